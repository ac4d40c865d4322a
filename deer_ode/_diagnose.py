"""Why a solve needs the iterations that it needs.

Newton's method is run on its own, one iteration after the other, and written down. Then
a perturbation is sent along the answer (`_growth`). How it grows says how hard the
problem is for any method that is parallel in time: an error early in a trajectory is so
many times as large later.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ._custom_types import Trajectory as TrajectoryArray
from ._diagnosis import Diagnosis, Findings, bin_ends, recommend
from ._growth import largest_growth, log_growth
from ._misc import ROUNDING_UNITS, is_reasonable
from ._newton import Newton
from ._problem import Problem, find_problem
from ._programs import without_checks
from ._progress import Progress
from ._recurrence import AbstractRecurrence


# A guess with fewer digits right than this is as good as none: it is off by half of
# the largest state.
_WORST_GUESS = 0.3


# --- the iteration ------------------------------------------------------------------


@eqx.filter_jit
def _begin(newton: Newton, recurrence: AbstractRecurrence) -> Progress:
    return without_checks(lambda: newton.start(recurrence).begin())()


@eqx.filter_jit
def _iterate(newton: Newton, recurrence: AbstractRecurrence, progress: Progress):
    """One iteration, and the errors of all steps before it."""
    solve = newton.start(recurrence)
    # As if no step were known: the errors of all are to be seen.
    nothing = jnp.asarray(0, jnp.int32)

    @without_checks
    def iterate(progress):
        updated = solve.update(
            solve.recurrence,
            progress.ys,
            progress.largest,
            progress.damping,
            nothing,
            progress.at_rounding,
        )
        progress = solve.advance(progress, updated, 0, recurrence.num_steps)
        return progress, updated.error

    return iterate(progress)


@eqx.filter_jit
def _finish(newton: Newton, recurrence: AbstractRecurrence, progress: Progress):
    """How far the trajectory is the sequential one, and all of that."""
    solve = newton.start(recurrence)

    @without_checks
    def finish(progress):
        progress = solve.check(progress)
        return progress.num_good, solve.take_steps(progress).ys

    return finish(progress)


class _Run(NamedTuple):
    """All iterations, and the answer."""

    residuals: Float[np.ndarray, "iterations bins"]
    num_good_steps: Int[np.ndarray, " iterations"]
    guess: TrajectoryArray
    end: TrajectoryArray
    """What the iteration ended with."""
    answer: TrajectoryArray
    """The same, with what was not accepted computed sequentially."""
    other_solution_from: int | None
    """Where the iteration found another solution of the steps' equations."""


def _run(problem: Problem, max_iterations: int) -> _Run:
    recurrence, newton = problem.recurrence, problem.newton
    progress = _begin(newton, recurrence)
    guess = progress.ys
    starts = np.r_[0, bin_ends(recurrence.num_steps)[:-1]]
    residuals, num_good_steps = [], []
    for _ in range(max_iterations):
        progress, errors = _iterate(newton, recurrence, progress)
        residuals.append(np.maximum.reduceat(np.asarray(errors), starts))
        num_good_steps.append(int(progress.num_good))
        if num_good_steps[-1] == recurrence.num_steps or bool(progress.is_stuck):
            break
    num_right, answer = _finish(newton, recurrence, progress)
    return _Run(
        np.stack(residuals),
        np.asarray(num_good_steps),
        guess,
        progress.ys,
        answer,
        int(num_right) if int(num_right) < num_good_steps[-1] else None,
    )


# --- what comes of it ---------------------------------------------------------------


def _perturbation(problem: Problem, answer: TrajectoryArray) -> np.ndarray | None:
    """Growth from step to step; `None` where that takes too much memory."""
    recurrence = problem.recurrence
    exact = recurrence.choose(problem.newton.exact_linearisation)
    if not exact.fits(answer.shape[0], answer.shape[1], answer.dtype):
        return None
    growth = without_checks(lambda answer: log_growth(recurrence, exact, answer))
    return np.asarray(growth(answer), np.float64)


