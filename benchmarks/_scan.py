"""Recurrent networks: `deer_ode.scan` beside `jax.lax.scan`.

`python -m benchmarks._scan` prints Markdown tables of gated recurrent units with few
states and of many small heads, as in figure 2 of the DEER paper; `--out FILE` keeps as
JSON what they show.
"""

import argparse
import functools as ft
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import deer_ode

from ._process import again_with_cpu_flag, can_use_cpu_flag, environment, write
from ._timing import time_alternating


# All steps at once, wherever it runs.
PLAIN = deer_ode.Newton(window=None)

STATES = (1, 2, 4, 8, 16, 32)
MAX_NUMBERS = {"cpu": 2**28, "gpu": 2**34}
"""Of the Jacobians of a case; one with more is left out."""

# DEER paper, figure 2 (V100, batch 16): over the sequential loop, forward / with
# gradient, by states and steps.
PUBLISHED = {
    1: {1_000: (16, 30), 10_000: (114, 235), 100_000: (309, 920), 10**6: (516, 1244)},
    2: {1_000: (24, 17), 10_000: (75, 186), 100_000: (72, 223), 10**6: (75, 151)},
    4: {1_000: (22, 46), 10_000: (47, 117), 100_000: (52, 144), 10**6: (51, 106)},
    8: {1_000: (15, 35), 10_000: (22, 61), 100_000: (25, 70)},
    16: {1_000: (7, 19), 10_000: (9, 26), 100_000: (10, 29)},
    32: {1_000: (3.7, 11), 10_000: (4.2, None)},
}


class Case(NamedTuple):
    heads: int
    size: int
    steps: int
    batch: int

    @property
    def name(self) -> str:
        return str(self.size) if self.heads == 1 else f"{self.heads} x {self.size}"


def _network(case: Case, dtype, key) -> tuple[Callable[..., Any], Any]:
    """Heads of Equinox's GRU, with its own initial weights, and their parameters."""

    def cell(key):
        return eqx.nn.GRUCell(case.size, case.size, dtype=dtype, key=key)

    cells = eqx.filter_vmap(cell)(jr.split(key, case.heads))
    params, static = eqx.partition(cells, eqx.is_array)

    def step(params, h, x):
        cells = eqx.combine(params, static)
        h = eqx.filter_vmap(lambda cell, h: cell(x, h))(cells, h)
        return h, h

    return step, params


def _programs(case: Case, dtype) -> tuple[dict[str, dict[str, Callable]], Callable]:
    keys = jr.split(jr.key(0), 2)
    step, params = _network(case, dtype, keys[0])
    xs = jr.normal(keys[1], (case.batch, case.steps, case.size), dtype)
    h0 = jnp.zeros((case.heads, case.size), dtype)
    rivals = {"deer": ft.partial(deer_ode.scan, method=PLAIN), "lax": jax.lax.scan}
    programs: dict[str, dict[str, Callable]] = {"forward": {}, "gradient": {}}
    for name, scan in rivals.items():

        def states(params, xs, scan=scan):
            run = lambda xs: scan(lambda h, x: step(params, h, x), h0, xs)[1]
            return jax.vmap(run)(xs) if case.batch > 1 else run(xs[0])

        def loss(params, xs, states=states):
            return jnp.mean(states(params, xs) ** 2)

        forward = jax.jit(states)
        gradient = jax.jit(jax.value_and_grad(loss))
        programs["forward"][name] = lambda forward=forward: forward(params, xs)
        programs["gradient"][name] = lambda gradient=gradient: gradient(params, xs)

    @jax.jit
    def newton_steps():
        def count(xs):
            f = lambda h, x: step(params, h, x)
            return deer_ode.solve_recurrence(f, h0, xs, method=PLAIN).stats

        return jax.tree.map(jnp.max, jax.vmap(count)(xs))

    return programs, newton_steps


def run(case: Case, repeats: int, dtype=jnp.float32) -> list[dict]:
    """One row of results each for the forward pass and the gradient."""
    programs, newton_steps = _programs(case, dtype)
    stats = newton_steps()
    rows = []
    for work, rivals in programs.items():
        values = {name: program() for name, program in rivals.items()}
        error = max(
            float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30))
            for a, b in zip(*map(jax.tree.leaves, values.values()), strict=True)
        )
        times = time_alternating(rivals, repeats)
        rows.append(
            {
                **case._asdict(),
                "states": case.name,
                "work": work,
                "dtype": jnp.dtype(dtype).name,
                "seconds": {name: t["median"] for name, t in times.items()},
                "first_seconds": {name: t["first"] for name, t in times.items()},
                "ratio": times["lax"]["median"] / times["deer"]["median"],
                "newton_steps": int(stats["num_newton_steps"]),
                "fallback_steps": int(stats["num_fallback_steps"]),
                "difference": error,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """How many times faster than `lax.scan`: forward / with gradient."""
    steps = sorted({row["steps"] for row in rows})
    head = ["states", "batch", *(f"T = {n:,}" for n in steps)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    cells = {(r["states"], r["batch"], r["steps"], r["work"]): r for r in rows}
    for states, batch in dict.fromkeys((r["states"], r["batch"]) for r in rows):
        line = [states, str(batch)]
        for n in steps:
            pair = [cells.get((states, batch, n, w)) for w in ("forward", "gradient")]
            if None in pair:
                line.append("-")
                continue
            text = " / ".join(f"{r['ratio']:.2g}" for r in pair if r)
            iterations = pair[0]["newton_steps"] if pair[0] else 0
            line.append(f"{text} ({iterations})")
        lines.append(" | ".join(line))
    return "\n".join(f"| {line} |" for line in lines)


def cases(options, backend: str) -> list[Case]:
    networks = [(1, n) for n in STATES] + [(32, 8)]
    lengths = [1_000, 10_000, 100_000] + [1_000_000] * (backend == "gpu")
    if options.quick:
        networks, lengths = [(1, 2), (3, 2)], [100]
    out = []
    for batch in (1, 16):
        for heads, size in networks:
            for steps in options.steps or lengths:
                # The Jacobians, and what the scan makes of them.
                if batch * steps * heads * size**2 <= MAX_NUMBERS[backend] / 4:
                    out.append(Case(heads, size, steps, batch))
    return out


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks._scan", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (5)")
    parser.add_argument("--steps", type=int, nargs="+", help="lengths of the sequences")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--one-flag", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    results: dict = {"environment": environment(), "rows": [], "published": PUBLISHED}
    flags = results["environment"]["xla_flags"] or "default XLA flags"
    print(
        f"### GRU, times faster than `lax.scan`, forward / with gradient (Newton "
        f"steps), float32, {results['environment']['device']}, {flags}\n"
    )
    for case in cases(options, jax.default_backend()):
        results["rows"] += run(case, options.repeats)
        # What is done is kept, should the rest not be.
        write(results, options.out)
        jax.clear_caches()
    print(table(results["rows"]), flush=True)
    if not options.one_flag and can_use_cpu_flag():
        arguments = ["--one-flag", "--repeats", str(options.repeats)]
        arguments += ["--quick"] * options.quick
        if options.steps:
            arguments += ["--steps", *map(str, options.steps)]
        results["with_cpu_flag"] = again_with_cpu_flag("benchmarks._scan", arguments)
        write(results, options.out)
    return results


if __name__ == "__main__":
    main()
