"""A guess at a whole trajectory: an adaptive solve, at a loose tolerance.

A guess has to resolve the solution and not the grid, so it takes as many sequential
steps on a grid as fine as one likes.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from .._custom_types import Args, State, Trajectory
from .._foreign import has_control_derivative, unvmap_any, unwrap
from .._misc import StateFlattener, hold_last_good, is_reasonable, select
from .._plan import FEWEST_GUESS_STEPS, GUESS_ATOL, guess_tolerance, most_attempts
from .._programs import without_checks
from ._base import Grid
from ._explicit_rk import explicit_rk_step


def is_ode(term) -> bool:
    """Whether the field of `term` is one of time and state alone."""
    if isinstance(term, diffrax.MultiTerm):
        return all(is_ode(t) for t in term.terms)
    if wrapped := unwrap(term):
        return is_ode(wrapped[0])
    return isinstance(term, diffrax.ODETerm)


def flat_field(
    terms, args: Args, flattener: StateFlattener
) -> Callable[[Any, State], State] | None:
    """`(t, y)` to the time derivative, flat; `None` for what is not an ODE."""
    if not is_ode(terms):
        return None

    def field(t, y):
        zero = jnp.zeros_like(t)
        control = terms.contr(zero, zero + 1)
        y = flattener.unflatten(y)
        return flattener.flatten(terms.vf_prod(t, y, args, control))

    return field


def guess_field(terms, args: Args, flattener: StateFlattener):
    """The same where it may be guessed by an adaptive solve. A control may have a kink
    at each of its points, and each would be a rejected step.
    """
    if has_control_derivative(terms):
        return None
    return flat_field(terms, args, flattener)


class _WrittenOut(diffrax.AbstractERK):
    """`Dopri8` without its loop over stages, of which an accelerator launches each turn
    by itself. On a CPU solves took 0.4 to 0.9 times as long without it (JAX 0.12).
    """

    tableau: ClassVar = diffrax.Dopri8.tableau
    interpolation_cls: ClassVar = diffrax.Dopri8.interpolation_cls

    def order(self, terms):
        return diffrax.Dopri8().order(terms)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        y1, y_error, dense_info = explicit_rk_step(self, terms, t0, t1, y0, args)
        return y1, y_error, dense_info, solver_state, diffrax.RESULTS.successful


def _solver(is_stiff: bool, rtol, atol) -> diffrax.AbstractAdaptiveSolver:
    if is_stiff:
        return diffrax.Kvaerno5(root_finder=diffrax.VeryChord(rtol=rtol, atol=atol))
    return _WrittenOut()


class _Stepping(NamedTuple):
    """Between two attempts."""

    num_attempts: Int[Array, ""]
    num_accepted: Int[Array, ""]
    tprev: Float[Array, ""]
    tnext: Float[Array, ""]
    y: State
    solver_state: PyTree[Array]
    controller_state: PyTree[Array]
    ts: Float[Array, " attempts"]
    """The ends of the accepted steps; then infinity."""
    infos: PyTree[Array]
    """What the interpolation of each needs."""


def adaptive_trajectory(
    ode: Callable[[Any, State], State],
    grid: Grid,
    y0: State,
    rtol: float | None,
    is_stiff: bool,
) -> Trajectory:
    """The states after the steps of `grid`; those that were not reached are held.

    Steps and their lengths are Diffrax's. The loop over them is not: it compiles in
    half of the time of `diffrax.diffeqsolve` (0.4 s in place of 0.9; JAX 0.12).
    """
    tolerance = guess_tolerance(rtol, y0.dtype, is_stiff)
    with jax.default_matmul_precision("highest"):
        # What the field closes over becomes an argument.
        ode = eqx.filter_closure_convert(ode, grid.tprev[0], y0)
        solve = lambda ode, grid, y0: _solve(ode, grid, y0, tolerance, is_stiff)
        return without_checks(solve)(ode, grid, y0)


def _solve(ode, grid: Grid, y0: State, rtol: float, is_stiff: bool) -> Trajectory:
    t0, t1 = grid.tprev[0], grid.tnext[-1]
    largest = jnp.max(jnp.abs(y0), initial=0)
    atol = GUESS_ATOL * rtol * jnp.where(largest > 0, largest, 1)
    solver = _solver(is_stiff, rtol, atol)
    # The ends of a long step may be right by themselves, and nothing between them.
    fewest = min(FEWEST_GUESS_STEPS, grid.num_steps)
    controller = diffrax.PIDController(rtol=rtol, atol=atol, dtmax=(t1 - t0) / fewest)
    term = diffrax.ODETerm(lambda t, y, args: ode(t, y))
    dt0, most = grid.tnext[0] - t0, most_attempts(grid.num_steps)
    end = _make_steps(term, solver, controller, t0, t1, dt0, y0, most)

    def at(t):
        index = jnp.searchsorted(end.ts, t)
        index = jnp.clip(index, 0, jnp.maximum(end.num_accepted - 1, 0))
        start = jnp.where(index > 0, end.ts[index - 1], t0)
        info = jtu.tree_map(lambda x: x[index], end.infos)
        return solver.interpolation_cls(t0=start, t1=end.ts[index], **info).evaluate(t)

    ys = jax.vmap(at)(grid.tnext)
    was_reached = (grid.tnext <= end.tprev) & (end.num_accepted > 0)
    return hold_last_good(y0, ys, is_reasonable(ys) & was_reached)


def _make_steps(term, solver, controller, t0, t1, dt0, y0: State, most: int):
    """Adaptive steps from `t0` to `t1`, of which `most` may be tried: a `_Stepping`."""
    order = solver.error_order(term)

    def is_running(now: _Stepping):
        return (now.tprev < t1) & (now.num_attempts < most)

    def attempt(now: _Stepping):
        y1, error, info, solver_state, result = solver.step(
            term, now.tprev, now.tnext, now.y, None, now.solver_state, made_jump=False
        )
        # An error estimate from what overflows would be no number, and stay so.
        is_finite = jnp.all(jnp.isfinite(y1) & jnp.isfinite(error))
        fine = is_finite & (result == diffrax.RESULTS.successful)
        y1, error = jnp.where(fine, y1, now.y), jnp.where(fine, error, jnp.inf)
        return y1, error, info, solver_state

    def step(now: _Stepping) -> _Stepping:
        y1, error, info, solver_state = attempt(now)
        keep, tprev, tnext, _, controller_state, _ = controller.adapt_step_size(
            now.tprev, now.tnext, now.y, y1, None, error, order, now.controller_state
        )
        # Members of a batch that have ended stay as they are. Not all by the loop: it
        # would copy all that is stored, in each turn.
        goes_on = is_running(now)
        keep = keep & goes_on
        # Beyond the end nothing is stored.
        index = jnp.where(keep, now.num_accepted, most)
        store = lambda all, one: all.at[index].set(one, mode="drop")
        return _Stepping(
            num_attempts=now.num_attempts + jnp.where(goes_on, 1, 0),
            num_accepted=now.num_accepted + jnp.where(keep, 1, 0),
            tprev=jnp.where(goes_on, jnp.minimum(tprev, t1), now.tprev),
            tnext=jnp.where(goes_on, jnp.minimum(tnext, t1), now.tnext),
            y=jnp.where(keep, y1, now.y),
            solver_state=select(keep, solver_state, now.solver_state),
            controller_state=select(goes_on, controller_state, now.controller_state),
            ts=store(now.ts, now.tnext),
            infos=jtu.tree_map(store, now.infos, info),
        )

    tnext, controller_state = controller.init(
        term, t0, t1, y0, dt0, None, solver.func, order
    )
    zero = jnp.asarray(0, jnp.int32)
    begin = _Stepping(
        num_attempts=zero,
        num_accepted=zero,
        tprev=t0,
        tnext=jnp.minimum(tnext, t1),
        y=y0,
        solver_state=solver.init(term, t0, tnext, y0, None),
        controller_state=controller_state,
        ts=jnp.full(most, jnp.inf, t0.dtype),
        infos=None,
    )
    info = jax.eval_shape(attempt, begin)[2]
    infos = jtu.tree_map(lambda x: jnp.zeros((most, *x.shape), x.dtype), info)
    return lax.while_loop(
        lambda now: unvmap_any(is_running(now)), step, begin._replace(infos=infos)
    )
