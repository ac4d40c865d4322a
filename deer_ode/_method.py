"""How a recurrence is solved: what all methods have in common."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from ._custom_types import Mask, Trajectory
from ._linearisation import AbstractLinearisation, Exact
from ._misc import leading_true
from ._plan import Plan, Platform, default_platform
from ._predictor import AbstractPredictor, Adaptive
from ._recurrence import AbstractRecurrence


@jtu.register_static
class StaticString(str):
    """A word that may be among the outputs of `jax.jit`."""


class TrajectorySolution(NamedTuple):
    """What a method ended with."""

    ys: Trajectory
    num_good_steps: Int[Array, ""]
    """Leading steps that satisfy the recurrence; all of them after success."""
    num_newton_steps: Int[Array, ""]
    num_windows: Int[Array, ""]
    is_sequential: Mask
    """Which steps were sequential."""
    residual: Float[Array, ""]
    """Largest residual over the steps that were solved for, before the last
    correction.
    """
    damping: Float[Array, ""]
    first_nonfinite_step: Int[Array, ""]
    """The first step to a state that is not finite; -1 where there is none."""
    is_stuck: Bool[Array, ""]
    """Whether the step after the good ones leads from a finite state to none."""

    @property
    def num_fallback_steps(self) -> Int[Array, ""]:
        return jnp.sum(self.is_sequential, dtype=jnp.int32)

    def stats(self) -> dict[str, Any]:
        """What the user gets to see of it, beside the counts of steps."""
        return dict(
            num_newton_steps=self.num_newton_steps,
            newton_residual=lax.stop_gradient(self.residual),
            newton_damping=lax.stop_gradient(self.damping),
            num_windows=self.num_windows,
        )


def first_nonfinite_step(ys: Trajectory) -> Int[Array, ""]:
    if ys.shape[0] == 0:
        return jnp.asarray(-1, jnp.int32)
    count = leading_true(jnp.all(jnp.isfinite(ys), axis=-1))
    return jnp.where(count < ys.shape[0], count, -1)


class AbstractMethod(eqx.Module):
    """A way to solve a recurrence."""

    def is_sequential(self, recurrence: AbstractRecurrence, platform: Platform) -> bool:
        """Whether all steps are sequential on `platform`."""
        del recurrence, platform
        return False

    def path(self, recurrence: AbstractRecurrence) -> StaticString:
        """How the steps are found, in one word, for `stats`."""
        is_sequential = self.is_sequential(recurrence, default_platform())
        return StaticString("sequential" if is_sequential else "newton")

    @abc.abstractmethod
    def plan(self, recurrence: AbstractRecurrence, platform: Platform) -> Plan:
        """How to solve `recurrence` on `platform`."""

    @abc.abstractmethod
    def solve(self, recurrence: AbstractRecurrence, plan: Plan) -> TrajectorySolution:
        """Finds the trajectory of `recurrence`. Not differentiable by itself."""

    @property
    @abc.abstractmethod
    def guess(self) -> AbstractPredictor:
        """Where the method starts from unless told otherwise."""

    @property
    @abc.abstractmethod
    def fallback(self) -> bool:
        """Whether what this method finds is the sequential answer in any case."""

    @property
    def exact_linearisation(self) -> AbstractLinearisation:
        """The exact Jacobian, as derivatives of the solution are to use it."""
        return Exact()

    def start_from(self, guess: AbstractPredictor) -> "AbstractMethod":
        """The same method from another guess."""
        del guess
        return self

    def report_to(self, meter: Any) -> "AbstractMethod":
        """The same method, telling a progress meter how far it is, if it can."""
        del meter
        return self

    def result(
        self, solution: TrajectorySolution, num_steps: int | Int[Array, ""]
    ) -> optx.RESULTS:
        """Whether the first `num_steps` steps of `solution` are the answer.

        Known when the program is traced if there is a sequential finish.
        """
        if self.fallback:
            return optx.RESULTS.successful
        return optx.RESULTS.where(
            solution.num_good_steps >= num_steps,
            optx.RESULTS.successful,
            optx.RESULTS.where(
                solution.is_stuck,
                optx.RESULTS.nonfinite,
                optx.RESULTS.nonlinear_max_steps_reached,
            ),
        )


def solve_sequentially(
    recurrence: AbstractRecurrence, *, only_finite: bool = False
) -> TrajectorySolution:
    """One step after the other."""
    if recurrence.num_steps == 0:
        ys = jnp.zeros((0, *recurrence.y0.shape), recurrence.y0.dtype)
    else:
        ys = recurrence.loop()
    return sequential_solution(ys, only_finite=only_finite)


def sequential_solution(
    ys: Trajectory, *, only_finite: bool = False
) -> TrajectorySolution:
    """`ys` are sequential steps. If `only_finite`, steps are good up to the
    first one to a state that is not finite.
    """
    count = jnp.asarray(ys.shape[0], jnp.int32)
    none = jnp.zeros_like(count)
    nonfinite = first_nonfinite_step(ys)
    is_stuck = only_finite & (nonfinite >= 0)
    zero = jnp.zeros((), ys.dtype)
    return TrajectorySolution(
        ys=ys,
        num_good_steps=jnp.where(is_stuck, nonfinite, count),
        num_newton_steps=none,
        num_windows=none,
        is_sequential=jnp.ones(ys.shape[0], bool),
        residual=zero,
        damping=zero,
        first_nonfinite_step=nonfinite,
        is_stuck=is_stuck,
    )


class Sequential(AbstractMethod):
    """One step after the other.

    What the parallel methods are compared with, by one word. In [`deer_ode.scan`][] it
    is `jax.lax.scan` itself, at full precision of products, and its derivatives are
    JAX's own, by storing every step. In [`deer_ode.DEER`][] it is a loop over the steps
    of the base solver; its derivatives are JAX's own as well, but only the trajectory
    is stored, and each step is evaluated once more. (Steps that are equations are
    differentiated by the implicit function theorem, as with the other methods.)
    """

    @property
    def guess(self):
        return Adaptive()  # where `diagnose` starts

    @property
    def fallback(self):
        return True

    def is_sequential(self, recurrence, platform):
        del recurrence, platform
        return True

    def plan(self, recurrence, platform):
        del recurrence
        return Plan("sequential", platform)

    def solve(self, recurrence, plan):
        del plan
        return solve_sequentially(recurrence)
