r"""Recurrences $y_i = f_i(y_{i-1})$, as Newton's method sees them."""

import abc
import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._affine import AbstractTransition
from ._blocks import connected
from ._custom_types import Mask, State, Trajectory
from ._dependence import dependence
from ._failure import NOT_CONVERGED, NOT_FINITE
from ._linearisation import AbstractLinearisation
from ._misc import (
    StateFlattener,
    finite,
    previous_states,
    rows_where,
    running,
)
from ._programs import without_checks


# How many steps the inputs of a recurrence are remembered for: what a pulse did to the
# scale of an entry is forgotten after one to two times as many.
_MEMORY = 256


class Linearised(NamedTuple):
    r"""A recurrence about a trajectory: the affine elements of one Newton iteration.

    The iteration solves $\delta_i = A_i \delta_{i-1} + r_i$.
    """

    residual: Trajectory
    """$r_i$: how far each state is from what its step makes of the one before it."""
    A: AbstractTransition
    defect: Trajectory
    """What has to vanish, in the units in which it is computed. Where a step is a map
    it is the residual; where it is an equation, what that equation leaves.
    """
    defect_scale: Trajectory
    r"""The terms that cancel in `defect`, by their absolute values: $|y_i| + |A_i|
    |y_{i-1}|$ for a map, $|B_i| |y_i| + |C_i| |y_{i-1}|$ for an equation. Rounding
    makes a defect of this size times the rounding unit.
    """
    scale: Trajectory
    """The same in units of the state: $|y_i| + |A_i| |y_{i-1}|$."""
    rounding: Trajectory
    """A residual as rounding makes it, in units of rounding: of arbitrary signs."""
    per_unit: Trajectory | None = None
    r"""Of an equation: $\sum_k |B_{jk}|$. A correction of one unit comes with rounding
    errors in all its entries, from the solution of the linear system; they make a
    defect of this size, times the rounding unit.
    """


