"""What derivatives of a loop over steps cost on a CPU, each way.

Only how long a derivative takes depends on this, never its value.
"""

import enum
import os
import re

import equinox as eqx
import jax
import jax.tree_util as jtu

from ._linearisation import AbstractLinearisation, Dense
from ._misc import num_operations
from ._recurrence import AbstractMapRecurrence, AbstractRecurrence


# So many operations for one Jacobian take as long on two cores as the loops that
# back-propagation is (a GRU of 32 entries, Tsit5 on a network of width 32 from 16).
_LARGE_WORK = 150_000

# From so many on, to work out steps again instead of keeping what back-propagation
# needs of them takes a quarter longer (a GRU of 64 entries).
_HUGE_WORK = 1_800_000

# Where XLA compiles loops whole, back-propagation takes up to half the time of the
# parallel derivative below (Tsit5 on Henon-Heiles; a GRU of 4 entries), and nine tenths
# from `_LARGE_WORK` on.
_SMALL_WORK = 5_000

# And of so few steps it keeps what stays in the cache: with 1,000 steps the parallel
# derivative took up to twice as long (networks of 2 and 8 states, a GRU of 16 entries).
_FEW_STEPS = 2_048

# The most that back-propagation may keep of all steps; of each member of a batch, since
# under `jax.vmap` nobody can see how many there are.
_MOST_BYTES = 2**30

# XLA's own threshold is a kilobyte of what an iteration reads and writes.
_THRESHOLD = re.compile(r"xla_cpu_small_while_loop_byte_threshold=(\d+)")
_LARGE_THRESHOLD = 2**17


class Way(enum.Enum):
    """How derivatives along a solution are found."""

    WINDOWS = "the Jacobians of many steps at a time"
    IN_TURN = "step by step, each one worked out again"
    THROUGH_THE_LOOP = "by back-propagation through the loop that solves"


def _are_loops_compiled_whole() -> bool:
    """Whether XLA was told to, instead of running larger bodies by the operation."""
    found = _THRESHOLD.findall(os.environ.get("XLA_FLAGS", ""))
    return bool(found) and int(found[-1]) >= _LARGE_THRESHOLD


def _work_of_jacobian(recurrence: AbstractMapRecurrence) -> float:
    """How many operations the Jacobian of a step takes, by XLA's own count."""

    def tangent(y, t_y, x):
        return jax.jvp(lambda y: recurrence.f(y, x), (y,), (t_y,))[1]

    y0, xs = recurrence.y0, recurrence.xs
    one = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
    x = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    with recurrence.tracing():
        return y0.size * (num_operations(tangent, one, one, x) or 0.0)


def _bytes_kept(recurrence: AbstractMapRecurrence) -> int:
    """Memory of what back-propagation needs of all steps."""

    def linear_part(recurrence, ys):
        changes, rest = eqx.partition(recurrence, eqx.is_inexact_array)
        evaluate = lambda changes, ys: eqx.combine(changes, rest).evaluate(ys)
        return jax.linearize(evaluate, changes, ys)[1]

    shape = (recurrence.num_steps, *recurrence.y0.shape)
    ys = jax.ShapeDtypeStruct(shape, recurrence.y0.dtype)
    kept = jtu.tree_leaves(eqx.filter_eval_shape(linear_part, recurrence, ys))
    return sum(x.size * x.dtype.itemsize for x in kept)


def cheapest_way(
    recurrence: AbstractRecurrence, exact: AbstractLinearisation, is_loop: bool
) -> Way:
    """By which way to take derivatives. `is_loop` is whether the solution comes from a
    loop, so that a derivative may be that loop's own.
    """
    # Where Jacobians have structure, or steps solve something, there is no choice.
    if not isinstance(recurrence, AbstractMapRecurrence):
        return Way.WINDOWS
    if not (recurrence.is_explicit and isinstance(exact, Dense)):
        return Way.WINDOWS
    work = _work_of_jacobian(recurrence)
    is_loop = is_loop and recurrence.num_steps > 0
    if _are_loops_compiled_whole():
        is_between = _SMALL_WORK < work <= _LARGE_WORK
        prefers_loop = not is_between or recurrence.num_steps <= _FEW_STEPS
    else:
        prefers_loop = work > _HUGE_WORK
    if is_loop and prefers_loop and _bytes_kept(recurrence) <= _MOST_BYTES:
        return Way.THROUGH_THE_LOOP
    return Way.IN_TURN if work > _LARGE_WORK else Way.WINDOWS
