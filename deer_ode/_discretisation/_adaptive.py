"""A guess at a whole trajectory: an adaptive solve, at a loose tolerance.

A guess has to resolve the solution and not the grid, so it takes as many sequential
steps on a grid as fine as one likes.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._custom_types import Args, State, Trajectory, Y
from .._foreign import (
    SNAPPED_UNITS,
    has_control_derivative,
    nextafter,
    unvmap_any,
    unwrap,
)
from .._misc import StateFlattener, hold_last_good, is_reasonable, select
from .._plan import FEWEST_GUESS_STEPS, GUESS_ATOL, guess_tolerance, most_attempts
from .._programs import without_checks
from ._base import Grid
from ._one_step import one_step


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


def _loose_solver(is_stiff: bool, rtol, atol) -> diffrax.AbstractAdaptiveSolver:
    if is_stiff:
        # Not `VeryChord`, whose Jacobian is that of the start of a step: it rejected
        # every second step, and took 6 to 11 times as many (1e-4, JAX 0.12).
        return diffrax.Kvaerno5(root_finder=optx.Chord(rtol=rtol, atol=atol))
    return diffrax.Dopri8()


class Stepping(NamedTuple):
    """Adaptive steps, between two attempts."""

    num_attempts: Int[Array, ""]
    num_accepted: Int[Array, ""]
    tprev: Float[Array, ""]
    tnext: Float[Array, ""]
    y: Y
    controller_state: PyTree[Array]
    is_too_short: Bool[Array, ""]
    """Whether the controller gave up."""
    starts: Float[Array, " attempts"]
    ends: Float[Array, " attempts"]
    """Of the accepted steps; then infinity."""
    stored: PyTree[Array]
    """Of each, what is to be kept."""


class AdaptiveSolution(eqx.Module):
    """An adaptive solve, and the solution between its steps."""

    t0: Float[Array, ""]
    y0: State
    reached: Float[Array, ""]
    """How far it came."""
    num_attempts: Int[Array, ""]
    num_accepted: Int[Array, ""]
    ts: Float[Array, " attempts"]
    """The ends of the accepted steps; then infinity."""
    _infos: PyTree[Array]
    _interpolation_cls: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, ts: Float[Array, " times"]) -> Trajectory:
        """The states at ascending times; those that were not reached are held."""

        def at(t):
            index = jnp.searchsorted(self.ts, t)
            index = jnp.clip(index, 0, jnp.maximum(self.num_accepted - 1, 0))
            start = jnp.where(index > 0, self.ts[index - 1], self.t0)
            info = jtu.tree_map(lambda x: x[index], self._infos)
            step = self._interpolation_cls(t0=start, t1=self.ts[index], **info)
            return step.evaluate(t)

        ys = jax.vmap(at)(ts)
        was_reached = (ts <= self.reached) & (self.num_accepted > 0)
        return hold_last_good(self.y0, ys, is_reasonable(ys) & was_reached)


def adaptive_trajectory(
    ode: Callable[[Any, State], State],
    grid: Grid,
    y0: State,
    rtol: float | None,
    is_stiff: bool,
) -> Trajectory:
    """The states after the steps of `grid`; those that were not reached are held."""
    tolerance = guess_tolerance(rtol, y0.dtype)
    with jax.default_matmul_precision("highest"):
        # What the field closes over becomes an argument.
        ode = eqx.filter_closure_convert(ode, grid.tprev[0], y0)

        def solve(ode, grid, y0):
            t0, t1, dt0 = grid.tprev[0], grid.tnext[-1], grid.tnext[0] - grid.tprev[0]
            most = most_attempts(grid.num_steps)
            # The ends of a long step may be right by themselves, and nothing between.
            fewest = min(FEWEST_GUESS_STEPS, grid.num_steps)
            solution = solve_adaptively(
                ode, t0, t1, dt0, y0, tolerance, is_stiff, most, fewest
            )
            return solution(grid.tnext)

        return without_checks(solve)(ode, grid, y0)


def solve_adaptively(
    ode: Callable[[Any, State], State],
    t0,
    t1,
    dt0,
    y0: State,
    rtol: float,
    is_stiff: bool,
    most: int,
    fewest: int,
    step_ts: Float[Array, " times"] | None = None,
    threshold: Float[Array, ""] | None = None,
) -> AdaptiveSolution:
    """In at least `fewest` steps, of which `most` may be tried, some of which end at
    `step_ts`. Entries above `threshold` are resolved, if it is given and not zero.

    Steps and their lengths are Diffrax's. The loop over them is not: it compiles in
    half of the time of `diffrax.diffeqsolve` (0.4 s in place of 0.9; JAX 0.12).
    """
    largest = jnp.max(jnp.abs(y0), initial=0)
    atol = GUESS_ATOL * rtol * jnp.where(largest > 0, largest, 1)
    if threshold is not None:
        atol = jnp.where(threshold > 0, jnp.minimum(atol, rtol * threshold), atol)
    solver = _loose_solver(is_stiff, rtol, atol)
    controller = diffrax.PIDController(rtol=rtol, atol=atol, dtmax=(t1 - t0) / fewest)
    if step_ts is not None:
        controller = diffrax.ClipStepSizeController(controller, step_ts)
    term = diffrax.ODETerm(lambda t, y, args: ode(t, y))
    dt0 = jnp.asarray(dt0, t1.dtype)
    order = solver.error_order(term)
    tnext, controller_state = controller.init(
        term, t0, t1, y0, dt0, None, solver.func, order
    )
    steps = AdaptiveSteps(
        *(solver, term, None, controller, order, t1, most),
        to_store=lambda after, info: info,
    )
    end = steps.run(y0, controller_state, t0, tnext)
    return AdaptiveSolution(
        t0=t0,
        y0=y0,
        reached=end.tprev,
        num_attempts=end.num_attempts,
        num_accepted=end.num_accepted,
        ts=end.ends,
        _infos=end.stored,
        _interpolation_cls=solver.interpolation_cls,
    )


class AdaptiveSteps(eqx.Module):
    """Adaptive steps to `t1`, of which at most `most` are tried. Each is made from
    rest, as when all are made at once.

    Explicit stages are written out: on a CPU solves by `Dopri8` took 0.4 to 0.9 times
    as long without Diffrax's loop over them (JAX 0.12).
    """

    solver: diffrax.AbstractSolver
    terms: Any
    args: Args
    controller: diffrax.AbstractStepSizeController
    order: Any
    t1: Float[Array, ""]
    most: int = eqx.field(static=True)
    to_store: Callable[[Stepping, Any], PyTree[Array]] = eqx.field(static=True)
    """`(after, info)`: what is kept of where an accepted step leads, and of what its
    interpolation needs.
    """

    def run(self, y0: Y, controller_state: Any, t0, tnext) -> Stepping:
        """From `t0`, first to `tnext`."""
        zero, no = jnp.asarray(0, jnp.int32), jnp.asarray(False)
        nowhere = jnp.full(self.most, jnp.inf, t0.dtype)
        begin = Stepping(
            num_attempts=zero,
            num_accepted=zero,
            tprev=t0,
            tnext=jnp.where(tnext > self._floor(t0), self.t1, tnext),
            y=y0,
            controller_state=jtu.tree_map(jnp.asarray, controller_state),
            is_too_short=no,
            starts=nowhere,
            ends=nowhere,
            stored=None,
        )
        one = jax.eval_shape(
            lambda now: self.to_store(now, self._attempt(now)[-1]), begin
        )
        stored = jtu.tree_map(lambda x: jnp.zeros((self.most, *x.shape), x.dtype), one)
        return lax.while_loop(
            lambda now: unvmap_any(self._is_running(now)),
            lambda now: self._step(t0, now),
            begin._replace(stored=stored),
        )

    def _floor(self, t0):
        """As Diffrax has it: a shorter last step could not be interpolated."""
        size = jnp.maximum(jnp.abs(t0), jnp.abs(self.t1))
        return self.t1 - SNAPPED_UNITS * float(jnp.finfo(self.t1.dtype).eps) * size

    def _is_running(self, now: Stepping):
        # Where the solution blows up, steps become too short to advance at all.
        advances = (now.tprev < now.tnext) | (now.num_attempts == 0)
        advances = advances & (now.tprev < self.t1)
        return advances & (now.num_attempts < self.most) & ~now.is_too_short

    def _attempt(self, now: Stepping):
        y1, error, info, result = one_step(
            self.solver, self.terms, now.tprev, now.tnext, now.y, self.args
        )
        # An error estimate from what overflows would be no number, and stay so.
        leaves = jtu.tree_leaves((y1, error))
        is_finite = ft.reduce(
            jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in leaves], True
        )
        fine = is_finite & (result == diffrax.RESULTS.successful)
        y1 = select(fine, y1, now.y)
        error = jtu.tree_map(lambda e: jnp.where(fine, e, jnp.inf), error)
        return fine, y1, error, info

    def _step(self, t0, now: Stepping) -> Stepping:
        t1, floor = self.t1, self._floor(t0)
        fine, y1, error, info = self._attempt(now)
        keep, tprev, tnext, _, controller_state, result = (
            self.controller.adapt_step_size(
                *(now.tprev, now.tnext, now.y, y1, self.args, error, self.order),
                now.controller_state,
            )
        )
        half = tprev + (t1 - tprev) / 2
        tnext = jnp.where(tnext > floor, jnp.where(keep, t1, half), tnext)
        tprev = jnp.where(keep & (now.tnext > floor), t1, tprev)
        # Members of a batch that have ended stay as they are. Not all by the loop: it
        # would copy all that is stored, in each turn.
        goes_on = self._is_running(now)
        keep = jnp.logical_and(keep, goes_on)
        # A step that is rejected would be tried for ever where rounding makes the next
        # one the same, and the controller has not changed; or one unit long.
        is_same = jnp.asarray(eqx.tree_equal(controller_state, now.controller_state))
        is_same = is_same & (tnext == now.tnext)
        is_shortest = tnext <= nextafter(nextafter(now.tprev))
        is_stuck = ~keep & (is_same | is_shortest)
        # A controller may keep the shortest step whatever its error.
        is_stuck = is_stuck | (keep & ~fine)
        keep = keep & fine
        is_stuck = is_stuck | (result != diffrax.RESULTS.successful)
        # Beyond the end nothing is stored.
        index = jnp.where(keep, now.num_accepted, self.most)
        store = lambda all, one: all.at[index].set(one, mode="drop")
        after = Stepping(
            num_attempts=now.num_attempts + jnp.where(goes_on, 1, 0),
            num_accepted=now.num_accepted + jnp.where(keep, 1, 0),
            tprev=jnp.where(goes_on, tprev, now.tprev),
            tnext=jnp.where(goes_on, tnext, now.tnext),
            y=select(keep, y1, now.y),
            controller_state=select(goes_on, controller_state, now.controller_state),
            is_too_short=now.is_too_short | (goes_on & is_stuck),
            starts=store(now.starts, now.tprev),
            ends=store(now.ends, jnp.where(now.tnext > floor, t1, now.tnext)),
            stored=None,
        )
        stored = jtu.tree_map(store, now.stored, self.to_store(after, info))
        return after._replace(stored=stored)
