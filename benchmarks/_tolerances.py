"""Error against time and field evaluations, to a tolerance: ours beside Diffrax's.

`python -m benchmarks._tolerances [--only NAME ...] [--quick] [--report]` solves the
reference problems, writes `benchmarks/results/tolerances.json` and brings
`docs/tolerances.md` and its picture up to it; `--report` does the latter alone.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import deer_ode
from deer_ode import DEER, Newton

from ._process import environment
from ._references import FIELDS, STIFF_FIELDS, load, reference
from ._timing import time_alternating


TOLERANCES = (1e-3, 1e-4, 1e-6, 1e-8, 1e-10)
ATOL = 1e-2
"""In units of the relative tolerance. Robertson's second component is 1e-13."""
ATOLS = {"Robertson": 1e-12, "DETEST-A1": 1e-8}

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tolerances.json"
PAGE = ROOT / "docs" / "tolerances.md"
PICTURE = ROOT / "docs" / "images" / "tolerances.png"

# The whole interval at once, as on an accelerator; the default on a CPU takes Diffrax's
# own steps.
AT_ONCE = Newton(window=None)
ROOM = 512
MOST_ROOM = 2**16


class Rival(NamedTuple):
    """A solver, how many field evaluations an attempted step costs, and the one of
    Diffrax's that ours is set beside.
    """

    solver: diffrax.AbstractSolver
    evaluations: int | None = None
    is_stiff: bool = False
    beside: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.beside is not None


#: What the guess is made by, too.
DOPRI8 = 13

RIVALS = {
    "DEER(Tsit5())": Rival(DEER(diffrax.Tsit5(), AT_ONCE), 6, beside="Tsit5"),
    "DEER(Dopri8())": Rival(DEER(diffrax.Dopri8(), AT_ONCE), DOPRI8, beside="Dopri8"),
    "Tsit5": Rival(diffrax.Tsit5(), 6),
    "Dopri8": Rival(diffrax.Dopri8(), DOPRI8),
    "DEER(RadauIIA())": Rival(
        DEER(deer_ode.RadauIIA()), is_stiff=True, beside="Kvaerno5"
    ),
    "Kvaerno5": Rival(diffrax.Kvaerno5(), is_stiff=True),
}
"""On stiff problems those for them; on the others all but those of Radau."""


def _evaluations(rival: Rival, size: int, stats: dict[str, int]) -> int | None:
    """Of the field, each tangent counted as one."""
    if rival.evaluations is None:
        return None
    if not rival.is_ours:
        return stats["num_steps"] * rival.evaluations
    # Error estimates of the guess, two kinds twice; iterations; and the steps of each
    # mesh, once more for their errors and once for the answer.
    iterations = stats["num_newton_steps"] * (1 + size)
    rounds = 4 + iterations + stats["num_meshes"] + 1
    return (
        stats["num_guess_steps"] * DOPRI8
        + rounds * stats["num_accepted_steps"] * rival.evaluations
    )


def _program(problem: dict, field, rival: Rival):
    """From the tolerances and the room for steps to the end value and statistics."""
    run: Any = deer_ode.diffeqsolve if rival.is_ours else diffrax.diffeqsolve
    t0, t1 = problem["t0"], problem["t1"]
    y0 = jnp.asarray(problem["y0"], float)
    # Left to itself, Kvaerno5 rejects every step of Van der Pol's oscillator.
    dt0 = 1e-6 if problem["stiff"] else None

    def solve(rtol, atol, max_steps):
        sol = run(
            *(diffrax.ODETerm(field), rival.solver, t0, t1, dt0, y0),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
            throw=False,
        )
        stats = {k: v for k, v in sol.stats.items() if not isinstance(v, str)}
        return sol.ys[0], stats, sol.result == diffrax.RESULTS.successful

    return jax.jit(solve, static_argnums=2)


