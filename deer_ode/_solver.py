"""`DEER`, a Diffrax solver whose one step is a window solved in parallel."""

import functools as ft
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, Real

from ._auto import Auto
from ._custom_types import Args, Y
from ._discretisation import Grid, check_one_step, discretise, one_step
from ._foreign import has_adjoint_term, running_adjoint
from ._implicit import solve_trajectory
from ._method import AbstractMethod, Sequential
from ._misc import StateFlattener, describe


class WindowInterpolation(diffrax.AbstractLocalInterpolation):
    """The base solver's interpolation within each of the sub-steps of a window."""

    t0: Any
    t1: Any
    ts: Real[Array, " points"]
    infos: dict[str, Any]
    base_cls: Callable[..., Any] = eqx.field(static=True)

    def evaluate(self, t0, t1=None, left=True):
        del left
        if t1 is not None:
            return jtu.tree_map(
                lambda a, b: b - a, self.evaluate(t0), self.evaluate(t1)
            )
        index = jnp.clip(
            jnp.searchsorted(self.ts, t0, side="left") - 1, 0, self.ts.shape[0] - 2
        )
        info = jtu.tree_map(lambda x: x[index], self.infos)
        local = self.base_cls(t0=self.ts[index], t1=self.ts[index + 1], **info)
        return local.evaluate(t0)


@ft.cache
def _window_interpolation(base_cls):
    # Diffrax keeps the class of interpolation as static data: the same object every
    # time, or everything is compiled anew.
    return ft.partial(WindowInterpolation, base_cls=base_cls)


class DEERState(NamedTuple):
    """The `solver_state` of [`deer_ode.DEER`][]."""

    ys: Float[Array, "steps state"]
    """The last trajectory, flattened, from which the next solve starts; may be empty.
    """
    num_newton_steps: Int[Array, ""]


def _warn_if_sequential(method: AbstractMethod) -> None:
    adjoint = running_adjoint()
    is_parallel = adjoint is None or getattr(adjoint, "takes_all_steps", False)
    if is_parallel or isinstance(method, Sequential):
        return
    warnings.warn(
        "`DEER` in `diffrax.diffeqsolve` makes its steps sequentially here: nothing is "
        "parallel. Use `deer_ode.diffeqsolve`, or give "
        "`adjoint=deer_ode.ParallelAdjoint()` and `max_steps`, or `DEER(..., "
        "num_substeps=...)`. If sequential steps are meant, say `DEER(..., "
        "method=deer_ode.Sequential())`.",
        stacklevel=3,
    )


