"""Fixed Tsit5 steps: `DEER` beside stock Diffrax and a loop written by hand."""

import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr

import deer_ode

from ._timing import time_alternating


T1 = 10.0


def _lotka_volterra(t, y, args):
    del t
    a, b, c, d = args
    prey, predators = y
    return jnp.stack(
        [a * prey - b * prey * predators, -c * predators + d * prey * predators]
    )


def _network(t, y, args):
    del t
    return args(y)


def problems(dtype) -> dict[str, tuple[Callable, jax.Array, Any]]:
    """Vector field, initial state and parameters, by name."""
    parameters = tuple(jnp.asarray(x, dtype) for x in (1.1, 0.4, 0.4, 0.1))
    network = eqx.nn.MLP(
        2, 2, width_size=32, depth=1, activation=jnp.tanh, dtype=dtype, key=jr.key(0)
    )
    return {
        "Lotka-Volterra": (_lotka_volterra, jnp.array([10.0, 5.0], dtype), parameters),
        "MLP, width 32": (_network, jnp.array([1.0, 0.0], dtype), network),
    }


def _stock(field, num_steps, saveat, y0, args):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        0.0,
        T1,
        T1 / num_steps,
        y0,
        args,
        saveat=saveat,
        max_steps=num_steps,
    ).ys


def _deer(field, num_steps, saveat, y0, args):
    return deer_ode.diffeqsolve(
        diffrax.ODETerm(field),
        deer_ode.DEER(diffrax.Tsit5(), method=deer_ode.Newton(window=None)),
        0.0,
        T1,
        T1 / num_steps,
        y0,
        args,
        saveat=saveat,
    )


def _loop(field, num_steps, saveat, y0, args):
    """What one would write by hand for fixed steps, without any saving between."""
    del saveat
    tableau = diffrax.Tsit5.tableau
    h = jnp.asarray(T1 / num_steps, y0.dtype)

    def step(y, i):
        t = i.astype(y0.dtype) * h
        ks = [field(t, y, args)]
        for c, row in zip(tableau.c, tableau.a_lower, strict=True):
            increment = sum(float(a) * k for a, k in zip(row, ks, strict=True))
            ks.append(field(t + float(c) * h, y + h * increment, args))
        y = y + h * sum(
            float(b) * k for b, k in zip(tableau.b_sol, ks, strict=True) if b != 0
        )
        return y, y

    return lax.scan(step, y0, jnp.arange(num_steps))[1]


def _gradient(solve):
    return eqx.filter_grad(lambda args, y0: jnp.mean(solve(y0, args) ** 2))


def run(num_steps: int, repeats: int, dtype_name: str) -> list[dict]:
    """One row a problem and kind of work, in the precision `dtype_name`."""
    rows = []
    dtype = jnp.dtype(dtype_name)
    for name, (field, y0, args) in problems(dtype).items():
        ts = jnp.linspace(0.0, T1, num_steps, dtype=dtype)
        bind = lambda fn, saveat, f=field: ft.partial(fn, f, num_steps, saveat)
        stock = bind(_stock, diffrax.SaveAt(ts=ts))
        bare = bind(_stock, diffrax.SaveAt(steps=True))
        by_hand = bind(_loop, None)
        deer = bind(_deer, diffrax.SaveAt(ts=ts))
        deer_ys = lambda y0, args, deer=deer: deer(y0, args).ys
        stats = eqx.filter_jit(deer)(y0, args).stats
        works = {
            "forward": {
                "deer": deer_ys,
                "diffrax, ts": stock,
                "diffrax, steps": bare,
                "scan by hand": by_hand,
            },
            "gradient": {
                "deer": _gradient(deer_ys),
                "diffrax, ts": _gradient(stock),
                "scan by hand": _gradient(by_hand),
            },
        }
        for work, programs in works.items():
            order = (y0, args) if work == "forward" else (args, y0)
            compiled = {k: eqx.filter_jit(fn) for k, fn in programs.items()}
            times = time_alternating(
                {k: ft.partial(fn, *order) for k, fn in compiled.items()}, repeats
            )
            answers = {k: fn(*order) for k, fn in compiled.items()}
            rows.append(
                {
                    "problem": name,
                    "dtype": dtype_name,
                    "steps": num_steps,
                    "work": work,
                    "num_newton_steps": int(stats["num_newton_steps"]),
                    "num_fallback_steps": int(stats["num_fallback_steps"]),
                    "difference": _difference(answers["deer"], answers["diffrax, ts"]),
                    "times": times,
                }
            )
    return rows


def _difference(actual, expected) -> float:
    """Largest difference over the largest entry, over all leaves together."""
    pairs = list(
        zip(
            jax.tree_util.tree_leaves(eqx.filter(actual, eqx.is_array)),
            jax.tree_util.tree_leaves(eqx.filter(expected, eqx.is_array)),
            strict=True,
        )
    )
    largest = max(float(jnp.max(jnp.abs(e))) for _, e in pairs)
    return max(float(jnp.max(jnp.abs(a - e))) for a, e in pairs) / largest


def table(rows: list[dict]) -> str:
    """Markdown, times in milliseconds and how many times faster `DEER` is."""
    lines = [
        "| problem | dtype | steps | work | Newton steps | DEER, ms "
        "| Diffrax, saves at `ts` | Diffrax, bare steps | `lax.scan` by hand "
        "| compile, s (DEER / Diffrax) | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = row["times"]
        deer = times["deer"]["median"]

        def cell(name, times=times, deer=deer):
            if name not in times:
                return "-"
            other = times[name]["median"]
            return f"{1e3 * other:.2f} ({other / deer:.2g}x)"

        lines.append(
            f"| {row['problem']} | {row['dtype']} | {row['steps']:,} | {row['work']} | "
            f"{row['num_newton_steps']} | {1e3 * deer:.2f} | {cell('diffrax, ts')} | "
            f"{cell('diffrax, steps')} | {cell('scan by hand')} | "
            f"{times['deer']['first']:.1f} / {times['diffrax, ts']['first']:.1f} | "
            f"{row['difference']:.1e} |"
        )
    return "\n".join(lines)
