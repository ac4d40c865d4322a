r"""Any one-step solver of Diffrax, as a recurrence.

$y_i = \Phi(t_{i-1}, t_i, y_{i-1})$, where $\Phi$ is one step of the solver from rest:
nothing but the state passes from step to step, so all steps can be taken at once.
"""

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
    rows_where,
    without_gradient,
)
from .._plan import PADDED_STRETCH, shares_jacobian
from .._programs import without_checks
from .._recurrence import AbstractMapRecurrence
from ._adaptive import adaptive_trajectory, guess_field
from ._base import Grid
from ._explicit_rk import DEGREE, SimplifiedStep, half_way, is_explicit_rk
from ._exponential import AbstractExponentialRosenbrock
from ._increments import Draw, record_draw
from ._one_step import innermost, one_step, tracing_steps


# Solvers of stiff equations, which explicit steps cannot guess.
_STIFF = (diffrax.AbstractImplicitSolver, AbstractExponentialRosenbrock)

# Without a tableau, and explicit as well.
_EXPLICIT = (
    diffrax.Euler,
    diffrax.EulerHeun,
    diffrax.ItoMilstein,
    diffrax.SemiImplicitEuler,
    diffrax.StratonovichMilstein,
)


class StepInputs(NamedTuple):
    """What tells one step from another; the fields are stacked over the grid."""

    grid: Grid
    increments: list[PyTree[Array]]
    """Of the Brownian paths, if any. Padding has those of the first step."""


class _Step(eqx.Module):
    """`(y, x)` to the next state. Padding takes the first step, from its start, and the
    state stays as it is.

    A step of no length need not be harmless: zero times infinity, or a Brownian
    increment divided by its length. The first step has to be fine anyway.
    """

    step: Callable[[State, StepInputs], State]
    """For steps that are made."""
    y0: State
    first: Grid

    def filled(self, y: State, x: StepInputs) -> tuple[State, StepInputs]:
        """A step that can be made, and the state before it."""
        select = lambda a, b: jnp.where(x.grid.active, a, b)
        times_of = lambda grid: (grid.tprev, grid.tnext)
        times = jtu.tree_map(select, times_of(x.grid), times_of(self.first))
        grid = eqx.tree_at(times_of, x.grid, times)
        return select(y, self.y0), x._replace(grid=grid)

    def __call__(self, y: State, x: StepInputs) -> State:
        return jnp.where(x.grid.active, self.step(*self.filled(y, x)), y)


