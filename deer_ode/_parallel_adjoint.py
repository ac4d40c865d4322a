"""`ParallelAdjoint`: Diffrax's time loop, all of its steps at once.

Diffrax hands its whole loop to the adjoint. The stock loop does the set-up, runs a
while loop over steps, and finishes: root finding for events, the save at `t1`, results.
Given in place of the while loop a function that makes the loop's final state in
parallel, everything before and after it stays Diffrax's own.
"""

import functools as ft
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._counting import KnownSteps, is_subsaveat
from ._discretisation import Grid, discretise, tracing_steps
from ._failure import error_if_failed
from ._foreign import (
    State,
    advance,
    constant_steps,
    direction_of,
    even_steps,
    linear_rescale,
    run_loop,
    unvmap_any,
)
from ._implicit import give_derivatives, is_native, solve_trajectory
from ._misc import (
    StateFlattener,
    always,
    count_true,
    hold_last_good,
    leading_true,
    state_at,
    without_gradient,
)
from ._predictor import Trajectory
from ._programs import Program
from ._saving import SolvedGrid, save, set_where
from ._solver import DEER, DEERState


def _controller_grid(
    controller, state: State, t1, max_steps: int | None, known: KnownSteps | None
) -> Grid:
    """The steps that `controller` would make, known without solving anything."""
    if isinstance(controller, diffrax.StepTo):
        ts = jnp.asarray(controller.ts)
        num_steps = ts.shape[0] - 1
        if max_steps is not None:
            num_steps = min(num_steps, max_steps)
        # Through the state and not `ts` alone, since there Diffrax's check of the ends
        # hangs: what is not used is not checked.
        tnext = ts[1 : num_steps + 1].astype(jnp.result_type(t1)).at[0].set(state.tnext)
        tprev = jnp.concatenate([jnp.asarray(state.tprev)[None], tnext[:-1]])
        return Grid(tprev, tnext, jnp.ones(num_steps, bool))
    if not isinstance(controller, diffrax.ConstantStepSize):
        raise ValueError(
            "`ParallelAdjoint` solves for all steps at once, so they must be known "
            "beforehand: `ConstantStepSize()` or `StepTo(ts)`. With "
            f"`{type(controller).__name__}` use `DEER(solver, num_substeps=...)` and "
            "Diffrax's default adjoint: its steps are then solved window by window."
        )
    if max_steps is None:
        raise ValueError(
            "`ParallelAdjoint` needs to know at most how many steps there are: give "
            "`max_steps=...` (the number of steps is best), or use "
            "`deer_ode.diffeqsolve`, which counts them."
        )
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1; got {max_steps}.")
    if known is not None:
        first = jnp.minimum(state.tnext, t1)
        tprev, tnext = even_steps(state.tprev, first, t1, known.num_steps)
        return Grid(tprev, tnext, jnp.ones(known.num_steps, bool))
    tprev, tnext = constant_steps(state, t1, max_steps)
    return Grid(tprev, tnext, tprev < t1)


def _padded(states, max_steps: int | None):
    """As many whatever is known of the steps, so that they fit the next solve."""
    num_more = 0 if max_steps is None else max(max_steps - states.shape[0], 0)
    return jnp.pad(states, ((0, num_more), (0, 0)), mode="edge")


def _first_event(event, state: State, args, event_kwargs, grid: Grid, ys):
    """For each step the values of the conditions, and which of them was met first."""

    def values_and_mask(cond_fn, old, direction):
        values = jax.vmap(lambda t, y: cond_fn(t, y, args, **event_kwargs))(
            grid.tnext, ys
        )
        if values.dtype == bool:
            return values, values
        before = jnp.concatenate([jnp.asarray(old, values.dtype)[None], values[:-1]])
        if direction is None:
            return values, jnp.sign(before) != jnp.sign(values)
        if direction:
            return values, (before <= 0) & (values > 0)
        return values, (before > 0) & (values <= 0)

    pairs = jtu.tree_map(
        values_and_mask,
        event.cond_fn,
        state.event_values,
        event.direction,
        is_leaf=callable,
    )
    structure = jtu.tree_structure(event.cond_fn, is_leaf=callable)
    values, masks = jtu.tree_transpose(structure, jtu.tree_structure((0, 0)), pairs)
    had_event = jnp.zeros(grid.num_steps, bool)
    exclusive = []
    for mask in jtu.tree_leaves(masks):
        mask = mask & grid.active
        exclusive.append(mask & ~had_event)
        had_event = had_event | mask
    return values, jtu.tree_unflatten(structure, exclusive), had_event


