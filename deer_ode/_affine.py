r"""Affine recurrences, solved in parallel, as a transposable linear solve.

A step is the affine map $y \mapsto A y + b$, written as the pair $(A, b)$. Doing
$(A_1, b_1)$ first and $(A_2, b_2)$ second is again such a map,

$$(A_2, b_2) \circ (A_1, b_1) = (A_2 A_1, A_2 b_1 + b_2),$$

and because the composition is associative, all prefixes follow from a parallel scan.
The recurrence $y_i = A_i y_{i-1} + b_i$ is also the block-bidiagonal linear system
$y_i - A_i y_{i-1} = b_i$, whose transpose is the same kind of recurrence, run
backwards with $A^\top$. That is all that derivatives of any order need.
"""

from typing import TypeGuard

import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float

from ._blocks import Blocks
from ._custom_types import Propagators
from ._kernels import are_right, can_run
from ._lanes import scan_lanes
from ._plan import by_platform


# A state is a vector, or one that is split into blocks.
_Steps = Float[Array, "steps *state"]

# Up to this size XLA on CPU is quicker with multiply-and-add than with a batched
# matrix product, which costs a call per matrix.
_SMALL = 8

# Up to this size sums are written out.
_TINY = 4

# An associative scan over more elements is a larger program: eleven levels are enough
# to keep a GPU busy.
_CHUNKS = 2048


def _is_dense(A: Propagators, b: _Steps) -> TypeGuard[Array]:
    return not isinstance(A, Blocks) and A.ndim == b.ndim + 1


def apply(A: Propagators, y: Array) -> Array:
    """$A y$, batched over leading axes, for each kind of `A`.

    An array with as many axes as `y` is a diagonal; one with one more is dense, and if
    it has fewer columns than `y` has entries it acts on the last of them.
    """
    if isinstance(A, Blocks):
        return A.apply(y)
    if A.ndim == y.ndim:
        return A * y
    y = y[..., y.shape[-1] - A.shape[-1] :]
    if y.shape[-1] == 1:
        return A[..., 0] * y
    if y.shape[-1] <= _SMALL:
        return jnp.sum(A * y[..., None, :], axis=-1)
    return jnp.matmul(A, y[..., None], precision=lax.Precision.HIGHEST)[..., 0]


def _apply_one(A: Propagators, y: Array) -> Array:
    """`apply` of one step, in a loop: there XLA on CPU writes products of tiny matrices
    out, and is quicker with them than with sums; and products of large ones with a
    vector are quicker than with a column.
    """
    size = y.shape[-1]
    if _is_dense(A, y) and (1 < size <= _TINY or size > _SMALL):
        return jnp.matmul(A, y, precision=lax.Precision.HIGHEST)
    return apply(A, y)


def multiply(A: Array, B: Array) -> Array:
    """$A B$ of square matrices, batched over leading axes."""
    if A.shape[-1] <= _TINY:
        # Written out it fuses with what is around it; a reduction would not.
        products = [A[..., :, k, None] * B[..., None, k, :] for k in range(A.shape[-1])]
        return sum(products[1:], products[0])
    return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)


def absolute(A: Propagators) -> Propagators:
    return jtu.tree_map(jnp.abs, A)


def _compose(first, second):
    A1, b1 = first
    A2, b2 = second
    b = apply(A2, b1) + b2
    if isinstance(A1, Blocks):
        return A2.multiply(A1), b
    if A1.ndim == b1.ndim:
        return A2 * A1, b
    return multiply(A2, A1), b


def transpose(A: Propagators, b: _Steps) -> Propagators:
    r"""$A^\top$ of every step; `b` tells diagonals from matrices."""
    if isinstance(A, Blocks):
        return A.transpose
    return jnp.swapaxes(A, -1, -2) if _is_dense(A, b) else A


def sequential_scan(
    A: Propagators, b: _Steps, reverse: bool, y0: Array | None = None
) -> _Steps:
    """The recurrence from `y0`, or zero, one step after the other: $O(T)$ depth."""

    def step(y, element):
        A_i, b_i = element
        y = _apply_one(A_i, y) + b_i
        return y, y

    y0 = jnp.zeros_like(b[0]) if y0 is None else y0
    return lax.scan(step, y0, (A, b), reverse=reverse)[1]


def sequential_scan_transposed(A, b, after, reverse):
    """`scan_steps_transposed`, one step after the other."""

    def step(after, element):
        A_i, b_i = element
        y = after + b_i
        return _apply_one(A_i, y), y

    after = jnp.zeros_like(b[0]) if after is None else after
    # Jacobians are made column by column, so this turns them round for nothing.
    return lax.scan(step, after, (transpose(A, b), b), reverse=not reverse)