class StepMap(AbstractMapRecurrence):
    """The steps of a one-step solver over a grid."""

    f: _Step
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
    solves_equations: bool = eqx.field(static=True)
    """Whether a step has a root finder within."""
    is_full: bool = eqx.field(static=True)
    """Whether there is no padding, as is known while tracing."""
    threshold: State | None

    def __init__(
        self,
        solver: diffrax.AbstractSolver,
        terms,
        grid: Grid,
        y0: Y,
        args: Args,
        is_checked: bool = True,
        is_full: bool = False,
    ):
        self.is_full = is_full
        self.threshold = None
        self.flattener = flattener = StateFlattener(y0)
        flat_y0 = flattener.flatten(y0)
        first = jtu.tree_map(lambda x: x[0], grid)

        def step_with(terms, y, x):
            y = flattener.unflatten(y)
            return one_step(solver, terms, x.tprev, x.tnext, y, args)

        def with_info(y, x):
            y1, _, info, _ = step_with(draw.use(terms, x.increments), y, x.grid)
            return flattener.flatten(y1), info

        def half_way_through(y, x):
            terms_now, y = draw.use(terms, x.increments), flattener.unflatten(y)
            change = half_way(terms_now, x.grid.tprev, x.grid.tnext, y, args)
            return flattener.flatten(change)

        def between(x, info, t):
            step = solver.interpolation_cls(t0=x.grid.tprev, t1=x.grid.tnext, **info)
            return flattener.flatten(step.evaluate(t))

        # Whatever the vector field closes over becomes a leaf of this recurrence, so
        # that derivatives reach it. The precision holds for all products traced here.
        with tracing_steps():
            self.draw = draw = record_draw(step_with, terms, flat_y0, first)
            draw_all = jax.vmap(draw)
            draw_all = draw_all if is_checked else without_checks(draw_all)
            self.xs = StepInputs(grid, draw_all(grid.filled()))
            x = jtu.tree_map(lambda x: x[0], self.xs)
            step = lambda y, x: with_info(y, x)[0]
            step = eqx.filter_closure_convert(step, flat_y0, x)
            self.f = _Step(step, flat_y0, first)  # pyright: ignore
        # Traced only where they are used: for saves, and for guesses and iterations,
        # whose derivatives nobody asks for.
        self.with_info, self.between = with_info, between
        self.half_way, self.num_stages = None, 1
        self.ode = guess_field(terms, args, flattener)
        self.is_stiff = isinstance(innermost(solver), _STIFF)
        if is_explicit_rk(solver):
            self.half_way = half_way_through
            self.num_stages = solver.tableau.num_stages  # pyright: ignore
        self.y0 = flat_y0
        self.harmless = (flat_y0, x)
        self.is_explicit = is_explicit_rk(solver) or type(solver) in _EXPLICIT
        implicit = diffrax.AbstractImplicitSolver
        self.solves_equations = isinstance(innermost(solver), implicit)

    @property
    def grid(self) -> Grid:
        return self.xs.grid

    @property
    def num_active(self):
        return self.grid.num_active

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
        otherwise = NO_SOLUTION if self.solves_equations else NOT_CONVERGED
        return jnp.where(cause == NOT_CONVERGED, otherwise, cause).astype(jnp.int32)

    def loop(self):
        """Backwards a step is evaluated once more, and only the states are stored."""
        step = jax.checkpoint(lambda y, x: self.f(y, x))

        def take(y, x):
            y = step(y, x)
            return y, y

        num_steps, size = self.num_steps, PADDED_STRETCH
        if self.is_full or num_steps <= size:
            return lax.scan(take, self.y0, self.xs)[1]

        def take_stretch(y, xs):
            hold = lambda: (y, jnp.broadcast_to(y, (size, *y.shape)))
            # What is padding only costs nothing, unless a batch is not.
            return lax.cond(xs.grid.active[0], lambda: lax.scan(take, y, xs), hold)

        padded = self.padded(num_steps + -num_steps % size)
        split = lambda x: x.reshape(-1, size, *x.shape[1:])
        _, ys = lax.scan(take_stretch, self.y0, jtu.tree_map(split, padded.xs))
        return ys.reshape(padded.num_steps, *self.y0.shape)[:num_steps]

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
        starts, xs = rows_where(fine, (starts, self.xs), (y, x))
        return values, fine, starts, xs

    def padded(self, num_steps):
        padded = super().padded(num_steps)
        count = num_steps - self.num_steps
        grid, end = self.grid, self.grid.tnext[-1:]
        times = jnp.repeat(end, count)
        grid = Grid(
            jnp.concatenate([grid.tprev, times]),
            jnp.concatenate([grid.tnext, times]),
            jnp.concatenate([grid.active, jnp.zeros(count, bool)]),
        )
        return eqx.tree_at(lambda r: r.xs.grid, padded, grid)

    def on(self, grid: Grid) -> "StepMap":
        """Without noise: increments of Brownian paths are those of the grid before."""
        grid = grid.plain()
        first = jtu.tree_map(lambda x: x[0], grid)
        return eqx.tree_at(
            lambda r: (r.xs.grid, r.harmless[1].grid, r.f.first),
            self,
            (grid, first, first),
        )

    def until(self, num_steps):
        return eqx.tree_at(lambda r: r.xs.grid, self, self.grid.until(num_steps))

    def checked(self) -> "StepMap":
        """The same, where Brownian paths say so if they are asked beyond their end."""
        increments = jax.vmap(self.draw)(self.grid.filled())
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
        step = SimplifiedStep(self.f.step, self.half_way)
        return eqx.tree_at(lambda r: r.f.step, self, step)

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
        return adaptive_trajectory(self.ode, self.grid, self.y0, rtol, self.is_stiff)

    def coarse_trajectory(self, every):
        grid, num_steps = self.grid, self.num_steps
        coarse_grid = grid.coarsen(every)
        num_coarse = coarse_grid.num_steps
        padding = num_coarse * every - num_steps

        def blocks(x):
            # Nothing comes from steps that are not made.
            x = rows_where(grid.active, x, 0)
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(num_coarse, every, *x.shape[1:])

        sums = self.draw.accumulate(jtu.tree_map(blocks, self.xs.increments))
        if sums is None:
            coarse = StepInputs(coarse_grid, jax.vmap(self.draw)(coarse_grid.filled()))
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
