r"""Recurrences $y_i = f_i(y_{i-1})$, as Newton's method sees them."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._affine import absolute, apply
from ._custom_types import Mask, Propagators, State, Trajectory
from ._linearisation import AbstractLinearisation
from ._misc import StateFlattener, previous_states


class Linearised(NamedTuple):
    r"""A recurrence about a trajectory: the affine elements of one Newton iteration.

    The iteration solves $\delta_i = A_i \delta_{i-1} + r_i$.
    """

    residual: Trajectory
    """$r_i$: how far each state is from what its step makes of the one before it."""
    A: Propagators
    defect: Trajectory
    """What has to vanish, in the units in which it is computed. Where a step is a map
    it is the residual; where it is an equation, what that equation leaves.
    """
    size: Trajectory
    """The terms that cancel in `defect`, by their absolute values: rounding alone makes
    a defect of this size times the rounding unit.
    """


class AbstractRecurrence(eqx.Module):
    r"""A recurrence $y_i = f_i(y_{i-1})$, $i = 1, \dots, T$, from a given $y_0$.

    States are flat real vectors. Everything that the answer depends on differentiably
    must be a leaf of this pytree: derivatives of the solution are taken with respect
    to those leaves.

    A step may depend on the last entries of the state before it only. Then $A_i$ has
    as many columns, and what the other entries hold of a step (the stages of a
    collocation method) belongs to that step alone.
    """

    y0: eqx.AbstractVar[State]
    eps: eqx.AbstractVar[tuple[float, ...]]

    @property
    @abc.abstractmethod
    def num_steps(self) -> int:
        """$T$, which is static."""

    @abc.abstractmethod
    def step(self, index: Int[Array, ""], y: State) -> State:
        """$f_i(y)$ for the step of zero-based `index`: one sequential step."""

    @abc.abstractmethod
    def choose(self, linearisation: AbstractLinearisation) -> AbstractLinearisation:
        """What `linearisation` comes to for the steps of this recurrence."""

    @abc.abstractmethod
    def linearise(
        self, ys: Trajectory, linearisation: AbstractLinearisation
    ) -> Linearised:
        """All steps at once, linearised about `ys`."""

    @abc.abstractmethod
    def linear_response(
        self, ys: Trajectory, tangent: Any, linearisation: AbstractLinearisation
    ) -> tuple[Propagators, Trajectory]:
        r"""How a solution `ys` answers a change of the leaves of this recurrence.

        Returns $A_i$ and $b_i$ of $\dot y_i = A_i \dot y_{i-1} + b_i$, where $b_i$ is
        linear in `tangent` (a recurrence of tangents, `None` where there is none).
        """

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


class AbstractMapRecurrence(AbstractRecurrence):
    r"""$y_i = f(y_{i-1}, x_i)$: one map for all steps, told apart by their inputs.

    `f` is a callable pytree `(state, x) -> state`, and `xs` any pytree of arrays whose
    first axis counts the steps.
    """

    f: eqx.AbstractVar[Callable[[State, Any], State]]
    xs: eqx.AbstractVar[PyTree[Array]]

    @property
    def num_steps(self):
        return jtu.tree_leaves(self.xs)[0].shape[0]

    def step(self, index, y):
        return self.f(y, jtu.tree_map(lambda x: x[index], self.xs))

    def is_sequential_answer(self, ys):
        del ys
        return None

    def choose(self, linearisation):
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        y0 = jax.ShapeDtypeStruct(self.y0.shape, self.y0.dtype)
        return linearisation.for_map(self.f, y0, jtu.tree_map(one, self.xs))

    def evaluate(self, ys: Trajectory) -> Trajectory:
        r"""$f(y_{i-1}, x_i)$ for all steps at once."""
        return jax.vmap(self.f)(previous_states(self.y0, ys), self.xs)

    def jacobians(
        self, ys: Trajectory, linearisation: AbstractLinearisation
    ) -> tuple[Trajectory, Propagators]:
        r"""$f(y_{i-1}, x_i)$ and its Jacobian for all steps at once."""

        def linearise_step(y, x):
            return linearisation(lambda y: self.f(y, x), y)

        return jax.vmap(linearise_step)(previous_states(self.y0, ys), self.xs)

    @abc.abstractmethod
    def sizes(self, ys: Trajectory) -> Trajectory:
        """How large the numbers are in which `ys` are computed, entry by entry."""

    def linearise(self, ys, linearisation):
        values, A = self.jacobians(ys, linearisation)
        residual = values - ys
        before = jnp.abs(previous_states(self.y0, ys))
        size = self.sizes(ys) + apply(absolute(A), before)
        return Linearised(residual, A, residual, size)

    def linear_response(self, ys, tangent, linearisation):
        _, t_values = eqx.filter_jvp(
            lambda recurrence: recurrence.evaluate(ys), (self,), (tangent,)
        )
        return self.jacobians(ys, linearisation)[1], t_values


class Recurrence(AbstractMapRecurrence):
    """A map that comes from nowhere else: it has no coarser version of itself."""

    f: Callable[[State, Any], State]
    y0: Float[Array, " state"]
    xs: PyTree[Array]
    flattener: StateFlattener

    def __init__(
        self,
        f: Callable[[State, Any], State],
        y0: State,
        xs: PyTree[Array],
        flattener: StateFlattener,
    ):
        self.f = f
        self.y0 = y0
        self.xs = xs
        self.flattener = flattener

    @property
    def eps(self):
        return self.flattener.eps

    def sizes(self, ys):
        """Of a step only its value is seen, which may be next to nothing where it is
        the difference of large terms. So the largest entry of its leaf stands for
        these, of the steps up to this one: of those that are right, if it is the next.
        """
        sizes = jnp.abs(jnp.concatenate([self.y0[None], ys]))
        largest = self.flattener.map_leaves(
            lambda x: jnp.broadcast_to(jnp.max(x, -1, keepdims=True), x.shape), sizes
        )
        return lax.cummax(largest)[1:]

    def sequential_response(self, ys: Trajectory, tangent: Any) -> Trajectory:
        """What `linear_response` leads to, one step after the other: for Jacobians that
        are too large to be kept.
        """
        _, b = eqx.filter_jvp(
            lambda recurrence: recurrence.evaluate(ys), (self,), (tangent,)
        )

        def step(t_y, inputs):
            y, x, b_i = inputs
            _, t_y = jax.jvp(lambda y: self.f(y, x), (y,), (t_y,))
            return (t_y + b_i,) * 2

        starts = previous_states(self.y0, ys)
        return lax.scan(step, jnp.zeros_like(self.y0), (starts, self.xs, b))[1]

    def flatten(self, ys):
        return jax.vmap(self.flattener.flatten)(ys)

    def coarse_trajectory(self, every):
        del every
        return jnp.broadcast_to(self.y0, (self.num_steps, *self.y0.shape))