def _check_conditions(discretised, trajectory, find_event, masks):
    """`masks`, with the checks in the conditions made as far as the solve goes."""
    active = discretised.grid.active
    first = lambda x: jax.vmap(lambda a, x_i: jnp.where(a, x_i, x[0]))(active, x)
    ys = jtu.tree_map(first, without_gradient(discretised.states(trajectory)))
    grid = discretised.grid
    ended = Grid(first(grid.tprev), first(grid.tnext), active)
    _, again, _ = find_event(ended, ys)
    holds = always(trajectory)
    return jtu.tree_map(lambda m, a: jnp.where(holds, m, a), masks, again)


def _error_if_failed(discretised, trajectory, is_failed, step, direction):
    """`trajectory`, unless `step` failed: then an error that says why."""
    recurrence = without_gradient(discretised.recurrence)
    start = state_at(recurrence.y0, lax.stop_gradient(trajectory), step)
    one = recurrence.part(step, 1, start)
    cause = lax.cond(
        unvmap_any(is_failed),
        lambda: one.cause_of_failure(),
        lambda: jnp.asarray(0, jnp.int32),
    )
    time = direction * discretised.grid.tprev[step]
    return error_if_failed(trajectory, is_failed, step, time, cause)


class _RunningMeter(diffrax.AbstractProgressMeter):
    """A meter that Diffrax has begun with, and will close."""

    meter: diffrax.AbstractProgressMeter
    state: PyTree[Array]

    def init(self):
        return self.state

    def step(self, state, progress):
        return self.meter.step(state, progress)

    def close(self, state):
        del state


