"""All that is private to other libraries, and so may move with any of their releases.

The layout of JAX's traced programs (jaxprs) and Pallas; Equinox's internal helpers;
Diffrax's loop with its state, its wrapped terms, and its rule for even steps. No other
module imports or names these. `tests/test_foreign.py` has a test for each, which fails
with what has moved; this module is then the only one to change.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.extend.core as jexc
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax._integrate import SaveState as SaveState, State as LoopState
from diffrax._misc import linear_rescale as linear_rescale
from diffrax._root_finder import use_stepsize_tol
from diffrax._term import AdjointTerm, WrapTerm, _ControlToODE
from equinox.internal import (
    nextafter as nextafter,
    prevbefore as prevbefore,
    unvmap_any as unvmap_any,
    unvmap_max as unvmap_max,
)
from jaxtyping import PyTree


# --- Traced programs ------------------------------------------------------------------

# From JAX 0.11 on `ClosedJaxpr` is the same class as `Jaxpr`.
_ClosedJaxpr: Any = jexc.ClosedJaxpr  # pyright: ignore
_PROGRAMS = jexc.Jaxpr | _ClosedJaxpr

Literal = jexc.Literal

# The module whose callbacks raise the errors of `equinox.error_if`.
_RAISES = "equinox._errors"


def is_program(x: Any) -> bool:
    return isinstance(x, _PROGRAMS)


def body_of(program: Any) -> Any:
    """The equations. Before JAX 0.11 a closed program holds them and its constants."""
    return getattr(program, "jaxpr", program)


def constants_of(program: Any) -> list:
    return list(getattr(program, "consts", ()))


def closed(body: Any, constants: list) -> Any:
    return _ClosedJaxpr(body, constants)


def run_program(body: Any, constants: list, *inputs: Any) -> list:
    return jexc.jaxpr_as_fun(closed(body, constants))(*inputs)


def inner_programs(equation: Any) -> Iterator[Any]:
    """The programs among the parameters of an equation: branches, bodies of loops."""
    for leaf in jtu.tree_leaves(list(equation.params.values()), is_leaf=is_program):
        if is_program(leaf):
            yield leaf


def called_program(params: dict[str, Any]) -> Any:
    """The program that an equation such as `jit` or `checkpoint` calls, or `None`."""
    return next((params[k] for k in ("jaxpr", "call_jaxpr") if k in params), None)


def scan_parts(params: dict[str, Any]) -> tuple[Any, int, int]:
    """The body of a `scan` equation, and how many constants and carries it has."""
    if "num_consts" in params:
        return params["jaxpr"], params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return params["jaxpr"], len(constants), len(carry)


def while_parts(params: dict[str, Any]) -> tuple[Any, int, int]:
    """The body of a `while` equation, and how many constants the condition and the
    body have.
    """
    return params["body_jaxpr"], params["cond_nconsts"], params["body_nconsts"]


def is_ref(atom: Any) -> bool:
    """Whether it is an array that is changed in place (`jax.Ref`)."""
    return "Ref" in type(atom.aval).__name__


def is_raise(equation: Any) -> bool:
    """Whether it is the callback that raises an error of `equinox.error_if`."""
    callback = equation.params.get("callback")
    callback = getattr(callback, "callback_func", callback)
    return (
        equation.primitive.name == "pure_callback"
        and getattr(callback, "__module__", None) == _RAISES
    )


def is_check(equation: Any) -> bool:
    """Whether it is the choice of `equinox.error_if` between passing and raising."""
    branches = equation.params.get("branches", ())
    return equation.primitive.name == "cond" and any(
        is_raise(e) for branch in branches for e in body_of(branch).eqns
    )


def passed(check: Any) -> Any:
    """The same choice, which always passes: Equinox has that branch first."""
    index, *operands = check.invars
    passes = Literal(np.asarray(0, index.aval.dtype), index.aval)
    return check.replace(invars=[passes, *operands])


# --- Pallas ---------------------------------------------------------------------------


class Pallas(NamedTuple):
    """All that is used of Pallas."""

    program_id: Callable
    ds: Callable
    cdiv: Callable
    BlockSpec: Callable
    pallas_call: Callable
    load: Callable
    store: Callable
    CompilerParams: Callable


def pallas() -> Pallas:
    """An `ImportError` with the reason where JAX does not have it.

    Not imported before a kernel is wanted: Pallas is experimental, its part for Triton
    is about to leave JAX (deprecated in 0.11), and without a GPU nobody needs it.
    """
    try:
        # By their full names: `from` would also take what a module only remembers.
        import jax.experimental.pallas as pallas
        import jax.experimental.pallas.triton as triton

        return Pallas(
            *(pallas.program_id, pallas.ds, pallas.cdiv),
            *(pallas.BlockSpec, pallas.pallas_call),
            *(triton.load, triton.store, triton.CompilerParams),
        )
    except (ImportError, AttributeError) as e:
        raise ImportError(
            "they are written in Pallas for Triton (`jax.experimental.pallas.triton`), "
            f"which JAX {jax.__version__} does not have as it was ({e})"
        ) from e


# --- Equinox --------------------------------------------------------------------------


def bounded_while_loop(cond_fun, body_fun, init, *, max_steps: int, base: int) -> Any:
    """A while loop that can be differentiated in forward and in reverse mode."""
    return eqxi.while_loop(
        cond_fun, body_fun, init, max_steps=max_steps, kind="bounded", base=base
    )


# --- Diffrax's terms ------------------------------------------------------------------
#
# Diffrax counts time forwards. It wraps each term of the user, with the direction in
# which the user's time goes.


def with_tolerances(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController
) -> diffrax.AbstractSolver:
    """Diffrax gives a root finder that has no tolerances those of the controller."""
    finder = getattr(solver, "root_finder", None)
    names = [
        name for name in ("rtol", "atol", "norm")
        if getattr(finder, name, None) is use_stepsize_tol
    ]  # fmt: skip
    get = lambda x: [getattr(x, name) for name in names]
    if not names:
        return solver
    return eqx.tree_at(lambda s: get(s.root_finder), solver, get(controller))


def _instances(of: type, tree: PyTree) -> list:
    is_one = lambda x: isinstance(x, of)
    return [x for x in jtu.tree_leaves(tree, is_leaf=is_one) if is_one(x)]


def wrap(terms: PyTree[diffrax.AbstractTerm], direction: Any) -> PyTree:
    """`terms` as `diffeqsolve` hands them to a solver; `direction` is 1 or -1."""
    is_single = lambda x: (
        isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)
    )
    return jtu.tree_map(lambda x: WrapTerm(x, direction), terms, is_leaf=is_single)


def unwrap(term: Any) -> tuple[Any, Any] | None:
    """The term of the user and its direction; `None` where `term` is not wrapped."""
    return (term.term, term.direction) if isinstance(term, WrapTerm) else None


def direction_of(terms: PyTree[diffrax.AbstractTerm]) -> Any:
    """-1 where the user's time goes backwards."""
    wrapped = _instances(WrapTerm, terms)
    return wrapped[0].direction if wrapped else 1


