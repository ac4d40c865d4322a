"""What the steps of a solver say beside the state: errors, interpolants, results."""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.lax as lax
from jaxtyping import Array, PyTree

from .._custom_types import Args, Trajectory, Y
from .._misc import StateFlattener, previous_states
from .._plan import steps_at_a_time
from ._one_step import one_step, tracing_steps
from ._step_map import StepMap


class Steps(NamedTuple):
    """All steps of a solved grid, every array with a leading axis of steps."""

    y_error: PyTree[Array] | None
    dense_info: dict[str, Any]
    result: Any
    """A `diffrax.RESULTS`, stacked; `None` where no step of this solver can fail."""


def take_steps(
    solver: diffrax.AbstractSolver,
    terms,
    recurrence: StepMap,
    y0: Y,
    ys: Trajectory,
    args: Args,
) -> Steps:
    """Takes every step of `recurrence` again, from the states that the solve found.

    Ordinary differentiable code. Padding repeats the first step.
    """
    flattener = StateFlattener(y0)
    flat_y0 = flattener.flatten(y0)
    xs = recurrence.xs
    can_fail = False

    def take(y, x):
        nonlocal can_fail
        y, x = recurrence.f.filled(y, x)
        terms_now = recurrence.draw.use(terms, x.increments)
        _, y_error, dense_info, result = one_step(
            *(solver, terms_now, x.grid.tprev, x.grid.tnext),
            *(flattener.unflatten(y), args),
        )
        can_fail = result.is_traced()
        return Steps(y_error, dense_info, result if can_fail else None)

    starts = previous_states(flat_y0, ys)
    with tracing_steps():
        if recurrence.is_explicit or starts.size == 0:
            return jax.vmap(take)(starts, xs)
        # An implicit step works on a Jacobian: as many at a time as there is room for.
        bytes_per_step = starts.shape[1] ** 2 * starts.dtype.itemsize
        at_a_time = steps_at_a_time(bytes_per_step)
        if at_a_time >= starts.shape[0]:
            return jax.vmap(take)(starts, xs)
        return lax.map(lambda step: take(*step), (starts, xs), batch_size=at_a_time)
