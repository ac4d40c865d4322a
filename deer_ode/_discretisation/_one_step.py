"""One step of a solver of Diffrax, from rest: nothing but the state passes on."""

import contextlib

import diffrax
import equinox as eqx
import jax
import jax.tree_util as jtu

from .._custom_types import Args, Y
from ._explicit_rk import explicit_rk_step, is_explicit_rk


# These keep a state between steps, but compute the same from nothing when told that
# there was a jump.
_RESTARTABLE = (
    diffrax.AbstractRungeKutta,
    diffrax.AbstractSRK,
    diffrax.AbstractFosterLangevinSRK,
)


def _wrapped_solver(solver) -> diffrax.AbstractSolver | None:
    """The solver inside `HalfSolver` and its like."""
    inner = getattr(solver, "solver", None)
    return inner if isinstance(inner, diffrax.AbstractSolver) else None


def innermost(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
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
    made_jump = not isinstance(innermost(solver), diffrax.AbstractFosterLangevinSRK)
    y1, y_error, dense_info, _, result = solver.step(
        terms, t0, t1, y0, args, state, made_jump=made_jump
    )
    return y1, y_error, dense_info, result
