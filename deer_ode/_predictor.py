"""Where Newton's method starts from: a first guess at the whole trajectory."""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import Trajectory as TrajectoryArray
from ._recurrence import AbstractRecurrence


class AbstractPredictor(eqx.Module):
    """Makes the initial trajectory.

    The guess never changes the answer, only how many iterations it takes: with one in
    the basin of quadratic convergence three to five, without dozens.
    """

    @abc.abstractmethod
    def __call__(self, recurrence: AbstractRecurrence) -> TrajectoryArray:
        """The states after each step; non-finite ones are allowed and held."""

    def for_window(self) -> "AbstractPredictor":
        """What guesses a part of a trajectory, from the state that it begins with.

        That is itself for a predictor that needs to know no more than the recurrence.
        """
        return Coarse()


class Constant(AbstractPredictor):
    """The initial state everywhere: free, and far off."""

    def __call__(self, recurrence):
        y0 = recurrence.y0
        return jnp.broadcast_to(y0, (recurrence.num_steps, *y0.shape))

    def for_window(self):
        return self


class Coarse(AbstractPredictor):
    """A sequential solve that takes every so many steps at once, interpolated.

    For a differential equation: the base solver on every `every`-th point of the grid,
    with the base solver's own interpolation between. Costs `1 / every` of a sequential
    solve. (The steps of [`deer_ode.Obreshkov`][] are long already: it is guessed by
    `Tsit5` on every `every // 8`-th point, so on each of them by default.) Where the
    coarse solve blows up, the last finite state is held from there on. Recurrences that
    are not discretised in time start from a constant.
    """

    every: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(
                f"`Coarse(every=...)` must be a positive integer; got {self.every}."
            )

    def __call__(self, recurrence):
        return recurrence.coarse_trajectory(self.every)

    def for_window(self):
        return self


Coarse.__init__.__doc__ = """**Arguments:**

- `every`: how many steps of the grid one coarse step spans.
"""


class Trajectory(AbstractPredictor):
    """A given trajectory: one's own, or that of an earlier solve.

    `diffeqsolve(..., solver_state=sol.solver_state)` is the short way to the latter.
    """

    ys: PyTree[Array]

    def __call__(self, recurrence):
        num_steps = recurrence.num_steps
        for leaf in jtu.tree_leaves(self.ys):
            if leaf.shape[:1] != (num_steps,):
                raise ValueError(
                    "The guessed trajectory must hold the state after each of the "
                    f"{num_steps} steps of the grid; got a leaf of shape {leaf.shape}. "
                    "One of another grid must be interpolated first "
                    "(`Newton(guess=Trajectory(ys))`), or left out (`solver_state=`)."
                )
        ys = recurrence.flatten(self.ys)
        if ys.shape != (num_steps, *recurrence.y0.shape):
            raise ValueError(
                "The states of the guessed trajectory must look like the initial state "
                f"({recurrence.y0.shape[0]} numbers); got {ys.shape[1]} numbers."
            )
        return ys


Trajectory.__init__.__doc__ = """**Arguments:**

- `ys`: the states after each step of the grid, without the initial one: a pytree like
    `y0` whose leaves have a leading axis of steps, as `SaveAt(steps=True)` gives.
"""
