"""Affine recurrences: `deer_ode.affine_scan` beside two loops, and beside copying."""

import functools as ft

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr

import deer_ode

from ._case import Case, Plan


DENSE = (1, 2, 3, 4, 8, 16, 32)
DIAGONAL = 64

#: Of what is read and written; cases with more are left out.
MAX_BYTES = 1e9


def _apply(A, y):
    return A * y if A.ndim == y.ndim else jnp.matmul(A, y, precision="highest")


def loop(A, b, y0):
    """One step after the other, as one would write it by hand."""

    def step(y, element):
        A, b = element
        y = _apply(A, y) + b
        return y, y

    return lax.scan(step, y0, (A, b))[1]


def associative_scan(A, b, y0):
    """All steps together, as one would write it by hand."""

    def compose(first, second):
        A1, b1 = first
        A2, b2 = second
        if A1.ndim == b1.ndim:
            return A2 * A1, A2 * b1 + b2
        A = jnp.matmul(A2, A1, precision="highest")
        return A, jnp.matmul(A2, b1[..., None], precision="highest")[..., 0] + b2

    b = b.at[0].add(_apply(A[0], y0))
    return lax.associative_scan(compose, (A, b))[1]


def copy(A, b, y0):
    """As much work as to write down again, with another sign, what is read."""
    del y0
    return -A, -b


def arguments(n: int, steps: int, dtype: str, is_diagonal: bool) -> tuple:
    """A recurrence that forgets: its matrices make about everything smaller."""

    @jax.jit
    def make():
        keys = jr.split(jr.key(0), 2)
        # Normal entries of variance $1 / n$ would make it as large as it was.
        width = 0.9 if is_diagonal else 1 / n**0.5
        shape = (steps, n) if is_diagonal else (steps, n, n)
        A = jr.uniform(keys[0], shape, dtype, minval=-width, maxval=width)
        b = jr.uniform(keys[1], (steps, n), dtype, minval=-1.0)
        return A, b, jnp.ones(n, dtype)

    return make()


def num_bytes(row: dict, program: str) -> int:
    """What a program has to read and write."""
    n, size = row["n"], jnp.dtype(row["dtype"]).itemsize
    per_step = n if row["name"].startswith("diagonal") else n**2
    numbers = 2 * (per_step + n) if program == "copy" else per_step + 2 * n
    return row["steps"] * numbers * size


def cases(plan: Plan) -> list[Case]:
    lengths = plan.choose_steps(
        (1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000, 100_000, 1_000_000), (64,)
    )
    sizes = [(2, False), (4, True)] if plan.quick else [(n, False) for n in DENSE]
    sizes += [] if plan.quick else [(DIAGONAL, True)]
    out = []
    for dtype in ("float32", "float64")[: 1 if plan.quick else 2]:
        for n, is_diagonal in sizes:
            for steps in lengths:
                case = Case(
                    family="affine",
                    name=f"{'diagonal' if is_diagonal else 'dense'} {n}",
                    n=n,
                    steps=steps,
                    dtype=dtype,
                    work="forward",
                    programs={
                        "default": deer_ode.affine_scan,
                        "lax.scan": loop,
                        "associative_scan": associative_scan,
                        "copy": copy,
                    },
                    arguments=ft.partial(arguments, n, steps, dtype, is_diagonal),
                    reference="lax.scan",
                    not_compared=("copy",),
                )
                row = {"name": case.name, "n": n, "steps": steps, "dtype": dtype}
                if num_bytes(row, "default") <= MAX_BYTES:
                    out.append(case)
    return out


def bandwidths(row: dict) -> dict[str, float]:
    """Bytes per second of each program, nothing but its arrays counted."""
    return {
        name: num_bytes(row, name) / rival["median"]
        for name, rival in row["rivals"].items()
        if "median" in rival
    }


def table(rows: list[dict]) -> str:
    """Nanoseconds per step and state, and how much of the speed of copying it is."""
    lines = [
        "| matrices | T | dtype | default, ns per element | GB/s | copying, GB/s "
        "| of copying |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = bandwidths(row)
        if "default" not in speeds or "copy" not in speeds:
            continue
        elements = row["steps"] * row["n"]
        ours, copying = speeds["default"], speeds["copy"]
        lines.append(
            f"| {row['name']} | {row['steps']:,} | {row['dtype']} | "
            f"{1e9 * row['rivals']['default']['median'] / elements:.2f} | "
            f"{ours / 1e9:.2f} | {copying / 1e9:.2f} | {ours / copying:.0%} |"
        )
    return "\n".join(lines)