def _all_steps(
    state: State,
    *,
    args,
    terms,
    solver: DEER,
    controller,
    event,
    event_kwargs,
    saveat,
    t0,
    t1,
    max_steps,
    throw: bool,
    progress_meter,
    guess,
    known: KnownSteps | None,
) -> tuple[State, dict]:
    """What Diffrax's loop would end with, and the statistics of getting there."""
    grid = _controller_grid(controller, state, t1, max_steps, known)
    method = solver.method
    if guess is not None and guess.shape[0] > 0:
        # What it has for the padding of another solve is not needed.
        guess = guess[: grid.num_steps]
        predictor = Trajectory(jax.vmap(StateFlattener(state.y).unflatten)(guess))
        method = method.start_from(predictor)
    meter_state = state.progress_meter_state
    shows_progress = not isinstance(progress_meter, diffrax.NoProgressMeter)
    if shows_progress:
        method = method.report_to(_RunningMeter(progress_meter, meter_state))
    # Whether a path reaches as far as the solve is seen once an event has ended that.
    discretised = discretise(
        solver.solver, terms, grid, state.y, args, is_checked=event is None
    )
    had_event = jnp.zeros(grid.num_steps, bool)
    if event is None:
        solution = solve_trajectory(discretised.recurrence, method)
        found = trajectory = solution.ys
    else:
        # First without derivatives, to see how far the solve goes: what comes after an
        # event may be as wild as it likes, and its derivatives with it.
        solution = solve_trajectory(
            without_gradient(discretised.recurrence), method, is_checked=False
        )
        found = solution.ys
        find_event = ft.partial(_first_event, event, state, args, event_kwargs)
        events = Program.of(find_event, grid, discretised.states(found))
        values, masks, had_event = without_gradient(
            events(grid, discretised.states(found))
        )
        discretised = discretised.until(leading_true(~had_event) + 1).checked()
        recurrence = discretised.recurrence
        if is_native(recurrence, method):
            trajectory = solve_trajectory(recurrence, method).ys
        else:
            found = hold_last_good(recurrence.y0, found, discretised.grid.active)
            trajectory = give_derivatives(
                recurrence,
                found,
                solution.num_good_steps,
                method.exact_linearisation,
                discretised.has_draws,
            )
        # Where it ended counts only if the steps up to there pass their checks.
        had_event = had_event & always(trajectory)
        if events.has_checks:
            masks = _check_conditions(discretised, trajectory, find_event, masks)
    recurrence = discretised.recurrence
    ys = discretised.states(trajectory)
    steps = discretised.take_steps(trajectory)

    # How many steps Diffrax would have made, and why no more.
    result = state.result
    is_running = result == diffrax.RESULTS.successful
    if known is None:
        is_running = is_running & (state.tprev < t1)
    num_steps = num_wanted = jnp.where(is_running, grid.num_active, 0)
    if steps.result is not None:
        failed = steps.result != diffrax.RESULTS.successful
        num_steps = jnp.minimum(
            num_steps, leading_true(~(failed & discretised.grid.active)) + 1
        )
        last = jnp.maximum(num_steps - 1, 0)
        result = diffrax.RESULTS.where(
            num_steps > 0, jtu.tree_map(lambda x: x[last], steps.result), result
        )
    event_fields = {}
    if event is not None:
        num_until_event = leading_true(~had_event) + 1
        is_event = num_until_event <= num_steps
        num_steps = jnp.minimum(num_steps, num_until_event)
        result = diffrax.RESULTS.where(is_event, diffrax.RESULTS.event_occurred, result)
    # Newton's method counts only as far as the solve goes: what comes after an event
    # may be as wild as it likes.
    num_until, is_short = num_steps, solution.num_good_steps < num_steps
    num_steps = jnp.minimum(num_steps, solution.num_good_steps)
    result = diffrax.RESULTS.where(
        is_short,
        diffrax.RESULTS.promote(method.result(solution, num_wanted)),
        result,
    )
    # Whether it is known while tracing that all steps are made.
    are_all = (
        known is not None and event is None and steps.result is None and method.fallback
    )
    if are_all:
        num_steps, result = jnp.asarray(grid.num_steps, jnp.int32), state.result

    if throw and not (steps.result is None and method.fallback):
        is_failed, step = is_short, solution.num_good_steps
        if steps.result is not None:
            step = jnp.where(is_short, step, jnp.maximum(num_until - 1, 0))
            is_failed = is_short | (failed[step] & discretised.grid.active[step])
        direction = direction_of(terms)
        trajectory = _error_if_failed(
            discretised, trajectory, is_failed, step, direction
        )
        ys = discretised.states(trajectory)

    made_any = num_steps > 0
    last = jnp.maximum(num_steps - 1, 0)
    at_last = lambda tree, otherwise: jtu.tree_map(
        lambda x, o: jnp.where(made_any, x[last], o), tree, otherwise
    )
    if event is not None:
        event_fields = dict(
            event_tprev=at_last(grid.tprev, state.event_tprev),
            event_tnext=at_last(grid.tnext, state.event_tnext),
            event_dense_info=at_last(steps.dense_info, state.event_dense_info),
            event_values=at_last(values, state.event_values),
            event_mask=at_last(masks, state.event_mask),
        )
    solved = SolvedGrid(
        grid,
        num_steps,
        state.y,
        ys,
        lambda ts, index: discretised.evaluate(trajectory, steps, ts, index),
        are_all,
    )
    subs, structure = jtu.tree_flatten(saveat.subs, is_leaf=is_subsaveat)
    saved = structure.flatten_up_to(state.save_state)
    counts = known.saved if known is not None else (None,) * len(subs)
    with tracing_steps():
        saved = [
            save(sub, count, buffers, solved, args)
            for sub, count, buffers in zip(subs, counts, saved, strict=True)
        ]
    save_state = jtu.tree_unflatten(structure, saved)
    num_made = count_true(solved.made())
    dense_fields = {}
    if saveat.dense:
        made = solved.made()
        dense_fields = dict(
            dense_ts=set_where(jnp.asarray(state.dense_ts), 1, made, grid.tnext),
            dense_infos=jtu.tree_map(
                lambda buffer, info: set_where(buffer, 0, made, info),
                state.dense_infos,
                steps.dense_info,
            ),
            dense_save_index=num_made,
        )
    tprev = at_last(grid.tnext, state.tprev)
    if shows_progress:
        fraction = linear_rescale(*lax.stop_gradient((t0, tprev, t1)))
        fraction = fraction.astype(jnp.result_type(float))
        meter_state = progress_meter.step(meter_state, fraction)
    made_jump = state.made_jump
    if not isinstance(made_jump, bool):
        made_jump = made_jump & ~made_any  # neither controller makes jumps
    final_state = State(
        y=recurrence.flattener.unflatten(
            state_at(
                recurrence.flattener.flatten(state.y),
                recurrence.states(trajectory),
                num_steps,
            )
        ),
        tprev=tprev,
        tnext=tprev,
        made_jump=made_jump,
        solver_state=DEERState(
            lax.stop_gradient(_padded(recurrence.states(found), max_steps)),
            state.solver_state.num_newton_steps + solution.num_newton_steps,
        ),
        controller_state=advance(controller, state.controller_state, num_made),
        progress_meter_state=meter_state,
        result=result,
        num_steps=state.num_steps + num_made,
        num_accepted_steps=state.num_accepted_steps + num_made,
        num_rejected_steps=state.num_rejected_steps,
        save_state=save_state,
        **(dict(dense_ts=None, dense_infos=None, dense_save_index=None) | dense_fields),
        **(dict.fromkeys(_EVENT_FIELDS) | event_fields),
    )
    nonfinite = solution.first_nonfinite_step
    indices = jnp.arange(grid.num_steps, dtype=jnp.int32)
    stats = dict(
        path=method.path(recurrence),
        **solution.stats(),
        # Neither padding nor what comes after an event counts.
        first_nonfinite_step=jnp.where(nonfinite < num_until, nonfinite, -1),
        num_fallback_steps=jnp.sum(
            solution.in_turn & (indices < num_steps),
            dtype=jnp.int32,
        ),
    )
    return final_state, stats


