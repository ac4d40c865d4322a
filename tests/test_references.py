"""Published solutions of initial value problems.

Those that are not stiff by `DEER(Dopri8())`, and by `DEER(Obreshkov())`, on fixed
steps; the stiff ones by `DEER(RadauIIA(3))` on graded grids.

The problems are read from a file that does not belong to the package: skipped, saying
so, where there is none. `python -m tests.test_references` prints the tables of
`docs/reference-problems.md`.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._references import (
    FIELDS,
    FILE,
    STIFF_FIELDS,
    load,
    reference,
    stiff_van_der_pol,
)

from .helpers import slow


#: How many steps.
STEPS = {
    **dict.fromkeys("DETEST-A1 DETEST-A3 DETEST-A4".split(), 200),
    **{"DETEST-A2": 400, "DETEST-A5": 400},
    **{"DETEST-B1": 800, "DETEST-B2": 200, "DETEST-B3": 200, "DETEST-B4": 800},
    **{"DETEST-C1": 200, "DETEST-C2": 400, "DETEST-C3": 200, "DETEST-C4": 200},
    **{"DETEST-D1": 400, "DETEST-D2": 800, "DETEST-D3": 1600, "DETEST-D4": 3200},
    **{"DETEST-D5": 12800, "Arenstorf": 40000},
}


# What order 6 leaves on the steps chosen for order 8.
OBRESHKOV_TOLERANCES = {"DETEST-D5": 1e-7, "Arenstorf": 2e-4}


def graded(first, last, num_steps):
    """Zero, and `num_steps` points from `first` to `last` in a geometric series."""
    return np.concatenate([[0.0], np.geomspace(first, last, num_steps)])


def radau_grid(field, t1, y0, rtol=1e-6, points=()):
    """The steps that SciPy's Radau method chooses for this tolerance, each halved."""
    from scipy.integrate import solve_ivp

    jacobian = jax.jit(jax.jacfwd(lambda y: field(0.0, y, None)))
    value = jax.jit(lambda y: field(0.0, y, None))
    ts = solve_ivp(
        lambda t, y: np.asarray(value(y)),
        (0.0, t1),
        y0,
        method="Radau",
        rtol=rtol,
        atol=1e-3 * rtol,
        jac=lambda t, y: np.asarray(jacobian(y)),
    ).t
    return np.unique(np.concatenate([ts, (ts[1:] + ts[:-1]) / 2, points]))


GRIDS = {
    "VanDerPol-stiff": lambda p: radau_grid(stiff_van_der_pol, p["t1"], p["y0"]),
    "Robertson": lambda p: graded(1e-6, p["t1"], 200),
}


def solve(problem, solver=None):
    import deer_ode

    num_steps = STEPS[problem["name"]]
    t0, t1 = problem["t0"], problem["t1"]
    term = diffrax.ODETerm(FIELDS[problem["name"]])
    y0 = jnp.asarray(problem["y0"], jnp.float64)
    # The whole interval at once.
    plain = deer_ode.Newton(window=None)
    solver = deer_ode.DEER(diffrax.Dopri8(), plain) if solver is None else solver
    return deer_ode.diffeqsolve(term, solver, t0, t1, (t1 - t0) / num_steps, y0)


def solve_stiff(field, ts, y0, saveat=None):
    import deer_ode

    ts = jnp.asarray(ts)
    return deer_ode.diffeqsolve(
        diffrax.ODETerm(field),
        deer_ode.DEER(deer_ode.RadauIIA(3), deer_ode.Newton()),
        ts[0],
        ts[-1],
        None,
        jnp.asarray(y0, jnp.float64),
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
    )


def error_of(sol, problem):
    """Largest error over the largest component of the reference."""
    y_ref = reference(problem)
    return float(np.max(np.abs(np.asarray(sol.ys[0]) - y_ref)) / np.max(np.abs(y_ref)))


def componentwise_error(ys, y_ref):
    return float(np.max(np.abs(np.asarray(ys) / np.asarray(y_ref) - 1)))


