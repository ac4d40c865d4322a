"""A guess at a whole trajectory: an adaptive solve, at a loose tolerance.

A guess has to resolve the solution and not the grid, so it takes as many sequential
steps on a grid as fine as one likes.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp

from .._custom_types import Args, State, Trajectory
from .._foreign import unwrap
from .._misc import StateFlattener, hold_last_good, is_reasonable
from .._plan import (
    FEWEST_GUESS_STEPS,
    default_platform,
    guess_tolerance,
    most_attempts,
)
from .._programs import without_checks
from ._base import Grid
from ._explicit_rk import explicit_rk_step


# The absolute tolerance, in units of the relative one times the largest initial entry.
_SMALL = 1e-3


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


class _WrittenOut(diffrax.AbstractERK):
    """`Dopri8` without its loop over stages, of which an accelerator launches each turn
    by itself.
    """

    tableau: ClassVar = diffrax.Dopri8.tableau
    interpolation_cls: ClassVar = diffrax.Dopri8.interpolation_cls

    def order(self, terms):
        return diffrax.Dopri8().order(terms)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        y1, y_error, dense_info = explicit_rk_step(self, terms, t0, t1, y0, args)
        return y1, y_error, dense_info, solver_state, diffrax.RESULTS.successful


def _solver(is_stiff: bool) -> diffrax.AbstractAdaptiveSolver:
    if is_stiff:
        return diffrax.Kvaerno5()
    return diffrax.Dopri8() if default_platform() == "cpu" else _WrittenOut()


def adaptive_trajectory(
    ode: Callable[[Any, State], State],
    grid: Grid,
    y0: State,
    rtol: float | None,
    is_stiff: bool,
) -> Trajectory:
    """The states after the steps of `grid`; those that were not reached are held."""

    def solve(grid, y0):
        largest = jnp.max(jnp.abs(y0), initial=0)
        atol = _SMALL * tolerance * jnp.where(largest > 0, largest, 1)
        # The ends of a long step may be right by themselves, and nothing between them.
        controller = diffrax.PIDController(
            rtol=tolerance,
            atol=atol,
            dtmax=(grid.tnext[-1] - grid.tprev[0]) / FEWEST_GUESS_STEPS,
        )
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: ode(t, y)),
            _solver(is_stiff),
            grid.tprev[0],
            grid.tnext[-1],
            grid.tnext[0] - grid.tprev[0],
            y0,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(dense=True),
            adjoint=diffrax.ForwardMode(),
            max_steps=most_attempts(grid.num_steps),
            throw=False,
        )
        interpolation = sol.interpolation
        assert interpolation is not None
        # Times that were not reached are infinite.
        ts = interpolation.ts
        reached = jnp.max(jnp.where(jnp.isfinite(ts), ts, -jnp.inf))
        ys = jax.vmap(sol.evaluate)(grid.tnext)
        return hold_last_good(y0, ys, is_reasonable(ys) & (grid.tnext <= reached))

    tolerance = guess_tolerance(y0.dtype, is_stiff) if rtol is None else rtol
    with jax.default_matmul_precision("highest"):
        return without_checks(solve)(grid, y0)