def has_noise(terms: PyTree[diffrax.AbstractTerm]) -> bool:
    """Whether there is a Brownian path among the controls."""
    return bool(_instances(diffrax.AbstractBrownianPath, terms))


def has_adjoint_term(terms: PyTree[diffrax.AbstractTerm]) -> bool:
    """Whether they are the terms of a backward solve of `BacksolveAdjoint`."""
    return bool(_instances(AdjointTerm, terms))


def has_control_derivative(terms: PyTree[diffrax.AbstractTerm]) -> bool:
    """Whether `ControlTerm.to_ode` made one of them."""
    return bool(_instances(_ControlToODE, terms))


# --- Diffrax's steps ------------------------------------------------------------------

# A step that would end closer to `t1` than so many units of rounding ends at `t1`.
SNAPPED_UNITS = 100


class EvenSteps(NamedTuple):
    """The `controller_state` of `ConstantStepSize`. Its steps divide an interval."""

    count: Any
    """How many steps there are up to the end of the next one."""
    total: Any
    """How many there are; -1 where there is no end, 0 where that is `start`."""
    start: Any
    end: Any
    """Where there is no end: the length of a step."""


def num_even_steps(t0: np.floating, t1: np.floating, dt0: np.floating) -> int:
    """How many steps `ConstantStepSize` makes, by the rule of Diffrax's controller."""
    # The next number, so that rounding of `dt0` makes no extra step.
    longest = np.nextafter(abs(dt0), dt0.dtype.type(np.inf))
    return max(1, int(np.ceil(abs(t1 - t0) / longest)))