def parallel_scan(A: Propagators, b: _Steps, reverse: bool) -> _Steps:
    r"""The recurrence from zero by an associative scan.

    Over chunks, if it is long, so that neither the program nor what it holds of
    products of the $A_i$ grows with $T$. Within chunks it is a loop.
    """
    num_steps = b.shape[0]
    if num_steps <= _CHUNKS:
        return lax.associative_scan(_compose, (A, b), reverse=reverse)[1]
    size = -(-num_steps // _CHUNKS)
    num_chunks = -(-num_steps // size)

    def turn(x):
        # Padding starts from zero and stays there.
        padding = ((0, num_chunks * size - num_steps), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(num_chunks, size, *x.shape[1:])

    elements = jtu.tree_map(lambda x: jnp.swapaxes(turn(x), 0, 1), (A, b))

    def compose(composed, element):
        return _compose(composed, element), None

    def step(y, element):
        A_i, b_i = element
        y = apply(A_i, y) + b_i
        return y, y

    first = -1 if reverse else 0
    rest = slice(None, -1) if reverse else slice(1, None)
    part = lambda index: jtu.tree_map(lambda x: x[index], elements)
    chunks, _ = lax.scan(compose, part(first), part(rest), reverse=reverse)
    ends = lax.associative_scan(_compose, chunks, reverse=reverse)[1]
    ys = lax.scan(step, shift(ends, reverse), elements, reverse=reverse)[1]
    return jnp.swapaxes(ys, 0, 1).reshape(-1, *b.shape[1:])[:num_steps]


def kernel_scan(
    A: Propagators, b: _Steps, reverse: bool, *, interpret: bool = False
) -> _Steps:
    """The recurrence from zero by GPU kernels; `has_kernels` says for which."""
    if isinstance(A, Blocks):
        return scan_lanes(A.entries, b, reverse, interpret=interpret)
    if _is_dense(A, b):
        lanes = A[..., None], b[..., None]
        return scan_lanes(*lanes, reverse, interpret=interpret)[..., 0]
    lanes = A[:, None, None], b[:, None]
    return scan_lanes(*lanes, reverse, interpret=interpret)[:, 0]


def has_kernels(A: Propagators, b: _Steps) -> bool:
    """Whether there is a GPU at hand on which they are right."""
    size = b.shape[1] if isinstance(A, Blocks) or _is_dense(A, b) else 1
    return can_run(size, b.dtype) and are_right(size, b.dtype)


def scan_steps(
    A: Propagators, b: _Steps, y0: Array | None = None, reverse: bool = False
) -> _Steps:
    r"""$y_i = A_i y_{i-1} + b_i$ from `y0`, or zero; not differentiable by itself.

    On a CPU the plain loop wins at nearly every size measured (`benchmarks`; chunks
    side by side take 0.6 times as long for single numbers, and 1.1 to 2.3 times as long
    for 2 to 4), so there the platform decides for it; accelerators get a parallel one.
    """
    if b.size == 0:
        return b
    if is_rectangular(A, b):
        assert y0 is None, "heads do not pass on, so nothing begins with them"
        return from_tail(scan_steps, A, b, reverse)
    if isinstance(A, Blocks) and A.order is not None:
        split = A.order.split
        parts = scan_steps(
            A.split(), split(b), None if y0 is None else split(y0), reverse
        )
        return A.order.join(parts)
    scan = kernel_scan if has_kernels(A, b) else parallel_scan

    def run(platform):
        if platform == "cpu":
            return sequential_scan(A, b, reverse, y0)
        return scan(A, with_first(A, b, y0, reverse), reverse)

    return by_platform(run)


def parallel_scan_transposed(A, b, after, reverse):
    """`scan_steps_transposed` by `scan_steps`.

    The transpose of "multiply the neighbour by mine" is "multiply by the neighbour's,
    transposed".
    """
    A = transpose(A, b)
    first, last = (-1, 0) if reverse else (0, -1)
    ys = b if after is None else b.at[last].add(after)
    ys = scan_steps(shift(A, not reverse), ys, reverse=not reverse)
    return apply(jtu.tree_map(lambda a: a[first], A), ys[first]), ys


def scan_steps_transposed(
    A: Propagators, b: _Steps, after: Array | None = None, reverse: bool = False
) -> tuple[Array, _Steps]:
    r"""The transpose of `scan_steps`, with the same `reverse`:

    $$y_i = A_{i+1}^\top y_{i+1} + b_i, \qquad i = T, \dots, 1,$$

    with `after` for $A_{T+1}^\top y_{T+1}$; the first value is $A_1^\top y_1$.
    """
    if isinstance(A, Blocks) and A.order is not None:
        split, join = A.order.split, A.order.join
        after = None if after is None else split(after)
        before, ys = scan_steps_transposed(A.split(), split(b), after, reverse)
        return join(before), join(ys)

    def run(platform):
        is_cpu = platform == "cpu"
        scan = sequential_scan_transposed if is_cpu else parallel_scan_transposed
        return scan(A, b, after, reverse)

    return by_platform(run)


def with_first(A, b, y0, reverse):
    """The biases with what `y0` adds to the first of them."""
    if y0 is None:
        return b
    first = -1 if reverse else 0
    return b.at[first].add(apply(jtu.tree_map(lambda a: a[first], A), y0))


def is_rectangular(A: Propagators, b: _Steps) -> TypeGuard[Array]:
    return _is_dense(A, b) and A.shape[-1] < b.shape[-1]


def from_tail(solve, A: Array, b: _Steps, reverse: bool = False) -> _Steps:
    """A recurrence in which only the last entries of a state pass on to the next.

    Those are a recurrence of their own; the others follow from it, all at once.
    """
    num_heads = b.shape[-1] - A.shape[-1]
    tails = solve(A[:, num_heads:], b[:, num_heads:], reverse=reverse)
    heads = apply(A[:, :num_heads], shift(tails, reverse)) + b[:, :num_heads]
    return jnp.concatenate([heads, tails], axis=-1)


def shift(stack, reverse: bool = False, y0: Array | None = None):
    """The neighbour that each step starts from, with `y0` or zero before the first."""

    def shift(x):
        first = jnp.zeros_like(x[:1]) if y0 is None else y0[None]
        return jnp.concatenate([x[1:], first] if reverse else [first, x[:-1]])

    return jtu.tree_map(shift, stack)


def affine_solve(
    A: Propagators, b: _Steps, y0: Array | None = None, reverse: bool = False
) -> _Steps:
    """As `scan_steps`, and differentiable to any order in `A`, `b` and `y0`."""
    if b.size == 0:
        return b
    if is_rectangular(A, b):
        assert y0 is None, "heads do not pass on, so nothing begins with them"
        return from_tail(affine_solve, A, b, reverse)
    if isinstance(A, Blocks) and A.order is not None:
        split = A.order.split
        y0 = None if y0 is None else split(y0)
        return A.order.join(affine_solve(A.split(), split(b), y0, reverse))

    # The state before the first step is one more unknown, and its own equation.
    def equations(states):
        y0, ys = states
        return y0, ys - apply(A, shift(ys, reverse, y0))

    def solve(_, right):
        y0, b = right
        return y0, scan_steps(A, b, y0, reverse)

    def transpose_solve(_, right):
        y0_bar, b_bar = right
        before, ys = scan_steps_transposed(A, b_bar, reverse=reverse)
        return None if y0_bar is None else y0_bar + before, ys

    return lax.custom_linear_solve(
        equations, (y0, b), solve=solve, transpose_solve=transpose_solve
    )[1]


def affine_scan(
    A: Float[ArrayLike, "steps state state"] | Float[ArrayLike, "steps state"],
    b: Float[ArrayLike, "steps state"],
    y0: Float[ArrayLike, " state"],
    *,
    reverse: bool = False,
) -> Float[Array, "steps state"]:
    r"""Solves a linear recurrence for all its steps at once.

    $$y_i = A_i y_{i-1} + b_i, \qquad i = 1, \dots, T,$$

    on accelerators in $O(\log T)$ depth (and loops over chunks, if $T$ is more than a
    few thousand) and $O(T n^3)$ work for dense $A_i$, $O(T n)$ for diagonal ones; on a
    CPU, where it is faster, in one pass of $O(T n^2)$ work. Both give the same answer
    up to rounding, as long as products of consecutive $A_i$ are finite, which the
    former forms: two thousand factors of 2 overflow in single precision, and give NaN
    even where the states are zero. All products are taken at full precision of the
    dtype.

    Derivatives of any order, forward and reverse, with respect to `A`, `b` and `y0`
    cost one more such scan each; nothing but the answer is stored for them.

    **Arguments:**

    - `A`: the transition matrices, of shape `(steps, state, state)`, or only their
        diagonals, of shape `(steps, state)`.
    - `b`: the biases, of shape `(steps, state)`, in units of the state.
    - `y0`: the state before the first step (after the last one if `reverse`), of shape
        `(state,)`.
    - `reverse`: run from the last step to the first, $y_i = A_i y_{i+1} + b_i$.

    **Returns:**

    The states $y_1, \dots, y_T$, of shape `(steps, state)`; `y0` is not included.

    **Raises:**

    - `ValueError`: if the shapes do not fit together.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode import affine_scan
        >>> A = jnp.full((3, 1, 1), 2.0)
        >>> b = jnp.ones((3, 1))
        >>> affine_scan(A, b, jnp.array([1.0])).ravel().tolist()
        [3.0, 7.0, 15.0]

    ??? cite "Reference"

        Blelloch (1990), *Prefix sums and their applications*, section 1.4.1.
    """
    A, b, y0 = jnp.asarray(A), jnp.asarray(b), jnp.asarray(y0)
    shapes = f"A {A.shape}, b {b.shape}, y0 {y0.shape}"
    if b.ndim != 2 or y0.shape != b.shape[1:]:
        raise ValueError(
            "`affine_scan` needs `b` of shape (steps, state) and `y0` of shape "
            f"(state,); got {shapes}."
        )
    if A.shape not in (b.shape, b.shape + b.shape[1:]):
        raise ValueError(
            "`affine_scan` needs `A` of shape (steps, state, state), or (steps, state) "
            f"for diagonal matrices; got {shapes}."
        )
    if b.shape[0] == 0:
        return b
    dtype = jnp.result_type(A, b, y0)
    A, b, y0 = (x.astype(dtype) for x in (A, b, y0))
    return affine_solve(A, b, y0, reverse)
