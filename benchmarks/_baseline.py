r"""Plain DEER, as the paper describes it: what is to be beaten.

Each iteration solves, in absolute form,

$$y_i = A_i y_{i-1} + f(y^{old}_{i-1}, x_i) - A_i y^{old}_{i-1}$$

by `jax.lax.associative_scan`, until no entry changes by more than a tolerance. The
derivative is that of the converged recurrence, by one more scan, and its transpose one
more in the other direction.
"""

import functools as ft

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array


_MAX_ITERATIONS = 100


def tolerance(dtype) -> float:
    """That of the authors' implementation."""
    return 1e-7 if jnp.finfo(dtype).bits == 64 else 1e-4


def _compose(first, second):
    A1, b1 = first
    A2, b2 = second
    A = jnp.matmul(A2, A1, precision="highest")
    return A, jnp.matmul(A2, b1[..., None], precision="highest")[..., 0] + b2


def _scan(A: Array, b: Array, reverse: bool = False) -> Array:
    return lax.associative_scan(_compose, (A, b), reverse=reverse)[1]


def _linear_solve(A: Array, b: Array) -> Array:
    """$y_i = A_i y_{i-1} + b_i$ from zero, differentiable in `b`."""
    # The step before is multiplied by the matrix of the step after.
    following = jnp.concatenate([A[1:], jnp.zeros_like(A[:1])])
    following = jnp.swapaxes(following, -1, -2)
    return lax.custom_linear_solve(
        lambda y: y - jnp.einsum("tij,tj->ti", A, _before(y, 0.0), precision="highest"),
        b,
        solve=lambda _, b: _scan(A, b),
        transpose_solve=lambda _, b: _scan(following, b, reverse=True),
    )


def _before(ys: Array, y0) -> Array:
    return jnp.concatenate([jnp.broadcast_to(y0, ys[:1].shape), ys[:-1]])


def _iterate(f, y0: Array, xs, tolerance: float) -> tuple[Array, Array]:
    num_steps = jax.tree_util.tree_leaves(xs)[0].shape[0]
    values = jax.vmap(f)
    jacobians = jax.vmap(jax.jacfwd(f))

    def step(carry):
        ys, count, _ = carry
        before = _before(ys, y0)
        A = jacobians(before, xs)
        b = values(before, xs) - jnp.einsum(
            "tij,tj->ti", A, before, precision="highest"
        )
        b = b.at[0].add(jnp.matmul(A[0], y0, precision="highest"))
        new = _scan(A, b)
        return new, count + 1, jnp.max(jnp.abs(new - ys))

    # From the initial state everywhere, which for a network is the paper's zero.
    start = jnp.broadcast_to(y0, (num_steps, *y0.shape))
    infinite = jnp.asarray(jnp.inf, y0.dtype)
    ys, count, _ = lax.while_loop(
        lambda carry: (carry[1] < _MAX_ITERATIONS) & (carry[2] > tolerance),
        step,
        (start, jnp.asarray(0, jnp.int32), infinite),
    )
    return ys, count


@ft.partial(jax.custom_jvp, nondiff_argnums=(0, 4))
def plain_deer(f, params, y0: Array, xs, tolerance: float) -> Array:
    """All states of `y = f(params, y, x)`, from `y0`."""
    return _iterate(ft.partial(f, params), y0, xs, tolerance)[0]


@plain_deer.defjvp
def _plain_deer_jvp(f, tolerance, primals, tangents):
    params, y0, xs = primals
    ys = plain_deer(f, params, y0, xs, tolerance)
    before = _before(ys, y0)
    A = jax.vmap(jax.jacfwd(ft.partial(f, params)))(before, xs)

    def values(params, y0, xs):
        before = jnp.concatenate([y0[None], lax.stop_gradient(ys[:-1])])
        return jax.vmap(ft.partial(f, params))(before, xs)

    _, b = jax.jvp(values, primals, tangents)
    # The tangent of the state before the first step is in `b` already.
    return ys, _linear_solve(A, b)