def measure(problem: dict, field, repeats: int, tolerances=TOLERANCES) -> list[dict]:
    """One row for each solver and tolerance."""
    y_ref = reference(problem)
    scale = ATOLS.get(problem["name"], ATOL)
    rows, programs = [], {}
    for label, rival in RIVALS.items():
        if rival.is_stiff != problem["stiff"] and label != "Kvaerno5":
            continue
        solve = _program(problem, field, rival)
        room = ROOM if rival.is_ours else MOST_ROOM
        for rtol in tolerances:
            tolerance = jnp.array(rtol), jnp.array(scale * rtol)
            while True:
                y, stats, is_okay = jax.device_get(solve(*tolerance, room))
                is_short = not is_okay and stats["num_steps"] >= room
                if not (is_short and rival.is_ours) or room >= MOST_ROOM:
                    break
                wanted = max(int(stats["num_mesh_steps"]), room)
                room = min(2 ** math.ceil(math.log2(1.25 * wanted)), MOST_ROOM)
            stats = {k: v.item() for k, v in stats.items() if np.ndim(v) == 0}
            error = np.max(np.abs(y - y_ref) / (scale + np.abs(y_ref)))
            rows.append(
                dict(
                    problem=problem["name"],
                    states=problem["dim"],
                    solver=label,
                    rtol=rtol,
                    error=float(error) if is_okay else None,
                    evaluations=_evaluations(rival, problem["dim"], stats),
                    stats=stats,
                )
            )
            programs[f"{label} {rtol}"] = lambda s=solve, t=tolerance, n=room: s(*t, n)
    times = time_alternating(programs, repeats)
    # The least of them: a program that runs after a long one is slower.
    least = [times[f"{row['solver']} {row['rtol']}"]["minimum"] for row in rows]
    return [row | dict(seconds=t) for row, t in zip(rows, least, strict=True)]


# --- the page -------------------------------------------------------------------------


def _pairs(rows: list[dict]) -> Iterator[tuple[dict, dict]]:
    """Each row of ours with that of Diffrax's."""
    key = lambda row: (row["problem"], row["solver"], row["rtol"])
    by_key = {key(row): row for row in rows}
    for row in rows:
        rival = RIVALS[row["solver"]]
        if rival.is_ours:
            yield row, by_key[row["problem"], rival.beside, row["rtol"]]


