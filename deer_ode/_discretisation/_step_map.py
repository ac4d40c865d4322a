r"""Any one-step solver of Diffrax, as a recurrence.

$y_i = \Phi(t_{i-1}, t_i, y_{i-1})$, where $\Phi$ is one step of the solver from rest:
nothing but the state passes from step to step, so all steps can be taken at once.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._blocks import connected
from .._custom_types import Args, Mask, State, Trajectory, Y
from .._dependence import dependence
from .._failure import NO_SOLUTION, NOT_CONVERGED
from .._misc import (
    StateFlattener,
    hold_last_good,
    is_reasonable,
    num_operations,
    previous_states,
    without_gradient,
)
from .._plan import shares_jacobian
from .._programs import without_checks
from .._recurrence import AbstractMapRecurrence
from ._adaptive import adaptive_trajectory, guess_field
from ._base import Grid
from ._explicit_rk import (
    DEGREE,
    SimplifiedStep,
    explicit_rk_step,
    half_way,
    is_explicit_rk,
)
from ._exponential import AbstractExponentialRosenbrock
from ._increments import Draw, record_draw


# These keep a state between steps, but compute the same from nothing when told that
# there was a jump.
_RESTARTABLE = (
    diffrax.AbstractRungeKutta,
    diffrax.AbstractSRK,
    diffrax.AbstractFosterLangevinSRK,
)

# Solvers of stiff equations, which explicit steps cannot guess.
_STIFF = (diffrax.AbstractImplicitSolver, AbstractExponentialRosenbrock)


def _wrapped_solver(solver) -> diffrax.AbstractSolver | None:
    """The solver inside `HalfSolver` and its like."""
    inner = getattr(solver, "solver", None)
    return inner if isinstance(inner, diffrax.AbstractSolver) else None


def _innermost(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    while (inner := _wrapped_solver(solver)) is not None:
        solver = inner
    return solver


def check_one_step(solver: diffrax.AbstractSolver) -> None:
    """Refuses the solvers whose steps depend on more than the state before them."""
    inner = _wrapped_solver(solver)
    if inner is not None:
        check_one_step(inner)
    elif isinstance(solver, diffrax.LeapfrogMidpoint | diffrax.ReversibleHeun):
        raise ValueError(
            f"`{type(solver).__name__}` carries memory from step to step, so its steps "
            "cannot be solved for in parallel: taken as a one-step method it gives "
            "wrong answers. Use a one-step solver, for example `diffrax.Midpoint()` or "
            "`diffrax.Heun()`."
        )


def _check_stateless(solver, state) -> None:
    inner = _wrapped_solver(solver)
    if inner is not None:
        _check_stateless(inner, state)
    elif not isinstance(solver, _RESTARTABLE) and len(jtu.tree_leaves(state)) > 0:
        raise ValueError(
            f"`{type(solver).__name__}` has a solver state, and is not known to "
            "restart from none: if its steps depend on more than the state before them "
            "they cannot be solved for in parallel. Use one of Diffrax's one-step "
            "solvers."
        )


def _with_differentiable_loops(solver):
    """Diffrax's default stage loops have no forward mode; these have both."""
    inner = _wrapped_solver(solver)
    if inner is not None:
        inner = _with_differentiable_loops(inner)
        return eqx.tree_at(lambda s: s.solver, solver, inner)
    if isinstance(solver, diffrax.AbstractRungeKutta):
        kind = "bounded"
    elif isinstance(solver, diffrax.AbstractSRK):
        kind = "lax"  # a scan already, which goes both ways
    else:
        return solver
    return eqx.tree_at(lambda s: s.scan_kind, solver, kind, is_leaf=lambda x: x is None)


def tracing_steps() -> contextlib.AbstractContextManager:
    """How the steps of a solve are traced: at full precision of products."""
    return jax.default_matmul_precision("highest")


