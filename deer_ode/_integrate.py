"""`diffeqsolve`: Diffrax's, with the grid counted and solved in parallel."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffrax
import equinox as eqx
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import ArrayLike, PyTree

from ._counting import KnownSteps, count_resumed_steps, count_steps
from ._custom_types import Args, Y
from ._discretisation import AbstractImplicitTerm, consistent_initial_values
from ._grid import KNOWN_STEPS
from ._misc import describe
from ._parallel_adjoint import CountedSteps, EndlessSteps, ParallelAdjoint
from ._plan import room_for_steps
from ._solver import DEER


_DIFFRAX_MAX_STEPS = 4096


class _Equation(NamedTuple):
    """What is solved: the positional arguments of `diffeqsolve`."""

    terms: PyTree[Any]
    solver: Any
    t0: Any
    t1: Any
    dt0: Any
    y0: Y
    args: Args


def _with_consistent_values(
    equation: _Equation, throw: bool, solve: Callable[[_Equation], diffrax.Solution]
) -> diffrax.Solution:
    """A differential-algebraic equation, from consistent initial values."""
    initial = consistent_initial_values(
        equation.terms, equation.t0, equation.y0, equation.args
    )
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
    sol = solve(equation._replace(y0=y0))
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
    max_steps: int | None | Literal["counted"] = "counted",
    throw: bool = True,
    progress_meter: diffrax.AbstractProgressMeter = diffrax.NoProgressMeter(),
    solver_state: PyTree[ArrayLike] | None = None,
    controller_state: PyTree[ArrayLike] | None = None,
    made_jump=None,
    discrete_terminating_event=None,
) -> diffrax.Solution:
    r"""Solves a differential equation, all time steps in parallel.

    The same arguments, in the same order and meaning, as `diffrax.diffeqsolve`, and
    the same `diffrax.Solution`. With a solver [`deer_ode.DEER`][] the whole interval is
    solved at once, on steps that are known beforehand or that follow from a tolerance
    ([`deer_ode.MeshRefinement`][]). Two arguments need not be
    given:

    - `max_steps` is the number of steps, counted from `t0`, `t1` and `dt0` (or from
        `StepTo(ts)`), so that `SaveAt(steps=True)` has no padding. A larger one costs
        that padding alone. Where one of those times is not known while tracing (under
        `jax.jit` or `jax.vmap` over times) it is Diffrax's 4096. `None`, no bound in
        Diffrax, is the same as not to give it. Of a solve that goes on from
        the `controller_state` of another, the steps after the first end where that
        one's grid would have its ends; so they are counted if that state is known while
        tracing. Where it is not they are counted by `dt0`, and `max_steps_reached` says
        if they are more.
        Where steps follow from a tolerance it is the room for them: as much as it
        takes, or Diffrax's 4096 within `jit`, `grad` and `vmap`.
    - `adjoint` is [`deer_ode.ParallelAdjoint`][], whose derivatives are exact.

    Beside Diffrax's terms there are [`deer_ode.DAETerm`][] and
    [`deer_ode.MassMatrixTerm`][] for differential-algebraic equations. The algebraic
    components of their initial state are worked out first
    ([`deer_ode.consistent_initial_values`][]); `stats` then also holds
    `initial_correction`, by how much they changed at most, and `initial_residual`. An
    initial state that contradicts itself is an error.

    Anything else goes to Diffrax as it is: another solver, `DEER` with `num_substeps`,
    or an adjoint that is given. Steps are not counted there, so that `max_steps` is
    Diffrax's own default of 4096 unless it is given.

    **Arguments:** as `diffrax.diffeqsolve`. Times share the units of `t0`; the vector
    field is in units of the state per unit of time.

    **Returns:**

    A `diffrax.Solution`. Its `stats` also say how the solve went; see
    [`deer_ode.ParallelAdjoint`][].

    **Raises:**

    - `ValueError`: for bad input, and where steps can neither be counted nor follow
        from a tolerance.
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
    equation = _Equation(terms, solver, t0, t1, dt0, y0, args)
    solve = lambda equation: _solve(equation, adjoint, max_steps, kwargs)
    if isinstance(terms, AbstractImplicitTerm):
        return _with_consistent_values(equation, throw, solve)
    return solve(equation)


