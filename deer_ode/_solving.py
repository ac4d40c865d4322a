"""All steps of Diffrax's loop at once: the solve, how far it goes, and its error."""

import functools as ft
from typing import Any, NamedTuple

import diffrax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from ._custom_types import Mask, Trajectory
from ._discretisation import Discretised, Grid, Steps
from ._events import Events, check_conditions, find_events
from ._failure import error_if_failed
from ._foreign import LoopState, direction_of, unvmap_any
from ._grid import LoopInputs
from ._implicit import give_derivatives, is_native, solve_trajectory
from ._method import AbstractMethod, TrajectorySolution, sequential_solution
from ._misc import always, hold_last_good, leading_true, state_at, without_gradient
from ._programs import Program
from ._refinement import Refined


class Solved(NamedTuple):
    """All steps of a grid, solved."""

    grid: Grid
    """All steps of the controller."""
    discretised: Discretised
    """What was solved; its own grid ends at the first event."""
    method: AbstractMethod
    solution: TrajectorySolution
    found: Trajectory
    """The trajectory without derivatives."""
    trajectory: Trajectory
    steps: Steps
    events: Events | None
    refined: Refined | None
    """How the grid was found, if it follows from a tolerance."""

    @property
    def failed(self) -> Mask | None:
        """Which steps failed; `None` where no step of the solver can."""
        if self.steps.result is None:
            return None
        failed = self.steps.result != diffrax.RESULTS.successful
        failed = failed & self.discretised.grid.active
        if self.refined is None or self.refined.sequential is None:
            return failed
        # Sequential steps succeeded when their lengths were chosen. When they are
        # recomputed, a root finder may miss its tolerance by rounding.
        steps = jnp.arange(failed.shape[0], dtype=jnp.int32)
        return failed & (steps >= self.refined.num_accurate)

    @property
    def always_succeeds(self) -> bool:
        is_sure = self.steps.result is None and self.method.fallback
        return is_sure and self.refined is None


def solve(
    inputs: LoopInputs,
    state: LoopState,
    discretised: Discretised,
    method: AbstractMethod,
    refined: Refined | None = None,
) -> Solved:
    """Solves for all steps, or for all up to the first event. With `refined` they have
    been solved for, without derivatives.
    """
    grid, events = discretised.grid, None
    solution: Any = _found_before(discretised, method, refined)
    if inputs.event is None and solution is None:
        solution = solve_trajectory(discretised.recurrence, method)
        found = trajectory = solution.ys
    elif inputs.event is None:
        found, trajectory = _with_derivatives(discretised, method, solution)
    else:
        # First without derivatives, to see how far the solve goes: states after the
        # event may be non-finite, and their derivatives with them.
        if solution is None:
            solution = solve_trajectory(
                without_gradient(discretised.recurrence), method, is_checked=False
            )
        find = ft.partial(find_events, inputs, state)
        conditions = Program.of(find, grid, discretised.states(solution.ys))
        events = without_gradient(conditions(grid, discretised.states(solution.ys)))
        discretised = discretised.until(leading_true(~events.happened) + 1).checked()
        found, trajectory = _with_derivatives(discretised, method, solution)
        # Where it ended counts only if the steps up to there pass their checks.
        events = events._replace(happened=events.happened & always(trajectory))
        if conditions.has_checks:
            events = check_conditions(events, find, discretised, trajectory)
    return Solved(
        grid=grid,
        discretised=discretised,
        method=method,
        solution=solution,
        found=found,
        trajectory=trajectory,
        steps=discretised.take_steps(trajectory),
        events=events,
        refined=refined,
    )


def _found_before(
    discretised: Discretised, method: AbstractMethod, refined: Refined | None
) -> TrajectorySolution | None:
    """What the search for steps solved already."""
    if refined is None or refined.solution is not None:
        return None if refined is None else refined.solution
    recurrence = discretised.recurrence
    if refined.sequential is None or not is_native(recurrence, method):
        return None
    if recurrence.y0.size == 0:
        return None
    ys = recurrence.flatten(refined.sequential.states)
    return sequential_solution(ys, only_finite=not method.fallback)