def one_step(solver: diffrax.AbstractSolver, terms, t0, t1, y0: Y, args: Args):
    """One step from rest: `(y1, y_error, dense_info, result)`."""
    if is_explicit_rk(solver):
        y1, y_error, dense_info = explicit_rk_step(solver, terms, t0, t1, y0, args)
        return y1, y_error, dense_info, diffrax.RESULTS.successful
    solver = _with_differentiable_loops(solver)
    state = solver.init(terms, t0, t1, y0, args)
    _check_stateless(solver, state)
    # `init` evaluates the state of these. (After a jump Diffrax 0.7.2 evaluates it
    # again, and fails for `QUICSORT`, which has none.)
    made_jump = not isinstance(_innermost(solver), diffrax.AbstractFosterLangevinSRK)
    y1, y_error, dense_info, _, result = solver.step(
        terms, t0, t1, y0, args, state, made_jump=made_jump
    )
    return y1, y_error, dense_info, result


class StepInputs(NamedTuple):
    """What tells one step from another; the fields are stacked over the grid."""

    grid: Grid
    increments: list[PyTree[Array]]
    """Of the Brownian paths, if any. Padding has those of the first step."""


def times_of(x: Grid, first: Grid):
    """From where to where a step goes; padding repeats the first one.

    A step of no length need not be harmless: zero times infinity, or a Brownian
    increment divided by its length. The first step has to be fine anyway.
    """
    select = lambda a, b: jnp.where(x.active, a, b)
    return select(x.tprev, first.tprev), select(x.tnext, first.tnext)


