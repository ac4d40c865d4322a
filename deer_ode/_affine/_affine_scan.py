r"""$y_i = A_i y_{i-1} + b_i$ for any transition, by the scan that is chosen for it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from .._plan import by_platform
from ._scans import choose_scan
from ._transitions import AbstractTransition, transition_of


_State = Float[Array, " state"]
_Steps = Float[Array, "steps state"]


def _by_scan(way: Callable[..., Any]) -> Callable[..., Any]:
    """`way(scan)(A, ...)` by the scan for `A` and the platform."""
    return lambda A, *args: by_platform(lambda p: way(choose_scan(A, p))(A, *args))


def scan_steps(
    A: AbstractTransition, b: _Steps, y0: _State | None = None, reverse: bool = False
) -> _Steps:
    r"""$y_i = A_i y_{i-1} + b_i$ from `y0`, or zero; not to be differentiated."""
    if b.size == 0:
        return b
    return A.solve(_by_scan(lambda scan: scan.scan), b, y0, reverse)


def scan_steps_transposed(
    A: AbstractTransition, b: _Steps, after: _State | None = None, reverse: bool = False
) -> tuple[_State, _Steps]:
    r"""The transpose of `scan_steps`, with the same `reverse`:

    $$y_i = A_{i+1}^\top y_{i+1} + b_i, \qquad i = T, \dots, 1,$$

    with `after` for $A_{T+1}^\top y_{T+1}$; the first value is $A_1^\top y_1$.
    """
    transposed = _by_scan(lambda scan: scan.scan_transposed)
    return A.solve_transposed(transposed, b, after, reverse)


def affine_solve(
    A: AbstractTransition, b: _Steps, y0: _State | None = None, reverse: bool = False
) -> _Steps:
    """As `scan_steps`, and differentiable to any order in `A`, `b` and `y0`."""
    if b.size == 0:
        return b
    return A.solve(_by_scan(lambda scan: scan.solve), b, y0, reverse)


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
        diagonals, of shape `(steps, state)`. One matrix for all steps has to be
        broadcast to the former.
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
    return affine_solve(transition_of(A), b, y0, reverse)