def arbitrary_signs(like: Trajectory) -> Trajectory:
    """1 and -1, the same in every call, without any pattern (an integer hash)."""
    count = lambda axis: lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    bits = count(0) * np.uint32(like.shape[1]) + count(1) + np.uint32(1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return 1 - 2 * ((bits >> 16) & 1).astype(like.dtype)


class AbstractRecurrence(eqx.Module):
    r"""A recurrence $y_i = f_i(y_{i-1})$, $i = 1, \dots, T$, from a given $y_0$.

    States are flat real vectors. Everything that the answer depends on differentiably
    must be a leaf of this pytree: derivatives of the solution are taken with respect
    to those leaves.

    A step may depend on the last entries of the state before it only
    (`TrailingTransition`). Then what the other entries hold of a step (the stages of a
    collocation method) belongs to that step alone.

    **Fields:**

    - `y0`: the state before the first step, flat and real.
    - `eps`: the rounding unit of each entry of a state, known while tracing. (It may be
        larger than that of the dtype of `y0`: the leaves of a state in the user's form
        may have several dtypes.)
    - `is_explicit`: whether a step is a map that solves nothing within, so that it can
        be taken from any state, and differentiated there.
    - `threshold`: entries below it are asked for in absolute terms, not relative to
        their size; `None` where every entry matters however small it is.
    """

    y0: eqx.AbstractVar[State]
    eps: eqx.AbstractVar[tuple[float, ...]]
    is_explicit: eqx.AbstractVar[bool]
    threshold: eqx.AbstractVar[State | None]

    def sizes(self, ys: Float[Array, "*steps state"]) -> Array:
        """How large the entries are to which errors are relative."""
        sizes = jnp.abs(ys)
        if self.threshold is None:
            return sizes
        return jnp.maximum(sizes, jnp.broadcast_to(self.threshold, sizes.shape))

    @property
    @abc.abstractmethod
    def num_steps(self) -> int:
        """$T$, which is static."""

    @property
    def num_active(self) -> Int[Array, ""] | int:
        """How many steps are made. Those after them are padding: they hold the state,
        and count as converged once these have.
        """
        return self.num_steps

    @abc.abstractmethod
    def step(self, index: Int[Array, ""], y: State) -> State:
        """$f_i(y)$ for the step of zero-based `index`: one sequential step."""

    def loop(self) -> Trajectory:
        """All steps, sequentially."""

        def step(y, index):
            y = self.step(index, y)
            return y, y

        indices = jnp.arange(self.num_steps, dtype=jnp.int32)
        return lax.scan(step, self.y0, indices)[1]

    @abc.abstractmethod
    def part(
        self, start: Int[Array, ""], length: int, y0: State
    ) -> "AbstractRecurrence":
        """The steps from the zero-based `start` on, from the state `y0` before them."""

    @abc.abstractmethod
    def until(self, num_steps: Int[Array, ""]) -> "AbstractRecurrence":
        """The same, where steps after the first `num_steps` do no harm, whatever the
        states there.
        """

    @property
    def is_map(self) -> bool:
        """Whether a step is a map, which has one value, or else an equation."""
        return False

    @property
    def has_other_solutions(self) -> bool:
        """Whether there may be solutions that sequential steps would not find."""
        return False

    @property
    @abc.abstractmethod
    def prefers_sequential(self) -> bool:
        """Whether on a CPU sequential steps take less time than iterations."""

    @abc.abstractmethod
    def choose(self, linearisation: AbstractLinearisation) -> AbstractLinearisation:
        """What `linearisation` comes to for the steps of this recurrence."""

    def simplified(self) -> "AbstractRecurrence":
        """The same steps, for an iteration: derivatives may be cheaper ones."""
        return self

    @abc.abstractmethod
    def linearise(
        self, ys: Trajectory, linearisation: AbstractLinearisation
    ) -> Linearised:
        """All steps at once, linearised about `ys`."""

    def largest_scale(self, scale: Trajectory, stride: int = 1) -> Trajectory:
        """The largest scale of each entry up to each step, so far as it matters there.
        `stride` is how many steps there are from one row to the next.
        """
        del stride
        return running(lax.cummax, finite(scale))

    @abc.abstractmethod
    def evaluate(self, ys: Trajectory) -> Trajectory:
        """What all steps make of the states `ys`, at once: the next states of maps, the
        defects of equations. Differentiable.
        """

    @abc.abstractmethod
    def linear_response(
        self, ys: Trajectory, tangent: Any, linearisation: AbstractLinearisation
    ) -> tuple[AbstractTransition, Trajectory]:
        r"""How a solution `ys` answers a change of the leaves of this recurrence.

        Returns $A_i$ and $b_i$ of $\dot y_i = A_i \dot y_{i-1} + b_i$, where $b_i$ is
        linear in `tangent` (a recurrence of tangents, `None` where there is none).
        """

    @abc.abstractmethod
    def cause_of_failure(self) -> Int[Array, ""]:
        """Why the only step of this recurrence fails, as `_failure` counts causes."""

    @abc.abstractmethod
    def is_sequential_answer(self, ys: Trajectory) -> Mask | None:
        """Which steps of a solution `ys` are those that a sequential solve would take.

        `None` where there can be no others: a map has one value. An equation may have
        several solutions, of which a sequential solve finds the one nearby.
        """

    @abc.abstractmethod
    def flatten(self, ys: PyTree[Array]) -> Trajectory:
        """A trajectory in the user's form, each leaf with a leading axis of steps."""

    @abc.abstractmethod
    def coarse_trajectory(self, every: int) -> Trajectory:
        """An approximate answer from strides of `every` steps, cheap to compute.

        Entries need not be finite.
        """

    def adaptive_trajectory(self, rtol: float | None) -> Trajectory | None:
        """An approximate answer by an adaptive solve to a relative tolerance, or to the
        default one; `None` where there is no ordinary differential equation.
        """
        del rtol
        return None


def cut(
    xs: PyTree[Array], start: Int[Array, ""], length: int, axis: int = 0
) -> PyTree[Array]:
    """`length` entries along one axis of each leaf."""
    return jtu.tree_map(lambda x: lax.dynamic_slice_in_dim(x, start, length, axis), xs)


class AbstractMapRecurrence(AbstractRecurrence):
    r"""$y_i = f(y_{i-1}, x_i)$: one map for all steps, told apart by their inputs.

    `f` is a callable pytree `(state, x) -> state`, and `xs` any pytree of arrays whose
    first axis counts the steps.
    """

    f: eqx.AbstractVar[Callable[[State, Any], State]]
    xs: eqx.AbstractVar[PyTree[Array]]

    @property
    def is_map(self):
        return True

    @property
    def xs_axis(self) -> int:
        """Which axis of `xs` counts the steps."""
        return 0

    @property
    def num_steps(self):
        return jtu.tree_leaves(self.xs)[0].shape[self.xs_axis]

    def step(self, index, y):
        take = lambda x: lax.dynamic_index_in_dim(x, index, self.xs_axis, False)
        return self.f(y, jtu.tree_map(take, self.xs))

    def loop(self):
        """Differentiable by JAX itself, also backwards."""

        def step(y, x):
            y = self.f(y, x)
            return y, y

        first = lambda x: jnp.moveaxis(x, self.xs_axis, 0)
        return lax.scan(step, self.y0, jtu.tree_map(first, self.xs))[1]

    def part(self, start, length, y0):
        xs = cut(self.xs, start, length)
        return eqx.tree_at(lambda r: (r.y0, r.xs), self, (y0, xs))

    def cause_of_failure(self):
        (value,) = without_checks(lambda r: r.evaluate(r.y0[None]))(self)
        is_finite = jnp.all(jnp.isfinite(value))
        return jnp.where(is_finite, NOT_CONVERGED, NOT_FINITE).astype(jnp.int32)

    def is_sequential_answer(self, ys):
        del ys
        return None

    @property
    def prefers_sequential(self):
        return True

    def padded(self, num_steps: int) -> "AbstractMapRecurrence":
        """With further steps, that can be taken but mean nothing."""
        count = num_steps - self.num_steps
        repeat = lambda x: jnp.concatenate([x, jnp.repeat(x[:1], count, axis=0)])
        return eqx.tree_at(lambda r: r.xs, self, jtu.tree_map(repeat, self.xs))

    def tracing(self) -> contextlib.AbstractContextManager:
        """In what steps are traced."""
        return jax.default_matmul_precision("highest")

    @abc.abstractmethod
    def groups(self) -> tuple[int, ...] | None:
        """For each entry of a state to which group it belongs: entries of different
        groups do not depend on each other. `None` where that is not known.
        """

    def choose(self, linearisation):
        return linearisation.for_map(self.groups, self.y0.shape[0])

    def evaluate(self, ys):
        with self.tracing():
            values = jax.vmap(self.f, in_axes=(0, self.xs_axis))
            return values(previous_states(self.y0, ys), self.xs)

    def jacobians(
        self, ys: Trajectory, linearisation: AbstractLinearisation
    ) -> tuple[Trajectory, AbstractTransition]:
        r"""$f(y_{i-1}, x_i)$ and its Jacobian for all steps at once."""

        def linearise_step(y, x):
            return linearisation(lambda y: self.f(y, x), y)

        with self.tracing():
            all_steps = jax.vmap(linearise_step, in_axes=(0, self.xs_axis))
            return all_steps(previous_states(self.y0, ys), self.xs)

    def linearise(self, ys, linearisation):
        values, A = self.jacobians(ys, linearisation)
        return self._linearised(ys, values, A, self.sizes(ys))

    def _linearised(self, ys, values, A, sizes) -> Linearised:
        """`sizes` is how large the entries are by which a step rounds its value."""
        # Any finite matrix will do where there is no derivative.
        A = A.where_finite()
        residual = values - ys
        before = self.sizes(previous_states(self.y0, ys))
        scale = sizes + A.abs().apply(before)
        rounding = scale * arbitrary_signs(scale)
        return Linearised(residual, A, residual, scale, scale, rounding)

    def linear_response(self, ys, tangent, linearisation):
        _, t_values = eqx.filter_jvp(
            lambda recurrence: recurrence.evaluate(ys), (self,), (tangent,)
        )
        _, A = self.jacobians(ys, linearisation)
        # There is nothing for the first one to multiply, even if it is not finite.
        return A.zero_first(), t_values


class Recurrence(AbstractMapRecurrence):
    """A map that comes from nowhere else: it has no coarser version of itself."""

    f: Callable[[State, Any], State]
    y0: Float[Array, " state"]
    xs: PyTree[Array]
    flattener: StateFlattener
    threshold = None
    _groups: tuple[int, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        f: Callable[[State, Any], State],
        y0: State,
        xs: PyTree[Array],
        flattener: StateFlattener,
    ):
        """`f` may close over what derivatives are taken in."""
        one = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
        start = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
        # Full precision, since residuals could not become small otherwise.
        with jax.default_matmul_precision("highest"):
            # Of `f` as it comes, where a constant is seen to be one.
            found = dependence(f, start, one)
            # What `f` closes over becomes a leaf.
            closed = eqx.filter_closure_convert(f, start, one)
        # An array within, where a derivative is taken in a Python number.
        self.f = jtu.tree_map(
            lambda x: jnp.asarray(x) if eqx.is_array(x) else x, closed
        )
        self._groups = None if found is None else connected(found)
        self.y0 = y0
        self.xs = xs
        self.flattener = flattener

    @property
    def is_explicit(self):
        return True

    def groups(self):
        return self._groups

    @property
    def eps(self):
        return self.flattener.eps

    def until(self, num_steps):
        """Steps after it repeat the first input."""
        is_made = jnp.arange(self.num_steps, dtype=jnp.int32) < num_steps
        first = jtu.tree_map(lambda x: x[0], self.xs)
        xs = rows_where(is_made, self.xs, first)
        return eqx.tree_at(lambda r: r.xs, self, xs)

    def largest_scale(self, scale, stride=1):
        """What was before a pulse, or after it, is not small beside it."""
        memory = max(1, _MEMORY // stride)
        scale = finite(scale)
        padding = -scale.shape[0] % memory
        stretches = jnp.pad(scale, ((0, padding), (0, 0)))
        stretches = stretches.reshape(-1, memory, scale.shape[1])
        so_far = running(lax.cummax, stretches, axis=1)
        before = jnp.concatenate([so_far[:1, :1], so_far[:-1, -1:]])
        largest = jnp.maximum(so_far, before)
        return largest.reshape(-1, scale.shape[1])[: scale.shape[0]]

    def flatten(self, ys):
        return jax.vmap(self.flattener.flatten)(ys)

    def coarse_trajectory(self, every):
        del every
        return jnp.broadcast_to(self.y0, (self.num_steps, *self.y0.shape))