def _is_exact(problem: Problem) -> bool:
    """Whether the iteration used all of the Jacobian, and the exact one."""
    iterated_on, linearisation = problem.newton.choose(problem.recurrence)
    return linearisation.is_exact and iterated_on is problem.recurrence


def _first(mask: np.ndarray) -> int | None:
    return int(np.argmax(mask)) if np.any(mask) else None


def _error(ys: TrajectoryArray, answer: TrajectoryArray) -> float:
    """The largest error, relative to the largest value of each entry of the state."""
    error = np.max(np.abs(np.asarray(ys - answer)), axis=0)
    largest = np.max(np.abs(np.asarray(answer)), axis=0)
    return float(np.max(error[largest > 0] / largest[largest > 0], initial=0))


def _num_digits(problem: Problem) -> float:
    """Of the least precise entry of the state."""
    return -math.log10(max(problem.recurrence.eps))


def _most_growth(problem: Problem) -> float:
    """How many digits may be lost before rounding makes corrections too large.

    A correction passes that is right to half the digits; where tolerances are given
    any passes that has some.
    """
    newton = problem.newton
    is_default = newton.rtol is None and newton.atol is None
    return _num_digits(problem) / (2 if is_default else 1)


def _predict(problem: Problem, guess_error: float, growth: float) -> int | None:
    """See `diagnose`. An unknown growth is taken for none."""
    if growth > _most_growth(problem):
        return None
    # What is right to so many digits is rounding to the acceptance test.
    digits = _num_digits(problem) - math.log10(ROUNDING_UNITS)
    # No guess is so bad that one iteration makes nothing of it, or so it is hoped.
    right = max(-math.log10(guess_error), _WORST_GUESS) if guess_error > 0 else digits
    # A trajectory whose steps all pass may be off by that much, grown.
    if right >= digits - max(growth, 0):
        return 1
    return 1 + max(0, math.ceil(math.log2(digits / right)))


def diagnose(
    solve: Callable[..., Any], *args: Any, max_iterations: int = 32, **kwargs: Any
) -> Diagnosis:
    r"""Why a solve converges, or why it does not.

    Put it before a call that puzzles: `diagnose(diffeqsolve, terms, DEER(Tsit5()), 0,
    10, 0.01, y0)`. Plain Newton iterations over the whole interval are made and written
    down, from the guess and with the linearisation of the method that is given; windows
    and what else a method may do beside are left out. Where they do not converge the
    answer is finished one step after the other. With a tolerance the steps are those of
    the mesh that meets it ([`deer_ode.MeshRefinement`][]), which is found first.

    **The Lyapunov exponent** is the rate at which a small perturbation of the answer
    grows,

    $$v_i = A_i v_{i-1}, \qquad
    \lambda = \frac{1}{t_T - t_0} \sum_{i=1}^T \log \frac{|v_i|}{|v_{i-1}|},$$

    with the exact Jacobians $A_i$ along the answer, and per step for a recurrence. The
    first direction $v_0$ is not any but, to good accuracy, the one of largest growth,
    found by one pass backwards with $A_i^\top$; so the whole interval counts, and
    nothing is dropped as a transient. It is that of this trajectory and this interval:
    over a short one it may be far from the limit, and where perturbations grow slower
    than exponentially it is their average.

    **How many iterations** to expect follows from two figures. Newton's method doubles
    the right digits. Of $d$ digits that are asked for (13.9 in double, 5.1 in single
    precision) a guess with $d_0$ right takes

    $$1 + \lceil \log_2 (d / d_0) \rceil$$

    iterations; $d_0$ is taken to be 0.3 at least, and where it is $d$ less `growth`, to
    which rounding may add up, it takes one. And what is right must be recognised:
    rounding, which the problem makes larger by `growth` digits, has to stay below the
    largest correction that is accepted, which is half of the digits. Beyond that
    `predicted_iterations` is `None`: iterations then gain little more than steps
    would.

    On the problems of the [page on diagnoses](diagnose.md) that was within one
    iteration of the truth wherever the guess was right to 30% of the largest state.
    From a worse guess it is no more than what a fair one would take. The truth may be
    many times as much, one iteration for each step at worst, also where nothing is
    chaotic: digits double near the answer, and how near that is the answer does not
    tell. It holds for the exact Jacobian only.

    **Arguments:**

    - `solve`: [`deer_ode.diffeqsolve`][], [`deer_ode.scan`][] or
        [`deer_ode.solve_recurrence`][].
    - `*args`, `**kwargs`: those of its call. What does not change the steps (`saveat`,
        `event`, `adjoint`, `throw`) is not used.
    - `max_iterations`: the most iterations; that of the method is not used.

    **Returns:**

    A [`deer_ode.Diagnosis`][].

    **Raises:**

    - `ValueError`: for another `solve`; for a solver other than `DEER`, or one with
        `num_substeps`; for no steps at all; inside `jax.jit` and its like.
    - Whatever the call itself raises before anything is computed.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode import diagnose, scan
        >>> def logistic(y, rate):
        ...     return rate * y * (1 - y), None
        >>> found = diagnose(scan, logistic, jnp.array(0.3), jnp.full(200, 4.0))
        >>> found.converged, found.predicted_iterations
        (False, None)
        >>> round(found.lyapunov_exponent, 1)
        0.7
        >>> "Chaotic" in found.recommendation
        True

    ??? cite "References"

        Benettin, Galgani, Giorgilli, Strelcyn (1980), *Lyapunov characteristic
        exponents for smooth dynamical systems and for Hamiltonian systems; a method
        for computing all of them*, Meccanica 15, for the exponent.

        Gonzalez et al. (2025), *Predictability enables parallelization of nonlinear
        state space models*, arXiv:2508.16817, for what it has to do with the number of
        iterations.
    """
    if isinstance(max_iterations, bool) or not (
        isinstance(max_iterations, int) and max_iterations > 0
    ):
        raise ValueError(
            "`diagnose(..., max_iterations=...)` must be a positive integer; got "
            f"{max_iterations!r}."
        )
    problem = find_problem(solve, args, kwargs)
    return _report(problem, _run(problem, max_iterations))


