"""What a diagnosis says, in figures, in words and as a picture."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ._plan import Plan


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# So many pixels are all that a picture shows.
_MAX_BINS = 1024

# A good guess needs up to five; from none a contractive network took nine.
_FEW = 10

# Residuals this far below the tolerance look alike in a picture: all are rounding.
_LOWEST = -2


def bin_ends(num_steps: int) -> Int[np.ndarray, " bins"]:
    """How many steps there are up to the end of each bin."""
    bins = min(num_steps, _MAX_BINS)
    return num_steps * np.arange(1, bins + 1) // bins


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a recommendation is made of, beside what it shares with a diagnosis."""

    end_error: float
    """Of what the iteration ended with, relative to the largest state."""
    most_growth: float
    """How many digits may be lost before no iterate is accepted."""
    is_equation: bool
    """Whether of a differential equation, as `Adaptive` and `Coarse` want it."""
    is_exact: bool
    """Whether the iteration used the exact Jacobian."""
    has_own_tolerance: bool
    other_solution_from: int | None
    """From which step on the iteration found what a sequential solve does not."""
    too_large_from: int | None
    """From which step on the answer is too large to be iterated on."""


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    r"""What [`deer_ode.diagnose`][] found.

    `str(diagnosis)` is a summary, `diagnosis.plot()` a picture.

    **Fields:**

    - `residuals`: the largest residual in each bin of time at the start of each
        iteration, of shape `(iterations, bins)`, in units of the tolerance: 1 or less
        passes. (The correction has to be small as well.) What is not finite is left as
        it is. There are at most 1024 bins, of equally many steps each, give or take
        one.
    - `times`: where each bin ends: the time, in units of `t0`, or for a recurrence the
        index of the step.
    - `start`: where the first bin begins: `t0`, or the index before the first step.
    - `num_good_steps`: how many leading steps each iteration accepted.
    - `num_steps`: how many steps there are.
    - `num_iterations`: how many iterations were made.
    - `converged`: whether all steps were accepted, and are those of a sequential solve.
    - `lyapunov_exponent`: the rate at which a small perturbation of the answer grows,
        per unit of time, or per step of a recurrence. $-\infty$ where everything is
        forgotten; NaN where the answer is not finite, or the exact Jacobians would take
        too much memory.
    - `horizon`: the same times the length: the interval in Lyapunov times. Zero or less
        means that perturbations die out.
    - `growth`: the largest $\log_{10} |v_i| / |v_j|$, $j \le i$, of that perturbation
        $v$: how many digits the problem itself loses on the way.
    - `guess_error`: how far the guess is from the answer, relative to the largest value
        that an entry of the state takes.
    - `predicted_iterations`: how many iterations are to be expected, or `None` where
        rounding alone, grown by `growth` digits, is too large to be accepted. See
        [`deer_ode.diagnose`][] for how it is estimated and how good it is.
    - `first_nonfinite`: the index of the first step whose value, computed one after
        the other, is not finite; or `None`.
    - `recommendation`: what to do about it.
    - `plan`: how the method that was given would solve it on this machine: its path,
        windows and memory.
    - `unit`: what `times` count, `"time"` or `"step"`.
    - `mesh_stats`: of steps that follow from a tolerance how many meshes were solved
        (`num_meshes`, of which all but the last were refined), by how many iterations
        in all (`num_newton_steps`), and the sequential steps of the first guess
        (`num_guess_steps`), with the names of `Solution.stats`; otherwise `None`.
    """

    residuals: Float[np.ndarray, "iterations bins"]
    times: Float[np.ndarray, " bins"]
    start: float
    num_good_steps: Int[np.ndarray, " iterations"]
    num_steps: int
    num_iterations: int
    converged: bool
    lyapunov_exponent: float
    horizon: float
    growth: float
    guess_error: float
    predicted_iterations: int | None
    first_nonfinite: int | None
    recommendation: str
    plan: Plan
    unit: str
    mesh_stats: dict[str, int] | None = None

    def __str__(self):
        mesh = ()
        if self.mesh_stats is not None:
            num_meshes = self.mesh_stats["num_meshes"]
            plural = "" if num_meshes == 1 else "es"
            mesh = (
                f"{num_meshes} mesh{plural} solved in "
                f"{self.mesh_stats['num_newton_steps']} iterations for the tolerance, "
                f"from a guess of {self.mesh_stats['num_guess_steps']} sequential "
                "steps; on the last:",
            )
        verdict = "converged" if self.converged else "not converged"
        most = int(self.num_good_steps.max())
        expected = self.predicted_iterations
        lines = (
            *mesh,
            f"{self.num_iterations} iterations, {verdict}; at most {most:,} of "
            f"{self.num_steps:,} steps accepted",
            f"expected from this guess: "
            f"{'no convergence' if expected is None else f'{expected} iterations'}",
            f"largest Lyapunov exponent: {self.lyapunov_exponent:.4g} per {self.unit}; "
            f"the interval is {self.horizon:.3g} Lyapunov times",
            f"perturbations grow by at most {self.growth:.2g} digits; the guess is off "
            f"by {self.guess_error:.1e} of the largest state",
            self.recommendation,
        )
        return "Diagnosis:\n  " + "\n  ".join(lines)

    __repr__ = __str__

    def plot(self) -> "Figure":
        """Residuals over time and iterations.

        Rows are iterations, the first on top; dark is converged. The line is the end of
        the steps that were accepted. What is not finite is grey.

        **Returns:**

        A Matplotlib `Figure`, which saves itself by `.savefig(path)`.

        **Raises:**

        - `ImportError`: without Matplotlib.

        !!! example

            >>> import jax.numpy as jnp
            >>> from deer_ode import diagnose, scan
            >>> step = lambda y, x: (jnp.cos(y) + x, None)
            >>> found = diagnose(scan, step, jnp.array(0.1), jnp.zeros(50))
            >>> found.plot().axes[0].get_xlabel()
            'step'
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError(
                "`Diagnosis.plot()` draws with Matplotlib, which is not installed: "
                "`pip install deer_ode[plot]`. `Diagnosis.residuals` holds what it "
                "would show."
            ) from error
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = np.log10(self.residuals)
        # A residual of zero is as good as any that is all rounding.
        shown = np.ma.masked_invalid(np.where(self.residuals == 0, _LOWEST, shown))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        edges = np.concatenate([[self.start], self.times])
        image = axes.pcolormesh(
            edges,
            np.arange(self.num_iterations + 1) + 0.5,
            shown,
            cmap=colormaps["viridis"].with_extremes(bad="0.6"),
            vmin=_LOWEST,
            vmax=max(1.0, float(shown.filled(1.0).max())),
            rasterized=True,
        )
        # A line down the picture, level by level.
        in_bins = np.concatenate([[0], bin_ends(self.num_steps)])
        good = np.interp(self.num_good_steps, in_bins, edges)
        levels = np.arange(self.num_iterations + 1) + 0.5
        axes.plot(np.repeat(good, 2), np.repeat(levels, 2)[1:-1], color="tab:red")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(self.num_iterations + 0.5, 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("time (in units of t0)" if self.unit == "time" else "step")
        axes.set_ylabel("iteration")
        bar = figure.colorbar(image, ax=axes, extend="min")
        bar.set_label("log10 of the residual (in units of the tolerance)")
        return figure


def recommend(found: Diagnosis, findings: Findings) -> str:
    """What is in the way, and the way around it, in two or three sentences."""
    recommendation = _recommend(found, findings)
    if found.plan.path == "sequential":
        recommendation += (
            " (The call as it is takes sequential steps on this machine, which need "
            "not converge.)"
        )
    return recommendation


def _recommend(found: Diagnosis, findings: Findings) -> str:
    if found.first_nonfinite is not None:
        return (
            f"The answer is not a number from step {found.first_nonfinite} on, "
            "computed sequentially: no method can go on from there. Look at "
            "that step, or end before it."
        )
    for start, cause in (
        (findings.too_large_from, _too_large),
        (findings.other_solution_from, _other_solution),
    ):
        if start is not None:
            return cause(start)
    if found.converged and found.num_iterations <= _FEW:
        plural = "" if found.num_iterations == 1 else "s"
        return f"Converges in {found.num_iterations} iteration{plural}; nothing to do."
    return f"{_progress(found)} {_remedy(found, findings)}"


def _too_large(start: int) -> str:
    return (
        f"The answer grows beyond what is iterated on at step {start} (the fourth root "
        "of the largest number): give the state in other units, compute in double "
        "precision, or step by step with `Sequential()`."
    )


def _other_solution(start: int) -> str:
    return (
        f"From step {start} on the equations of the steps have several solutions, and "
        "the iteration found another one than a sequential solve does: take shorter "
        "steps, or give a better guess."
    )


def _progress(found: Diagnosis) -> str:
    if found.converged:
        return f"Converges, but in {found.num_iterations} iterations."
    return (
        f"Does not converge in {found.num_iterations} iterations, which accepted at "
        f"most {int(found.num_good_steps.max()):,} of {found.num_steps:,} steps."
    )


def _remedy(found: Diagnosis, findings: Findings) -> str:
    if found.predicted_iterations is None:
        return _windows(found, findings)
    if not findings.is_exact:
        return (
            "The linearisation leaves out part of the Jacobian: use "
            "`Newton(linearisation=Exact())`, or `Sequential()` where that is too "
            "large."
        )
    if findings.has_own_tolerance and findings.end_error <= 1e-6:
        return (
            f"The iterate is within {findings.end_error:.0e} of the answer, so what "
            "is not accepted is rounding: leave `rtol` and `atol` out, or loosen them."
        )
    better = (
        "`Newton(guess=Adaptive(rtol=1e-8))` (for controls, noise and constraints "
        "`Coarse(every=2)`) or `Trajectory(ys)` of a problem nearby"
        if findings.is_equation
        else "the `carries` of a problem nearby as `guess=`"
    )
    error = found.guess_error
    off = f"{error:.0%} of" if error < 10 else f"{error:.1e} times"
    return (
        f"The guess is off by {off} the largest state: give a "
        f"better one, {better}, or solve in short windows (`Newton(window=...)`)."
    )


def _windows(found: Diagnosis, findings: Findings) -> str:
    chaotic = (
        f"Chaotic over {found.horizon:.3g} Lyapunov times"
        if found.horizon > np.log(10) * findings.most_growth / 2
        else "Very sensitive in between"
    )
    # A quarter of what can be borne: the growth is an average, twice that occurs, and a
    # guess needs room as well. (Lorenz by Tsit5: half left thousands of sequential
    # steps, a quarter none.)
    window = found.num_steps * findings.most_growth / (4 * found.growth)
    window = max(1, int(float(f"{window:.2g}")))
    return (
        f"{chaotic}: rounding grows by {found.growth:.2g} digits, more than the "
        f"{findings.most_growth:.2g} with which the whole can be accepted. Solve in "
        f"windows of about {window:,} steps (`Newton(window=Window({window}))`), or "
        "step by step (`Sequential()`)."
    )
