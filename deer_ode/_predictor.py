"""Where Newton's method starts from: a first guess at the whole trajectory."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._custom_types import Trajectory as TrajectoryArray, Y
from ._misc import StateFlattener
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
        return Adaptive()


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
    with its own interpolation between (for a stochastic one, a step from each coarse
    point to each fine one, on summed increments). Costs `1 / every` of a sequential
    solve. Where the coarse solve blows up, the last finite state is held from there on.
    Recurrences that are not discretised in time start from a constant.
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


class Adaptive(AbstractPredictor):
    r"""An adaptive solve at a loose tolerance, interpolated. The default.

    It resolves the solution and not the grid, so it takes as many sequential steps on
    a grid as fine as one likes: 100 to 300 for the usual test problems. By
    `diffrax.Dopri8`, or `diffrax.Kvaerno5` where the base solver is one for stiff
    equations (implicit, exponential or collocation at Radau's nodes). The absolute
    tolerance is a thousandth of the relative one, times the largest entry of $y_0$ (or
    1, where that is zero).

    At most $T / 4 + 256$ steps are attempted for a grid of $T$ steps; beyond those the
    last state is held. What is not an ordinary differential equation (a control, a
    Brownian path, an algebraic equation, a symplectic splitting) is guessed by
    [`deer_ode.Coarse`][], and a recurrence that is not discretised in time starts from
    a constant.

    !!! example

        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from deer_ode import Adaptive, DEER, Newton, diffeqsolve
        >>> decay = diffrax.ODETerm(lambda t, y, args: -y)
        >>> method = Newton(guess=Adaptive(rtol=1e-3))
        >>> solver = DEER(diffrax.Tsit5(), method)
        >>> sol = diffeqsolve(decay, solver, 0, 1, 0.01, jnp.array(1.0))
        >>> round(float(sol.ys[0]), 6)
        0.367879
    """

    rtol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.rtol is not None and not self.rtol > 0:
            raise ValueError(
                f"`Adaptive(rtol=...)` must be a positive number; got {self.rtol}."
            )

    def __call__(self, recurrence):
        ys = recurrence.adaptive_trajectory(self.rtol)
        return Coarse()(recurrence) if ys is None else ys

    def for_window(self):
        return self


Adaptive.__init__.__doc__ = """**Arguments:**

- `rtol`: the relative tolerance; by default 1e-6, and no less than 64 units of
    rounding.

**Raises:**

- `ValueError`: if it is not positive.
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


def from_solver_state(
    states: TrajectoryArray, y0: Y, num_steps: int
) -> Trajectory | None:
    """The trajectory of an earlier solve, from its flat states, of which those beyond
    `num_steps` are padding; `None` where there are no states.
    """
    if states.shape[0] == 0:
        return None
    return Trajectory(jax.vmap(StateFlattener(y0).unflatten)(states[:num_steps]))
