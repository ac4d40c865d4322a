"""Why a solve needs the iterations that it needs.

Newton's method is run on its own, one iteration after the other, and written down. Then
a perturbation is sent along the answer (`_growth`). How it grows says how hard the
problem is for any method that is parallel in time: an error early in a trajectory is so
many times as large later.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax._term import WrapTerm
from jaxtyping import Array, Float, Int

from ._auto import Auto
from ._custom_types import Trajectory as TrajectoryArray
from ._damping import Undamped
from ._diagnosis import Diagnosis, Findings, bin_ends, recommend
from ._discretisation import (
    AbstractImplicitTerm,
    Grid,
    consistent_initial_values,
    discretise,
)
from ._growth import largest_growth, log_growth
from ._integrate import diffeqsolve
from ._linearisation import AbstractLinearisation, Dense, Exact
from ._method import AbstractMethod
from ._misc import StateFlattener, hold_last_good, is_reasonable, leading_true
from ._newton import ROUNDING_UNITS, Newton
from ._predictor import AbstractPredictor, Trajectory
from ._recurrence import AbstractRecurrence
from ._scan import make_recurrence, scan, solve_recurrence
from ._solver import DEER


# A guess with fewer digits right than this is as good as none: it is off by half of
# the largest state.
_WORST_GUESS = 0.3


# --- what is asked for --------------------------------------------------------------


class _Problem(NamedTuple):
    """A recurrence, where its steps are, and how to iterate."""

    recurrence: AbstractRecurrence
    newton: Newton
    points: np.ndarray
    """Where each step starts, and where the last one ends."""
    unit: str
    """What `points` count: time or steps."""


def _plain(method: AbstractMethod, guess: AbstractPredictor | None) -> Newton:
    """Newton's method as `method` has it, without what helps it."""
    newton = method.newton if isinstance(method, Auto) else method
    if not isinstance(newton, Newton):
        newton = Newton(guess=method.guess)
    newton = dataclasses.replace(newton, damping=Undamped(), window=None)
    return newton if guess is None else newton.start_from(guess)


def _check_concrete(arguments: dict) -> None:
    for name, value in arguments.items():
        if any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(value)):
            raise ValueError(
                f"`diagnose` looks at numbers, but `{name}` is traced: call it outside "
                "`jax.jit`, `jax.vmap` and `jax.grad`, on one example."
            )


def _check_solver(solver) -> None:
    if type(solver) is not DEER:
        raise ValueError(
            "`diagnose` looks at solves that are parallel in time: "
            f"`DEER({type(solver).__name__}())` in place of "
            f"`{type(solver).__name__}()`."
        )
    if solver.num_substeps is not None:
        raise ValueError(
            "`diagnose` looks at a whole interval at once, not at the windows of "
            f"`DEER(..., num_substeps={solver.num_substeps})`. Leave `num_substeps` "
            "out, and give one window as the interval (`t0`, `t1`) and one of its "
            "sub-steps as `dt0`."
        )


def _check_controller(controller) -> None:
    if not isinstance(controller, diffrax.ConstantStepSize | diffrax.StepTo):
        raise ValueError(
            "`diagnose` needs to know the steps beforehand: `ConstantStepSize()` or "
            f"`StepTo(ts)`; got `{type(controller).__name__}(...)`. The steps that it "
            "would choose come from a sequential solve with `SaveAt(t0=True, "
            "steps=True)`: give its `ts` to `StepTo`."
        )


def _even_points(t0, t1, dt0, dtype) -> np.ndarray:
    """Diffrax's rule: the first step is `dt0` long, the others divide evenly."""
    length = abs(t1 - t0)
    # The next number, so that rounding of `dt0` makes no extra step.
    longest = np.nextafter(abs(dt0), dtype.type(np.inf))
    count = max(1, int(np.ceil(length / longest)))
    points = t0 + (t1 - t0) * (np.arange(count + 1).astype(dtype) / dtype.type(count))
    points[-1] = t1
    if count > 1:
        points[1] = t0 + dt0
    return points


