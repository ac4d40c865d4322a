"""What `diagnose` is asked about: the recurrence behind a call, and where it is."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._auto import Auto
from ._counting import count_even_steps, time_dtype
from ._damping import Undamped
from ._discretisation import (
    AbstractImplicitTerm,
    Grid,
    consistent_initial_values,
    discretise,
)
from ._foreign import even_steps, with_tolerances, wrap
from ._grid import KNOWN_STEPS
from ._integrate import diffeqsolve
from ._method import AbstractMethod
from ._newton import Newton
from ._plan import Plan, default_platform
from ._predictor import AbstractPredictor, Trajectory, from_solver_state
from ._recurrence import AbstractRecurrence
from ._scan import make_recurrence, scan, solve_recurrence
from ._solver import DEER


class Problem(NamedTuple):
    """A recurrence, where its steps are, and how to iterate."""

    recurrence: AbstractRecurrence
    newton: Newton
    """The method without windows and damping: the iteration as it is."""
    plan: Plan
    """How the method that was given would go about it."""
    points: np.ndarray
    """Where each step starts, and where the last one ends."""
    unit: str
    """What `points` count: time or steps."""
    mesh_stats: dict[str, int] | None = None
    """What it took to find steps for a tolerance."""


def _plain(method: AbstractMethod, guess: AbstractPredictor | None) -> Newton:
    """Newton's method as `method` has it, without what helps it."""
    newton = method.newton if isinstance(method, Auto) else method
    if not isinstance(newton, Newton):
        newton = Newton(guess=method.guess)
    newton = dataclasses.replace(
        newton, damping=Undamped(), window=None, progress_meter=None
    )
    return newton if guess is None else newton.start_from(guess)


def _check_concrete(arguments: dict) -> None:
    for name, value in arguments.items():
        if any(isinstance(x, jax.core.Tracer) for x in jtu.tree_leaves(value)):
            raise ValueError(
                f"`diagnose` looks at numbers, but `{name}` is traced: call it outside "
                "`jax.jit`, `jax.vmap` and `jax.grad`, on one example."
            )


def _check_solver(solver) -> None:
    if type(solver) is not DEER:
        raise ValueError(
            "`diagnose` looks at solves that are parallel in time: "
            f"`DEER({type(solver).__name__}())` in place of "
            f"`{type(solver).__name__}()`."
        )
    if solver.num_substeps is not None:
        raise ValueError(
            "`diagnose` looks at a whole interval at once, not at the windows of "
            f"`DEER(..., num_substeps={solver.num_substeps})`. Leave `num_substeps` "
            "out, and give one window as the interval (`t0`, `t1`) and one of its "
            "sub-steps as `dt0`."
        )


def _on_a_mesh(arguments: dict) -> tuple[dict, dict[str, int] | None]:
    """The same call on the steps that meet its tolerance, as Newton's method chooses
    them; and what it took to find them.
    """
    solver, controller = arguments["solver"], arguments["stepsize_controller"]
    if isinstance(controller, KNOWN_STEPS):
        return arguments, None
    call: dict[str, Any] = arguments | dict(
        solver=dataclasses.replace(solver, method=_plain(solver.method, None)),
        saveat=diffrax.SaveAt(t0=True, steps=True),
        event=None,
        discrete_terminating_event=None,
        adjoint=None,
        throw=True,
    )
    sol = diffeqsolve(**call)
    ts: Any = sol.ts
    ts = ts[: int(sol.stats["num_accepted_steps"]) + 1]
    names = "num_meshes", "num_newton_steps", "num_guess_steps"
    solver = dataclasses.replace(
        solver, solver=with_tolerances(solver.solver, controller)
    )
    # States of an earlier solve are those of another mesh.
    arguments = arguments | dict(
        solver=solver,
        stepsize_controller=diffrax.StepTo(ts),
        dt0=None,
        solver_state=None,
    )
    return arguments, {name: int(sol.stats[name]) for name in names}


def _even_points(t0, t1, dt0, saveat) -> np.ndarray:
    """Diffrax's rule: the first step is `dt0` long, the others divide evenly."""
    count, _ = count_even_steps(t0, t1, dt0, saveat)
    assert count is not None  # or the call that is diagnosed had raised
    # Compiled as it is in a solve, since XLA rounds constants its own way.
    first = t0 + dt0 if count > 1 else t1
    tnext = jax.jit(lambda: even_steps(t0, first, t1, count)[1])()
    return np.concatenate([[t0], np.asarray(tnext)])


