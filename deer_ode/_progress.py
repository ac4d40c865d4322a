"""How far an iteration over a trajectory has come, and whether it still advances."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import Mask, State, Trajectory


# Iterations without progress after which an interval is given up. Newton's method takes
# three to five from a good guess, and two or three per window once it slides.
_PATIENCE = 8

# Progress is a quarter of the interval, or half of the error.
_QUARTER = 4


class Updated(NamedTuple):
    """What an iteration makes of the part of a trajectory that it is given."""

    ys: Trajectory
    good: Bool[Array, " steps"]
    residual: Trajectory
    error: Float[Array, " steps"]
    """The residual of each step, in units of its tolerance."""
    damping: Float[Array, ""]
    at_rounding: Mask
    """Of which steps residual and correction are no more than rounding."""


class Patience(NamedTuple):
    """Whether the iteration over an interval still makes progress."""

    mark: Int[Array, ""]
    """How many steps had converged when it last advanced by a quarter."""
    lowest: Float[Array, ""]
    """The last error that was half of the one before it."""
    since: Int[Array, ""]
    """How many iterations ago either happened."""

    @classmethod
    def at(cls, num_good: Int[Array, ""], dtype: Any) -> "Patience":
        return cls(num_good, jnp.asarray(jnp.inf, dtype), jnp.zeros_like(num_good))

    def after(
        self, num_good: Int[Array, ""], error: Float[Array, ""], length: int
    ) -> tuple["Patience", Bool[Array, ""]]:
        """After an iteration over `length` steps; and whether it advanced."""
        advanced = num_good - self.mark >= max(length // _QUARTER, 1)
        # NaN is no improvement, nor is an error that was and remains infinite.
        improved = (error <= self.lowest / 2) & (self.lowest > 0) & jnp.isfinite(error)
        lowest = jnp.where(improved, error, self.lowest)
        new = Patience(
            mark=jnp.where(advanced, num_good, self.mark),
            lowest=jnp.where(advanced, jnp.inf, lowest),
            since=jnp.where(advanced | improved, 0, self.since + 1),
        )
        return new, advanced

    @property
    def is_spent(self) -> Bool[Array, ""]:
        return self.since >= _PATIENCE


class Tally(NamedTuple):
    """What is counted."""

    num_newton_steps: Int[Array, ""]
    work: Float[Array, ""]
    """The same in units of iterations over the whole trajectory."""
    num_windows: Int[Array, ""]
    residual: Float[Array, ""]
    """The largest residual of a converged step, before its last correction."""
    damping: Float[Array, ""]
    is_sequential: Mask
    """Which steps were sequential."""


class Progress(NamedTuple):
    """A trajectory, and how far it has converged."""

    ys: Trajectory
    num_good: Int[Array, ""]
    largest: State
    """The largest magnitude of each entry in the converged part."""
    damping: Float[Array, ""]
    at_rounding: Mask
    """Of which steps the last correction was no more than rounding."""
    is_nonfinite: Bool[Array, ""]
    """Whether the step after the converged ones was not finite when last seen."""
    is_stuck: Bool[Array, ""]
    patience: Patience
    tally: Tally
    num_guessed: Int[Array, ""]
    """How many states hold a guess, at least."""
    suspects_guess: Bool[Array, ""]
    """Whether the window failed once, and holds its first state as a guess."""
    gives_up: Bool[Array, ""]
    """Whether the window failed twice: sequential steps are next."""
    num_failures: Int[Array, ""]
    is_checked: Bool[Array, ""]
    """Whether it is known that this is the solution that sequential steps find."""
    num_trusted: Int[Array, ""]
    """How many states come from sequential steps, so need no such check."""
    meter: PyTree[Array]
    """The state of the progress meter."""
