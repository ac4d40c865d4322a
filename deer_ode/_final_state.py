"""The state in which Diffrax's loop would have ended, and statistics of the solve."""

from typing import Any

import diffrax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._counting import is_subsaveat
from ._custom_types import Trajectory
from ._discretisation import tracing_steps
from ._foreign import LoopState, advance, linear_rescale, nextafter
from ._grid import LoopInputs
from ._mesh import as_mesh_refinement
from ._misc import count_true, select
from ._refinement import Refined
from ._saving import SolvedGrid, save, set_where
from ._solver import DEERState
from ._solving import Outcome, Solved


def final_state(
    inputs: LoopInputs, state: LoopState, solved: Solved, outcome: Outcome
) -> LoopState:
    grid = _solved_grid(state, solved, outcome)
    num_made = count_true(grid.made())
    tprev = _at_last(outcome.num_steps, solved.grid.ends, state.tprev)
    controller_state = advance(
        inputs.stepsize_controller, state.controller_state, num_made
    )
    num_rejected = 0
    if solved.refined is not None and solved.refined.sequential is not None:
        controller_state, num_tried = _after_steps(state, solved.refined, outcome)
        num_rejected = num_tried - num_made
    return LoopState(
        y=_at_last(outcome.num_steps, grid.ys, state.y),
        tprev=tprev,
        tnext=tprev,
        made_jump=jnp.where(
            outcome.num_steps > 0, _is_jump(inputs, tprev), state.made_jump
        ),
        solver_state=_solver_state(inputs, state, solved),
        controller_state=controller_state,
        progress_meter_state=_meter_state(inputs, state, tprev),
        result=outcome.result,
        num_steps=state.num_steps + num_made + num_rejected,
        num_accepted_steps=state.num_accepted_steps + num_made,
        num_rejected_steps=state.num_rejected_steps + num_rejected,
        save_state=_save_all(inputs, state, grid),
        **_dense_fields(inputs, state, solved, grid),
        **_event_fields(state, solved, outcome),
    )


def _after_steps(state: LoopState, refined: Refined, outcome: Outcome):
    """The controller's state in the end, and how many steps it had tried."""
    sequential = refined.sequential
    assert sequential is not None
    end = sequential.controller_state, refined.num_guess_steps
    if sequential.after is None:
        return end
    before = state.controller_state, jnp.zeros_like(refined.num_guess_steps)
    at_event = _at_last(outcome.num_steps, sequential.after, before)
    return select(outcome.result == diffrax.RESULTS.event_occurred, at_event, end)


def _is_jump(inputs: LoopInputs, t) -> Bool[Array, ""]:
    """Whether a step that ends at `t` ends at a jump, or just beyond it."""
    mesh = as_mesh_refinement(inputs.stepsize_controller)
    if mesh is None or mesh.jump_ts is None:
        return jnp.asarray(False)
    jump_ts = mesh.jump_ts.astype(t.dtype)
    return jnp.any((t == jump_ts) | (t == nextafter(jump_ts)))


def _at_last(num_steps: Int[Array, ""], tree: PyTree, otherwise: PyTree) -> PyTree:
    """What `tree` has for the last step that is made; `otherwise` where none is."""
    last = jnp.maximum(num_steps - 1, 0)
    return jtu.tree_map(
        lambda x, o: jnp.where(num_steps > 0, x[last], o), tree, otherwise
    )


def _solved_grid(state: LoopState, solved: Solved, outcome: Outcome) -> SolvedGrid:
    discretised, trajectory, steps = solved.discretised, solved.trajectory, solved.steps
    return SolvedGrid(
        solved.grid,
        outcome.num_steps,
        state.y,
        discretised.states(trajectory),
        lambda ts, index: discretised.evaluate(trajectory, steps, ts, index),
        outcome.are_all_made,
    )


def _solver_state(inputs: LoopInputs, state: LoopState, solved: Solved) -> DEERState:
    ys = solved.discretised.recurrence.states(solved.found)
    return DEERState(
        lax.stop_gradient(_padded(ys, inputs.max_steps)),
        state.solver_state.num_newton_steps + solved.solution.num_newton_steps,
    )


def _padded(
    states: Trajectory, max_steps: int | None
) -> Float[Array, "max_steps state"]:
    """With the last state repeated, one row for each step of `max_steps`: the shape
    does not depend on whether steps were counted.
    """
    num_more = 0 if max_steps is None else max(max_steps - states.shape[0], 0)
    return jnp.pad(states, ((0, num_more), (0, 0)), mode="edge")


def _meter_state(inputs: LoopInputs, state: LoopState, tprev: Float[Array, ""]) -> Any:
    if not inputs.shows_progress:
        return state.progress_meter_state
    times = lax.stop_gradient((inputs.t0, tprev, inputs.t1))
    fraction = linear_rescale(*times).astype(jnp.result_type(float))
    return inputs.progress_meter.step(state.progress_meter_state, fraction)


def _save_all(inputs: LoopInputs, state: LoopState, grid: SolvedGrid) -> PyTree:
    subs, structure = jtu.tree_flatten(inputs.saveat.subs, is_leaf=is_subsaveat)
    buffers = structure.flatten_up_to(state.save_state)
    counts = (None,) * len(subs) if inputs.known is None else inputs.known.saved
    with tracing_steps():
        saved = [
            save(*each, grid, inputs.args)
            for each in zip(subs, counts, buffers, strict=True)
        ]
    return jtu.tree_unflatten(structure, saved)


def _dense_fields(
    inputs: LoopInputs, state: LoopState, solved: Solved, grid: SolvedGrid
) -> dict[str, Any]:
    if not inputs.saveat.dense:
        return dict(dense_ts=None, dense_infos=None, dense_save_index=None)
    made = grid.made()
    ts = jnp.asarray(state.dense_ts)
    return dict(
        dense_ts=set_where(ts, 1, made, solved.grid.ends),
        dense_infos=jtu.tree_map(
            lambda buffer, info: set_where(buffer, 0, made, info),
            state.dense_infos,
            solved.steps.dense_info,
        ),
        dense_save_index=count_true(made),
    )


def _event_fields(state: LoopState, solved: Solved, outcome: Outcome) -> dict[str, Any]:
    names = "tprev tnext dense_info values mask".split()
    if (events := solved.events) is None:
        return {f"event_{name}": None for name in names}
    grid, info = solved.grid, solved.steps.dense_info
    now = (grid.tprev, grid.tnext, info, events.values, events.masks)
    of_steps = {f"event_{name}": x for name, x in zip(names, now, strict=True)}
    before = {name: getattr(state, name) for name in of_steps}
    return _at_last(outcome.num_steps, of_steps, before)


def stats(solved: Solved, outcome: Outcome) -> dict[str, Any]:
    solution = solved.solution
    nonfinite = solution.first_nonfinite_step
    indices = jnp.arange(solved.grid.num_steps, dtype=jnp.int32)
    out = dict(
        path=solved.method.path(solved.discretised.recurrence),
        **solution.stats(),
        # Neither padding nor what comes after an event counts.
        first_nonfinite_step=jnp.where(nonfinite < outcome.num_until, nonfinite, -1),
        num_fallback_steps=jnp.sum(
            solution.is_sequential & (indices < outcome.num_steps), dtype=jnp.int32
        ),
    )
    if (refined := solved.refined) is not None:
        out |= dict(
            num_meshes=refined.num_meshes,
            num_mesh_steps=refined.num_mesh_steps,
            num_guess_steps=refined.num_guess_steps,
        )
    return out