def _given_points(ts, t0, t1) -> np.ndarray:
    direction = 1 if t0 < t1 else -1
    if ts[0] != t0 or ts[-1] != t1 or not np.all(np.diff(ts) * direction > 0):
        raise ValueError(
            "`StepTo(ts)` must go from `t0` to `t1` without turning back; got "
            f"t0={t0}, t1={t1} and ts={ts}."
        )
    return ts


def _points(arguments: dict) -> np.ndarray:
    """The grid as Diffrax makes it, forwards or backwards in time."""
    controller = arguments["stepsize_controller"]
    t0, t1, dt0 = (arguments[name] for name in ("t0", "t1", "dt0"))
    dtype = time_dtype(t0, t1, dt0, arguments["saveat"])
    t0, t1 = dtype.type(t0), dtype.type(t1)
    if t0 == t1 or not np.isfinite(t1 - t0):
        raise ValueError(
            f"`diagnose` needs an interval of finite length; got t0={t0}, t1={t1}."
        )
    if isinstance(controller, diffrax.StepTo):
        return _given_points(np.asarray(controller.ts).astype(dtype), t0, t1)
    return _even_points(t0, t1, dtype.type(dt0), arguments["saveat"])


def _differential_equation(arguments: dict) -> Problem:
    arguments, mesh_stats = _on_a_mesh(arguments)
    solver = arguments["solver"]
    points = _points(arguments)
    args, terms, y0 = (arguments[name] for name in ("args", "terms", "y0"))
    if isinstance(terms, AbstractImplicitTerm):
        y0 = consistent_initial_values(terms, arguments["t0"], y0, args).y0
    with jax.numpy_dtype_promotion("standard"):
        y0 = jtu.tree_map(
            lambda y: jnp.asarray(y, jnp.result_type(y, points.dtype)), y0
        )
    # Time runs forwards for Diffrax's solvers; the terms know better.
    direction = jnp.where(points[0] < points[-1], 1, -1)
    terms = wrap(terms, direction)
    grid = Grid.from_points(jnp.asarray(points) * direction)
    recurrence = discretise(solver.solver, terms, grid, y0, args).recurrence
    guess = None
    if arguments["solver_state"] is not None:
        ys = arguments["solver_state"].ys
        guess = from_solver_state(ys, y0, grid.num_steps)
    plan = solver.method.plan(recurrence, default_platform())
    newton = _plain(solver.method, guess)
    return Problem(recurrence, newton, plan, points, "time", mesh_stats)


def _recurrence(arguments: dict) -> Problem:
    f, init, xs, length, reverse, guess = (
        arguments[name] for name in ("f", "init", "xs", "length", "reverse", "guess")
    )
    carry, _ = jax.eval_shape(lambda init: lax.scan(f, init, xs, length), init)
    init = jtu.tree_map(lambda x, s: jnp.asarray(x, s.dtype), init, carry)
    xs = jtu.tree_map(jnp.asarray, xs)
    num_steps = jtu.tree_leaves(xs)[0].shape[0] if length is None else int(length)
    if num_steps == 0 or len(jtu.tree_leaves(init)) == 0:
        raise ValueError(
            f"There is nothing to diagnose: {num_steps} steps of a carry of "
            f"{len(jtu.tree_leaves(init))} arrays."
        )
    if guess is None:
        guess = arguments["method"].guess
    elif not isinstance(guess, AbstractPredictor):
        guess = Trajectory(guess)
    points = np.arange(-1.0, num_steps)
    if reverse:
        flip = lambda tree: jtu.tree_map(lambda x: x[::-1], tree)
        points = num_steps - 1 - points
        xs, guess = flip(xs), flip(guess) if isinstance(guess, Trajectory) else guess
    recurrence = make_recurrence(f, init, xs, num_steps)
    method = arguments["method"]
    plan = method.plan(recurrence, default_platform())
    return Problem(recurrence, _plain(method, guess), plan, points, "step")


def find_problem(solve, args, kwargs) -> Problem:
    is_equation = solve is diffeqsolve
    if not is_equation and solve is not scan and solve is not solve_recurrence:
        raise ValueError(
            "`diagnose(solve, ...)` takes `deer_ode.diffeqsolve`, `deer_ode.scan` or "
            f"`deer_ode.solve_recurrence` and the arguments of its call; got {solve!r}."
        )
    bound = inspect.signature(solve).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    _check_concrete(arguments)
    if is_equation:
        _check_solver(arguments["solver"])
    # The errors are those of the call because it is the call that is checked.
    eqx.filter_eval_shape(lambda: solve(*args, **kwargs))
    return _differential_equation(arguments) if is_equation else _recurrence(arguments)