def _report(problem: Problem, run: _Run) -> Diagnosis:
    points, num_good_steps = problem.points.astype(np.float64), run.num_good_steps
    num_steps = len(points) - 1
    first_nonfinite = _first(np.asarray(~jnp.isfinite(run.answer).all(axis=1)))
    horizon = growth = guess_error = end_error = math.nan
    if first_nonfinite is None:
        guess_error = _error(run.guess, run.answer)
        end_error = _error(run.end, run.answer)
        changes = _perturbation(problem, run.answer)
        if changes is not None:
            horizon, growth = float(np.sum(changes)), largest_growth(changes)
    is_known = first_nonfinite is None
    is_same = run.other_solution_from is None
    found = Diagnosis(
        residuals=run.residuals,
        times=points[bin_ends(num_steps)],
        start=float(points[0]),
        num_good_steps=num_good_steps,
        num_steps=num_steps,
        num_iterations=len(num_good_steps),
        converged=bool(num_good_steps[-1] == num_steps) and is_same,
        lyapunov_exponent=horizon / abs(float(points[-1] - points[0])),
        horizon=horizon,
        growth=growth,
        guess_error=guess_error,
        predicted_iterations=(
            _predict(problem, guess_error, growth) if is_known else None
        ),
        first_nonfinite=first_nonfinite,
        recommendation="",
        plan=problem.plan,
        unit=problem.unit,
        mesh_stats=problem.mesh_stats,
    )
    newton = problem.newton
    findings = Findings(
        end_error=end_error,
        most_growth=_most_growth(problem),
        is_equation=problem.unit == "time",
        is_exact=_is_exact(problem),
        has_own_tolerance=newton.rtol is not None or newton.atol is not None,
        other_solution_from=run.other_solution_from,
        too_large_from=(
            None if found.converged else _first(np.asarray(~is_reasonable(run.answer)))
        ),
    )
    return dataclasses.replace(found, recommendation=recommend(found, findings))
