r"""How a solution answers a change of what it depends on, in bounded memory.

$$\dot y_i = A_i \dot y_{i-1} + b_i, \qquad \dot y_0 = 0,$$

along the solution, with exact Jacobians $A_i$. All of them at once take $O(T n^2)$
memory. They are worked out anew from the states where they are needed, so it is enough
to hold those of one window, and the windows follow one another; or none at all, if
$A_i \dot y_{i-1}$ is worked out step by step.
"""

from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._affine import apply, scan_steps, scan_steps_transposed, shift
from ._custom_types import Trajectory
from ._linearisation import AbstractLinearisation
from ._misc import previous_states, state_at
from ._recurrence import AbstractMapRecurrence, cut


def response_in_windows(
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
        return jtu.tree_map(
            lambda a: jnp.where(counts.reshape(-1, *(1,) * (a.ndim - 1)), a, 0), A
        )

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
            return None, apply(jacobians(start), before)

        before = jnp.pad(shift(t_ys), padding).reshape(num_windows, length, state_size)
        _, out = lax.scan(window, None, (starts, before))
        return t_ys - out.reshape(total, state_size)[:num_steps]

    return lax.custom_linear_solve(
        remainder,
        b,
        solve=lambda _, b: over_windows(forwards, b, False),
        transpose_solve=lambda _, b: over_windows(backwards, b, True),
    )


def response_in_turn(
    recurrence: AbstractMapRecurrence, ys: Trajectory, b: Trajectory
) -> Trajectory:
    """Step by step, for explicit steps: what JAX makes of the loop, less its primal."""

    # The primal part is worked out again rather than kept.
    @jax.checkpoint
    def step(t_y, inputs):
        y, x, b, is_first = inputs
        _, moved = jax.jvp(lambda y: recurrence.f(y, x), (y,), (t_y,))
        # There is nothing for the first one to move, even if it is not finite.
        return (jnp.where(is_first, 0, moved) + b,) * 2

    is_first = jnp.arange(ys.shape[0], dtype=jnp.int32) == 0
    inputs = previous_states(recurrence.y0, ys), recurrence.xs, b, is_first
    with recurrence.tracing():
        return lax.scan(step, jnp.zeros_like(ys[0]), inputs)[1]


def jvp_of_loop(
    recurrence: AbstractMapRecurrence, tangent: Any
) -> tuple[Trajectory, Trajectory]:
    """The solution and its answer, as JAX has both of the loop: transposed it is
    back-propagation, for which something of every step is kept.
    """

    def loop(recurrence):
        with recurrence.tracing():
            if tangent.y0 is not None:
                return recurrence.loop()
            # Where `y0` does not change there is nothing for the first step to move,
            # even if it is not finite: so it is taken by itself.
            x = jtu.tree_map(lambda x: x[0], recurrence.xs)
            y1 = recurrence.f(recurrence.y0, x)
            rest = jtu.tree_map(lambda x: x[1:], recurrence.xs)
            rest = eqx.tree_at(lambda r: (r.y0, r.xs), recurrence, (y1, rest))
            return jnp.concatenate([y1[None], rest.loop()])

    return eqx.filter_jvp(loop, (recurrence,), (tangent,))