def _can_broadcast(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _check_fields(terms, t0, y0: Y, args: Args) -> None:
    """Whether what fields give looks like the state: for after something failed."""
    fields = terms.terms if isinstance(terms, diffrax.MultiTerm) else (terms,)
    shapes = lambda tree: jtu.tree_map(np.shape, tree, is_leaf=lambda x: x is None)
    for term in fields:
        if not isinstance(term, diffrax.ODETerm):
            continue
        field = term.vector_field
        out = eqx.filter_eval_shape(field, jnp.asarray(t0, float), y0, args)
        is_same = jtu.tree_structure(out) == jtu.tree_structure(y0) and all(
            _can_broadcast(np.shape(a), np.shape(b))
            for a, b in zip(jtu.tree_leaves(out), jtu.tree_leaves(y0), strict=True)
        )
        if not is_same:
            name = getattr(field, "__qualname__", type(field).__name__)
            raise ValueError(
                f"The vector field `{name}` must give what looks like the state: "
                f"arrays of shape {shapes(y0)}; got {shapes(out)}."
            )


def _is_endless(t0, t1) -> bool:
    """Whether only an event can end the solve."""
    known = [t for t in (t0, t1) if not isinstance(t, jax.core.Tracer)]
    return any(bool(np.isinf(t)) for t in known)


def _solve(equation: _Equation, adjoint, max_steps, kwargs: dict[str, Any]):
    _check_kinds(equation.solver, max_steps)
    is_parallel = (
        type(equation.solver) is DEER
        and equation.solver.num_substeps is None
        and (adjoint is None or type(adjoint) is ParallelAdjoint)
    )
    if not is_parallel:
        if adjoint is not None:
            kwargs["adjoint"] = adjoint
        kwargs["max_steps"] = (
            _DIFFRAX_MAX_STEPS if max_steps == "counted" else max_steps
        )
        return diffrax.diffeqsolve(*equation, **kwargs)
    if max_steps == "counted":
        max_steps = None
    if not isinstance(kwargs["stepsize_controller"], KNOWN_STEPS):
        is_endless = _is_endless(equation.t0, equation.t1)
        adjoint = EndlessSteps() if is_endless else ParallelAdjoint()
        kwargs["adjoint"] = adjoint
        if max_steps is None:
            return _solve_with_room(equation, kwargs)
    bound, known = _count(equation, max_steps, kwargs)
    if max_steps is None:
        max_steps = _bound_on_steps(equation, bound, kwargs)
    if adjoint is None:
        adjoint = ParallelAdjoint() if known is None else CountedSteps(known)
    kwargs |= dict(adjoint=adjoint, max_steps=max_steps)
    return _with_checked_fields(equation, kwargs)


def _is_traced(equation: _Equation) -> bool:
    """Whether numbers are not known yet, as far as it can be seen."""
    leaves = [jnp.zeros(()), *jtu.tree_leaves(equation)]
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


def _solve_with_room(equation: _Equation, kwargs: dict[str, Any]) -> diffrax.Solution:
    """On a mesh whose number of steps follows from a tolerance: with Diffrax's default
    for `max_steps` while tracing and without an end, else with as many as it takes.
    """
    size = sum(np.size(y) for y in jtu.tree_leaves(equation.y0))
    first, most = room_for_steps(size, _DIFFRAX_MAX_STEPS)

    def solve(max_steps: int, throw: bool) -> diffrax.Solution:
        options = kwargs | dict(max_steps=max_steps, throw=throw)
        return _with_checked_fields(equation, options)

    if _is_traced(equation) or _is_endless(equation.t0, equation.t1):
        return solve(_DIFFRAX_MAX_STEPS, kwargs["throw"])
    room = first
    while True:
        sol = solve(room, False)
        wanted = sol.stats["num_mesh_steps"]
        leaves = jtu.tree_leaves((wanted, sol.result))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            # Of what a field or an event closes over.
            return solve(_DIFFRAX_MAX_STEPS, kwargs["throw"])
        is_short = bool(sol.result == diffrax.RESULTS.max_steps_reached)
        if not is_short or room >= most:
            break
        # A power of two, so that few programs are compiled.
        wanted = max(int(wanted), room)
        room = min(2 ** int(np.ceil(np.log2(1.25 * wanted))), most)
    is_fine = bool(diffrax.is_okay(sol.result))
    return sol if is_fine or not kwargs["throw"] else solve(room, True)


def _with_checked_fields(
    equation: _Equation, kwargs: dict[str, Any]
) -> diffrax.Solution:
    try:
        return diffrax.diffeqsolve(*equation, **kwargs)
    except (TypeError, ValueError):
        _check_fields(equation.terms, equation.t0, equation.y0, equation.args)
        raise


def _check_kinds(solver, max_steps) -> None:
    if isinstance(solver, type):
        raise ValueError(
            "`solver` must be an instance of a solver, such as "
            f"`DEER(diffrax.Tsit5())`; got {describe(solver)}."
        )
    if isinstance(max_steps, str) and max_steps != "counted":
        raise ValueError(
            "`max_steps` must be a number of steps, `None` for no bound, or "
            f"'counted'; got {max_steps!r}."
        )


def _count(
    equation: _Equation, max_steps: int | None, kwargs: dict[str, Any]
) -> tuple[int | None, KnownSteps | None]:
    """At most how many steps there are, and which they are, as far as it is known."""
    controller, state = kwargs["stepsize_controller"], kwargs["controller_state"]
    times = equation.t0, equation.t1, equation.dt0, kwargs["saveat"]
    is_even = isinstance(controller, diffrax.ConstantStepSize)
    if is_even and equation.dt0 is None:
        if max_steps is None:
            raise ValueError(
                "`dt0` is the size of the steps and must be given with "
                "`ConstantStepSize()`; got `dt0=None`."
            )
        return None, None
    bound, known = count_steps(controller, *times, max_steps)
    if state is None:
        return bound, known
    # A solve that is resumed continues the count of steps.
    counted = count_resumed_steps(state, *times) if is_even else None
    return bound if counted is None else counted, None


def _bound_on_steps(
    equation: _Equation, bound: int | None, kwargs: dict[str, Any]
) -> int | None:
    """`max_steps` where it is not given: Diffrax's default where steps cannot be
    counted while tracing.
    """
    is_even = isinstance(kwargs["stepsize_controller"], diffrax.ConstantStepSize)
    if bound is not None or not is_even:
        return bound
    t0, t1, dt0 = equation.t0, equation.t1, equation.dt0
    # The latter is Diffrax's older name for the former.
    has_event = (kwargs["event"], kwargs["discrete_terminating_event"]) != (None, None)
    is_known = not any(isinstance(t, jax.core.Tracer) for t in (t0, t1, dt0))
    if is_known and not (has_event and _is_endless(t0, t1)):
        raise ValueError(
            f"The number of steps cannot be counted from t0={t0}, t1={t1}, dt0={dt0}. "
            "Give finite times and a `dt0` that divides them into fewer than 2**31 "
            "steps, an `event` that ends a solve without end, or steps to given times "
            "with `stepsize_controller=diffrax.StepTo(ts)`."
        )
    return _DIFFRAX_MAX_STEPS