class DEER(diffrax.AbstractWrappedSolver):
    r"""Takes the steps of a Diffrax solver in parallel over time.

    The steps $y_i = \Phi(t_{i-1}, t_i, y_{i-1})$ of the base solver are unknowns of
    one system of equations, which Newton's method solves for the whole time grid at
    once, each iteration an affine recurrence that runs in parallel. The answer is that
    of the base solver on the same grid.

    There are three ways to use it:

    - [`deer_ode.diffeqsolve`][] in place of `diffrax.diffeqsolve`, which needs nothing
        else;
    - `diffrax.diffeqsolve(..., adjoint=ParallelAdjoint(), max_steps=...)`, with
        `max_steps` at least the number of steps;
    - `DEER(..., num_substeps=n)` in `diffrax.diffeqsolve` with anything that Diffrax
        has: each of Diffrax's steps is a window of `n` sub-steps of the base solver,
        solved in parallel. Step size controllers, events and adjoints work window by
        window; the error estimate of a window is the largest of its sub-steps', so a
        tolerance means what it means for the base solver.

    Without `num_substeps`, and with another adjoint than
    [`deer_ode.ParallelAdjoint`][], Diffrax makes its steps one by one and nothing is
    parallel: the answer is the base solver's.

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, International Conference on Learning
        Representations, arXiv:2309.12252.
    """

    solver: diffrax.AbstractSolver = diffrax.Tsit5()
    method: AbstractMethod = Auto()
    num_substeps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not isinstance(self.solver, diffrax.AbstractSolver):
            raise ValueError(
                "`DEER(solver)` needs an instance of a Diffrax solver, such as "
                f"`diffrax.Tsit5()`; got {describe(self.solver)}."
            )
        if type(self.solver) is DEER:
            raise ValueError("`DEER(DEER(...))` makes no sense: give the base solver.")
        if not isinstance(self.method, AbstractMethod):
            raise ValueError(
                "`DEER(method=...)` needs `Auto()`, `Newton(...)` or `Sequential()`; "
                f"got {describe(self.method)}."
            )
        if self.num_substeps is not None and not (
            isinstance(self.num_substeps, int) and self.num_substeps > 0
        ):
            raise ValueError(
                "`DEER(num_substeps=...)` must be a positive integer or `None`; got "
                f"{self.num_substeps!r}."
            )
        check_one_step(self.solver)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):  # pyright: ignore
        base_cls = self.solver.interpolation_cls
        if self.num_substeps is None:
            return base_cls
        return _window_interpolation(base_cls)

    # Diffrax replaces these on Runge--Kutta and on implicit solvers, for which a
    # wrapped solver passes. The first is taken care of, the second is passed on.
    @property
    def scan_kind(self):
        return "bounded"

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore

    @property
    def root_find_max_steps(self):
        return self.solver.root_find_max_steps  # pyright: ignore

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0: Y, args: Args) -> DEERState:
        del terms, t0, t1, args
        flattener = StateFlattener(y0)
        return DEERState(
            ys=jnp.zeros((0, flattener.size), flattener.dtype),
            num_newton_steps=jnp.asarray(0, jnp.int32),
        )

    def step(self, terms, t0, t1, y0: Y, args: Args, solver_state, made_jump):
        del made_jump
        if self.num_substeps is None:
            _warn_if_sequential(self.method)
            y1, y_error, dense_info, result = one_step(
                self.solver, terms, t0, t1, y0, args
            )
            # `ParallelAdjoint` decides results at run time. Diffrax's loop looks here
            # whether that can be, and would otherwise settle them while tracing.
            result = diffrax.RESULTS.where(
                t0 <= t1, result, diffrax.RESULTS.internal_error
            )
            return y1, y_error, dense_info, solver_state, result
        if has_adjoint_term(terms):
            raise ValueError(
                "`BacksolveAdjoint` solves for the gradients of all parameters as part "
                "of the state, far too large a state for parallel steps, and its "
                "answer is approximate. Use the default adjoint with `DEER(..., "
                "num_substeps=...)`: its gradients are exact."
            )
        fraction = jnp.linspace(0, 1, self.num_substeps + 1, dtype=jnp.result_type(t1))
        ts = jnp.asarray(t0 + fraction * (t1 - t0)).at[-1].set(t1)
        grid = Grid.from_points(ts)
        discretised = discretise(self.solver, terms, grid, y0, args)
        solution = solve_trajectory(discretised.recurrence, self.method)
        y1 = jtu.tree_map(lambda y: y[-1], discretised.states(solution.ys))
        steps = discretised.take_steps(solution.ys)
        # Promoting would make it traced, where with a sequential finish it is known.
        result = self.method.result(solution, self.num_substeps)
        if result.is_traced():
            result = diffrax.RESULTS.promote(result)
        else:
            result = diffrax.RESULTS.successful
        if steps.result is not None:
            failed = steps.result != diffrax.RESULTS.successful
            first = jnp.argmax(failed)
            result = diffrax.RESULTS.where(
                jnp.any(failed), jtu.tree_map(lambda x: x[first], steps.result), result
            )
        y_error = steps.y_error
        if y_error is not None:
            okay = result == diffrax.RESULTS.successful
            y_error = jtu.tree_map(
                lambda e: jnp.where(okay, jnp.max(jnp.abs(e), axis=0), jnp.inf), y_error
            )
        dense_info = dict(ts=ts, infos=steps.dense_info)
        solver_state = DEERState(
            solver_state.ys,
            solver_state.num_newton_steps + solution.num_newton_steps,
        )
        return y1, y_error, dense_info, solver_state, result


DEER.__init__.__doc__ = """**Arguments:**

- `solver`: the base solver: any one-step solver of Diffrax, explicit or implicit, for
    ordinary, controlled or stochastic differential equations, or one of this package.
    Defaults to `diffrax.Tsit5()`, which Diffrax recommends as well: of a step it needs
    no more than the field, and Newton's method the field's first derivative. For
    smooth fields and small states [`deer_ode.Obreshkov`][] needs the least work.
- `method`: how to solve for all steps: [`deer_ode.Auto`][] (the default),
    [`deer_ode.Newton`][] or [`deer_ode.Sequential`][].
- `num_substeps`: into how many sub-steps to divide each step that Diffrax makes, for
    use in `diffrax.diffeqsolve` without [`deer_ode.ParallelAdjoint`][].

**Raises:**

- `ValueError`: for solvers with memory between steps (`LeapfrogMidpoint`,
    `ReversibleHeun`).
"""
