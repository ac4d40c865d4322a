r"""Steps that are equations: $F_i(y_{i-1}, y_i) = 0$, one Newton for the whole grid.

With the blocks $B_i = \partial F_i / \partial y_i$ and $C_i = \partial F_i / \partial
y_{i-1}$ at the iterate, an iteration solves

$$C_i \delta_{i-1} + B_i \delta_i = -F_i,$$

which is the affine recurrence with $A_i = -B_i^{-1} C_i$ and $r_i = -B_i^{-1} F_i$. An
implicit method taken as a map would need an iteration of its own within each step, for
each iteration over the grid; here there is only the one.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, Float, PyTree

from .._affine import matvec, transition_of
from .._custom_types import Args, Mask, State, Trajectory, Y
from .._failure import NO_DERIVATIVE, NO_SOLUTION, NOT_FINITE, SINGULAR
from .._implicit import solve_trajectory
from .._misc import (
    StateFlattener,
    hold_last_good,
    is_reasonable,
    previous_states,
)
from .._newton import Newton
from .._plan import by_platform, elimination
from .._predictor import Coarse, Constant
from .._programs import without_checks
from .._recurrence import AbstractRecurrence, Linearised, arbitrary_signs, cut
from ._adaptive import adaptive_trajectory
from ._base import Grid
from ._one_step import tracing_steps
from ._steps import Steps


# One step by itself.
_ONE_STEP = Newton(guess=Constant(), fallback=False)

# The same, where it must be differentiable.
_ONE_STEP_AT_LAST = Newton(guess=Coarse(1))

# A coarse trajectory is a guess: it pays to be about right, not to be exact.
_ROUGHLY = Newton(guess=Constant(), rtol=1e-4, newton_max_steps=10, fallback=False)

# Two solutions of the equation of a step that are closer, relatively, are the same.
_SAME = 1e-4

Blocks = tuple[
    Float[Array, "steps equations"],
    Float[Array, "steps equations equations"],
    Float[Array, "steps equations solution"],
]
"""$F$, $B$ and $C$ of all steps."""


def _eliminate(B: Array, right: Array) -> Array:
    """Gauss--Jordan elimination with partial pivoting, written out.

    All blocks at once, entry by entry: XLA makes one kernel of it, where a call of
    LAPACK for each block takes three to six times as long.
    """
    n, num_columns = right.shape[1:]
    rows = [
        [B[:, i, j] for j in range(n)] + [right[:, i, j] for j in range(num_columns)]
        for i in range(n)
    ]
    for k in range(n):
        for i in range(k + 1, n):
            swap = jnp.abs(rows[i][k]) > jnp.abs(rows[k][k])
            for j in range(k, n + num_columns):
                upper, lower = rows[k][j], rows[i][j]
                rows[k][j] = jnp.where(swap, lower, upper)
                rows[i][j] = jnp.where(swap, upper, lower)
        for j in range(k + 1, n + num_columns):
            rows[k][j] = rows[k][j] / rows[k][k]
        for i in range(n):
            if i == k:
                continue
            for j in range(k + 1, n + num_columns):
                rows[i][j] = rows[i][j] - rows[i][k] * rows[k][j]
    return jnp.stack([jnp.stack(row[n:], axis=-1) for row in rows], axis=-2)


def _eliminate_in_a_loop(B: Array, right: Array) -> Array:
    """The same, column by column of all blocks at once."""
    n = B.shape[-1]
    rows = jnp.arange(n, dtype=jnp.int32)

    def eliminate(k, arrays):
        B, right = arrays
        candidates = jnp.where(rows[None] >= k, jnp.abs(B[:, :, k]), -1)
        pivot = lax.argmax(candidates, 1, jnp.int32)
        is_k = (rows == k)[None, :, None]
        is_pivot = (rows[None] == pivot[:, None])[..., None]

        def swapped(M):
            lower = jnp.take_along_axis(M, pivot[:, None, None], axis=1)
            upper = lax.dynamic_slice_in_dim(M, k, 1, axis=1)
            return jnp.where(is_k, lower, jnp.where(is_pivot, upper, M))

        B, right = swapped(B), swapped(right)
        factors = lax.dynamic_slice_in_dim(B, k, 1, axis=2)
        divisor = lax.dynamic_slice_in_dim(factors, k, 1, axis=1)

        def reduced(M):
            row = lax.dynamic_slice_in_dim(M, k, 1, axis=1) / divisor
            return jnp.where(is_k, row, M - factors * row)

        return reduced(B), reduced(right)

    return lax.fori_loop(0, n, eliminate, (B, right))[1]


def solve_blocks(
    B: Float[Array, "steps n n"], right: Float[Array, "steps n columns"]
) -> Float[Array, "steps n columns"]:
    """$B_i^{-1} R_i$. A singular block gives what is not finite."""
    if B.shape[-1] == 0:
        return right
    ways = {
        "written out": _eliminate,
        "in a loop": _eliminate_in_a_loop,
        "lapack": jax.vmap(_solve_one),
    }
    return by_platform(lambda p: ways[elimination(B.shape[-1], p)](B, right))


def _solve_one(B, right):
    solver = lx.LU()
    state = solver.init(lx.MatrixLinearOperator(B), {})
    compute = lambda column: solver.compute(state, column, {})[0]
    return jax.vmap(compute, in_axes=1, out_axes=1)(right)


def is_singular(B: Float[Array, "steps n n"]) -> Mask:
    """Which blocks are singular to rounding, whatever the units of rows and columns."""
    for axis in (2, 1):
        largest = jnp.max(jnp.abs(B), axis=axis, keepdims=True, initial=0)
        B = B / jnp.where(largest == 0, 1, largest)
    lu, _, _ = lax.linalg.lu(B)
    pivots = jnp.abs(jnp.diagonal(lu, axis1=1, axis2=2))
    eps = B.shape[-1] * jnp.finfo(B.dtype).eps
    # Written so that NaN is not singular: it is worse, and found elsewhere.
    return jnp.any(pivots <= eps, axis=-1)


class Ends(NamedTuple):
    """Both ends of all steps. What is padding goes from where the first step starts, in
    the time of the first step, and stays there.
    """

    starts: Float[Array, "steps solution"]
    ys: Trajectory
    """All that is unknown of each step; the solution at its end comes last."""
    grid: Grid


class AbstractEquationRecurrence(AbstractRecurrence):
    """A recurrence whose steps are equations between both ends.

    Its states may hold more than the solution: the last entries, as many as the user's
    state has, are the solution at the end of a step.

    A subclass need not know of padding.

    **Fields:**

    - `ode`: `(t, y)` to the time derivative, flat, for ordinary differential equations.
    - `is_stiff`: whether the solver is one for stiff equations.
    """

    y0: eqx.AbstractVar[State]
    grid: eqx.AbstractVar[Grid]
    flattener: eqx.AbstractVar[StateFlattener]
    ode: eqx.AbstractVar[Callable[[Any, State], State] | None]
    is_stiff: eqx.AbstractVar[bool]

    @property
    def num_steps(self):
        return self.grid.num_steps

    @property
    def solves_equations(self) -> bool:
        return False  # these are solved for all steps at once

    @property
    def num_active(self):
        return self.grid.num_active

    @property
    def eps(self):
        return self.flattener.eps * (self.y0.shape[0] // max(self.flattener.size, 1))

    def part(self, start, length, y0):
        grid = cut(self.grid, start, length)
        return eqx.tree_at(lambda r: (r.y0, r.grid), self, (y0, grid))

    def on(self, grid: Grid) -> "AbstractEquationRecurrence":
        return eqx.tree_at(lambda r: r.grid, self, grid.plain())

    def until(self, num_steps):
        return self.on(self.grid.until(num_steps))

    @abc.abstractmethod
    def defects(self, ends: Ends) -> Trajectory:
        """$F_i$ of all steps, differentiable in the leaves of this recurrence."""

    @abc.abstractmethod
    def linearised_defects(self, ends: Ends, exact: bool) -> Blocks:
        """$F_i$, $B_i$ and $C_i$ of all steps. Derivatives of the solution need the
        exact ones; the iteration may do with what is cheaper.
        """

    @property
    @abc.abstractmethod
    def may_be_singular(self) -> bool:
        """Whether a step may have no solution, or many, for every length of it."""

    @abc.abstractmethod
    def from_states(self, states: Float[Array, "steps solution"]) -> Trajectory:
        """A whole trajectory of this recurrence, guessed from the states alone."""

    @abc.abstractmethod
    def predict_step(self) -> State:
        """A cheap guess at the end of the first step."""

    @abc.abstractmethod
    def dense_info(self, ends: Ends) -> dict[str, Any]:
        """What the interpolation within each step needs."""

    @abc.abstractmethod
    def interpolate(self, info: dict[str, Any], t0, t1, t) -> Y:
        """The solution at `t` within the step from `t0` to `t1`."""

    @abc.abstractmethod
    def error_estimate(self, ends: Ends) -> Float[Array, "steps solution"] | None:
        """Of each step, flat; `None` where the method has none."""

    def ends(self, ys: Trajectory) -> Ends:
        """Both ends of the steps along `ys`."""
        before, active = previous_states(self.y0, ys), self.grid.active[:, None]
        y0 = self.y0[None]
        return Ends(
            starts=self.states(jnp.where(active, before, y0)),
            ys=jnp.where(active, ys, y0),
            grid=self.grid.filled(),
        )

    def _held(self, ys: Trajectory) -> Trajectory:
        """The equations of padding: every entry is the state before it."""
        before = self.states(previous_states(self.y0, ys))
        return jnp.tile(before, ys.shape[1] // max(before.shape[1], 1)) - ys

    def evaluate(self, ys):
        F = self.defects(self.ends(ys))
        return jnp.where(self.grid.active[:, None], F, self._held(ys))

    def _blocks(self, ys: Trajectory, exact: bool) -> Blocks:
        F, B, C = self.linearised_defects(self.ends(ys), exact)
        active = self.grid.active[:, None]
        B_held = -jnp.eye(B.shape[1], dtype=B.dtype)[None]
        C_held = jnp.eye(C.shape[2], dtype=C.dtype)
        C_held = jnp.tile(C_held, (C.shape[1] // max(C.shape[2], 1), 1))[None]
        return (
            jnp.where(active, F, self._held(ys)),
            jnp.where(active[..., None], B, B_held),
            jnp.where(active[..., None], C, C_held),
        )

    def states(self, ys: Trajectory) -> Float[Array, "steps solution"]:
        return ys[:, ys.shape[1] - self.flattener.size :]

    def flatten(self, ys: PyTree[Array]):
        return self.from_states(jax.vmap(self.flattener.flatten)(ys))

    def choose(self, linearisation):
        return linearisation.for_equations()

    def linearise(self, ys, linearisation):
        del linearisation  # all of it
        with tracing_steps():
            F, B, C = self._blocks(ys, exact=False)
            if self.may_be_singular:
                # No solution of a singular system passes for the solution.
                F = jnp.where(is_singular(B)[:, None], jnp.nan, F)
            sizes, before = self.sizes(ys), self.sizes(previous_states(self.y0, ys))
            defect_scale = matvec(jnp.abs(B), sizes)
            defect_scale = defect_scale + transition_of(C).abs().apply(before)
            rounding = defect_scale * arbitrary_signs(ys)
            right = jnp.concatenate([F[..., None], rounding[..., None], C], axis=-1)
            solved = solve_blocks(B, -right)
            residual, rounding = solved[..., 0], solved[..., 1]
            A = transition_of(solved[..., 2:])
            scale = sizes + A.abs().apply(before)
            per_unit = jnp.sum(jnp.abs(B), axis=-1)
        return Linearised(residual, A, F, defect_scale, scale, rounding, per_unit)

    def linear_response(self, ys, tangent, linearisation):
        del linearisation  # it is the exact one that is asked for
        with tracing_steps():
            _, F_dot = eqx.filter_jvp(
                lambda recurrence: recurrence.evaluate(ys), (self,), (tangent,)
            )
            _, B, C = self._blocks(ys, exact=True)
            # Apart, since only one of them is linear in the tangent.
            A = transition_of(solve_blocks(B, -C))
            b = solve_blocks(B, -F_dot[..., None])[..., 0]
        return A, b

    def _one(self, x: Grid, y: State) -> "AbstractEquationRecurrence":
        """The step `x` by itself, from `y`."""
        grid = jtu.tree_map(lambda x: x[None], x)
        return eqx.tree_at(lambda r: (r.y0, r.grid), self, (y, grid))

    def _guessed_step(self) -> State:
        return jnp.where(self.grid.active[0], self.predict_step(), self.y0)

    def step(self, index, y):
        if y.shape[0] == 0:
            return y
        one = self._one(jtu.tree_map(lambda x: x[index], self.grid), y)
        # First from a prediction; where that leads nowhere, from where it starts.
        guesses = jnp.stack([one._guessed_step(), y])

        def attempt(carry):
            count, _, _ = carry
            end = _ONE_STEP.iterate(one, guesses[count][None])
            return count + 1, end.ys[0], end.num_good == 1

        _, end, is_good = lax.while_loop(
            lambda carry: (carry[0] < 2) & ~carry[2],
            attempt,
            (jnp.asarray(0, jnp.int32), y, jnp.asarray(False)),
        )
        # No state that is not a solution passes for one.
        return jnp.where(is_good, end, jnp.nan)

    def field_values(self, ends: Ends) -> Array:
        """What the equations take of the field, without any derivative of it."""
        return self.defects(ends)

    def cause_of_failure(self):
        start = self.from_states(self.states(self.y0[None]))
        look = lambda r, y: (r.field_values(r.ends(y)), r._blocks(y, exact=False))
        f, (F, B, C) = without_checks(look)(self, start)
        is_finite = lambda x: jnp.all(jnp.isfinite(x))
        cause = jnp.where(jnp.any(is_singular(B)), SINGULAR, NO_SOLUTION)
        has_derivatives = is_finite(F) & is_finite(B) & is_finite(C)
        cause = jnp.where(has_derivatives, cause, NO_DERIVATIVE)
        return jnp.where(is_finite(f), cause, NOT_FINITE).astype(jnp.int32)

    @property
    def prefers_sequential(self) -> bool:
        return True  # to solve each step alone is what the check of solutions takes

    @property
    def is_explicit(self):
        return False

    @property
    def has_other_solutions(self):
        return self.num_steps > 1

    def is_sequential_answer(self, ys: Trajectory) -> Mask | None:
        if not self.has_other_solutions:
            return None
        return self.are_sequential_ends(ys) | ~self.grid.active

    def are_sequential_ends(self, ys: Trajectory) -> Mask:
        """Whether each step by itself, from the state before it, ends there."""
        alone = jax.vmap(self.step)(
            jnp.arange(self.num_steps), previous_states(self.y0, ys)
        )
        # Another solution is as far off as a step is long, or further; the same one is
        # found to rounding, which the conditioning of the step magnifies.
        distance = jnp.max(jnp.abs(alone - ys), axis=-1)
        size = jnp.max(jnp.abs(ys), axis=-1)
        return distance <= _SAME * size

    def adaptive_trajectory(self, rtol):
        if self.ode is None:
            return None
        y0 = self.states(self.y0[None])[0]
        ys = adaptive_trajectory(self.ode, self.grid, y0, rtol, self.is_stiff)
        return self.from_states(ys)

    def coarse_trajectory(self, every):
        coarse_grid = self.grid.coarsen(every)

        def step(y, x):
            one = self._one(x, y)
            y = _ROUGHLY.iterate(one, one._guessed_step()[None]).ys[0]
            return y, y

        _, ends = lax.scan(step, self.y0, coarse_grid)
        ends = hold_last_good(self.y0, ends, is_reasonable(ends))
        if every == 1:
            return ends
        coarse = eqx.tree_at(lambda r: r.grid, self, coarse_grid)
        num_coarse = ends.shape[0]
        padding = num_coarse * every - self.num_steps
        ts = jnp.pad(self.grid.tnext, (0, padding), mode="edge")

        def between(info, x, t):
            return self.flattener.flatten(self.interpolate(info, x.tprev, x.tnext, t))

        states = jax.vmap(jax.vmap(between, in_axes=(None, None, 0)))(
            coarse.dense_info(coarse.ends(ends)),
            coarse_grid,
            ts.reshape(num_coarse, every),
        ).reshape(num_coarse * every, -1)[: self.num_steps]
        last = self.states(ends)[-1]
        return self.from_states(jnp.where(self.grid.active[:, None], states, last))

    def take_steps(self, ys: Trajectory) -> Steps:
        """What the steps say beside their ends. Ordinary differentiable code."""
        with tracing_steps():
            ends = self.ends(ys)
            y_error = self.error_estimate(ends)
            if y_error is not None:
                y_error = jnp.where(self.grid.active[:, None], y_error, 0)
                y_error = jax.vmap(self.flattener.unflatten)(y_error)
            dense_info = self.dense_info(ends)
        was_solved = jnp.all(jnp.isfinite(ys), axis=-1)
        failed: Any = diffrax.RESULTS.nonlinear_divergence
        result = jax.vmap(
            lambda solved: diffrax.RESULTS.where(
                solved, diffrax.RESULTS.successful, failed
            )
        )(was_solved)
        return Steps(y_error, dense_info, result)


class AbstractEquationSolver(diffrax.AbstractSolver):
    """A one-step method whose step is an equation between both ends.

    Stock Diffrax runs it step by step, each step solved by itself; `DEER` solves all
    steps together. Both solve the same equations to rounding.
    """

    @abc.abstractmethod
    def recurrence(
        self, terms, grid: Grid, y0: Y, args: Args
    ) -> AbstractEquationRecurrence:
        """The equations of all steps of `grid`."""

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        grid = Grid(jnp.asarray(t0)[None], jnp.asarray(t1)[None], jnp.ones(1, bool))
        recurrence = self.recurrence(terms, grid, y0, args)
        solution = solve_trajectory(recurrence, _ONE_STEP_AT_LAST)
        steps = recurrence.take_steps(solution.ys)
        y1, y_error, dense_info, result = jtu.tree_map(
            lambda x: x[0],
            (
                jax.vmap(recurrence.flattener.unflatten)(
                    recurrence.states(solution.ys)
                ),
                steps.y_error,
                steps.dense_info,
                steps.result,
            ),
        )
        return y1, y_error, dense_info, None, result
