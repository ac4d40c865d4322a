"""Gated recurrent units: `deer_ode.scan` beside `jax.lax.scan`, as in figure 2 of the
DEER paper.
"""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import deer_ode

from ._baseline import plain_deer, tolerance
from ._case import WORKS, Case, Counted, Plan


SIZES = (1, 2, 4, 8, 16, 32, 64)
MAX_NUMBERS = {False: 2**28, True: 2**33}
"""Of the Jacobians of a case, on a CPU and on a GPU; one with more is left out."""

# DEER paper, figure 2 (V100, batch 16): over the sequential loop, forward / with
# gradient, by states and steps.
PUBLISHED = {
    1: {1_000: (16, 30), 10_000: (114, 235), 100_000: (309, 920), 10**6: (516, 1244)},
    2: {1_000: (24, 17), 10_000: (75, 186), 100_000: (72, 223), 10**6: (75, 151)},
    4: {1_000: (22, 46), 10_000: (47, 117), 100_000: (52, 144), 10**6: (51, 106)},
    8: {1_000: (15, 35), 10_000: (22, 61), 100_000: (25, 70)},
    16: {1_000: (7, 19), 10_000: (9, 26), 100_000: (10, 29)},
    32: {1_000: (3.7, 11), 10_000: (4.2, None)},
    64: {1_000: (1.3, None), 10_000: (1.3, None)},
}


def parallel(method: deer_ode.AbstractMethod) -> Callable:
    def states(cell, h0, xs):
        f = lambda h, x: (cell(x, h),) * 2
        sol = deer_ode.solve_recurrence(f, h0, xs, method=method)
        return Counted.of(sol.ys, sol.stats)

    return states


def loop(cell, h0, xs):
    return jax.lax.scan(lambda h, x: (cell(x, h),) * 2, h0, xs)[1]


def _plain(cell, h0, xs):
    f = lambda cell, h, x: cell(x, h)
    return plain_deer(f, cell, h0, xs, tolerance(xs.dtype))


RIVALS = {
    "default": parallel(deer_ode.Auto()),
    "newton": parallel(deer_ode.Newton()),
    "lax.scan": loop,
    "plain DEER": _plain,
}


def _batched(states: Callable) -> Callable:
    def run(cell, h0, xs):
        if xs.shape[0] == 1:
            return states(cell, h0, xs[0])
        return jax.vmap(states, in_axes=(None, None, 0))(cell, h0, xs)

    return run


def arguments(n: int, steps: int, batch: int, dtype: str) -> tuple:
    """Equinox's unit with its own initial weights, and inputs."""
    keys = jr.split(jr.key(0), 2)
    cell = eqx.nn.GRUCell(n, n, dtype=jnp.dtype(dtype), key=keys[0])
    draw = jax.jit(lambda key: jr.normal(key, (batch, steps, n), dtype))
    return cell, jnp.zeros(n, dtype), draw(keys[1])


def cases(plan: Plan) -> list[Case]:
    lengths = plan.choose_steps(
        (1_000, 10_000, 100_000), (1_000, 10_000, 100_000, 1_000_000), (100,)
    )
    # In double precision one sequence tells enough.
    kinds = [("float32", 1), ("float32", 16), ("float64", 1)]
    out = []
    for dtype, batch in kinds[: 1 if plan.quick else 3]:
        for n in (2,) if plan.quick else SIZES:
            for steps in lengths:
                if batch * steps * n**2 > MAX_NUMBERS[plan.on_gpu]:
                    continue
                for work, wrap in WORKS.items():
                    case = Case(
                        family="gru",
                        name=f"GRU {n}",
                        n=n,
                        steps=steps,
                        batch=batch,
                        dtype=dtype,
                        work=work,
                        programs={k: wrap(_batched(f)) for k, f in RIVALS.items()},
                        arguments=ft.partial(arguments, n, steps, batch, dtype),
                        reference="lax.scan",
                    )
                    out.append(case)
    return out


def speed_up(row: dict) -> float | None:
    """Of the faster of ours, over `lax.scan`."""
    rivals = row["rivals"]
    ours = [rivals[k]["median"] for k in ("default", "newton") if "median" in rivals[k]]
    loop = rivals["lax.scan"].get("median")
    return loop / min(ours) if ours and loop else None


def table(rows: list[dict]) -> str:
    """The published table beside ours: over `lax.scan`, forward / with gradient."""
    lines = [
        "| states | T | published, V100 | here | newton alone |",
        "|---|---|---|---|---|",
    ]
    cells = {
        (r["n"], r["steps"], r["work"]): r
        for r in rows
        if r["batch"] == 16 and r["dtype"] == "float32"
    }
    for n, by_steps in PUBLISHED.items():
        for steps, published in by_steps.items():
            pair = [cells.get((n, steps, work)) for work in WORKS]
            if not any(pair):
                continue
            ours = [row and speed_up(row) for row in pair]
            newton = [row and _newton_alone(row) for row in pair]
            lines.append(
                f"| {n} | {steps:,} | {_pair(published)} | {_pair(ours)} | "
                f"{_pair(newton)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _newton_alone(row: dict) -> float | None:
    newton, loop = (row["rivals"][k].get("median") for k in ("newton", "lax.scan"))
    return loop / newton if newton and loop else None


def _pair(values) -> str:
    return " / ".join("-" if x is None else f"{x:.3g}" for x in values)
