"""Published solutions of initial value problems, by `DEER(Dopri8())` on fixed grids.

The problems are read from a file that does not belong to the package: skipped, saying
so, where there is none. `python -m tests.test_references` prints the table of
`docs/reference-problems.md`.
"""

import json
import os
import pathlib

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest


FOLDER = os.environ.get("DEER_ODE_DATA")
FOLDER = (
    pathlib.Path(__file__).parents[2] / "shared" / "data"
    if FOLDER is None
    else pathlib.Path(FOLDER)
)
FILE = FOLDER / "ivp_reference.json"


#: The fields, written for JAX; the file has them as text.
def _three_bodies(t, y):
    del t
    mu = 0.012277471
    x, z, dx, dz = y
    d1 = ((x + mu) ** 2 + z**2) ** 1.5
    d2 = ((x - 1 + mu) ** 2 + z**2) ** 1.5
    ddx = x + 2 * dz - (1 - mu) * (x + mu) / d1 - mu * (x - 1 + mu) / d2
    ddz = z - 2 * dx - (1 - mu) * z / d1 - mu * z / d2
    return jnp.stack([dx, dz, ddx, ddz])


def _kepler(t, y):
    del t
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])


def _b4(t, y):
    del t
    r = jnp.sqrt(y[0] ** 2 + y[1] ** 2)
    return jnp.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def _chain(rates):
    rates = np.asarray(rates, float)

    def field(t, y):
        del t
        flow = jnp.asarray(rates) * y[:-1]
        zero = jnp.zeros((1,))
        return jnp.concatenate([zero, flow]) - jnp.concatenate([flow, zero])

    return field


def _heat(t, y):
    del t
    zero = jnp.zeros((1,))
    return jnp.concatenate([zero, y[:-1]]) - 2 * y + jnp.concatenate([y[1:], zero])


# name: (field, steps)
PROBLEMS = {
    "DETEST-A1": (lambda t, y: -y, 200),
    "DETEST-A2": (lambda t, y: -0.5 * y**3, 400),
    "DETEST-A3": (lambda t, y: y * jnp.cos(t), 200),
    "DETEST-A4": (lambda t, y: 0.25 * y * (1 - y / 20), 200),
    "DETEST-A5": (lambda t, y: (y - t) / (y + t), 400),
    "DETEST-B1": (
        lambda t, y: jnp.stack([2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])]),
        800,
    ),
    "DETEST-B2": (
        lambda t, y: jnp.stack([-y[0] + y[1], y[0] - 2 * y[1] + y[2], y[1] - y[2]]),
        200,
    ),
    "DETEST-B3": (
        lambda t, y: jnp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]),
        200,
    ),
    "DETEST-B4": (_b4, 800),
    "DETEST-C1": (_chain(np.ones(9)), 200),
    "DETEST-C2": (_chain(np.arange(1, 10)), 400),
    "DETEST-C3": (_heat, 200),
    "DETEST-C4": (_heat, 200),
    "DETEST-D1": (_kepler, 400),
    "DETEST-D2": (_kepler, 800),
    "DETEST-D3": (_kepler, 1600),
    "DETEST-D4": (_kepler, 3200),
    "DETEST-D5": (_kepler, 12800),
    "Arenstorf": (_three_bodies, 40000),
}  # fmt: skip


def load():
    return {p["name"]: p for p in json.loads(FILE.read_text())["problems"]}


def reference(problem):
    y = np.asarray(problem["y_ref"], float)
    if problem["name"] == "DETEST-A1":
        # The published value is wrong in the seventh digit.
        y = np.exp([-20.0])
    return y


def solve(problem):
    import deer_ode

    field, num_steps = PROBLEMS[problem["name"]]
    t0, t1 = problem["t0"], problem["t1"]
    term = diffrax.ODETerm(lambda t, y, args: field(t, y))
    y0 = jnp.asarray(problem["y0"], jnp.float64)
    solver = deer_ode.DEER(diffrax.Dopri8())
    return deer_ode.diffeqsolve(term, solver, t0, t1, (t1 - t0) / num_steps, y0)


def error_of(sol, problem):
    """Largest error over the largest component of the reference."""
    y_ref = reference(problem)
    return float(np.max(np.abs(np.asarray(sol.ys[0]) - y_ref)) / np.max(np.abs(y_ref)))


@pytest.mark.skipif(not FILE.exists(), reason=f"no reference problems at {FILE}")
@pytest.mark.parametrize("name", PROBLEMS)
def test_reference(name):
    problem = load()[name]
    sol = solve(problem)
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert error_of(sol, problem) < 1e-9


@pytest.mark.skipif(not FILE.exists(), reason=f"no reference problems at {FILE}")
def test_every_explicit_problem_is_here():
    assert set(PROBLEMS) == {name for name, p in load().items() if not p["stiff"]}


def main():
    jax.config.update("jax_enable_x64", True)
    print("| problem | states | steps | Newton steps | finished sequentially | error |")
    print("|---|---|---|---|---|---|")
    for name, problem in load().items():
        if name not in PROBLEMS:
            continue
        sol = solve(problem)
        stats = sol.stats
        print(
            f"| {name} | {problem['dim']} | {PROBLEMS[name][1]:,} | "
            f"{int(stats['num_newton_steps'])} | {int(stats['num_fallback_steps'])} | "
            f"{error_of(sol, problem):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
