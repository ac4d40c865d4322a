"""Where the conditions of an event are met on a grid that has been solved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._custom_types import Mask, Trajectory, Y
from ._discretisation import Discretised, Grid
from ._foreign import LoopState
from ._grid import LoopInputs
from ._misc import always, rows_where, without_gradient


class Events(NamedTuple):
    """In which steps the conditions of an event are met.

    `values` and `masks` have the structure of the conditions.
    """

    values: PyTree[Array]
    """The values of each condition at the ends of the steps."""
    masks: PyTree[Bool[Array, " steps"]]
    """Where each condition is met, and none of those before it."""
    happened: Mask
    """Where any condition is met."""


def _is_met(values: Array, old: Any, direction: Any) -> Mask:
    """In which steps a condition becomes true, or a number changes its sign."""
    if values.dtype == bool:
        return values
    before = jnp.concatenate([jnp.asarray(old, values.dtype)[None], values[:-1]])
    if direction is None:
        return jnp.sign(before) != jnp.sign(values)
    if direction:
        return (before <= 0) & (values > 0)
    return (before > 0) & (values <= 0)


def find_events(inputs: LoopInputs, state: LoopState, grid: Grid, ys: Y) -> Events:
    """`ys` are the states after each step."""
    event, args, kwargs = inputs.event, inputs.args, inputs.condition_kwargs
    assert event is not None

    def values_and_mask(cond_fn, old, direction):
        condition = lambda t, y: cond_fn(t, y, args, **kwargs)
        values = jax.vmap(condition)(grid.tnext, ys)
        return values, _is_met(values, old, direction)

    pairs = jtu.tree_map(
        values_and_mask,
        event.cond_fn,
        state.event_values,
        event.direction,
        is_leaf=callable,
    )
    structure = jtu.tree_structure(event.cond_fn, is_leaf=callable)
    values, masks = jtu.tree_transpose(structure, jtu.tree_structure((0, 0)), pairs)
    happened = jnp.zeros(grid.num_steps, bool)
    exclusive = []
    for mask in jtu.tree_leaves(masks):
        mask = mask & grid.active
        exclusive.append(mask & ~happened)
        happened = happened | mask
    return Events(values, jtu.tree_unflatten(structure, exclusive), happened)


def check_conditions(
    events: Events,
    find: Callable[[Grid, Y], Events],
    discretised: Discretised,
    trajectory: Trajectory,
) -> Events:
    """Evaluates the user's checks within the conditions on the steps up to the event;
    `events` itself is unchanged.
    """
    grid = discretised.grid
    tprev, tnext, ys = grid.tprev, grid.tnext, discretised.states(trajectory)
    rows = without_gradient((tprev, tnext, ys))
    first = jtu.tree_map(lambda x: x[0], rows)
    tprev, tnext, ys = rows_where(grid.active, rows, first)
    again = find(Grid(tprev, tnext, grid.active), ys).masks
    holds = always(trajectory)
    masks = jtu.tree_map(lambda m, a: jnp.where(holds, m, a), events.masks, again)
    return events._replace(masks=masks)
