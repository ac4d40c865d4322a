"""A stochastic equation: `DEER` beside stock Diffrax, on one sample path."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr

import deer_ode

from ._case import WORKS, Case, Counted, Plan
from ._fields import PROBLEMS, lotka_volterra
from ._ode import arguments


T1 = 10.0

#: Solver, whether it needs Levy areas, and whether the noise must be additive.
SOLVERS = {
    "Heun": (diffrax.Heun(), False, False),
    "ItoMilstein": (diffrax.ItoMilstein(), False, False),
    "SPaRK": (diffrax.SPaRK(), True, False),
    "ShARK": (diffrax.ShARK(), True, True),
}


def _proportional(t, y, args):
    del t, args
    return 0.1 * jnp.diag(y)


def _constant(t, y, args):
    del t, y
    return 0.2 * jnp.eye(2, dtype=args[0].dtype)


def _terms(name: str, steps: int, dtype):
    """Noisy Lotka--Volterra, on a path finer than its steps."""
    _, with_area, is_additive = SOLVERS[name]
    path = diffrax.VirtualBrownianTree(
        jnp.asarray(0, dtype),
        jnp.asarray(T1, dtype),
        tol=T1 / steps / 2,
        shape=jax.ShapeDtypeStruct((2,), dtype),
        key=jr.key(0),
        levy_area=diffrax.SpaceTimeLevyArea if with_area else diffrax.BrownianIncrement,
    )
    diffusion = _constant if is_additive else _proportional
    return diffrax.MultiTerm(
        diffrax.ODETerm(lotka_volterra), diffrax.ControlTerm(diffusion, path)
    )


def _stock(name: str, steps: int, args, y0):
    return diffrax.diffeqsolve(
        _terms(name, steps, y0.dtype),
        SOLVERS[name][0],
        0.0,
        T1,
        T1 / steps,
        y0,
        args,
        saveat=diffrax.SaveAt(steps=True),
        max_steps=steps,
    ).ys


def _deer(name: str, steps: int, method, args, y0):
    sol = deer_ode.diffeqsolve(
        _terms(name, steps, y0.dtype),
        deer_ode.DEER(SOLVERS[name][0], method),
        0.0,
        T1,
        T1 / steps,
        y0,
        args,
        saveat=diffrax.SaveAt(steps=True),
    )
    return Counted.of(sol.ys, sol.stats)


def _draw(name: str, steps: int, args, y0):
    """The increments alone, which is the least that any parallel solve must do."""
    del args
    path = _terms(name, steps, y0.dtype).terms[1].control
    ts = jnp.linspace(0, T1, steps + 1, dtype=y0.dtype)
    ask = lambda t0, t1: path.evaluate(t0, t1, use_levy=SOLVERS[name][1])
    return jax.vmap(ask)(ts[:-1], ts[1:])


def cases(plan: Plan) -> list[Case]:
    out = []
    for dtype in ("float32", "float64")[: 1 if plan.quick else 2]:
        for name in ("Heun",) if plan.quick else SOLVERS:
            for steps in plan.choose_steps((10_000,), (10_000, 100_000), (20,)):
                of = (name, steps)
                solves = {
                    "default": ft.partial(_deer, *of, deer_ode.Auto()),
                    "newton": ft.partial(_deer, *of, deer_ode.Newton()),
                    "diffrax, steps": ft.partial(_stock, *of),
                }
                for work, wrap in WORKS.items():
                    if plan.quick and work == "gradient":
                        continue
                    programs = {k: wrap(solve) for k, solve in solves.items()}
                    if work == "forward":
                        programs["drawing"] = ft.partial(_draw, *of)
                    out.append(
                        Case(
                            family="sde",
                            name=name,
                            n=2,
                            steps=steps,
                            dtype=dtype,
                            work=work,
                            programs=programs,
                            arguments=ft.partial(
                                arguments, PROBLEMS["Lotka-Volterra"], dtype
                            ),
                            reference="diffrax, steps",
                            not_compared=("drawing",),
                        )
                    )
    return out
