r"""Derivatives of a converged trajectory, by the implicit function theorem.

The trajectory solves $f_i(y_{i-1}, \theta) - y_i = 0$. A perturbation of $\theta$
therefore moves it by the solution of

$$\dot y_i = A_i \dot y_{i-1} + \frac{\partial f_i}{\partial \theta} \dot\theta,$$

the same affine recurrence with the exact Jacobian $A_i$ at the solution. It is linear
in $\dot\theta$ and JAX can transpose it, so this one rule gives forward and reverse
derivatives of every order. Nothing of the iterations is stored. (Where a loop finds the
solution, the loop's own derivative is the same, and sometimes takes less time.)
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.lax as lax
import jax.tree_util as jtu

from ._affine import affine_solve
from ._costs import Way, cheapest_way
from ._custom_types import Trajectory
from ._linearisation import AbstractLinearisation
from ._method import AbstractMethod, TrajectorySolution, sequential_solution
from ._misc import by_platform, has_accelerator, without_gradient
from ._recurrence import AbstractMapRecurrence, AbstractRecurrence
from ._response import jvp_of_loop, response_in_turn, response_in_windows


# On a CPU the Jacobians of so many steps stay in its cache. With windows of 128 to 512
# steps gradients took between half the time and as much as with all of them at once.
_CPU_WINDOW = 512


class _Derivatives(eqx.Module):
    """What the rule has to know of the method."""

    linearisation: AbstractLinearisation
    """Exact, whatever the iteration may use."""
    is_loop_on_cpu: bool = eqx.field(static=True)
    fallback: bool = eqx.field(static=True)


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
    derivatives: _Derivatives,
) -> TrajectorySolution:
    del derivatives
    solution = run(recurrence)
    return solution._replace(ys=_batch_first(solution.ys))


@_solve.def_jvp
def _solve_jvp(primals, tangents):
    recurrence, run, derivatives = primals
    t_recurrence, *_ = tangents
    if len(jtu.tree_leaves(t_recurrence)) == 0:
        solution = _solve(recurrence, run, derivatives)
        return solution, jtu.tree_map(lambda _: None, solution)
    exact = recurrence.choose(derivatives.linearisation)

    # Where there is an accelerator, the program may be for that.
    way = None
    if not has_accelerator():
        way = cheapest_way(recurrence, exact, derivatives.is_loop_on_cpu)
    if way is Way.THROUGH_THE_LOOP:
        ys, t_ys = jvp_of_loop(recurrence, t_recurrence)
        solution = sequential_solution(
            _batch_first(ys), only_finite=not derivatives.fallback
        )
    else:
        # By the rule's own function, so that higher derivatives come here again.
        solution = _solve(recurrence, run, derivatives)
        t_ys = _response(recurrence, exact, solution.ys, t_recurrence, way)
    t_solution = jtu.tree_map(lambda _: None, solution)
    return solution, t_solution._replace(ys=t_ys)


def _response(
    recurrence: AbstractRecurrence,
    exact: AbstractLinearisation,
    ys: Trajectory,
    tangent: Any,
    way: Way | None,
) -> Trajectory:
    """How the solution `ys` answers a change of the leaves of `recurrence`; which way
    on a CPU, if that is known.
    """
    num_steps, state_size = ys.shape

    def at_once():
        exact.check_size(num_steps, state_size, ys.dtype)
        return affine_solve(*recurrence.linear_response(ys, tangent, exact))

    if not isinstance(recurrence, AbstractMapRecurrence):
        return at_once()

    def changes():
        return eqx.filter_jvp(lambda r: r.evaluate(ys), (recurrence,), (tangent,))[1]

    def in_windows(length):
        """Of `length` steps, or as many as there is memory for."""
        while length > 1 and not exact.fits(length, state_size, ys.dtype):
            length = -(-length // 2)
        exact.check_size(length, state_size, ys.dtype)
        if length == num_steps:
            return at_once()
        return response_in_windows(recurrence, ys, changes(), exact, length)

    def on_cpu():
        if (way or cheapest_way(recurrence, exact, False)) is Way.IN_TURN:
            return response_in_turn(recurrence, ys, changes())
        return in_windows(min(_CPU_WINDOW, num_steps))

    return by_platform(cpu=on_cpu, elsewhere=lambda: in_windows(num_steps))


def solve_trajectory(
    recurrence: AbstractRecurrence, method: AbstractMethod
) -> TrajectorySolution:
    """Solves `recurrence` by `method`, differentiably in all leaves of `recurrence`."""
    # JAX asks for it by itself and again within its derivatives: traced once for both.
    run = eqx.filter_closure_convert(method.solve, recurrence)
    # What the forward pass uses may be cheaper; a derivative needs all of it.
    derivatives = _Derivatives(
        method.exact_linearisation,
        method.is_loop_on_cpu(recurrence),
        method.fallback,
    )
    return _solve(recurrence, run, derivatives)


class _Known(eqx.Module):
    ys: Trajectory

    def __call__(self, recurrence: AbstractRecurrence) -> TrajectorySolution:
        del recurrence
        return sequential_solution(self.ys)


def give_derivatives(
    recurrence: AbstractRecurrence, ys: Trajectory, linearisation: AbstractLinearisation
) -> Trajectory:
    """`ys` as they are, differentiable as the trajectory of `recurrence`."""
    known = _Known(without_gradient(ys))
    return _solve(recurrence, known, _Derivatives(linearisation, False, True)).ys