def table(rows: list[dict]) -> str:
    """Ours beside Diffrax's."""
    lines = [
        "| Problem | By | Tolerance | Error / tolerance | Diffrax's | Steps "
        "| Diffrax's | Guess | Meshes | Iterations | Sequential | Evaluations, ratio "
        "| Time, ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for ours, other in _pairs(rows):
        a, b = ours["stats"], other["stats"]
        units = [
            "failed" if r["error"] is None else f"{r['error'] / r['rtol']:.2g}"
            for r in (ours, other)
        ]
        evaluations = "-"
        if ours["evaluations"] is not None:
            evaluations = f"{ours['evaluations'] / other['evaluations']:.1f}"
        lines.append(
            f"| {ours['problem'].replace('DETEST-', '')} | {ours['solver'][5:-3]} "
            f"| {ours['rtol']:.0e} | {units[0]} | {units[1]} "
            f"| {a['num_accepted_steps']:,} | {b['num_accepted_steps']:,} "
            f"| {a['num_guess_steps']} | {a['num_meshes']} | {a['num_newton_steps']} "
            f"| {a['num_fallback_steps']:,} | {evaluations} "
            f"| {ours['seconds'] / other['seconds']:.1f} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict]) -> list[str]:
    """What the table comes to."""
    pairs = list(_pairs(rows))
    both = [(a, b) for a, b in pairs if None not in (a["error"], b["error"])]
    accurate = [(a, b) for a, b in both if b["error"] <= 10 * b["rtol"]]
    within = sum(a["error"] <= 10 * a["rtol"] for a, _ in accurate)
    steps = [
        a["stats"]["num_accepted_steps"] / b["stats"]["num_accepted_steps"]
        for a, b in both
    ]
    times = [a["seconds"] / b["seconds"] for a, b in both]
    meshes = [a["stats"]["num_meshes"] for a, _ in both]
    return [
        f"{len(both)} of {len(pairs)} pairs succeed on both sides",
        f"where Diffrax's error is at most 10 times the tolerance, so is ours in "
        f"{within} of {len(accurate)}",
        f"steps beside Diffrax's: median {np.median(steps):.2f}, at most "
        f"{max(steps):.2f}; at most 1.1 in {sum(s <= 1.1 for s in steps)}",
        f"meshes: at most two in {sum(m <= 2 for m in meshes)}, most {max(meshes)}",
        f"time beside Diffrax's: median {np.median(times):.1f}, least "
        f"{min(times):.1f}, most {max(times):.1f}",
    ]


def plot(rows: list[dict], path: pathlib.Path) -> None:
    """For each problem error against time, and against field evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(row["problem"] for row in rows))
    panels = [
        (name, key) for name in names for key in ("seconds", "evaluations")
        if any(row[key] for row in rows if row["problem"] == name)
    ]  # fmt: skip
    columns = 6
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(13, 2.0 * lines), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    shown = {}
    for ax, (name, key) in zip(axes.flat, panels, strict=False):
        for k, (label, rival) in enumerate(RIVALS.items()):
            points = [
                (r[key] * (1e3 if key == "seconds" else 1), r["error"])
                for r in rows
                if (r["problem"], r["solver"]) == (name, label)
                and r["error"] and r[key]
            ]  # fmt: skip
            if not points:
                continue
            style = "-" if rival.is_ours else "--"
            (line,) = ax.loglog(
                [x for x, _ in points],
                [error for _, error in points],
                f"C{k}{style}",
                marker=".",
                linewidth=1,
            )
            shown[label] = line
        ax.set_title(name.replace("DETEST-", ""), fontsize=8)
        ax.set_xlabel("ms" if key == "seconds" else "evaluations", fontsize=7)
        ax.tick_params(labelsize=6)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    figure.supylabel("error at the end, in units of the solution", fontsize=9)
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=6, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


_BEGIN, _END = "<!-- measured -->", "<!-- /measured -->"

#: What of the table is on the page.
_SHOWN = 1e-6


def report(results: dict) -> None:
    """Brings the page and the picture up to the results."""
    rows, where = results["rows"], results["environment"]
    versions = where["versions"]
    lines = [f"- {line}" for line in summary(rows)]
    text = "\n".join(
        [
            _BEGIN,
            f"{where['device']}, {where['cores']} cores, JAX {versions['jax']}, "
            f"Diffrax {versions['diffrax']}, float64:",
            "",
            *lines,
            "",
            f"To {_SHOWN:g} (all are in `benchmarks/results/{RESULTS.name}`):",
            "",
            table([row for row in rows if row["rtol"] == _SHOWN]),
            _END,
        ]
    )
    page = PAGE.read_text()
    before, rest = page.split(_BEGIN)
    PAGE.write_text(before + text + rest.split(_END)[1])
    plot(rows, PICTURE)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="these problems")
    parser.add_argument("--quick", action="store_true", help="two tolerances, once")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    if options.report:
        report(json.loads(RESULTS.read_text()))
        return
    problems, rows = load(), []
    for name, field in (FIELDS | STIFF_FIELDS).items():
        if options.only and name not in options.only:
            continue
        tolerances = (1e-4, 1e-8) if options.quick else TOLERANCES
        repeats = 1 if options.quick else 5
        new = measure(problems[name], field, repeats, tolerances)
        rows += new
        print(table(new), flush=True)
    print("\n".join(summary(rows)))
    if options.only or options.quick:
        return
    results = dict(environment=environment(), rows=rows)
    # A line for each row.
    RESULTS.write_text(json.dumps(results).replace('{"problem"', '\n{"problem"') + "\n")
    report(results)


if __name__ == "__main__":
    main()
