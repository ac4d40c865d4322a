"""The iterations and sequential steps that docs/convergence.md states are seen."""

import pathlib
import re

import equinox as eqx
import pytest

from benchmarks import _hard
from deer_ode import Newton

from .helpers import slow


PAGE = pathlib.Path(__file__).parents[1] / "docs" / "convergence.md"

# Of the others a step or an iteration takes long to compile.
PROBLEMS = {
    problem.name: problem
    for problem in _hard.equations() + _hard.recurrences()
    if not problem.name.endswith(("Obreshkov", "RadauIIA", "Kvaerno5"))
    and not problem.name.startswith("five")
}

ORDINARY = (
    "Lorenz, 50 Lyapunov times, Tsit5",
    "Kepler, e = 0.9, Tsit5",
    "GRU, weights x 10",
)


def documented() -> dict[str, tuple[int, int, float]]:
    """Of each problem its steps, and the iterations and the share of sequential steps
    in the column of windows.
    """
    out = {}
    column = None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "problem":
            column = cells.index("windows") if "windows" in cells else None
        elif column is not None and cells[0] in PROBLEMS:
            found = re.match(r"(\d+)(?: \((\d+)% sequential\))?;", cells[column])
            assert found is not None, line
            iterations, percent = found.groups()
            num_steps = int(cells[1].replace(",", ""))
            out[cells[0]] = num_steps, int(iterations), int(percent or 0) / 100
    return out


DOCUMENTED = documented()


def test_all_rows_are_known():
    assert set(DOCUMENTED) == set(PROBLEMS)
    assert len(DOCUMENTED) >= 15


@pytest.mark.parametrize("name", slow(DOCUMENTED, lambda name: name not in ORDINARY))
def test_row(name):
    problem, (num_steps, iterations, share) = PROBLEMS[name], DOCUMENTED[name]
    run = eqx.filter_jit(lambda start: problem.solve(start, Newton())[1])
    stats = run(problem.start)
    num_fallback = int(stats["num_fallback_steps"])
    if share == 0:
        assert num_fallback == 0
    # The table has whole percents.
    assert abs(num_fallback / num_steps - share) <= 0.006
    # Rounding decides about an iteration here and there.
    assert abs(int(stats["num_newton_steps"]) - iterations) <= 2 + 0.05 * iterations
