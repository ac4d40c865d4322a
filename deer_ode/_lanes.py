r"""A long affine recurrence by kernels that take many short ones side by side.

A chunk of $c$ steps is one step, $y \mapsto P y + d$. So all chunks are composed at the
same time, the recurrence of these is solved in the same way, and then all chunks are
run at the same time from where they start. Chunks are further lanes for the kernels.
This is twice the work of a loop over the steps, in a program that hardly grows with
their number: one more level for every factor of `_CHUNK`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from . import _kernels


# A kernel takes as long as its chunk has steps, however many chunks there are, up to
# some 100,000 threads; and a level costs three launches. By reasoning: not measured.
_CHUNK = 64
_SHORT = 256


def scan_lanes(
    A: Float[Array, "steps n n lanes"],
    b: Float[Array, "steps n lanes"],
    reverse: bool,
    *,
    interpret: bool = False,
) -> Float[Array, "steps n lanes"]:
    r"""$y_i = A_i y_{i-1} + b_i$ from zero, in each lane."""
    num_steps, n, num_lanes = b.shape
    if num_steps <= _SHORT:
        zero = jnp.zeros_like(b[0])
        return _kernels.run(A, b, zero, reverse, interpret=interpret)
    num_chunks = -(-num_steps // _CHUNK)

    def turn(x):
        """From steps to `(steps of a chunk, ..., chunks and lanes)`. Padding starts
        from zero and stays there.
        """
        padding = num_chunks * _CHUNK - num_steps
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        x = jnp.moveaxis(x.reshape(num_chunks, _CHUNK, *x.shape[1:]), 0, -2)
        return x.reshape(*x.shape[:-2], num_chunks * num_lanes)

    def chunks_first(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], num_chunks, num_lanes), -2, 0)

    A, b = turn(A), turn(b)
    P, d = _kernels.compose(A, b, reverse, interpret=interpret)
    ends = scan_lanes(chunks_first(P), chunks_first(d), reverse, interpret=interpret)
    zero = jnp.zeros_like(ends[:1])
    starts = [ends[1:], zero] if reverse else [zero, ends[:-1]]
    starts = jnp.moveaxis(jnp.concatenate(starts), 0, -2).reshape(n, -1)
    ys = chunks_first(_kernels.run(A, b, starts, reverse, interpret=interpret))
    return ys.reshape(num_chunks * _CHUNK, n, num_lanes)[:num_steps]
