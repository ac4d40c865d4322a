"""`python -m benchmarks`, on cases so small that they say nothing about speed."""

import contextlib
import importlib
import json
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import (
    _affine,
    _gru,
    _length,
    _ode,
    _report,
    _results,
    _runner,
    _tables,
    _targets,
    _tolerances,
    _work_precision,
)
from benchmarks.__main__ import main
from benchmarks._case import KEY, Case, Plan, gradient, key_of
from benchmarks._process import can_use_cpu_flag, has_cpu_flag

from .helpers import rounding, slow


@contextlib.contextmanager
def as_users_have_it():
    """The strictness is for the package, not for its rivals."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(*arguments):
    with as_users_have_it():
        return main([str(a) for a in arguments])


# --- every family, as `--quick` has it ----------------------------------------------


# Nearly all of the time is compilation.
@pytest.mark.parametrize("family", slow(benchmarks.FAMILIES, lambda f: f != "affine"))
def test_family(family, tmp_path):
    out = tmp_path / "new folder" / "results.json"
    rows = run("--quick", "--only", family, "--repeats", 1, "--out", out)
    # Nothing that JSON would change, so what is returned is what is written.
    assert json.loads(out.read_text())["rows"] == rows
    every_case_is_there_once(family, rows)
    answers_agree(rows)
    times_compilation_and_memory(rows)
    iterations_are_told(rows)
    environment_is_told(rows, out)
    tables_are_rectangular(family, rows)
    report_has_the_tables(family, rows, out, tmp_path)


def every_case_is_there_once(family, rows):
    cases = importlib.import_module(f"benchmarks._{family}").cases(Plan(quick=True))
    assert [key_of(row) for row in rows] == [case.key for case in cases]
    for row, case in zip(rows, cases, strict=True):
        assert row["family"] == family
        assert [*row["rivals"]] == [*case.programs]


def answers_agree(rows):
    """To 1000 units of rounding: of a hundred steps at most, rounded a few times each,
    and of what they make of that. Seen are 40.
    """
    apart = {"copy", "drawing"}
    for row in rows:
        for name, rival in row["rivals"].items():
            assert "error" not in rival, (name, rival)
            assert ("difference" in rival) == (name not in apart)
            if name not in apart:
                assert rival["difference"] <= rounding(row["dtype"]), (row, name)
        assert row["difference"] <= rounding(row["dtype"])


def times_compilation_and_memory(rows):
    for row in rows:
        for rival in row["rivals"].values():
            for key in ("median", "minimum", "compile_s"):
                assert math.isfinite(rival[key]) and rival[key] > 0
            assert rival["minimum"] <= rival["median"]
            # Nothing is needed to copy, and little for a loop.
            assert rival["temp_bytes"] >= 0
        assert any(rival["temp_bytes"] > 0 for rival in row["rivals"].values())


def iterations_are_told(rows):
    for row in rows:
        if "newton" in row["rivals"]:
            assert row["newton_steps"] >= 1
            assert row["fallback_steps"] == 0
        else:
            # One loop, or nothing to iterate.
            assert row["newton_steps"] in (0, None)


def environment_is_told(rows, out):
    environment = json.loads(out.read_text())["environment"]
    assert environment["device"] and environment["cores"] >= 1
    assert environment["versions"]["jax"] == jax.__version__
    assert {"jaxlib", "diffrax", "equinox"} < set(environment["versions"])
    assert all(environment["versions"].values())
    assert "xla_flags" in environment
    for row in rows:
        assert row["device"] == environment["device"]
        assert row["commit"] == environment["commit"]
        assert row["cpu_flag"] == has_cpu_flag()


def report_has_the_tables(family, rows, out, tmp_path):
    """The page has the tables, once also if it is written twice, and what was not
    measured stays.
    """
    page, text = tmp_path / "benchmarks.md", "before\n\n"
    for name in (*benchmarks.FAMILIES, "targets", "devices"):
        text += f"<!-- table: {name} -->\n\nold {name}\n\n<!-- /table -->\n\nafter\n"
    page.write_text(text)
    tables = _report.report(out.parent, tmp_path)
    assert set(tables) == {family, "targets", "devices"}
    once = page.read_text()
    for name in benchmarks.FAMILIES:
        assert (f"old {name}" in once) == (name != family)
    assert _report.family_text(family, rows) in once
    assert once.startswith("before") and once.count("after") == text.count("after")
    assert "No GPU has been measured yet" in once
    _report.report(out.parent, tmp_path)
    assert page.read_text() == once


def tables_are_rectangular(family, rows):
    for block in _report.family_text(family, rows).split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
            assert len(lines) >= 3


@pytest.mark.slow(covered_by="test_family")
def test_again_with_loops_compiled_whole(tmp_path):
    if not can_use_cpu_flag():
        pytest.skip("for a CPU without the flag")
    out = tmp_path / "results.json"
    arguments = ["--quick", "--only", "affine", "--repeats", 1, "--out", out]
    rows = run(*arguments, "--flag")
    assert sorted(row["cpu_flag"] for row in rows) == [False] * 2 + [True] * 2
    # Both again, in place of those.
    assert len(run(*arguments)) == len(rows)


def test_real_page_has_every_table():
    text = (_report.DOCS / "benchmarks.md").read_text()
    for name in (*benchmarks.FAMILIES, "targets", "devices"):
        assert _report.replace(text, name, "new") != text


# --- measuring ----------------------------------------------------------------------


def case(**programs):
    return Case(
        family="f",
        name="doubling",
        n=1,
        steps=10,
        dtype="float32",
        work="forward",
        programs={"loop": lambda x: 2 * x, **programs},
        arguments=lambda: (jnp.arange(4.0),),
        reference="loop",
    )


def _raise(x):
    raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(
    ("program", "message"),
    (
        (_raise, "RuntimeError: out of"),
        (lambda x: 3 * x, "ArithmeticError: another answer, off by 0.5"),
        (lambda x: x / 0, "ArithmeticError: another answer, off by nan"),
        (lambda x: x[:2], "ValueError: the answer has another shape"),
    ),
    ids=("raises", "wrong", "not finite", "shape"),
)
def test_a_rival_that_fails_stops_no_other(program, message):
    row = _runner.measure(case(default=program, other=lambda x: x + x), 2)
    assert row["rivals"]["default"] == {"error": message}
    assert row["rivals"]["other"]["median"] > 0
    assert row["rivals"]["loop"]["difference"] == row["rivals"]["other"]["difference"]
    assert row["difference"] is None
    assert row | {"cpu_flag": False, "device": "CPU"}
    text = _report.family_text("f", [row | {"cpu_flag": False, "device": "CPU"}])
    assert f"- default failed in 1 of these cases: {message}" in text


def test_a_difference_is_no_number_where_an_entry_is_none():
    """As of a trajectory that overflows on its way, in whichever leaf."""
    ys = jnp.ones((8192, 2), jnp.float32)
    broken = ys.at[4000:].set(jnp.nan)
    for actual in ((ys, broken), (broken, ys)):
        assert math.isnan(_runner.difference(actual, (ys, ys)))
    assert math.isinf(_runner.difference(ys.at[5].set(jnp.inf), ys))
    assert _runner.difference(ys + 0.5, ys) == 0.5
    with pytest.raises(ArithmeticError):
        _runner._check(-math.inf)


def test_a_program_larger_than_the_machine_is_not_run(monkeypatch):
    monkeypatch.setattr(_runner, "_memory_limit", lambda: -1)
    row = _runner.measure(case(), 1)
    assert row["rivals"]["loop"]["error"].startswith("MemoryError")


def test_long_programs_are_run_once(monkeypatch):
    """Those over the limit by themselves are not run again."""
    ran = []
    calls = {k: (lambda k=k: ran.append(k), t) for k, t in dict(a=30, b=9, c=1).items()}
    times = _runner._time_alternating(calls, 5)
    assert times["a"] == [30]
    assert [ran.count(k) for k in "abc"] == [0, 3, 5]


def test_gradient_is_of_the_mean_square():
    value, slopes = gradient(lambda a, x: a * x)(jnp.array(3.0), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose([value, slopes], [22.5, 15.0])


def test_precision_is_restored():
    assert jax.config.read("jax_enable_x64")
    _runner.measure(case(), 1)
    assert jax.config.read("jax_enable_x64")


def test_newer_rows_replace_older_ones(tmp_path):
    results = _results.Results(tmp_path / "results.json")
    row = made_up(_gru.cases(Plan())[0])
    results.add(row | {"newton_steps": 1})
    results.add(made_up(_gru.cases(Plan())[1]))
    results.add(row | {"newton_steps": 2})
    assert [r["newton_steps"] for r in _results.read_all(tmp_path)] == [2, 3]


# --- targets ------------------------------------------------------------------------


def made_up(case, seconds=1.0, **rivals):
    """A row with a second for each program, or what is given."""
    names = dict.fromkeys(case.programs, seconds) | rivals
    return {name: getattr(case, name) for name in KEY} | {
        "rivals": {
            name: {"error": "failed"}
            if t is None
            else {"median": t, "minimum": t, "compile_s": 1.0, "temp_bytes": 10**6}
            for name, t in names.items()
        },
        "newton_steps": 3,
        "fallback_steps": 0,
        "difference": 0.0,
        "device": "CPU",
        "cpu_flag": False,
        "commit": None,
    }


def target(start):
    every = _targets.targets_on_cpu() + _targets.targets_on_gpu()
    (found,) = (t for t in every if t.text.startswith(start))
    return found


def verdict(start, rows):
    return _targets.judge(target(start), {key_of(row): row for row in rows})


def gru_4(**rivals):
    return [made_up(c, **rivals) for c in _gru.cases(Plan()) if c.n == 4]


FOUR = "newton over plain DEER, GRU n = 4"


def test_nothing_measured_meets_nothing():
    for found in _targets.targets_on_cpu() + _targets.targets_on_gpu():
        assert _targets.judge(found, {}) == (None, "not measured"), found.text
    assert "met" not in _targets.table([])


def test_met_missed_and_not_measured():
    good = gru_4(**{"plain DEER": 8.0})
    assert verdict(FOUR, good) == (8, f"met in all {len(good)}")
    assert verdict(FOUR, good[1:]).word == f"1 of {len(good)} not measured"
    slow_one = gru_4(**{"plain DEER": 7.9})[:1]
    assert verdict(FOUR, good[1:] + slow_one) == (7.9, f"missed in 1 of {len(good)}")
    assert verdict(FOUR, slow_one).word == (
        f"missed in 1 of {len(good)}; {len(good) - 1} of {len(good)} not measured"
    )


def test_failures_of_ours_count_and_those_of_rivals_do_not_alone():
    good = gru_4(**{"plain DEER": 9.0})
    ours = gru_4(newton=None)[:1]
    assert verdict(FOUR, ours + good[1:]) == (0, f"missed in 1 of {len(good)}")
    theirs = gru_4(**{"plain DEER": None})
    assert verdict(FOUR, theirs[:1] + good[1:]).word == (
        f"met in all {len(good)}; the rival failed in 1"
    )
    assert verdict(FOUR, theirs).word == "not measured"


def test_a_rival_that_was_left_out_is_not_measured():
    rows = gru_4(**{"plain DEER": 9.0})
    del rows[0]["rivals"]["plain DEER"]
    assert verdict(FOUR, rows).word == f"1 of {len(rows)} not measured"


def test_figures_to_stay_below():
    size = "temporary memory"
    (forward, backward) = (
        made_up(c)
        for c in _gru.cases(Plan())
        if (c.n, c.steps, c.batch, c.dtype) == (32, 100_000, 1, "float32")
    )
    assert verdict(size, [forward, backward]) == (1, "met in all 2")
    backward["rivals"]["newton"]["temp_bytes"] = 200 * 10**6
    # That of plain DEER is its own affair.
    forward["rivals"]["plain DEER"]["temp_bytes"] = 10**10
    assert verdict(size, [forward, backward]) == (200, "missed in 1 of 2")


def length_rows(power=1.0):
    return [made_up(c, (c.steps / 1e3) ** power) for c in _length.cases(Plan())]


def test_slopes():
    rows = [row for row in length_rows() if row["name"] == "GRU 4"]
    np.testing.assert_allclose(_length.slopes(rows, "newton"), (1, 1))
    rows[0]["rivals"]["newton"]["median"] *= 100
    overall, last = _length.slopes(rows, "newton")
    assert overall < 0.8 and abs(last - 1) < 1e-12
    assert _length.slopes(rows[:3], "newton")[1] is None
    assert "| GRU 4 | newton |" in _length.table(rows)


def test_target_of_slopes():
    slope = "slope of time"
    assert verdict(slope, length_rows(1.05)).word == "met in all 5"
    assert verdict(slope, length_rows(1.2)).word == "missed in 5 of 5"
    shorter = [row for row in length_rows() if row["steps"] < 10**7]
    assert verdict(slope, shorter).word == "not measured"


def test_long_odes_are_asked_for():
    """Runs of the default sizes cannot meet the target of the long ones."""
    long = "the same, n = 2 to 4, gradient"
    rows = [made_up(c, **{_ode.STOCK: 50.0}) for c in _ode.cases(Plan())]
    assert verdict(long, rows).word == "not measured"
    assert verdict("the same, n = 8, forward", rows).word.startswith("met in all")
    plan = Plan(steps=(2**16,))
    rows = [made_up(c, **{_ode.STOCK: 50.0}) for c in _ode.cases(plan)]
    assert verdict(long, rows).word.startswith("met in all")


def test_published_speed_ups():
    cell = "speed-up over the published one"
    cases = [c for c in _gru.cases(Plan(on_gpu=True)) if c.batch == 16]
    fast = [made_up(c, newton=1e-4) for c in cases]
    cells = sum(
        x is not None for d in _gru.PUBLISHED.values() for p in d.values() for x in p
    )
    assert verdict(cell, fast).word == f"met in all {cells}"
    found = verdict(cell, [made_up(c, newton=1e-2) for c in cases])
    np.testing.assert_allclose(found.worst, 100 / 1244)
    assert found.word.startswith("missed in")
    assert "| 4 | 1,000 | 22 / 46 | 1e+04 / 1e+04 |" in _gru.table(fast)


def test_speed_of_copying():
    """A dense recurrence with n = 1 reads two numbers and writes one; copying them
    writes another.
    """
    copying = "`affine_scan` over copying"
    cases = _affine.cases(Plan(on_gpu=True))
    rows = [made_up(c, copy=0.75) for c in cases]
    (one,) = (
        r
        for r in rows
        if (r["name"], r["steps"], r["dtype"]) == ("dense 1", 1000, "float32")
    )
    speeds = _affine.bandwidths(one)
    assert speeds["default"] == 12e3
    np.testing.assert_allclose(speeds["copy"], 16e3 / 0.75)
    # 3 / 4 of the numbers at 3 / 4 of the speed, at least.
    assert verdict(copying, rows).word.startswith("missed")
    assert verdict(copying, [made_up(c, copy=2.0) for c in cases]).word.startswith(
        "met"
    )


def test_targets_tell_flags_and_devices_apart():
    rows = gru_4(**{"plain DEER": 8.0})
    lines = _targets.table([row | {"cpu_flag": True} for row in rows]).splitlines()
    (line,) = (line for line in lines if FOUR in line)
    assert line.endswith(f"| - | not measured | 8 | met in all {len(rows)} |")
    assert "met in" not in _targets.table([row | {"device": "GPU"} for row in rows])


def test_captions():
    rows = gru_4()[:1]
    rows += [row | {"cpu_flag": True} for row in rows]
    rows += [rows[0] | {"device": "Some GPU"}]
    assert list(_tables.captions(rows)) == [
        "CPU, default XLA flags",
        "CPU, with loops compiled whole",
        "Some GPU",
    ]


def test_pictures_of_several_lengths(tmp_path):
    from benchmarks._plots import plot

    rows = length_rows()
    assert not plot(rows[:3], tmp_path / "one.png")
    assert plot(rows, tmp_path / "images" / "all.png")
    assert (tmp_path / "images" / "all.png").stat().st_size > 1000


# --- the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    (["--repeats", "0"], ["--steps", "0"], ["--only", "none"], ["--x"]),
    ids=" ".join,
)
def test_bad_values(arguments, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow(covered_by="test_family")
def test_names_that_are_asked_for(tmp_path):
    arguments = ["--quick", "--only", "affine", "--repeats", 1]
    rows = run(*arguments, "--names", "diagonal 4", "none", "--out", tmp_path / "a")
    assert [row["name"] for row in rows] == ["diagonal 4"]


def test_steps_that_are_asked_for():
    assert {c.steps for c in _ode.cases(Plan(steps=(7, 9)))} == {7, 9}
    # A case too large for this device is left out.
    assert _affine.cases(Plan(steps=(10**9,))) == []


# --- work against error, a program of its own ---------------------------------------


def test_times_at_equal_error_are_interpolated():
    from benchmarks import _work_precision

    def row(solver, error, seconds):
        return dict(problem="p", solver=solver, error=error, times=dict(median=seconds))

    rows = [
        row("DEER(Obreshkov())", 1e-4, 1.0),
        row("DEER(Obreshkov())", 1e-8, 4.0),
        row("DEER(Tsit5())", 1e-3, 2.0),
        row("DEER(Tsit5())", 1e-7, 8.0),
    ]
    # Half way in the logarithm of the error is half way in that of the time.
    assert (
        abs(_work_precision.time_at(rows, "p", "DEER(Obreshkov())", 1e-6) - 2.0) < 1e-12
    )
    assert abs(_work_precision.time_at(rows, "p", "DEER(Tsit5())", 1e-5) - 4.0) < 1e-12
    assert _work_precision.time_at(rows, "p", "DEER(Tsit5())", 1e-8) is None
    table = _work_precision.table(rows)
    assert "| p | 1e-04 | 1000.00 |" in table
    assert "1e-08" not in table


@pytest.mark.parametrize(
    "name",
    slow(_work_precision.problems(), lambda name: name != "network, 4 states"),
)
def test_work_against_error_of_every_problem_is_that_of_its_method(name):
    """The fields are right: stock Diffrax comes as close to the reference."""
    field, y0, t1, counts = _work_precision.problems()[name]
    reference = _work_precision._reference(field, jnp.asarray(y0), t1)
    num_steps = counts["DEER(Tsit5())"][-1]
    term = diffrax.ODETerm(lambda t, y, args: field(t, y))
    ys = diffrax.diffeqsolve(
        term, diffrax.Tsit5(), 0.0, t1, t1 / num_steps, jnp.asarray(y0),
        max_steps=num_steps,
    ).ys[0]  # fmt: skip
    assert float(jnp.max(jnp.abs(ys - reference))) < 1e-7, name


# --- tolerances -----------------------------------------------------------------------


def test_tolerances_are_measured_and_told(tmp_path, monkeypatch):
    """One problem with a solution in closed form; the page keeps its own words."""
    decay = dict(
        name="decay", dim=1, t0=0.0, t1=2.0, y0=[1.0], y_ref=[np.exp(-2)], stiff=False
    )
    pair = ("DEER(Tsit5())", "Tsit5")
    rivals = {name: _tolerances.RIVALS[name] for name in pair}
    monkeypatch.setattr(_tolerances, "RIVALS", rivals)
    rows = _tolerances.measure(decay, lambda t, y, args: -y, 1, (1e-4, 1e-6))
    assert [(row["solver"], row["rtol"]) for row in rows] == [
        (name, rtol) for name in pair for rtol in (1e-4, 1e-6)
    ]
    for row in rows:
        assert 0 < row["error"] <= 10 * row["rtol"] and row["seconds"] > 0
    loose, tight = (row["evaluations"] for row in rows[2:])
    assert 0 < loose < tight == 6 * rows[3]["stats"]["num_steps"]
    assert "2 of 2 pairs succeed" in _tolerances.summary(rows)[0]
    page, picture = tmp_path / "page.md", tmp_path / "images" / "picture.png"
    page.write_text("Before.\n<!-- measured -->\nold\n<!-- /measured -->\nAfter.\n")
    monkeypatch.setattr(_tolerances, "PAGE", page)
    monkeypatch.setattr(_tolerances, "PICTURE", picture)
    versions = dict(jax="0.0", diffrax="0.0")
    where = dict(device="CPU", cores=2, versions=versions)
    _tolerances.report(dict(environment=where, rows=rows))
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n")
    assert "old" not in text and "| decay | Tsit5 | 1e-06 |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
