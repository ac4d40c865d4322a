r"""The tangent of a solution with respect to what it depends on, in bounded memory.

$$\dot y_i = A_i \dot y_{i-1} + b_i, \qquad \dot y_0 = 0,$$

along the solution, with exact Jacobians $A_i$. All of them at once take $O(T n^2)$
memory. They are computed from the states where they are needed, so it is enough to hold
those of one window, and the windows follow one another.
"""

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp

from ._affine import scan_steps, scan_steps_transposed, shift
from ._custom_types import Trajectory
from ._linearisation import AbstractLinearisation
from ._misc import state_at
from ._recurrence import AbstractMapRecurrence, cut


def tangent_in_windows(
    recurrence: AbstractMapRecurrence,
    ys: Trajectory,
    b: Trajectory,
    exact: AbstractLinearisation,
    length: int,
) -> Trajectory:
    """The Jacobians of `length` steps at a time."""
    num_steps, state_size = ys.shape
    num_windows = -(-num_steps // length)
    total = num_windows * length
    starts = length * jnp.arange(num_windows, dtype=jnp.int32)
    padding = ((0, total - num_steps), (0, 0))
    padded = recurrence.padded(total)
    # Padding repeats the first step, from where that begins; and of the last state
    # there is nothing else to come.
    repeated = jnp.broadcast_to(recurrence.y0, (total - num_steps + 1, state_size))
    padded_ys = jnp.concatenate([ys[:-1], repeated])

    def jacobians(start):
        y0 = state_at(recurrence.y0, padded_ys, start)
        part = padded.part(start, length, y0)
        _, A = part.jacobians(cut(padded_ys, start, length), exact)
        # There is nothing for the first one to multiply, even if it is not finite; and
        # padding must not reach the steps when this is run backwards.
        steps = start + jnp.arange(length, dtype=jnp.int32)
        counts = (steps > 0) & (steps < num_steps)
        return A.masked(counts)

    # Needed in four places, and traced once for all.
    jacobians = eqx.filter_closure_convert(jacobians, starts[0])

    def over_windows(window, b, reverse):
        b = jnp.pad(b, padding).reshape(num_windows, length, state_size)
        zero = jnp.zeros(state_size, b.dtype)
        _, out = lax.scan(window, zero, (starts, b), reverse=reverse)
        return out.reshape(total, state_size)[:num_steps]

    def forwards(before, inputs):
        start, b = inputs
        out = scan_steps(jacobians(start), b, before)
        return out[-1], out

    def backwards(after, inputs):
        start, b = inputs
        return scan_steps_transposed(jacobians(start), b, after)

    def remainder(t_ys):
        """What is left of the recurrence; only derivatives of this rule need it."""

        def window(_, inputs):
            start, before = inputs
            return None, jacobians(start).apply(before)

        before = jnp.pad(shift(t_ys), padding).reshape(num_windows, length, state_size)
        _, out = lax.scan(window, None, (starts, before))
        return t_ys - out.reshape(total, state_size)[:num_steps]

    return lax.custom_linear_solve(
        remainder,
        b,
        solve=lambda _, b: over_windows(forwards, b, False),
        transpose_solve=lambda _, b: over_windows(backwards, b, True),
    )