def _given_points(ts, t0, t1) -> np.ndarray:
    direction = 1 if t0 < t1 else -1
    if ts[0] != t0 or ts[-1] != t1 or not np.all(np.diff(ts) * direction > 0):
        raise ValueError(
            "`StepTo(ts)` must go from `t0` to `t1` without turning back; got "
            f"t0={t0}, t1={t1} and ts={ts}."
        )
    return ts


def _points(arguments: dict) -> np.ndarray:
    """The grid as Diffrax makes it, forwards or backwards in time."""
    controller = arguments["stepsize_controller"]
    t0, t1, dt0 = (arguments[name] for name in ("t0", "t1", "dt0"))
    saveat = arguments["saveat"]
    subs = jtu.tree_leaves(saveat.subs, is_leaf=lambda x: hasattr(x, "ts"))
    given = [t0, t1, dt0, *(sub.ts for sub in subs)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(t for t in given if t is not None))
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    dtype = np.dtype(dtype)
    t0, t1 = dtype.type(t0), dtype.type(t1)
    if t0 == t1 or not np.isfinite(t1 - t0):
        raise ValueError(
            f"`diagnose` needs an interval of finite length; got t0={t0}, t1={t1}."
        )
    if isinstance(controller, diffrax.StepTo):
        return _given_points(np.asarray(controller.ts).astype(dtype), t0, t1)
    return _even_points(t0, t1, dtype.type(dt0), dtype)


def _differential_equation(arguments: dict) -> _Problem:
    solver = arguments["solver"]
    points = _points(arguments)
    args, terms, y0 = (arguments[name] for name in ("args", "terms", "y0"))
    if isinstance(terms, AbstractImplicitTerm):
        y0 = consistent_initial_values(terms, arguments["t0"], y0, args).y0
    with jax.numpy_dtype_promotion("standard"):
        y0 = jtu.tree_map(
            lambda y: jnp.asarray(y, jnp.result_type(y, points.dtype)), y0
        )
    # Time runs forwards for Diffrax's solvers; the terms know better.
    direction = jnp.where(points[0] < points[-1], 1, -1)
    terms = jtu.tree_map(
        lambda term: WrapTerm(term, direction),
        terms,
        is_leaf=lambda x: (
            isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)
        ),
    )
    grid = Grid.from_points(jnp.asarray(points) * direction)
    recurrence = discretise(solver.solver, terms, grid, y0, args).recurrence
    guess = None
    if arguments["solver_state"] is not None:
        ys = arguments["solver_state"].ys
        if ys.shape[0] > 0:
            guess = Trajectory(jax.vmap(StateFlattener(y0).unflatten)(ys))
    return _Problem(recurrence, _plain(solver.method, guess), points, "time")


def _recurrence(arguments: dict) -> _Problem:
    f, init, xs, length, reverse, guess = (
        arguments[name] for name in ("f", "init", "xs", "length", "reverse", "guess")
    )
    carry, _ = jax.eval_shape(lambda init: lax.scan(f, init, xs, length), init)
    init = jtu.tree_map(lambda x, s: jnp.asarray(x, s.dtype), init, carry)
    xs = jtu.tree_map(jnp.asarray, xs)
    num_steps = jtu.tree_leaves(xs)[0].shape[0] if length is None else int(length)
    if num_steps == 0 or len(jtu.tree_leaves(init)) == 0:
        raise ValueError(
            f"There is nothing to diagnose: {num_steps} steps of a carry of "
            f"{len(jtu.tree_leaves(init))} arrays."
        )
    if guess is not None and not isinstance(guess, AbstractPredictor):
        guess = Trajectory(guess)
    points = np.arange(-1.0, num_steps)
    if reverse:
        flip = lambda tree: jtu.tree_map(lambda x: x[::-1], tree)
        points = num_steps - 1 - points
        xs, guess = flip(xs), flip(guess) if isinstance(guess, Trajectory) else guess
    recurrence = make_recurrence(f, init, xs, num_steps)
    return _Problem(recurrence, _plain(arguments["method"], guess), points, "step")


