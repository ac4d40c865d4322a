"""Flattening of states and other small helpers that know nothing of recurrences."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Inexact, PyTree

from ._custom_types import Mask, State, Trajectory, Y
from ._plan import default_platform


# Rounding of one step, in units of `eps * (|y| + |A| |y_previous|)`, was at most 25 on
# the published reference problems (and below 5 on most), in both precisions. 64 is
# above it, and the correction that is still applied after acceptance removes what this
# leaves.
ROUNDING_UNITS = 64


def _split_complex(y: Y) -> Y:
    return jtu.tree_map(lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else x, y)


class StateFlattener(eqx.Module):
    """Turns a state pytree into one real vector and back.

    Newton's method needs the field to be differentiable in the real sense only, so a
    complex leaf becomes its real and its imaginary part. Leaves of different precision
    share the widest of their dtypes; `eps` remembers what each entry can resolve.
    """

    _unravel: Callable[[State], Y] = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)
    _complex: tuple[bool, ...] = eqx.field(static=True)
    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    eps: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, y: Y):
        struct = jax.eval_shape(lambda: y)
        leaves, self._structure = jtu.tree_flatten(struct)
        self._complex = tuple(
            jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves
        )
        example = jtu.tree_map(lambda x: np.zeros(x.shape, x.dtype), struct)
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
            vector, self._unravel = jfu.ravel_pytree(_split_complex(example))
        self.size = vector.size
        self.dtype = vector.dtype if leaves else np.dtype(jnp.result_type(float))
        leaf_sizes = tuple(
            int(np.prod(x.shape)) * (2 if c else 1)
            for x, c in zip(leaves, self._complex, strict=True)
        )
        eps = [
            np.full(size, jnp.finfo(x.dtype).eps)
            for x, size in zip(leaves, leaf_sizes, strict=True)
        ]
        self.eps = tuple(float(e) for e in np.concatenate([np.zeros(0), *eps]))

    def flatten(self, y: Y) -> State:
        with jax.numpy_dtype_promotion("standard"):
            return jfu.ravel_pytree(_split_complex(y))[0].astype(self.dtype)

    def unflatten(self, vector: State) -> Y:
        leaves = iter(jtu.tree_leaves(self._unravel(vector)))
        out = [
            jax.lax.complex(next(leaves), next(leaves)) if is_complex else next(leaves)
            for is_complex in self._complex
        ]
        return jtu.tree_unflatten(self._structure, out)


def for_both_parts(x: Array, like: Array) -> Array:
    """The real `x` in the dtype of `like`; for both parts where that is complex."""
    if not jnp.iscomplexobj(like):
        return x.astype(like.dtype)
    x = x.astype(jnp.finfo(like.dtype).dtype)
    return jax.lax.complex(x, x)


def previous_states(
    y0: Inexact[Array, "*state"], ys: Inexact[Array, "steps *state"]
) -> Inexact[Array, "steps *state"]:
    r"""$(y_0, \dots, y_{T-1})$ from $y_0$ and $(y_1, \dots, y_T)$."""
    return jnp.concatenate([y0[None], ys[:-1]])


def leading_true(mask: Mask) -> Array:
    """How many entries of `mask` are true before the first false one."""
    if mask.shape[0] == 0:
        return jnp.asarray(0, jnp.int32)
    first = lax.argmin(mask, 0, jnp.int32)
    # Where the smallest entry is true all are. Another reduction would compile for as
    # long as this one.
    return jnp.where(mask[first], mask.shape[0], first).astype(jnp.int32)


_RUNNING = {
    lax.cummax: (jnp.maximum, -np.inf),
    lax.cummin: (jnp.minimum, np.inf),
    lax.cumsum: (jnp.add, 0),
}


def running(
    cumulative: Callable[..., Array], x: Array, axis: int = 0, reverse: bool = False
) -> Array:
    """`cumulative(x, axis, reverse)`, which is `jax.lax.cummax` or its like. On a CPU
    as a loop, which compiles in a quarter of the time and runs in a third (the maximum
    of 2,000 rows of two; JAX 0.12).
    """
    if default_platform() != "cpu":
        return cumulative(x, axis, reverse)
    combine, neutral = _RUNNING[cumulative]

    def step(so_far, row):
        so_far = combine(so_far, row)
        return so_far, so_far

    rows = jnp.moveaxis(x, axis, 0)
    first = jnp.full_like(rows[0], neutral)
    return jnp.moveaxis(lax.scan(step, first, rows, reverse=reverse)[1], 0, axis)


def count_true(mask: Mask) -> Array:
    """How many entries are true, weakly typed as Diffrax's own counters are."""
    return lax.reduce_sum(jnp.where(mask, 1, 0), axes=(0,))


