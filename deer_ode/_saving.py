"""What Diffrax saves step by step, saved from a whole trajectory at once."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Int

from ._custom_types import Args, StepCounts, Y
from ._discretisation import Grid
from ._foreign import SaveState
from ._misc import count_true, rows_where


class SolvedGrid(eqx.Module):
    """A grid with its solution, of which the first `num_steps` steps were made.

    `ys` is a pytree of arrays with a leading axis of steps.
    """

    grid: Grid
    num_steps: Int[Array, ""]
    y0: Y
    ys: Y
    evaluate: Callable[..., Y] = eqx.field(static=True)
    """`(ts, index)` to the solution at `ts`, which lie in the steps `index`."""
    are_all_made: bool = eqx.field(static=True)
    """Whether that is known while tracing."""

    def made(self) -> Bool[Array, " steps"]:
        if self.are_all_made:  # and XLA masks nothing
            return jnp.ones(self.grid.num_steps, bool)
        steps = jnp.arange(self.grid.num_steps, dtype=jnp.int32)
        return steps < self.num_steps

    def states_after(self, counts: StepCounts) -> Y:
        """The states after so many steps: `y0` after none."""
        shift = 1 if counts[0] > 0 else 0

        def take(y0, ys):
            ys = ys if shift else jnp.concatenate([y0[None], ys])
            return ys[counts.start - shift : counts.stop - shift : counts.step]

        return jtu.tree_map(take, self.y0, self.ys)


def set_where(
    buffer: Array, offset: int | Array, mask: Bool[Array, " n"], value: Array
) -> Array:
    """Writes `value` from `offset` on, leaving what is there where `mask` is false."""
    before = lax.dynamic_slice_in_dim(buffer, offset, value.shape[0], axis=0)
    mask = mask.reshape(mask.shape + (1,) * (value.ndim - 1))
    value = jnp.where(mask, value.astype(buffer.dtype), before)
    return lax.dynamic_update_slice_in_dim(buffer, value, offset, axis=0)


def _scatter(buffer, positions, value):
    return buffer.at[positions].set(value.astype(buffer.dtype), mode="drop")


class _Saves(NamedTuple):
    """What one kind of save (`ts` or `steps`) writes. What is not reached is evaluated
    at the start, where all is finite.
    """

    times: Array
    states: Y
    mask: Bool[Array, " saves"]
    """Which of them lie within the steps that were made."""
    order: Int[Array, " saves"]
    """The place of each among the saves of both kinds."""


def _saves_at_times(
    ts: Array, every: int, counts: StepCounts | None, solved: SolvedGrid
) -> _Saves:
    tnext, num_made = solved.grid.tnext, solved.num_steps
    # Not used where `every` is zero and nothing is interpolated.
    index = jnp.searchsorted(tnext, ts, side="left").astype(jnp.int32)
    if counts is not None and solved.are_all_made:
        reached = jnp.ones(len(ts), bool)
        times, states = ts, solved.states_after(counts)
    else:
        last = jnp.where(num_made > 0, tnext[jnp.maximum(num_made - 1, 0)], -jnp.inf)
        reached = ts <= last
        index = jnp.where(reached, index, 0)
        times = jnp.where(reached, ts, solved.grid.tprev[0])
        states = solved.evaluate(times, index)
    order = jnp.arange(len(ts), dtype=jnp.int32)
    if every != 0:
        order += index // every
    return _Saves(times, states, reached, order)


def _saves_after_steps(every: int, ts: Array | None, solved: SolvedGrid) -> _Saves:
    take = lambda x: x[every - 1 :: every]
    times, mask = take(solved.grid.ends), take(solved.made())
    order = jnp.arange(times.shape[0], dtype=jnp.int32)
    if ts is not None:
        order += jnp.searchsorted(ts, times, side="right").astype(jnp.int32)
    states = jtu.tree_map(take, solved.ys)
    if not solved.are_all_made:
        start = solved.grid.tprev[0], solved.y0
        times, states = rows_where(mask, (times, states), start)
    return _Saves(times, states, mask, order)


def save(
    subsaveat: diffrax.SubSaveAt,
    counts: StepCounts | None,
    save_state: SaveState,
    solved: SolvedGrid,
    args: Args,
) -> SaveState:
    """Fills the output of one `SubSaveAt`, in the order in which Diffrax would.

    `counts` is after how many steps it is `ts`, where that is known while tracing.

    The value at `t0` is there already; that at `t1` is written by Diffrax afterwards.
    """
    offset: Any = save_state.save_index
    out_ts, out_ys = save_state.ts, save_state.ys
    out_size = out_ts.shape[0]
    every, ts = subsaveat.steps, subsaveat.ts
    saves = []
    if ts is not None:
        saves.append(_saves_at_times(ts, every, counts, solved))
    if every != 0:
        saves.append(_saves_after_steps(every, ts, solved))
    for times, states, mask, order in saves:
        values = jax.vmap(lambda t, y: subsaveat.fn(t, y, args))(times, states)
        if len(saves) == 1:
            write = ft.partial(set_where, offset=offset, mask=mask)
        else:  # saves of two kinds, interleaved by time
            positions = jnp.where(mask, offset + order, out_size)
            write = ft.partial(_scatter, positions=positions)
        out_ts = write(out_ts, value=times)
        out_ys = jtu.tree_map(lambda out, v, w=write: w(out, value=v), out_ys, values)
    num_saved = [count_true(each.mask) for each in saves]
    num_reached = 0 if ts is None else num_saved[0]
    return SaveState(
        saveat_ts_index=save_state.saveat_ts_index + num_reached,
        ts=out_ts,
        ys=out_ys,
        save_index=offset + sum(num_saved),
    )