#: The others take too long for the ordinary run, which has a close approach among the
#: documented rows.
ONE_EACH = ("DETEST-A5",)

needs_file = pytest.mark.skipif(
    not FILE.exists(), reason=f"no reference problems at {FILE}"
)


@needs_file
@pytest.mark.parametrize("name", slow(STEPS, lambda name: name not in ONE_EACH))
def test_reference(name):
    problem = load()[name]
    sol = solve(problem)
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert error_of(sol, problem) < 1e-9


@needs_file
@pytest.mark.parametrize("name", slow(STEPS, lambda name: name != "DETEST-A1"))
def test_reference_by_obreshkov(name):
    import deer_ode

    problem = load()[name]
    plain = deer_ode.Newton(window=None)
    sol = solve(problem, deer_ode.DEER(deer_ode.Obreshkov(), plain))
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert error_of(sol, problem) < OBRESHKOV_TOLERANCES.get(name, 1e-8)


@needs_file
@pytest.mark.parametrize("name", STIFF_FIELDS)
@pytest.mark.slow(covered_by="test_stiff.py::test_problems_of_the_test_sets")
def test_stiff_reference(name):
    problem = load()[name]
    sol = solve_stiff(STIFF_FIELDS[name], GRIDS[name](problem), problem["y0"])
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert componentwise_error(sol.ys[0], problem["y_ref"]) < 1e-6


@needs_file
@pytest.mark.parametrize("t1", (1, 11))
@pytest.mark.slow(covered_by="test_stiff.py::test_problems_of_the_test_sets")
def test_van_der_pol_at_whole_times(t1):
    problem = load()["VanDerPol-stiff"]
    values = problem["extra_references"]["values"]
    save = np.arange(1.0, t1 + 1)
    ts = radau_grid(stiff_van_der_pol, float(t1), problem["y0"], points=save)
    saveat = diffrax.SaveAt(ts=jnp.asarray(save))
    sol = solve_stiff(stiff_van_der_pol, ts, problem["y0"], saveat)
    y_ref = [values[str(i)] for i in range(1, t1 + 1)]
    assert componentwise_error(sol.ys, y_ref) < 1e-6


@needs_file
def test_every_problem_is_here():
    problems = load()
    easy = {name for name, p in problems.items() if not p["stiff"]}
    assert set(STEPS) == set(FIELDS) == easy
    assert set(GRIDS) == set(STIFF_FIELDS) == set(problems) - easy


def _row(*entries):
    print("| " + " | ".join(str(x) for x in entries) + " |", flush=True)


def _print_row(problem, num_steps, sol, error):
    _row(
        problem["name"],
        problem["dim"],
        f"{num_steps:,}",
        int(sol.stats["num_newton_steps"]),
        int(sol.stats["num_fallback_steps"]),
        f"{error:.1e}",
    )


def main():
    import deer_ode

    jax.config.update("jax_enable_x64", True)
    problems = load()
    header = "problem", "states", "steps", "Newton steps", "finished sequentially"
    plain = deer_ode.Newton(window=None)
    for base in (diffrax.Dopri8(), deer_ode.Obreshkov()):
        solver = deer_ode.DEER(base, plain)
        print(f"\n{type(solver.solver).__name__}\n")
        _row(*header, "error")
        _row(*["---"] * 6)
        for name, num_steps in STEPS.items():
            sol = solve(problems[name], solver)
            _print_row(problems[name], num_steps, sol, error_of(sol, problems[name]))
    print("\nRadauIIA(3)\n")
    _row(*header, "componentwise error")
    _row(*["---"] * 6)
    for name, field in STIFF_FIELDS.items():
        problem = problems[name]
        ts = GRIDS[name](problem)
        sol = solve_stiff(field, ts, problem["y0"])
        error = componentwise_error(sol.ys[0], problem["y_ref"])
        _print_row(problem, len(ts) - 1, sol, error)


if __name__ == "__main__":
    main()