class StepMap(AbstractMapRecurrence):
    """The steps of a one-step solver over a grid."""

    f: Callable[[State, StepInputs], State]
    y0: Float[Array, " state"]
    xs: StepInputs
    draw: Draw
    with_info: Callable[[State, StepInputs], tuple[State, Any]] = eqx.field(static=True)
    """`(y, x)`: a step that is made, and what its interpolation needs."""
    between: Callable[..., State] = eqx.field(static=True)
    """`(x, info, t)`: the solution at `t` within the step `x`."""
    half_way: Callable[[State, StepInputs], State] | None = eqx.field(static=True)
    """The field in the middle of a step, times its length, for explicit ones."""
    num_stages: int = eqx.field(static=True)
    ode: Callable[[Any, State], State] | None = eqx.field(static=True)
    """`(t, y)` to the time derivative, for ordinary differential equations."""
    flattener: StateFlattener
    harmless: tuple[State, StepInputs]
    """A state and a step from it that can be differentiated: the first one."""
    is_explicit: bool = eqx.field(static=True)
    is_stiff: bool = eqx.field(static=True)
    """Whether the solver is one for stiff equations."""

    def __init__(
        self,
        solver: diffrax.AbstractSolver,
        terms,
        grid: Grid,
        y0: Y,
        args: Args,
        is_checked: bool = True,
    ):
        self.flattener = flattener = StateFlattener(y0)
        flat_y0 = flattener.flatten(y0)
        first = jtu.tree_map(lambda x: x[0], grid)

        def step_with(terms, y, x):
            t0, t1 = times_of(x, first)
            return one_step(solver, terms, t0, t1, flattener.unflatten(y), args)

        def step(y, x):
            select = lambda a, b: jnp.where(x.grid.active, a, b)
            terms_now = draw.use(terms, x.increments)
            y1, _, _, _ = step_with(terms_now, select(y, flat_y0), x.grid)
            return select(flattener.flatten(y1), y)

        def half_way_through(y, x):
            select = lambda a, b: jnp.where(x.grid.active, a, b)
            t0, t1 = times_of(x.grid, first)
            terms_now = draw.use(terms, x.increments)
            y = flattener.unflatten(select(y, flat_y0))
            change = flattener.flatten(half_way(terms_now, t0, t1, y, args))
            return select(change, jnp.zeros_like(change))

        def with_info(y, x):
            terms_now, y = draw.use(terms, x.increments), flattener.unflatten(y)
            t0, t1 = x.grid.tprev, x.grid.tnext
            y1, _, info, _ = one_step(solver, terms_now, t0, t1, y, args)
            return flattener.flatten(y1), info

        def between(x, info, t):
            step = solver.interpolation_cls(t0=x.grid.tprev, t1=x.grid.tnext, **info)
            return flattener.flatten(step.evaluate(t))

        # Whatever the vector field closes over becomes a leaf of this recurrence, so
        # that derivatives reach it. The precision holds for all products traced here.
        with tracing_steps():
            self.draw = draw = record_draw(step_with, terms, flat_y0, first)
            draw_all = jax.vmap(draw)
            draw_all = draw_all if is_checked else without_checks(draw_all)
            self.xs = StepInputs(grid, draw_all(grid))
            x = jtu.tree_map(lambda x: x[0], self.xs)
            self.f = eqx.filter_closure_convert(step, flat_y0, x)
        # Traced only where they are used: for saves, and for guesses and iterations,
        # whose derivatives nobody asks for.
        self.with_info, self.between = with_info, between
        self.half_way, self.num_stages = None, 1
        self.ode = guess_field(terms, args, flattener)
        self.is_stiff = isinstance(_innermost(solver), _STIFF)
        if is_explicit_rk(solver):
            self.half_way = half_way_through
            self.num_stages = solver.tableau.num_stages  # pyright: ignore
        self.y0 = flat_y0
        self.harmless = (flat_y0, x)
        self.is_explicit = is_explicit_rk(solver)

    @property
    def eps(self):
        return self.flattener.eps

    def states(self, ys: Trajectory) -> Trajectory:
        """The solution at the end of each step."""
        return ys

    def flatten(self, ys: PyTree[Array]):
        return jax.vmap(self.flattener.flatten)(ys)

    def groups(self):
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        y0 = jax.ShapeDtypeStruct(self.y0.shape, self.y0.dtype)
        found = dependence(self.f, y0, jtu.tree_map(one, self.xs))
        return None if found is None else connected(found)

    def cause_of_failure(self):
        cause = super().cause_of_failure()
        otherwise = NOT_CONVERGED if self.is_explicit else NO_SOLUTION
        return jnp.where(cause == NOT_CONVERGED, otherwise, cause).astype(jnp.int32)

    def loop(self):
        """Backwards a step is evaluated once more, and only the states are stored."""
        step = jax.checkpoint(lambda y, x: self.f(y, x))

        def take(y, x):
            y = step(y, x)
            return y, y

        return lax.scan(take, self.y0, self.xs)[1]

    def _harmless(self, ys) -> tuple[Trajectory, Mask, Trajectory, StepInputs]:
        """Values, and where each step may be differentiated.

        The derivative of a step that solves equations within solves a linear system,
        and that ends the whole program when given what is not finite. So where the
        value is not finite, the first step is differentiated instead: any finite
        Jacobian will do there.
        """
        starts = previous_states(self.y0, ys)
        f, constant_starts, constant_xs = without_gradient((self.f, starts, self.xs))
        values = jax.vmap(f)(constant_starts, constant_xs)
        fine = jnp.all(jnp.isfinite(values), axis=-1)
        y, x = self.harmless
        starts = jnp.where(fine[:, None], starts, y[None])
        select = jax.vmap(jnp.where, in_axes=(0, 0, None))
        xs = jtu.tree_map(lambda x, x0: select(fine, x, x0), self.xs, x)
        return values, fine, starts, xs

    def padded(self, num_steps):
        padded = super().padded(num_steps)
        count = num_steps - self.num_steps
        grid, end = self.xs.grid, self.xs.grid.tnext[-1:]
        times = jnp.repeat(end, count)
        grid = Grid(
            jnp.concatenate([grid.tprev, times]),
            jnp.concatenate([grid.tnext, times]),
            jnp.concatenate([grid.active, jnp.zeros(count, bool)]),
        )
        return eqx.tree_at(lambda r: r.xs.grid, padded, grid)

    def until(self, num_steps):
        return eqx.tree_at(lambda r: r.xs.grid, self, self.xs.grid.until(num_steps))

    def checked(self) -> "StepMap":
        """The same, where Brownian paths say so if they are asked beyond their end."""
        increments = jax.vmap(self.draw)(self.xs.grid)
        return eqx.tree_at(lambda r: r.xs.increments, self, increments)

    def tracing(self):
        return tracing_steps()

    def simplified(self):
        if self.half_way is None:
            return self
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        y0 = jax.ShapeDtypeStruct(self.y0.shape, self.y0.dtype)
        with self.tracing():
            work = num_operations(self.half_way, y0, jtu.tree_map(one, self.xs))
        if not shares_jacobian(self.num_stages, work, self.y0.shape[0], DEGREE):
            return self
        return eqx.tree_at(lambda r: r.f, self, SimplifiedStep(self.f, self.half_way))

    def evaluate(self, ys):
        with self.tracing():
            if self.is_explicit:
                return super().evaluate(ys)
            values, fine, starts, xs = self._harmless(ys)
            return jnp.where(fine[:, None], jax.vmap(self.f)(starts, xs), values)

    def jacobians(self, ys, linearisation):
        with self.tracing():
            if self.is_explicit:
                return super().jacobians(ys, linearisation)
            values, _, starts, xs = self._harmless(ys)
            _, A = jax.vmap(lambda y, x: linearisation(lambda y: self.f(y, x), y))(
                starts, xs
            )
            return values, A

    def adaptive_trajectory(self, rtol):
        if self.ode is None:
            return None
        return adaptive_trajectory(self.ode, self.xs.grid, self.y0, rtol, self.is_stiff)

    def coarse_trajectory(self, every):
        grid, num_steps = self.xs.grid, self.num_steps
        coarse_grid = grid.coarsen(every)
        num_coarse = coarse_grid.num_steps
        padding = num_coarse * every - num_steps

        def blocks(x):
            # Nothing comes from steps that are not made.
            x = jax.vmap(lambda active, x: jnp.where(active, x, 0))(grid.active, x)
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(num_coarse, every, *x.shape[1:])

        sums = self.draw.accumulate(jtu.tree_map(blocks, self.xs.increments))
        if sums is None:
            coarse = StepInputs(coarse_grid, jax.vmap(self.draw)(coarse_grid))
        else:
            coarse = StepInputs(coarse_grid, jtu.tree_map(lambda x: x[:, -1], sums))

        def step(y, x):
            if sums is not None:
                y = self.f(y, x)
                return y, (y, None)
            y1, info = self.with_info(y, x)
            y1 = jnp.where(x.grid.active, y1, y)
            return y1, (y1, info)

        _, (ends, infos) = lax.scan(step, self.y0, coarse)
        ends = hold_last_good(self.y0, ends, is_reasonable(ends))
        if every == 1:
            return ends
        if sums is None:
            # Within a coarse step only the time differs, so the step is taken once.
            ts = jnp.pad(grid.tnext, (0, padding), mode="edge")
            between = jax.vmap(jax.vmap(self.between, in_axes=(None, None, 0)))
            ys = between(coarse, infos, ts.reshape(num_coarse, every))
            ys = ys.reshape(num_coarse * every, -1)[:num_steps]
        else:
            # An interpolant knows nothing of the path between its ends, while the
            # increments from the start of a coarse step to each of its points are
            # known: so a step is taken to each.
            which = jnp.arange(num_steps) // every
            parts = Grid(coarse.grid.tprev[which], grid.tnext, grid.active)
            one_axis = lambda x: x.reshape(-1, *x.shape[2:])[:num_steps]
            parts = StepInputs(parts, jtu.tree_map(one_axis, sums))
            ys = jax.vmap(self.f)(previous_states(self.y0, ends)[which], parts)
        return jnp.where(grid.active[:, None], ys, ends[-1])
