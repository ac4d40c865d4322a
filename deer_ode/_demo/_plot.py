"""The picture: orbits, loss, time steps, and the residuals of Newton's method."""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ._fit import Task, Training
from ._system import loss_of_truth, see, true_system


def plot(
    path: str, task: Task, training: Training, histories: dict[str, list[float]]
) -> None:
    """Writes the picture: orbits, loss, mesh, and Newton's method at work."""
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    left, right = (figure.add_subplot(grid[:, i]) for i in (0, 2))
    top, bottom = (figure.add_subplot(grid[i, 1]) for i in (0, 1))
    _plot_orbits(left, task, training)
    _plot_losses(top, task, training)
    _plot_mesh(bottom, training.mesh)
    _plot_residuals(right, training.mesh.size - 1, histories)
    for axes in (left, top, bottom, right):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, format="png")


def _plot_orbits(axes, task: Task, training: Training) -> None:
    """All of the orbits, and from nearby the far end of the lighter body's."""
    close = axes.inset_axes((0.6, 0.7, 0.4, 0.3))
    _draw_orbits(axes, task, training, size=1.5)
    end = _draw_orbits(close, task, training, size=2.5)
    close.set(
        xlim=(end[0] - 0.12, end[0] + 0.04),
        ylim=(end[1] - 0.06, end[1] + 0.06),
        xticks=[],
        yticks=[],
        facecolor="0.85",
    )
    axes.indicate_inset_zoom(close, edgecolor="black")
    names = ["data", "before the fit", "truth", "fit"]
    legend = axes.legend(
        close.get_lines()[:4], names, loc="upper left", fontsize=8, facecolor="0.85"
    )
    legend.get_lines()[0].set(markersize=6, alpha=1)
    axes.set(title="Two bodies", xlabel="x", ylabel="y", aspect="equal")
    # Room for the inset.
    axes.set_ylim(top=axes.get_ylim()[0] + np.diff(axes.get_xlim()).item())


def _draw_orbits(axes, task: Task, training: Training, size: float) -> np.ndarray:
    """Data, first model, truth and fit; returns where the lighter body starts."""
    problem = task.problem
    data = np.asarray(problem.positions)
    before = np.asarray(see(task.model(task.first), training.first_states))
    fitted = np.asarray(see(task.model(training.parameters), training.states))
    true = np.asarray(see(true_system(), problem.truth))
    for body, colour in enumerate(("tab:blue", "tab:orange")):
        axes.plot(*data[body].T, ".", color=colour, markersize=size, alpha=0.4)
        axes.plot(*before[body].T, color="0.6", linewidth=0.8)
        axes.plot(*true[body].T, color="black", linewidth=1.0)
        axes.plot(*fitted[body].T, "--", color="white", linewidth=1.0)
    return true[1, 0]


def _plot_losses(axes, task: Task, training: Training) -> None:
    axes.loglog(np.arange(1, len(training.losses) + 1), training.losses)
    noise = loss_of_truth(task.problem)
    axes.axhline(noise, color="black", linewidth=0.8, linestyle=":", label="noise")
    axes.legend(fontsize=8)
    axes.set(title="Training", xlabel="gradient step", ylabel="loss")


def _plot_mesh(axes, mesh: Float[np.ndarray, " knots"]) -> None:
    lengths = np.diff(mesh)
    axes.semilogy(mesh[:-1], lengths, ".", markersize=3)
    axes.set(title=f"The {lengths.size} steps", xlabel="time", ylabel="length")


def _plot_residuals(axes, num_steps: int, histories: dict[str, list[float]]) -> None:
    for name, history in histories.items():
        axes.semilogy(history, ".-", label=name)
    axes.set(
        title=f"One solve of {num_steps:,} steps",
        xlabel="Newton step",
        ylabel="largest residual of any step",
    )
    axes.legend(title="guess", fontsize=8)
