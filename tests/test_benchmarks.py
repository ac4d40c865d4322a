"""`python -m benchmarks`, on a case so small that it says nothing about speed."""

import json
import math

import jax
import pytest

from benchmarks import _fixed_steps
from benchmarks.__main__ import main

from .helpers import rounding


NUM_STEPS = 40
PROBLEMS = ("Lotka-Volterra", "MLP, width 32")
DTYPES = ("float32", "float64")


@pytest.fixture(
    scope="module",
    params=(
        # Nearly all of the time is compilation, so one case of each kind of work.
        pytest.param((PROBLEMS[:1], DTYPES[1:]), id="one"),
        pytest.param((PROBLEMS, DTYPES), id="all", marks=pytest.mark.slow),
    ),
)
def case(request, tmp_path_factory):
    """Problems, dtypes, and the results of a run with them."""
    problems, dtypes = request.param
    out = tmp_path_factory.mktemp("benchmarks") / "new folder" / "results.json"
    arguments = ["--quick", "--one-flag", "--repeats", "1", "--steps", str(NUM_STEPS)]
    every_problem, run = _fixed_steps.problems, _fixed_steps.run

    def some_problems(dtype):
        every = every_problem(dtype)
        assert tuple(every) == PROBLEMS
        return {name: every[name] for name in problems}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fixed_steps, "problems", some_problems)
        patch.setattr(
            _fixed_steps,
            "run",
            lambda num_steps, repeats, dtype: (
                run(num_steps, repeats, dtype) if dtype in dtypes else []
            ),
        )
        # As users run it: the strictness is for the package, not for its rivals.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            returned = main([*arguments, "--out", str(out)])
    written = json.loads(out.read_text())
    # Nothing that JSON would change, so what is returned is what is written.
    assert written == returned
    return problems, dtypes, written


@pytest.fixture
def results(case):
    return case[2]


def test_environment(results):
    environment = results["environment"]
    assert environment["device"]
    assert environment["cores"] >= 1
    assert environment["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "diffrax", "equinox"} < set(environment["versions"])
    assert all(environment["versions"].values())
    assert "commit" in environment and "xla_flags" in environment
    # Only the table itself was asked for.
    assert "guesses" not in results and "with_cpu_flag" not in results


def test_every_case_is_there(case):
    problems, dtypes, results = case
    rows = results["fixed_steps"]
    seen = [(row["problem"], row["dtype"], row["work"]) for row in rows]
    works = ("forward", "gradient")
    assert sorted(seen) == sorted(
        (problem, dtype, work)
        for problem in problems
        for dtype in dtypes
        for work in works
    )
    for row in rows:
        assert row["steps"] == NUM_STEPS
        assert row["num_newton_steps"] >= 1
        assert row["num_fallback_steps"] == 0
        rivals = {"deer", "diffrax, ts", "scan by hand"}
        if row["work"] == "forward":
            rivals.add("diffrax, steps")
        assert set(row["times"]) == rivals


def test_times(results):
    assert len(results["fixed_steps"]) > 0
    for row in results["fixed_steps"]:
        for times in row["times"].values():
            assert set(times) == {"first", "median", "minimum"}
            assert all(math.isfinite(t) and t > 0 for t in times.values())
            assert times["minimum"] <= times["median"]


def test_answers_agree_with_diffrax(results):
    """To 1000 units of rounding.

    Forty steps are rounded a few times each, and what is off at one of them has grown
    by at most 11 at the end (the largest derivative of any state with respect to the
    first): about a thousand units if all pull the same way. Seen are 10.
    """
    assert len(results["fixed_steps"]) > 0
    for row in results["fixed_steps"]:
        assert row["difference"] <= rounding(row["dtype"]), row


def test_table(results):
    rows = results["fixed_steps"]
    head, rule, *lines = _fixed_steps.table(rows).splitlines()
    assert len(lines) == len(rows) > 0
    for line, row in zip(lines, rows, strict=True):
        assert line.count("|") == head.count("|") == rule.count("|")
        assert line.startswith(f"| {row['problem']} | {row['dtype']} | {NUM_STEPS} | ")


@pytest.mark.parametrize("arguments", (["--repeats", "0"], ["--steps", "0"], ["--x"]))
def test_bad_values(arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_times_at_equal_error_are_interpolated():
    from benchmarks import _work_precision

    def row(solver, error, seconds):
        return dict(problem="p", solver=solver, error=error, times=dict(median=seconds))

    rows = [
        row("DEER()", 1e-4, 1.0),
        row("DEER()", 1e-8, 4.0),
        row("DEER(Tsit5())", 1e-3, 2.0),
        row("DEER(Tsit5())", 1e-7, 8.0),
    ]
    # Half way in the logarithm of the error is half way in that of the time.
    assert abs(_work_precision.time_at(rows, "p", "DEER()", 1e-6) - 2.0) < 1e-12
    assert abs(_work_precision.time_at(rows, "p", "DEER(Tsit5())", 1e-5) - 4.0) < 1e-12
    assert _work_precision.time_at(rows, "p", "DEER(Tsit5())", 1e-8) is None
    table = _work_precision.table(rows)
    assert "| p | 1e-04 | 1000.00 |" in table
    assert "1e-08" not in table


def test_work_against_error_of_every_problem_is_that_of_its_method():
    """The fields are right: stock Diffrax comes as close to the reference."""
    import diffrax
    import jax.numpy as jnp

    from benchmarks import _work_precision

    for name, (field, y0, t1, counts) in _work_precision.problems().items():
        reference = _work_precision._reference(field, jnp.asarray(y0), t1)
        num_steps = counts["DEER(Tsit5())"][-1]
        term = diffrax.ODETerm(lambda t, y, args, field=field: field(t, y))
        ys = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, t1, t1 / num_steps, jnp.asarray(y0),
            max_steps=num_steps,
        ).ys[0]  # fmt: skip
        assert float(jnp.max(jnp.abs(ys - reference))) < 1e-7, name
