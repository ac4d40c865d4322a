"""Work against error: `DEER(Obreshkov())` beside the default, `DEER(Tsit5())`.

`python -m benchmarks._work_precision [--out FILE] [--quick]`
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import deer_ode

from ._timing import time_alternating


#: Errors at which times are compared.
TARGETS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)

# The whole interval at once, wherever it runs.
PLAIN = deer_ode.Newton(window=None)

SOLVERS = {
    "DEER(Obreshkov())": deer_ode.DEER(deer_ode.Obreshkov(), PLAIN),
    "DEER(Tsit5())": deer_ode.DEER(diffrax.Tsit5(), PLAIN),
}


def _lotka_volterra(t, y):
    del t
    prey, predators = y
    return jnp.stack(
        [
            1.1 * prey - 0.4 * prey * predators,
            -0.4 * predators + 0.1 * prey * predators,
        ]
    )


def _kepler(t, y):
    del t
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])


def _network(size: int) -> Callable:
    """Coupled oscillators with a network on top: a neural ODE that has been trained
    moves like this rather than like a network of random weights alone.
    """
    network = eqx.nn.MLP(size, size, 32, 1, activation=jnp.tanh, key=jr.key(0))
    rotation = np.kron(np.diag(np.arange(1.0, size // 2 + 1)), [[0, 1], [-1, 0]])
    rotation = jnp.asarray(rotation)

    def field(t, y):
        del t
        return rotation @ y + 0.5 * network(y)

    return field


def problems() -> dict[str, tuple[Callable, list[float], float, dict[str, list[int]]]]:
    """Field, initial state, time units, and the numbers of steps to try."""
    double = lambda first, count: [first * 2**k for k in range(count)]
    return {
        "Lotka-Volterra, 2 states": (
            _lotka_volterra,
            [10.0, 5.0],
            200.0,
            {"DEER(Obreshkov())": double(450, 3), "DEER(Tsit5())": double(600, 4)},
        ),
        "Kepler, 4 states": (
            _kepler,
            [0.7, 0.0, 0.0, 1.362770287738494],
            100.0,
            {"DEER(Obreshkov())": double(700, 3), "DEER(Tsit5())": double(1400, 4)},
        ),
        "network, 2 states": (
            _network(2),
            [1.0, 0.0],
            100.0,
            {"DEER(Obreshkov())": double(150, 4), "DEER(Tsit5())": double(250, 5)},
        ),
        "network, 4 states": (
            _network(4),
            [1.0, 0.0, 0.5, 0.0],
            100.0,
            {"DEER(Obreshkov())": double(560, 3), "DEER(Tsit5())": double(560, 4)},
        ),
    }


def _reference(field, y0, t1):
    num_steps = int(400 * t1)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(t, y)),
        diffrax.Dopri8(),
        0.0,
        t1,
        t1 / num_steps,
        y0,
        max_steps=num_steps + 1,
    )
    ys: Any = sol.ys
    return ys[0]


def run(repeats: int, only: int | None = None) -> list[dict]:
    """One row a problem, solver and number of steps (the first `only` of them)."""
    rows = []
    for name, (field, y0, t1, counts) in problems().items():
        y0 = jnp.asarray(y0)
        reference = _reference(field, y0, t1)
        term = diffrax.ODETerm(lambda t, y, args, field=field: field(t, y))
        programs = {}
        stats = {}
        for label, solver in SOLVERS.items():
            for num_steps in counts[label][:only]:

                @eqx.filter_jit
                def solve(y0, solver=solver, num_steps=num_steps, t1=t1, term=term):
                    sol = deer_ode.diffeqsolve(
                        term, solver, 0.0, t1, t1 / num_steps, y0
                    )
                    ys: Any = sol.ys
                    return ys[0], sol.stats

                key = f"{label} {num_steps}"
                programs[key] = lambda solve=solve, y0=y0: solve(y0)
                y, stat = solve(y0)
                stats[key] = dict(
                    problem=name,
                    solver=label,
                    steps=num_steps,
                    error=float(jnp.max(jnp.abs(y - reference))),
                    num_newton_steps=int(stat["num_newton_steps"]),
                    num_fallback_steps=int(stat["num_fallback_steps"]),
                )
        times = time_alternating(programs, repeats)
        rows += [row | dict(times=times[key]) for key, row in stats.items()]
    return rows


def time_at(rows: list[dict], problem: str, solver: str, error: float) -> float | None:
    """Seconds for a given error, interpolated between the two runs next to it."""
    points = sorted(
        (row["error"], row["times"]["median"])
        for row in rows
        if row["problem"] == problem and row["solver"] == solver
    )
    errors = np.log([e for e, _ in points])
    if not errors[0] <= np.log(error) <= errors[-1]:
        return None
    times = np.log([t for _, t in points])
    return float(np.exp(np.interp(np.log(error), errors, times)))


def table(rows: list[dict]) -> str:
    lines = [
        "| problem | error | DEER(Obreshkov()), ms | DEER(Tsit5()), ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        for error in TARGETS:
            ours, other = (time_at(rows, problem, s, error) for s in SOLVERS)
            if ours is None or other is None:
                continue
            lines.append(
                f"| {problem} | {error:.0e} | {1e3 * ours:.2f} | {1e3 * other:.2f} | "
                f"{ours / other:.2f} |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = run(repeats=3 if options.quick else 9, only=2 if options.quick else None)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['problem']}: {row['solver']}, {row['steps']} steps, error "
            f"{row['error']:.1e}, {1e3 * row['times']['median']:.2f} ms, "
            f"{row['num_newton_steps']} Newton steps, "
            f"{row['num_fallback_steps']} finished sequentially"
        )
    print(table(rows))


if __name__ == "__main__":
    main()
