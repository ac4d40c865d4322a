r"""Derivatives of a converged trajectory, by the implicit function theorem.

The trajectory solves $f_i(y_{i-1}, \theta) - y_i = 0$. A perturbation of $\theta$
therefore moves it by the solution of

$$\dot y_i = A_i \dot y_{i-1} + \frac{\partial f_i}{\partial \theta} \dot\theta,$$

the same affine recurrence with the exact Jacobian $A_i$ at the solution. It is linear
in $\dot\theta$ and JAX can transpose it, so this one rule gives forward and reverse
derivatives of every order. Nothing of the iterations is stored. Where the solution is
a loop over maps, JAX's own derivative of that loop is the same and takes less time.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int

from ._affine import affine_solve
from ._custom_types import Trajectory
from ._dependence import NO_FORWARD_MODE
from ._linearisation import AbstractLinearisation
from ._method import AbstractMethod, TrajectorySolution, sequential_solution
from ._misc import always, without_gradient
from ._plan import by_platform, tangent_window
from ._programs import Program, without_checks
from ._recurrence import AbstractMapRecurrence, AbstractRecurrence
from ._tangent import tangent_in_windows


def _batch_first(ys: Trajectory) -> Trajectory:
    """The same. Under `jax.vmap` JAX takes the axis of the batch to be where it is in
    what a function gives also for what its derivative rule gives; after a transposition
    it is in front.
    """
    return lax.transpose(lax.transpose(ys, (1, 0)), (1, 0))


@eqx.filter_custom_jvp
def _solve(
    recurrence: AbstractRecurrence,
    run: Callable[[AbstractRecurrence], TrajectorySolution],
    linearisation: AbstractLinearisation | None,
) -> TrajectorySolution:
    del linearisation
    solution = run(recurrence)
    return solution._replace(ys=_batch_first(solution.ys))


@_solve.def_jvp
def _solve_jvp(primals, tangents):
    recurrence, run, linearisation = primals
    t_recurrence, *_ = tangents
    # By the rule's own function, so that higher derivatives come here again.
    solution = _solve(recurrence, run, linearisation)
    t_solution = jtu.tree_map(lambda _: None, solution)
    if len(jtu.tree_leaves(t_recurrence)) == 0:
        return solution, t_solution
    if linearisation is None:
        tangent = _tangent_of_loop
    else:
        tangent = ft.partial(_tangent, recurrence.choose(linearisation))
    # The steps are checked along the solution, where they are taken once more.
    tangent = without_checks(tangent)
    return solution, t_solution._replace(
        ys=tangent(recurrence, solution.ys, t_recurrence)
    )


def _tangent(
    exact: AbstractLinearisation,
    recurrence: AbstractRecurrence,
    ys: Trajectory,
    t_recurrence: Any,
) -> Trajectory:
    """By how much the solution `ys` moves with the leaves of `recurrence`."""
    num_steps, state_size = ys.shape

    def at_once():
        exact.check_size(num_steps, state_size, ys.dtype)
        return affine_solve(*recurrence.linear_response(ys, t_recurrence, exact))

    if not isinstance(recurrence, AbstractMapRecurrence):
        return at_once()

    def in_windows(platform):
        fits = lambda n: exact.fits(n, state_size, ys.dtype)
        length = tangent_window(num_steps, fits, platform)
        exact.check_size(length, state_size, ys.dtype)
        if length == num_steps:
            return at_once()
        _, changes = eqx.filter_jvp(
            lambda r: r.evaluate(ys), (recurrence,), (t_recurrence,)
        )
        return tangent_in_windows(recurrence, ys, changes, exact, length)

    return by_platform(in_windows)


def _tangent_of_loop(
    recurrence: AbstractRecurrence, ys: Trajectory, t_recurrence: Any
) -> Trajectory:
    """The same by JAX's own derivative of the loop over the steps."""
    del ys
    return eqx.filter_jvp(_looped, (recurrence,), (t_recurrence,))[1]


def _looped(recurrence: AbstractRecurrence) -> Trajectory:
    assert isinstance(recurrence, AbstractMapRecurrence)
    with recurrence.tracing():
        return recurrence.loop()


def solve_trajectory(
    recurrence: AbstractRecurrence, method: AbstractMethod, *, is_checked: bool = True
) -> TrajectorySolution:
    """Solves `recurrence` by `method`, differentiably in all leaves of `recurrence`.

    With `is_checked` the user's own checks (`equinox.error_if`) are made on the steps
    of the solution, and on nothing else.
    """
    if is_native(recurrence, method):
        loop = _looped if is_checked else without_checks(_looped)
        return sequential_solution(loop(recurrence), only_finite=not method.fallback)

    def solve(recurrence):
        planned = lambda platform: method.plan(recurrence, platform)
        return by_platform(lambda p: method.solve(recurrence, planned(p)))

    # JAX asks for it by itself and again within its derivatives: traced once for both.
    try:
        program = Program.of(solve, recurrence)
    except TypeError as error:
        if "custom_vjp" in str(error) and str(error) != NO_FORWARD_MODE:
            raise TypeError(NO_FORWARD_MODE) from error
        raise
    run = _Run(program, is_checked)
    # What the forward pass uses may be cheaper; a derivative needs all of it.
    return _solve(recurrence, run, method.exact_linearisation)


def is_native(recurrence: AbstractRecurrence, method: AbstractMethod) -> bool:
    """Whether the solution is a loop that JAX differentiates by itself."""
    is_sequential = method.path(recurrence) == "sequential"
    return recurrence.is_map and is_sequential


def _checked(
    recurrence: AbstractRecurrence, ys: Trajectory, num_good: Int[Array, ""]
) -> Trajectory:
    """`ys`, with the user's checks on the first `num_good` steps."""
    again = recurrence.until(num_good).evaluate(ys)
    return jnp.where(always(ys), ys, again)


class _Run(eqx.Module):
    """A solve, and the user's checks on what it found."""

    program: Program
    is_checked: bool = eqx.field(static=True)

    def __call__(self, recurrence: AbstractRecurrence) -> TrajectorySolution:
        solution = self.program(recurrence)
        if not (self.is_checked and self.program.has_checks):
            return solution
        ys = _checked(recurrence, solution.ys, solution.num_good_steps)
        return solution._replace(ys=ys)


class _Known(eqx.Module):
    """A trajectory that was found before, with the user's checks if there are any."""

    ys: Trajectory
    num_good: Int[Array, ""]
    has_checks: bool = eqx.field(static=True)

    def __call__(self, recurrence: AbstractRecurrence) -> TrajectorySolution:
        ys = self.ys
        if self.has_checks:
            ys = _checked(recurrence, ys, self.num_good)
        return sequential_solution(ys)


def give_derivatives(
    recurrence: AbstractRecurrence,
    ys: Trajectory,
    num_good: Int[Array, ""],
    method: AbstractMethod,
    has_checks: bool,
) -> Trajectory:
    """`ys` as they are, differentiable as the trajectory of `recurrence`, with the
    user's checks on the first `num_good` steps; and on its inputs, if `has_checks`.
    """
    ys = without_gradient(ys)
    steps = Program.of(lambda r, ys: r.evaluate(ys), recurrence, ys)
    known = _Known(ys, num_good, has_checks or steps.has_checks)
    is_loop = is_native(recurrence, method)
    linearisation = None if is_loop else method.exact_linearisation
    return _solve(recurrence, known, linearisation).ys
