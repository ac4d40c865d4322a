"""A stochastic equation: `DEER` beside stock Diffrax, on one sample path."""

import argparse
import functools as ft
import json
import os
import pathlib

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

import deer_ode

from ._timing import time_alternating


T1 = 10.0

#: Solver, whether it needs Levy areas, and whether the noise must be additive.
SOLVERS = {
    "Heun": (diffrax.Heun(), False, False),
    "ItoMilstein": (diffrax.ItoMilstein(), False, False),
    "SPaRK": (diffrax.SPaRK(), True, False),
    "ShARK": (diffrax.ShARK(), True, True),
}


def _drift(t, y, args):
    del t
    a, b, c, d = args
    prey, predators = y
    return jnp.stack(
        [a * prey - b * prey * predators, -c * predators + d * prey * predators]
    )


def _proportional(t, y, args):
    del t, args
    return 0.1 * jnp.diag(y)


def _constant(t, y, args):
    del t, y
    return 0.2 * jnp.eye(2, dtype=args[0].dtype)


def _terms(num_steps: int, with_area: bool, is_additive: bool, dtype):
    """Noisy Lotka--Volterra, on a path finer than its steps."""
    area = diffrax.SpaceTimeLevyArea if with_area else diffrax.BrownianIncrement
    path = diffrax.VirtualBrownianTree(
        jnp.asarray(0, dtype),
        jnp.asarray(T1, dtype),
        tol=T1 / num_steps / 2,
        shape=jax.ShapeDtypeStruct((2,), dtype),
        key=jr.key(0),
        levy_area=area,
    )
    diffusion = _constant if is_additive else _proportional
    return diffrax.MultiTerm(
        diffrax.ODETerm(_drift), diffrax.ControlTerm(diffusion, path)
    )


def _stock(terms, solver, num_steps, y0, args):
    return diffrax.diffeqsolve(
        terms,
        solver,
        0.0,
        T1,
        T1 / num_steps,
        y0,
        args,
        saveat=diffrax.SaveAt(steps=True),
        max_steps=num_steps,
    )


def _deer(terms, solver, num_steps, y0, args):
    return deer_ode.diffeqsolve(
        terms,
        deer_ode.DEER(solver, deer_ode.Newton(window=None)),
        0.0,
        T1,
        T1 / num_steps,
        y0,
        args,
        saveat=diffrax.SaveAt(steps=True),
    )


def _draw(terms, with_area, num_steps, y0, args):
    """The increments alone, which is the least that any parallel solve must do."""
    del y0, args
    path = terms.terms[1].control
    ts = jnp.linspace(0, T1, num_steps + 1, dtype=path.shape.dtype)
    ask = lambda t0, t1: path.evaluate(t0, t1, use_levy=with_area)
    return jax.vmap(ask)(ts[:-1], ts[1:])


def _gradient(solve):
    return eqx.filter_grad(lambda args, y0: jnp.mean(solve(y0, args).ys ** 2))


def run(num_steps: int, repeats: int, dtype_name: str) -> list[dict]:
    """One row a solver and kind of work, in the precision `dtype_name`."""
    dtype = jnp.dtype(dtype_name)
    y0 = jnp.array([10.0, 5.0], dtype)
    args = tuple(jnp.asarray(x, dtype) for x in (1.1, 0.4, 0.4, 0.1))
    rows = []
    for name, (solver, with_area, is_additive) in SOLVERS.items():
        terms = _terms(num_steps, with_area, is_additive, dtype)
        stock = ft.partial(_stock, terms, solver, num_steps)
        deer = ft.partial(_deer, terms, solver, num_steps)
        works = {
            "forward": {
                "deer": lambda y0, args, deer=deer: deer(y0, args).ys,
                "diffrax": lambda y0, args, stock=stock: stock(y0, args).ys,
                "drawing": ft.partial(_draw, terms, with_area, num_steps),
            },
            "gradient": {"deer": _gradient(deer), "diffrax": _gradient(stock)},
        }
        stats = eqx.filter_jit(deer)(y0, args).stats
        for work, programs in works.items():
            order = (y0, args) if work == "forward" else (args, y0)
            compiled = {k: eqx.filter_jit(fn) for k, fn in programs.items()}
            times = time_alternating(
                {k: ft.partial(fn, *order) for k, fn in compiled.items()}, repeats
            )
            answers = [compiled[k](*order) for k in ("deer", "diffrax")]
            rows.append(
                {
                    "solver": name,
                    "dtype": dtype_name,
                    "steps": num_steps,
                    "work": work,
                    "num_newton_steps": int(stats["num_newton_steps"]),
                    "num_fallback_steps": int(stats["num_fallback_steps"]),
                    "difference": _difference(*answers),
                    "times": times,
                }
            )
    return rows


def _difference(actual, expected) -> float:
    """Largest difference over the largest entry, over all leaves together."""
    pairs = [
        (a, e)
        for a, e in zip(jtu.tree_leaves(actual), jtu.tree_leaves(expected), strict=True)
    ]
    largest = max(float(jnp.max(jnp.abs(e))) for _, e in pairs)
    return max(float(jnp.max(jnp.abs(a - e))) for a, e in pairs) / largest


def table(rows: list[dict]) -> str:
    """Markdown, times in milliseconds and how many times faster `DEER` is."""
    lines = [
        "| solver | dtype | steps | work | Newton steps | DEER, ms | of that drawing "
        "| Diffrax, ms | compile, s (DEER / Diffrax) | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = row["times"]
        deer, diffrax_time = times["deer"]["median"], times["diffrax"]["median"]
        drawing = times.get("drawing")
        drawn = "-" if drawing is None else f"{1e3 * drawing['median']:.1f}"
        lines.append(
            f"| {row['solver']} | {row['dtype']} | {row['steps']:,} | {row['work']} | "
            f"{row['num_newton_steps']} | {1e3 * deer:.1f} | {drawn} | "
            f"{1e3 * diffrax_time:.0f} ({diffrax_time / deer:.2g}x) | "
            f"{times['deer']['first']:.1f} / {times['diffrax']['first']:.1f} | "
            f"{row['difference']:.1e} |"
        )
    return "\n".join(lines)


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._sde")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=pathlib.Path, help="add the results to this JSON")
    options = parser.parse_args(argv)
    rows = []
    # Single precision as its users have it, without 64-bit counters and times.
    for dtype in ("float32", "float64"):
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        rows += run(options.steps, options.repeats, dtype)
    flags = os.environ.get("XLA_FLAGS", "")
    print(f"### {flags or 'default XLA flags'}\n\n{table(rows)}", flush=True)
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[flags] = rows
        options.out.write_text(json.dumps(known, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