_EVENT_FIELDS = (
    "event_tprev",
    "event_tnext",
    "event_dense_info",
    "event_values",
    "event_mask",
)


class AbstractParallelAdjoint(diffrax.AbstractAdjoint):
    """All steps of Diffrax's loop at once."""

    takes_all_steps: ClassVar[bool] = True

    known: eqx.AbstractVar[KnownSteps | None]
    """The steps, if it is known while tracing that all of them are made."""

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ):
        del passed_controller_state
        if type(solver) is not DEER:
            raise ValueError(
                "`ParallelAdjoint` needs a solver that takes its steps in parallel: "
                f"`DEER({type(solver).__name__}(...))` in place of "
                f"`{type(solver).__name__}(...)`."
            )
        if solver.num_substeps is not None:
            raise ValueError(
                "`DEER(..., num_substeps=...)` is for Diffrax's own adjoints, which "
                "solve window by window. Leave out `num_substeps`, or leave out "
                "`ParallelAdjoint`."
            )
        event_kwargs = dict(
            terms=terms,
            solver=solver,
            t0=t0,
            t1=t1,
            dt0=dt0,
            saveat=saveat,
            stepsize_controller=stepsize_controller,
            max_steps=max_steps,
        )

        def all_steps(init_state):
            return _all_steps(
                init_state,
                args=args,
                terms=terms,
                solver=solver,
                controller=stepsize_controller,
                event=event,
                event_kwargs=event_kwargs,
                saveat=saveat,
                t0=t0,
                t1=t1,
                max_steps=max_steps,
                throw=throw,
                progress_meter=progress_meter,
                guess=init_state.solver_state.ys if passed_solver_state else None,
                known=self.known,
            )

        return run_loop(
            self,
            all_steps,
            args=args,
            terms=terms,
            solver=solver,
            stepsize_controller=stepsize_controller,
            event=event,
            saveat=saveat,
            t0=t0,
            t1=t1,
            dt0=dt0,
            max_steps=max_steps,
            init_state=init_state,
            progress_meter=progress_meter,
        )


class ParallelAdjoint(AbstractParallelAdjoint):
    r"""Makes `diffrax.diffeqsolve` take all its steps in parallel.

    `diffrax.diffeqsolve(terms, DEER(solver), ..., adjoint=ParallelAdjoint(),
    max_steps=...)` gives the solution of `solver` on the same steps, with everything
    that Diffrax's `Solution` has. Its `stats` also hold

    - `path`: `"newton"`, or `"sequential"` where [`deer_ode.Auto`][] chose a loop over
        the steps;
    - `num_newton_steps`: iterations of Newton's method, over windows of the interval or
        all of it; zero for sequential steps;
    - `newton_residual`: the largest residual of the converged steps, in units of the
        state, before the last correction;
    - `newton_damping`: the largest $\lambda$ of [`deer_ode.LevenbergMarquardt`][];
    - `num_windows`: how often a window moved on, and one;
    - `num_fallback_steps`: how many steps were sequential;
    - `first_nonfinite_step`: the first step to a state that is not finite, counted from
        zero; -1 if there is none.

    The steps must be known beforehand: `ConstantStepSize()` or `StepTo(ts)`. With the
    former the solve is sized for `max_steps` steps, and pays for those that are not
    needed: give the true number. [`deer_ode.diffeqsolve`][] does so by itself.

    Derivatives are exact, those of the discrete solution, forward and reverse and to
    any order, by the implicit function theorem, for which only the trajectory is kept;
    or, where the steps are sequential, JAX's own of the loop over them, for which only
    the trajectory is kept as well.
    """

    known: ClassVar[None] = None


class CountedSteps(AbstractParallelAdjoint):
    """As [`deer_ode.ParallelAdjoint`][], for steps that are known.

    Nothing need be done for steps that may not be there, which is a tenth of the time
    of a loop over cheap ones, and `max_steps` may be larger. What is saved where steps
    end is not interpolated.
    """

    known: KnownSteps = eqx.field(static=True)
