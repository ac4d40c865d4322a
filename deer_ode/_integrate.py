"""`diffeqsolve`: Diffrax's, with the grid counted and solved in parallel."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import ArrayLike, PyTree

from ._custom_types import Args, Y
from ._discretisation import AbstractImplicitTerm, consistent_initial_values
from ._parallel_adjoint import CountedSteps, ParallelAdjoint
from ._solver import DEER


def _static(x, dtype) -> Any:
    """`x` as a number known while tracing, or `None`."""
    if isinstance(x, jax.core.Tracer):
        return None
    return np.asarray(x).astype(dtype)[()]


def time_dtype(t0, t1, dt0, saveat: diffrax.SaveAt) -> np.dtype:
    """The dtype in which Diffrax computes times; `dt0` may be `None`."""
    subs = jtu.tree_leaves(saveat.subs, is_leaf=lambda x: hasattr(x, "ts"))
    times = [t0, t1, dt0, *(sub.ts for sub in subs)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(t for t in times if t is not None))
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    return np.dtype(dtype)


def num_even_steps(t0: np.floating, t1: np.floating, dt0: np.floating) -> int:
    """How many steps `ConstantStepSize` makes, by the rule of Diffrax's controller."""
    # The next number, so that rounding of `dt0` makes no extra step.
    longest = np.nextafter(abs(dt0), dt0.dtype.type(np.inf))
    return max(1, int(np.ceil(abs(t1 - t0) / longest)))


def _count_steps(t0, t1, dt0, saveat: diffrax.SaveAt) -> tuple[int | None, bool]:
    """The same, and whether it makes all of them: `None` where that is not static, or
    makes no sense.
    """
    dtype = time_dtype(t0, t1, dt0, saveat)
    t0, t1, dt0 = (_static(t, dtype) for t in (t0, t1, dt0))
    if t0 is None or t1 is None or dt0 is None:
        return None, False
    if not np.isfinite(t1 - t0) or not abs(dt0) > 0:
        return None, False
    num_steps = num_even_steps(t0, t1, dt0)
    if num_steps == 1 and (t1 - (t0 + dt0)) * np.sign(dt0) > 0:
        # Rounding leaves it short of `t1`, and Diffrax takes what is left for a second.
        return 2, False
    # A step that ends within a hundred units of rounding of `t1` is the last one. The
    # first one is `dt0` long, the others divide the interval.
    units = 200 * max(np.spacing(abs(t0)), np.spacing(abs(t1)))
    left = [abs(t1 - t0) / num_steps]
    if num_steps > 1:
        left.append(abs(t1 - t0) - abs(dt0))
    return num_steps, bool(min(left) > units)


def _solve_implicit(term: AbstractImplicitTerm, t0, y0: Y, args: Args, throw, solve):
    """A differential-algebraic equation, from consistent initial values."""
    initial = consistent_initial_values(term, t0, y0, args)
    # What is typed in to half the digits or more passes.
    is_consistent = (
        initial.residual <= float(jnp.finfo(initial.residual.dtype).eps) ** 0.5
    )
    y0 = initial.y0
    if throw:
        y0 = eqx.error_if(
            y0,
            ~is_consistent,
            "The initial values are not consistent: with the components of `y0` whose "
            "time derivatives appear, the equation and its derivatives cannot all hold "
            "at `t0`. `deer_ode.consistent_initial_values(term, t0, y0, args)` shows "
            "what is left; mend `y0`, or go on regardless with `throw=False`.",
        )
    sol = solve(y0)
    stats = sol.stats | dict(
        initial_residual=initial.residual, initial_correction=initial.correction
    )
    return eqx.tree_at(lambda s: s.stats, sol, stats)


