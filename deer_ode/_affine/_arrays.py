"""Products of small dense matrices, and neighbours along the axis of steps.

All products are taken at full precision of the dtype: some GPUs round float32 products
to TF32 otherwise.
"""

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._plan import SMALL_MATRIX, TINY_MATRIX


def matvec(
    A: Float[Array, "*batch rows columns"], y: Float[Array, "*batch columns"]
) -> Float[Array, "*batch rows"]:
    """$A y$, batched over leading axes, in $O(n^2)$ work."""
    if y.shape[-1] == 1:
        return A[..., 0] * y
    if y.shape[-1] <= SMALL_MATRIX:
        return jnp.sum(A * y[..., None, :], axis=-1)
    return jnp.matmul(A, y[..., None], precision=lax.Precision.HIGHEST)[..., 0]


def matvec_in_loop(
    A: Float[Array, "rows columns"], y: Float[Array, " columns"]
) -> Float[Array, " rows"]:
    """`matvec` of one step, inside a loop over the steps.

    There XLA on CPU writes products of tiny matrices out, and is quicker with them than
    with sums; and products of large ones with a vector are quicker than with a column.
    """
    size = y.shape[-1]
    if 1 < size <= TINY_MATRIX or size > SMALL_MATRIX:
        return jnp.matmul(A, y, precision=lax.Precision.HIGHEST)
    return matvec(A, y)


def matmul(
    A: Float[Array, "*batch rows inner"], B: Float[Array, "*batch inner columns"]
) -> Float[Array, "*batch rows columns"]:
    """$A B$, batched over leading axes, in $O(n^3)$ work."""
    if A.shape[-1] <= TINY_MATRIX:
        # Written out it fuses with what is around it; a reduction would not.
        products = [A[..., :, k, None] * B[..., None, k, :] for k in range(A.shape[-1])]
        return sum(products[1:], products[0])
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def shift(
    stack: PyTree[Array], reverse: bool = False, y0: Array | None = None
) -> PyTree[Array]:
    """The neighbour that each step starts from, with `y0` or zero before the first."""

    def shift(x):
        first = jnp.zeros_like(x[:1]) if y0 is None else y0[None]
        return jnp.concatenate([x[1:], first] if reverse else [first, x[:-1]])

    return jtu.tree_map(shift, stack)
