"""Pictures of rows of results: times against numbers of steps."""

import math
import pathlib


_COLUMNS = 5


def plot(rows: list[dict], path: pathlib.Path) -> bool:
    """Milliseconds by steps of one family on one device: a panel for each problem and
    kind of work, of those measured at two numbers of steps at least; dashed are the
    times with loops compiled whole. Whether there was anything to draw.
    """
    # Not needed before, and not by those who only measure.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    first = rows[0]
    rows = [r for r in rows if (r["dtype"], r["batch"]) in _shown(rows, first)]
    steps = {row["name"]: set() for row in rows}
    for row in rows:
        steps[row["name"]].add(row["steps"])
    names = [name for name in steps if len(steps[name]) > 1]
    if not names:
        return False
    rows = [row for row in rows if row["name"] in names]
    works = list(dict.fromkeys(row["work"] for row in rows))
    programs = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    columns = min(_COLUMNS, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(
        lines * len(works),
        columns,
        figsize=(1.0 + 2.2 * columns, 0.8 + 2.1 * lines * len(works)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.set_visible(False)
    for i, work in enumerate(works):
        for j, name in enumerate(names):
            ax = axes[i * lines + j // columns, j % columns]
            ax.set_visible(True)
            found = [r for r in rows if (r["work"], r["name"]) == (work, name)]
            for k, program in enumerate(programs):
                for cpu_flag, style in ((False, "-"), (True, "--")):
                    points = sorted(
                        (r["steps"], 1e3 * r["rivals"][program]["median"])
                        for r in found
                        if r["cpu_flag"] == cpu_flag
                        and "median" in r["rivals"].get(program, {})
                    )
                    label = program if (i, j, cpu_flag) == (0, 0, False) else None
                    ax.loglog(
                        *([p[axis] for p in points] for axis in (0, 1)),
                        f"C{k}{style}",
                        marker=".",
                        linewidth=1,
                        label=label,
                    )
            title = f"{name}, {found[0]['dtype']}" if found else name
            ax.set_title(title, fontsize=9)
            if j % columns == 0:
                ax.set_ylabel(f"{work}, ms")
            ax.set_xlabel("steps")
            # Between two powers of ten there is no room for more.
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.tick_params(labelbottom=True)
            ax.grid(alpha=0.3)
    figure.legend(
        loc="outside lower center", ncols=min(len(programs), 2 * columns), fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nothing in the file that changes without the figures.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return True


def _shown(rows: list[dict], first: dict) -> set[tuple]:
    """One dtype and batch for each problem: those of its first row, or of all of them
    those of the first.
    """
    common = (first["dtype"], first["batch"])
    if all(
        any((r["dtype"], r["batch"]) == common for r in rows if r["name"] == name)
        for name in {row["name"] for row in rows}
    ):
        return {common}
    return {(row["dtype"], row["batch"]) for row in rows}