def diffeqsolve(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0,
    t1,
    dt0,
    y0: Y,
    args: Args = None,
    *,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    stepsize_controller: diffrax.AbstractStepSizeController = (
        diffrax.ConstantStepSize()
    ),
    adjoint: diffrax.AbstractAdjoint | None = None,
    event: diffrax.Event | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    progress_meter: diffrax.AbstractProgressMeter = diffrax.NoProgressMeter(),
    solver_state: PyTree[ArrayLike] | None = None,
    controller_state: PyTree[ArrayLike] | None = None,
    made_jump=None,
    discrete_terminating_event=None,
) -> diffrax.Solution:
    r"""Solves a differential equation, all time steps in parallel.

    The same arguments, in the same order and meaning, as `diffrax.diffeqsolve`, and
    the same `diffrax.Solution`. With a solver [`deer_ode.DEER`][] and steps that are
    known beforehand the whole interval is solved at once. Two arguments need not be
    given:

    - `max_steps` is the number of steps, counted from `t0`, `t1` and `dt0` (or from
        `StepTo(ts)`), so that `SaveAt(steps=True)` has no padding. Where one of those
        times is not known while tracing (under `jax.jit` or `jax.vmap` over times) give
        a bound.
    - `adjoint` is [`deer_ode.ParallelAdjoint`][], whose derivatives are exact.

    Beside Diffrax's terms there are [`deer_ode.DAETerm`][] and
    [`deer_ode.MassMatrixTerm`][] for differential-algebraic equations. The algebraic
    components of their initial state are worked out first
    ([`deer_ode.consistent_initial_values`][]); `stats` then also holds
    `initial_correction`, by how much they changed at most, and `initial_residual`. An
    initial state that contradicts itself is an error.

    Anything else goes to Diffrax as it is: another solver, `DEER` with `num_substeps`,
    or an adjoint that is given.

    **Arguments:** as `diffrax.diffeqsolve`. Times share the units of `t0`; the vector
    field is in units of the state per unit of time.

    **Returns:**

    A `diffrax.Solution`. Its `stats` also say how the solve went; see
    [`deer_ode.ParallelAdjoint`][].

    **Raises:**

    - `ValueError`: for bad input, and where the steps are not known beforehand.
    - `RuntimeError`: if `throw=True` and the solve fails at run time.

    !!! example

        >>> import diffrax, jax.numpy as jnp
        >>> from deer_ode import DEER, diffeqsolve
        >>> term = diffrax.ODETerm(lambda t, y, args: -y)
        >>> sol = diffeqsolve(term, DEER(diffrax.Tsit5()), 0, 1, 0.01, jnp.array(1.0))
        >>> round(float(sol.ys[0]), 4)
        0.3679
    """
    kwargs: dict[str, Any] = dict(
        saveat=saveat,
        stepsize_controller=stepsize_controller,
        event=event,
        throw=throw,
        progress_meter=progress_meter,
        solver_state=solver_state,
        controller_state=controller_state,
        made_jump=made_jump,
        discrete_terminating_event=discrete_terminating_event,
    )
    if isinstance(terms, AbstractImplicitTerm):

        def solve(y0):
            return _solve(
                terms, solver, t0, t1, dt0, y0, args, adjoint, max_steps, kwargs
            )

        return _solve_implicit(terms, t0, y0, args, throw, solve)
    return _solve(terms, solver, t0, t1, dt0, y0, args, adjoint, max_steps, kwargs)


def _solve(terms, solver, t0, t1, dt0, y0, args, adjoint, max_steps, kwargs):
    stepsize_controller = kwargs["stepsize_controller"]
    is_parallel = (
        type(solver) is DEER
        and solver.num_substeps is None
        and (adjoint is None or type(adjoint) is ParallelAdjoint)
    )
    if not is_parallel:
        if adjoint is not None:
            kwargs["adjoint"] = adjoint
        kwargs["max_steps"] = 4096 if max_steps is None else max_steps
        return diffrax.diffeqsolve(terms, solver, t0, t1, dt0, y0, args, **kwargs)
    is_counted = False
    if max_steps is None and isinstance(stepsize_controller, diffrax.StepTo):
        max_steps = stepsize_controller.ts.shape[0] - 1
    elif max_steps is None and isinstance(
        stepsize_controller, diffrax.ConstantStepSize
    ):
        if dt0 is None:
            raise ValueError(
                "`dt0` is the size of the steps and must be given with "
                "`ConstantStepSize()`; got `dt0=None`."
            )
        max_steps, is_counted = _count_steps(t0, t1, dt0, kwargs["saveat"])
        # A solve that is resumed goes on counting.
        is_counted = is_counted and kwargs["controller_state"] is None
        if max_steps is None:
            raise ValueError(
                "The number of steps must be known while tracing, but cannot be "
                f"counted from t0={t0}, t1={t1}, dt0={dt0}. Give `max_steps=...`, at "
                "least the number of steps, or step to given times with "
                "`stepsize_controller=diffrax.StepTo(ts)`."
            )
    if adjoint is None:
        adjoint = CountedSteps() if is_counted else ParallelAdjoint()
    return diffrax.diffeqsolve(
        terms,
        solver,
        t0,
        t1,
        dt0,
        y0,
        args,
        adjoint=adjoint,
        max_steps=max_steps,
        **kwargs,
    )
