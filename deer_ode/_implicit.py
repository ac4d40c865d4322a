r"""Derivatives of a converged trajectory, by the implicit function theorem.

The trajectory solves $f_i(y_{i-1}, \theta) - y_i = 0$. A perturbation of $\theta$
therefore moves it by the solution of

$$\dot y_i = A_i \dot y_{i-1} + \frac{\partial f_i}{\partial \theta} \dot\theta,$$

the same affine recurrence with the exact Jacobian $A_i$ at the solution. It is linear
in $\dot\theta$ and JAX can transpose it, so this one rule gives forward and reverse
derivatives of every order. Nothing of the iterations is stored.
"""

from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu

from ._affine import affine_solve
from ._custom_types import Trajectory
from ._linearisation import AbstractLinearisation, Dense
from ._method import AbstractMethod, TrajectorySolution
from ._misc import by_platform
from ._recurrence import AbstractMapRecurrence, AbstractRecurrence
from ._response import response_in_turn, response_in_windows


# On a CPU the Jacobians of so many steps stay in its cache. With windows of 128 to 512
# steps gradients took between half the time and as much as with all of them at once.
_CPU_WINDOW = 512

# So many operations for one Jacobian take as long on two cores as the loops that
# back-propagation is (a GRU of 32 entries, Tsit5 on a network of width 32 from 16).
_LARGE_WORK = 150_000


@eqx.filter_custom_jvp
def _solve(
    recurrence: AbstractRecurrence, method: AbstractMethod
) -> TrajectorySolution:
    return method.solve(recurrence)


@_solve.def_jvp
def _solve_jvp(primals, tangents):
    recurrence, method = primals
    t_recurrence, _ = tangents
    # Solved by the rule's own function, so that higher derivatives come here again.
    solution = _solve(recurrence, method)
    t_solution = jtu.tree_map(lambda _: None, solution)
    if len(jtu.tree_leaves(t_recurrence)) == 0:
        return solution, t_solution
    ys = solution.ys
    # What the forward pass used may have been cheaper; a derivative needs all of it.
    exact = recurrence.choose(method.exact_linearisation)
    t_ys = _response(recurrence, exact, ys, t_recurrence)
    return solution, t_solution._replace(ys=t_ys)


def _work_of_jacobian(recurrence: AbstractMapRecurrence) -> float:
    """How many operations the Jacobian of a step takes, by XLA's own count."""

    def tangent(y, t_y, x):
        return jax.jvp(lambda y: recurrence.f(y, x), (y,), (t_y,))[1]

    y0, xs = recurrence.y0, recurrence.xs
    one = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
    x = jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    with recurrence.tracing():
        costs = jax.jit(tangent).lower(one, one, x).cost_analysis()
    return y0.size * (costs or {}).get("flops", 0.0)


def _response(
    recurrence: AbstractRecurrence,
    exact: AbstractLinearisation,
    ys: Trajectory,
    tangent: Any,
) -> Trajectory:
    """How the solution `ys` answers a change of the leaves of `recurrence`."""
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
        is_dense = isinstance(exact, Dense) and recurrence.is_explicit
        if is_dense and _work_of_jacobian(recurrence) > _LARGE_WORK:
            return response_in_turn(recurrence, ys, changes())
        return in_windows(min(_CPU_WINDOW, num_steps))

    return by_platform(cpu=on_cpu, elsewhere=lambda: in_windows(num_steps))


def solve_trajectory(
    recurrence: AbstractRecurrence, method: AbstractMethod
) -> TrajectorySolution:
    """Solves `recurrence` by `method`, differentiably in all leaves of `recurrence`."""
    return _solve(recurrence, method)