def state_at(y0: State, ys: Trajectory, count: Array) -> State:
    """The state after `count` steps, where zero steps mean `y0`."""
    if ys.shape[0] == 0:
        return y0
    last = jnp.maximum(count - 1, 0)
    return jnp.where(count > 0, lax.dynamic_index_in_dim(ys, last, keepdims=False), y0)


def finite(x: Array) -> Array:
    """Zero for what is not a finite number."""
    return jnp.where(jnp.isfinite(x), x, 0)


def hold_last_good(
    y0: State, ys: Trajectory, good: Bool[Array, " steps"]
) -> Trajectory:
    """Give every step from the first bad one on the last good state before it.

    The states before the first bad one are untouched, so the exact prefix of an
    iterate survives an overflow further on, and the next iterate starts the rest from
    a finite state instead of from a clipped or zeroed one that means nothing.
    """
    count = leading_true(good)
    steps = jnp.arange(ys.shape[0], dtype=jnp.int32)
    return jnp.where((steps < count)[:, None], ys, state_at(y0, ys, count))


def is_reasonable(
    ys: Trajectory, largest: State | None = None
) -> Bool[Array, " steps"]:
    """Which states are finite and far from overflow.

    The bound is the fourth root of the largest number of the dtype, so that products
    of up to four components still are numbers; or a thousand times what is known to
    occur.
    """
    most = jnp.finfo(ys.dtype).max
    bound = jnp.asarray(float(most) ** 0.25, ys.dtype)
    if largest is not None:
        bound = jnp.maximum(bound, 2**10 * jnp.max(finite(largest), initial=0))
        bound = jnp.minimum(bound, most)
    return jnp.all(jnp.abs(ys) <= bound, axis=-1)


def select(which: Bool[Array, ""], yes: PyTree, no: PyTree) -> PyTree:
    """`jnp.where` of every leaf."""
    return jtu.tree_map(lambda a, b: jnp.where(which, a, b), yes, no)


def rows_where(mask: Bool[Array, " rows"], rows: PyTree, other: PyTree) -> PyTree:
    """The rows of each leaf where `mask` is true, and `other` in place of the rest."""
    return jax.vmap(select, in_axes=(0, 0, None))(mask, rows, other)


def without_gradient(tree: PyTree) -> PyTree:
    """`jax.lax.stop_gradient` of all that can have one."""
    return jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree
    )


def always(x: Inexact[Array, "*shape"]) -> Bool[Array, ""]:
    """True, which no compiler knows. A check of the user counts by its value only; so
    `jnp.where(always(y), y, checked)` makes it without changing `y`.
    """
    return jnp.sum(lax.stop_gradient(x) > 0, dtype=jnp.int32) >= 0


def num_operations(f: Callable, *args: PyTree) -> float | None:
    """How many floating-point operations `f(*args)` takes, by XLA's own count, which
    some accelerators do not have. Arrays may be given by their shapes.
    """
    lowered = jax.jit(lambda *args: f(*args)).lower(*args)
    return (lowered.cost_analysis() or {}).get("flops")


def describe(x: Any) -> str:
    """For messages: a class where an instance is needed is a common slip."""
    if isinstance(x, type):
        return f"the class `{x.__name__}`: write `{x.__name__}()`"
    return repr(x)