def _with_derivatives(
    discretised: Discretised, method: AbstractMethod, solution: TrajectorySolution
) -> tuple[Trajectory, Trajectory]:
    """The trajectory up to the end of the grid, without and with derivatives."""
    recurrence = discretised.recurrence
    found = hold_last_good(recurrence.y0, solution.ys, discretised.grid.active)
    trajectory = give_derivatives(
        recurrence,
        found,
        solution.num_good_steps,
        method,
        discretised.has_draws,
    )
    return found, trajectory


class Outcome(NamedTuple):
    """How many steps Diffrax would have made, and why no more."""

    num_steps: Int[Array, ""]
    result: Any
    num_until: Int[Array, ""]
    """Where the solve would have ended if Newton's method had found all steps."""
    is_short: Bool[Array, ""]
    """Whether it did not find all of these."""
    are_all_made: bool
    """Whether it is known while tracing that all steps are made."""


def find_outcome(inputs: LoopInputs, state: LoopState, solved: Solved) -> Outcome:
    result = state.result
    is_running = result == diffrax.RESULTS.successful
    if inputs.known is None:
        is_running = is_running & (state.tprev < inputs.t1)
    num_steps = num_wanted = jnp.where(is_running, solved.grid.num_active, 0)
    if (failed := solved.failed) is not None:
        num_steps = jnp.minimum(num_steps, leading_true(~failed) + 1)
        last = jnp.maximum(num_steps - 1, 0)
        result_of_last = jtu.tree_map(lambda x: x[last], solved.steps.result)
        result = diffrax.RESULTS.where(num_steps > 0, result_of_last, result)
    if solved.events is not None:
        num_until_event = leading_true(~solved.events.happened) + 1
        is_event = num_until_event <= num_steps
        num_steps = jnp.minimum(num_steps, num_until_event)
        result = diffrax.RESULTS.where(is_event, diffrax.RESULTS.event_occurred, result)
    # Newton's method counts only as far as the solve goes: states after an event may
    # be non-finite.
    num_good = solved.solution.num_good_steps
    num_until, is_short = num_steps, num_good < num_steps
    num_steps = jnp.minimum(num_steps, num_good)
    shortfall = solved.method.result(solved.solution, num_wanted)
    result = diffrax.RESULTS.where(is_short, diffrax.RESULTS.promote(shortfall), result)
    if solved.refined is not None:
        num_accurate = solved.refined.num_accurate
        is_inaccurate = num_accurate < num_steps
        num_steps = jnp.minimum(num_steps, num_accurate)
        too_short = diffrax.RESULTS.dt_min_reached
        result = diffrax.RESULTS.where(is_inaccurate, too_short, result)
    are_all_made = (
        inputs.known is not None and inputs.event is None and solved.always_succeeds
    )
    if are_all_made:
        num_steps = jnp.asarray(solved.grid.num_steps, jnp.int32)
        result = state.result
    return Outcome(num_steps, result, num_until, is_short, are_all_made)


def raise_failure(inputs: LoopInputs, solved: Solved, outcome: Outcome) -> Solved:
    """`solved`, unless a step failed: then an error that says which one, and why."""
    is_failed, step = outcome.is_short, solved.solution.num_good_steps
    if (failed := solved.failed) is not None:
        last = jnp.maximum(outcome.num_until - 1, 0)
        step = jnp.where(outcome.is_short, step, last)
        # An event in the step that failed ends the solve before its failure counts.
        is_failed = outcome.is_short | (failed[step] & ~diffrax.is_okay(outcome.result))
    recurrence = without_gradient(solved.discretised.recurrence)
    start = state_at(recurrence.y0, lax.stop_gradient(solved.trajectory), step)
    one = recurrence.part(step, 1, start)
    cause = lax.cond(
        unvmap_any(is_failed),
        lambda: one.cause_of_failure(),
        lambda: jnp.asarray(0, jnp.int32),
    )
    time = direction_of(inputs.terms) * solved.discretised.grid.tprev[step]
    trajectory = error_if_failed(solved.trajectory, is_failed, step, time, cause)
    return solved._replace(trajectory=trajectory)