def _even_end(steps: EvenSteps, xp: Any) -> Any:
    """Where step `steps.count`, counted from one, ends."""
    count, total, start, end = steps
    dtype = xp.result_type(start, end)
    time = start + (end - start) * (count.astype(dtype) / total.astype(dtype))
    # Where `end` is `start` there are none to divide by.
    return xp.where((count == total) | (total == 0), end, time)


def _step_times(t0, first, end_of: Callable[[Any], Any], num_steps: int, xp: Any):
    """Where the steps start, and where they end; `end_of` counts from zero.

    Each entry by itself, so that XLA makes one pass over the grid.
    """
    steps = xp.arange(num_steps, dtype=np.int32)
    end = lambda step: xp.where(step == 0, first, end_of(step))
    return xp.where(steps == 0, t0, end(steps - 1)), end(steps)


def even_steps(t0, first, t1, num_steps: int, xp: Any = jnp) -> tuple[Any, Any]:
    """The first step goes to `first`, and the last one to `t1`; in NumPy or in JAX.

    Nothing is clipped: that is a tenth of the time of a sequential loop over cheap
    steps.
    """
    total = np.asarray(num_steps, np.int32)
    end_of = lambda step: _even_end(EvenSteps(step + 1, total, t0, t1), xp)
    return _step_times(t0, first, end_of, num_steps, xp)


def constant_steps(state: LoopState, t1, max_steps: int) -> tuple[Any, Any]:
    """The steps of `ConstantStepSize` from the state that Diffrax's loop begins with.

    The first one is `dt0` long, the others divide the interval evenly; without an end
    all are `dt0` long. After the last one they begin at `t1`.
    """
    even = EvenSteps(*state.controller_state)
    floor = lax.fori_loop(0, SNAPPED_UNITS, lambda _, t: prevbefore(t), t1)

    def end_of(step):
        bounded = _even_end(even._replace(count=even.count + step), jnp)
        endless = state.tnext + even.end * step.astype(jnp.result_type(t1))
        end = jnp.where(even.total >= 0, bounded, endless)
        return jnp.where(end > floor, t1, end)

    return _step_times(
        state.tprev, jnp.minimum(state.tnext, t1), end_of, max_steps, jnp
    )


def advance(
    controller: diffrax.AbstractStepSizeController, state: PyTree, num_steps
) -> PyTree:
    """The state of `ConstantStepSize` or `StepTo` so many steps on."""
    if isinstance(controller, diffrax.StepTo):
        return state + num_steps
    if not isinstance(controller, diffrax.ConstantStepSize):
        return state  # of a controller whose steps follow from a tolerance
    count, *rest = state
    return (count + num_steps, *rest)


# --- Diffrax's loop -------------------------------------------------------------------


def run_loop(
    adjoint: diffrax.AbstractAdjoint,
    make_all_steps: Callable[[LoopState], tuple[LoopState, dict[str, Any]]],
    **kwargs: Any,
) -> tuple[LoopState, dict[str, Any]]:
    """Diffrax's loop, with a function in place of the while loop over steps.

    `make_all_steps` is given the state that the while loop would begin with. It gives
    the one that it would end with, and statistics. Diffrax's set-up and its finish
    (root finding for events, the save at `t1`) stay as they are.
    """
    stats = {}

    def outer(cond_fun, body_fun, init_state, *, max_steps, buffers):
        del cond_fun, body_fun, max_steps, buffers
        state, new_stats = make_all_steps(init_state)
        stats.update(new_stats)
        return state

    final_state, aux_stats = adjoint._loop(
        **kwargs,
        # The body is only looked at, never run.
        inner_while_loop=lambda cond_fun, body_fun, init_val, **kw: init_val,
        outer_while_loop=outer,
    )
    return final_state, aux_stats | stats


def running_adjoint() -> diffrax.AbstractAdjoint | None:
    """The adjoint whose loop a step is traced in. Diffrax does not tell a solver, and
    traces a step before that loop too, for the shapes of what is saved.
    """
    frame = sys._getframe(1)
    while frame is not None:
        adjoint = frame.f_locals.get("self")
        if frame.f_code.co_name == "loop" and isinstance(
            adjoint, diffrax.AbstractAdjoint
        ):
            return adjoint
        frame = frame.f_back
    return None