def _problem(solve, args, kwargs) -> _Problem:
    is_equation = solve is diffeqsolve
    if not is_equation and solve is not scan and solve is not solve_recurrence:
        raise ValueError(
            "`diagnose(solve, ...)` takes `deer_ode.diffeqsolve`, `deer_ode.scan` or "
            f"`deer_ode.solve_recurrence` and the arguments of its call; got {solve!r}."
        )
    bound = inspect.signature(solve).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    _check_concrete(arguments)
    if is_equation:
        _check_solver(arguments["solver"])
        _check_controller(arguments["stepsize_controller"])
    # The errors are those of the call because it is the call that is checked.
    eqx.filter_eval_shape(lambda: solve(*args, **kwargs))
    return _differential_equation(arguments) if is_equation else _recurrence(arguments)


# --- the iteration ------------------------------------------------------------------


class _Iteration(NamedTuple):
    """What one iteration made, and what it saw before it."""

    ys: TrajectoryArray
    errors: Float[Array, " bins"]
    num_good: Int[Array, ""]
    stuck: Any


def _largest_in_bins(errors):
    ends = bin_ends(errors.shape[0])
    which = np.searchsorted(ends, np.arange(errors.shape[0]), side="right")
    # A segment's maximum passes NaN over.
    largest = jax.ops.segment_max(
        jnp.where(jnp.isnan(errors), -jnp.inf, errors),
        jnp.asarray(which),
        len(ends),
        indices_are_sorted=True,
    )
    has_nan = jax.ops.segment_max(
        jnp.isnan(errors).astype(jnp.int32), jnp.asarray(which), len(ends)
    )
    return jnp.where(has_nan > 0, jnp.nan, largest)


@eqx.filter_jit
def _start(newton: Newton, recurrence: AbstractRecurrence):
    ys = newton.guess(recurrence).astype(recurrence.y0.dtype)
    return hold_last_good(recurrence.y0, ys, is_reasonable(ys))


@eqx.filter_jit
def _iterate(
    newton: Newton,
    recurrence: AbstractRecurrence,
    linearisation: AbstractLinearisation,
    ys: TrajectoryArray,
) -> _Iteration:
    largest, undamped = jnp.abs(recurrence.y0), jnp.zeros((), ys.dtype)
    none = jnp.asarray(0, jnp.int32)
    updated = newton.update(linearisation, recurrence, ys, largest, undamped, none)
    num_good, num_steps = leading_true(updated.good), recurrence.num_steps
    # From a state that is right the next step is not a number: nor is the answer.
    next_residual = updated.residual[jnp.minimum(num_good, num_steps - 1)]
    stuck = (num_good < num_steps) & ~jnp.all(jnp.isfinite(next_residual))
    return _Iteration(updated.ys, _largest_in_bins(updated.error), num_good, stuck)


class _Run(NamedTuple):
    """All iterations, and the answer."""

    residuals: Float[np.ndarray, "iterations bins"]
    num_good_steps: Int[np.ndarray, " iterations"]
    guess: TrajectoryArray
    end: TrajectoryArray
    """What the iteration ended with."""
    answer: TrajectoryArray
    """The same, with what was not accepted computed one after the other."""
    other_solution_from: int | None
    """Where the iteration found another solution of the steps' equations."""


@eqx.filter_jit
def _finish(recurrence: AbstractRecurrence, ys, num_good):
    """The steps after the first `num_good`, one after the other."""

    def step(y, inputs):
        index, known = inputs
        y = lax.cond(index < num_good, lambda: known, lambda: recurrence.step(index, y))
        return y, y

    indices = jnp.arange(recurrence.num_steps, dtype=jnp.int32)
    return lax.scan(step, recurrence.y0, (indices, ys))[1]


def _run(problem: _Problem, max_iterations: int) -> _Run:
    recurrence, newton = problem.recurrence, problem.newton
    num_steps, state_size = recurrence.num_steps, recurrence.y0.shape[0]
    linearisation = recurrence.choose(newton.linearisation)
    linearisation.check_size(num_steps, state_size, recurrence.y0.dtype)
    guess = ys = _start(newton, recurrence)
    residuals, num_good_steps = [], []
    for _ in range(max_iterations):
        made = _iterate(newton, recurrence, linearisation, ys)
        ys = made.ys
        residuals.append(np.asarray(made.errors))
        num_good_steps.append(int(made.num_good))
        if num_good_steps[-1] == num_steps or bool(made.stuck):
            break
    num_right = num_good_steps[-1]
    is_answer = recurrence.is_sequential_answer(ys)
    if is_answer is not None:
        num_right = min(num_right, int(leading_true(is_answer)))
    answer = ys
    if num_right < num_steps:
        answer = _finish(recurrence, ys, jnp.asarray(num_right, jnp.int32))
    return _Run(
        np.stack(residuals),
        np.asarray(num_good_steps),
        guess,
        ys,
        answer,
        num_right if num_right < num_good_steps[-1] else None,
    )


