r"""Recurrences $y_i = f_i(y_{i-1})$, as Newton's method sees them."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ._custom_types import Propagators, State, Trajectory
from ._linearisation import AbstractLinearisation
from ._misc import previous_states


class AbstractRecurrence(eqx.Module):
    r"""A recurrence $y_i = f_i(y_{i-1})$, $i = 1, \dots, T$, from a given $y_0$.

    States are flat real vectors. Everything that the answer depends on differentiably
    must be a leaf of this pytree: derivatives of the solution are taken with respect
    to those leaves.
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
    def evaluate(self, ys: Trajectory) -> Trajectory:
        r"""$f_i(y_{i-1})$ for all steps at once."""

    @abc.abstractmethod
    def linearise(
        self, ys: Trajectory, linearisation: AbstractLinearisation
    ) -> tuple[Trajectory, Propagators]:
        r"""$f_i(y_{i-1})$ and $\partial f_i / \partial y_{i-1}$ for all steps."""

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

    def evaluate(self, ys):
        return jax.vmap(self.f)(previous_states(self.y0, ys), self.xs)

    def linearise(self, ys, linearisation):
        def linearise_step(y, x):
            return linearisation(lambda y: self.f(y, x), y)

        return jax.vmap(linearise_step)(previous_states(self.y0, ys), self.xs)


class Recurrence(AbstractMapRecurrence):
    """A map that comes from nowhere else: it has no coarser version of itself."""

    f: Callable[[State, Any], State]
    y0: Float[Array, " state"]
    xs: PyTree[Array]
    eps: tuple[float, ...] = eqx.field(static=True)

    def flatten(self, ys):
        return ys

    def coarse_trajectory(self, every):
        del every
        return jnp.broadcast_to(self.y0, (self.num_steps, *self.y0.shape))
