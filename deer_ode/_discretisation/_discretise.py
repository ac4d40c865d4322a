"""Solver, terms and grid: the recurrence to solve, and what its solution says."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, Real

from .._custom_types import Args, Trajectory, Y
from .._misc import previous_states
from ._base import Grid
from ._equations import AbstractEquationRecurrence, AbstractEquationSolver
from ._step_map import StepMap
from ._steps import Steps, take_steps


class Discretised(NamedTuple):
    """A differential equation on a grid, and the way back from its trajectory."""

    recurrence: StepMap | AbstractEquationRecurrence
    solver: diffrax.AbstractSolver
    terms: Any
    grid: Grid
    y0: Y
    args: Args

    def until(self, num_steps: Int[Array, ""]) -> "Discretised":
        """The same with all that comes after the first `num_steps` steps as padding,
        which harms no derivative.
        """
        recurrence = self.recurrence.until(num_steps)
        return self._replace(recurrence=recurrence, grid=self.grid.until(num_steps))

    def on(self, grid: Grid) -> "Discretised":
        """The same equation on another grid of as many steps, without noise."""
        return self._replace(recurrence=self.recurrence.on(grid), grid=grid)

    def with_threshold(self, threshold: Y) -> "Discretised":
        """The same, with entries below `threshold` asked for in absolute terms."""
        recurrence = self.recurrence
        flat = lax.stop_gradient(recurrence.flattener.flatten(threshold))
        unknowns = recurrence.y0.shape[0] // max(flat.shape[0], 1)
        recurrence = eqx.tree_at(
            lambda r: r.threshold,
            recurrence,
            jnp.tile(flat, unknowns),
            is_leaf=lambda x: x is None,
        )
        return self._replace(recurrence=recurrence)

    @property
    def has_draws(self) -> bool:
        """Whether steps are given increments of Brownian paths."""
        recurrence = self.recurrence
        return isinstance(recurrence, StepMap) and bool(recurrence.xs.increments)

    def checked(self) -> "Discretised":
        """The same, with the checks of Brownian paths on the steps that are made."""
        if not isinstance(self.recurrence, StepMap):
            return self
        return self._replace(recurrence=self.recurrence.checked())

    def states(self, ys: Trajectory) -> Y:
        """The solution after each step, as the user has it."""
        unflatten = self.recurrence.flattener.unflatten
        return jax.vmap(unflatten)(self.recurrence.states(ys))

    def take_steps(self, ys: Trajectory) -> Steps:
        """What the steps say beside their ends. Ordinary differentiable code."""
        if isinstance(self.recurrence, AbstractEquationRecurrence):
            return self.recurrence.take_steps(ys)
        return take_steps(
            self.solver, self.terms, self.recurrence, self.y0, ys, self.args
        )

    def evaluate(
        self,
        ys: Trajectory,
        steps: Steps,
        ts: Real[Array, " times"],
        index: Int[Array, " times"],
    ) -> Y:
        """The interpolated solution at `ts`, which lie in the steps `index`."""
        recurrence, rows = (
            self.recurrence,
            lambda tree: jtu.tree_map(lambda x: x[index], tree),
        )
        if isinstance(recurrence, AbstractEquationRecurrence):
            times = self.grid.tprev[index], self.grid.tnext[index]
            return jax.vmap(recurrence.interpolate)(rows(steps.dense_info), *times, ts)
        xs = rows(recurrence.xs)
        if ts.shape[0] > self.grid.num_steps:
            info = rows(steps.dense_info)
        else:
            # These steps again, which is less work than all of them.
            start = previous_states(recurrence.y0, ys)[index]
            _, info = jax.vmap(recurrence.with_info)(start, xs)
        flat = jax.vmap(recurrence.between)(xs, info, ts)
        return jax.vmap(recurrence.flattener.unflatten)(flat)


def discretise(
    solver: diffrax.AbstractSolver,
    terms,
    grid: Grid,
    y0: Y,
    args: Args,
    is_checked: bool = True,
) -> Discretised:
    """Steps that are equations are solved as such, all others as maps. `is_checked` is
    whether Brownian paths say so if they are asked beyond their end.
    """
    plain = grid.plain()
    if isinstance(solver, AbstractEquationSolver):
        recurrence = solver.recurrence(terms, plain, y0, args)
    else:
        recurrence = StepMap(solver, terms, plain, y0, args, is_checked, grid.is_full)
    return Discretised(recurrence, solver, terms, plain, y0, args)