# --- what comes of it ---------------------------------------------------------------


def _perturbation(problem: _Problem, answer: TrajectoryArray) -> np.ndarray | None:
    """Growth from step to step; `None` where that takes too much memory."""
    recurrence, linearisation = problem.recurrence, problem.newton.linearisation
    is_exact = isinstance(linearisation, Dense | Exact)
    exact = recurrence.choose(linearisation if is_exact else Exact())
    try:
        exact.check_size(answer.shape[0], answer.shape[1], answer.dtype)
    except ValueError:
        return None
    return np.asarray(log_growth(recurrence, exact, answer), np.float64)


def _first(mask: np.ndarray) -> int | None:
    return int(np.argmax(mask)) if np.any(mask) else None


def _error(ys: TrajectoryArray, answer: TrajectoryArray) -> float:
    """The largest error, relative to the largest value of each entry of the state."""
    error = np.max(np.abs(np.asarray(ys - answer)), axis=0)
    largest = np.max(np.abs(np.asarray(answer)), axis=0)
    return float(np.max(error[largest > 0] / largest[largest > 0], initial=0))


def _num_digits(problem: _Problem) -> float:
    """Of the least precise entry of the state."""
    return -math.log10(max(problem.recurrence.eps))


def _most_growth(problem: _Problem) -> float:
    """How many digits may be lost before rounding makes corrections too large.

    A correction passes that is right to half the digits; where tolerances are given
    any passes that has some.
    """
    newton = problem.newton
    is_default = newton.rtol is None and newton.atol is None
    return _num_digits(problem) / (2 if is_default else 1)


def _predict(problem: _Problem, guess_error: float, growth: float) -> int | None:
    """See `diagnose`. An unknown growth is taken for none."""
    if growth > _most_growth(problem):
        return None
    # What is right to so many digits is rounding to the acceptance test.
    digits = _num_digits(problem) - math.log10(ROUNDING_UNITS)
    # No guess is so bad that one iteration makes nothing of it, or so it is hoped.
    right = max(-math.log10(guess_error), _WORST_GUESS) if guess_error > 0 else digits
    return 1 + max(0, math.ceil(math.log2(digits / right)))


def diagnose(
    solve: Callable[..., Any], *args: Any, max_iterations: int = 32, **kwargs: Any
) -> Diagnosis:
    r"""Why a solve converges, or why it does not.

    Put it before a call that puzzles: `diagnose(diffeqsolve, terms, DEER(Tsit5()), 0,
    10, 0.01, y0)`. Plain Newton iterations over the whole interval are made and written
    down, from the guess and with the linearisation of the method that is given; windows
    and what else a method may do beside are left out. Where they do not converge the
    answer is finished one step after the other.

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

    iterations; $d_0$ is taken to be 0.3 at least. And what is right must be recognised:
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
        `num_substeps`; for steps that are not known beforehand; for no steps at all;
        inside `jax.jit` and its like.
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
    problem = _problem(solve, args, kwargs)
    return _report(problem, _run(problem, max_iterations))


def _report(problem: _Problem, run: _Run) -> Diagnosis:
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
        unit=problem.unit,
    )
    newton = problem.newton
    findings = Findings(
        end_error=end_error,
        most_growth=_most_growth(problem),
        is_equation=problem.unit == "time",
        is_exact=isinstance(newton.linearisation, Dense | Exact),
        has_own_tolerance=newton.rtol is not None or newton.atol is not None,
        other_solution_from=run.other_solution_from,
        too_large_from=_first(np.asarray(~is_reasonable(run.answer))),
    )
    return dataclasses.replace(found, recommendation=recommend(found, findings))
