"""Fixed Tsit5 steps: `DEER` beside stock Diffrax, a loop by hand and plain DEER."""

import functools as ft
from collections.abc import Callable

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np

import deer_ode

from ._baseline import plain_deer, tolerance
from ._case import WORKS, Case, Counted, Plan
from ._fields import PROBLEMS, Problem


#: What "stock Diffrax" is in the targets: the usual way to have a whole trajectory.
STOCK = "diffrax, ts"


def tsit5_step(field: Callable, h: float) -> Callable:
    """`(args, y, t)` to a step later, as one would write it by hand."""
    tableau = diffrax.Tsit5.tableau

    def step(args, y, t):
        ks = [field(t, y, args)]
        for c, row in zip(tableau.c, tableau.a_lower, strict=True):
            increment = sum(float(a) * k for a, k in zip(row, ks, strict=True))
            ks.append(field(t + float(c) * h, y + h * increment, args))
        return y + h * sum(
            float(b) * k for b, k in zip(tableau.b_sol, ks, strict=True) if b != 0
        )

    return step


def loop(field: Callable, t1: float, steps: int) -> Callable:
    """Every state by `lax.scan`: no controller, no saving, no estimate of errors."""
    h = t1 / steps
    step = tsit5_step(field, h)

    def solve(args, y0):
        def body(y, i):
            y = step(args, y, i.astype(y.dtype) * h)
            return y, y

        return lax.scan(body, y0, jnp.arange(steps))[1]

    return solve


def plain(field: Callable, t1: float, steps: int) -> Callable:
    h = t1 / steps
    step = tsit5_step(field, h)

    def solve(args, y0):
        ts = h * jnp.arange(steps).astype(y0.dtype)
        return plain_deer(step, args, y0, ts, tolerance(y0.dtype))

    return solve


def grid(t1: float, steps: int, dtype) -> np.ndarray:
    """The ends of all steps."""
    return (np.arange(1, steps + 1) * (t1 / steps)).astype(dtype)


def _constant(ts: np.ndarray) -> jax.Array:
    """As users have it from outside of `jax.jit`: still known while tracing."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(ts)


def deer(field, t1: float, steps: int, solver=None, at_ts: bool = False) -> Callable:
    """`deer_ode.diffeqsolve`, with `DEER(Tsit5())` unless another is given."""
    solver = deer_ode.DEER(diffrax.Tsit5()) if solver is None else solver

    def solve(args, y0):
        saveat = (
            diffrax.SaveAt(ts=_constant(grid(t1, steps, y0.dtype)))
            if at_ts
            else diffrax.SaveAt(steps=True)
        )
        sol = deer_ode.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            t1,
            t1 / steps,
            y0,
            args,
            saveat=saveat,
        )
        return Counted.of(sol.ys, sol.stats)

    return solve


def stock(field, t1: float, steps: int, how: str) -> Callable:
    """`diffrax.diffeqsolve`: `how` is `"ts"`, `"steps"` or `"StepTo"`."""

    def solve(args, y0):
        ends = grid(t1, steps, y0.dtype)
        step_to = diffrax.StepTo(ts=np.pad(ends, (1, 0)))
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            t1,
            None if how == "StepTo" else t1 / steps,
            y0,
            args,
            saveat=diffrax.SaveAt(ts=_constant(ends))
            if how == "ts"
            else diffrax.SaveAt(steps=True),
            stepsize_controller=step_to
            if how == "StepTo"
            else diffrax.ConstantStepSize(),
            max_steps=steps,
        ).ys

    return solve


NEWTON = deer_ode.DEER(diffrax.Tsit5(), method=deer_ode.Newton())
SHARED = deer_ode.DEER(
    diffrax.Tsit5(), method=deer_ode.Newton(deer_ode.SharedJacobian())
)


def rivals(problem: Problem, steps: int) -> dict[str, Callable]:
    of = (problem.field, problem.t1, steps)
    # Less work only where the field is what takes time.
    shared = {"newton, shared": deer(*of, SHARED)} if problem.is_network else {}
    return {
        "default": deer(*of),
        "newton": deer(*of, NEWTON),
        **shared,
        "default, ts": deer(*of, at_ts=True),
        "loop": loop(*of),
        "diffrax, ts": stock(*of, "ts"),
        "diffrax, StepTo": stock(*of, "StepTo"),
        "diffrax, steps": stock(*of, "steps"),
        "plain DEER": plain(*of),
    }


def _programs(problem: Problem, steps: int, work: str, quick: bool):
    """By name. To try it, the gradient is compiled for a few only."""
    few = ("default", "newton", "loop", STOCK)
    return {
        name: WORKS[work](solve)
        for name, solve in rivals(problem, steps).items()
        if not quick or work == "forward" or name in few
    }


def arguments(problem: Problem, dtype: str) -> tuple:
    return problem.parameters(jnp.dtype(dtype)), jnp.asarray(problem.y0, dtype)


def cases(plan: Plan) -> list[Case]:
    lengths = plan.choose_steps((2**10, 2**13), (2**10, 2**13, 2**16, 2**19), (2**5,))
    # The one with the least to compile; plain DEER overflows for others at this size.
    names = ["rigid body"] if plan.quick else list(PROBLEMS)
    return [
        Case(
            family="ode",
            name=name,
            n=PROBLEMS[name].n,
            steps=steps,
            dtype=dtype,
            work=work,
            programs=_programs(PROBLEMS[name], steps, work, plan.quick),
            arguments=ft.partial(arguments, PROBLEMS[name], dtype),
            reference="loop",
        )
        for dtype in (("float64",) if plan.quick else ("float32", "float64"))
        for name in names
        for steps in lengths
        for work in WORKS
    ]
