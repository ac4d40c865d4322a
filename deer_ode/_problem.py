"""What `diagnose` is asked about: the recurrence behind a call, and where it is.

The call itself is made, by a method that takes the recurrence which it is to solve, and
ends the call.
"""

import dataclasses
import inspect
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
import numpy as np

from ._auto import Auto
from ._damping import Undamped
from ._foreign import with_tolerances
from ._grid import KNOWN_STEPS
from ._integrate import diffeqsolve
from ._method import AbstractMethod
from ._newton import Newton
from ._plan import Plan, default_platform
from ._recurrence import AbstractRecurrence
from ._scan import scan, solve_recurrence
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


def _plain(method: AbstractMethod) -> Newton:
    """Newton's method as `method` has it, without what helps it."""
    newton = method.newton if isinstance(method, Auto) else method
    if not isinstance(newton, Newton):
        newton = Newton(guess=method.guess)
    return dataclasses.replace(
        newton, damping=Undamped(), window=None, progress_meter=None
    )


class _Captured(Exception):
    def __init__(self, recurrence: AbstractRecurrence, newton: Newton):
        super().__init__()
        self.recurrence = recurrence
        self.newton = newton


class _Capture(AbstractMethod):
    """Raises `_Captured` when it is first asked about the recurrence to be solved."""

    newton: Newton

    def is_sequential(self, recurrence, platform):
        raise _Captured(recurrence, self.newton)

    def plan(self, recurrence, platform):
        raise _Captured(recurrence, self.newton)

    def solve(self, recurrence, plan):
        raise _Captured(recurrence, self.newton)

    @property
    def guess(self):
        return self.newton.guess

    @property
    def fallback(self):
        return True

    def start_from(self, guess):
        return _Capture(self.newton.start_from(guess))


def _capture(solve, arguments: dict) -> _Captured:
    """What the call would solve, in numbers: nothing of it is compiled as a whole."""
    try:
        with jax.disable_jit():
            solve(**arguments)
    except _Captured as captured:
        if captured.recurrence.num_active > 0:
            return captured
    names = [name for name in ("t0", "t1", "y0", "init") if name in arguments]
    got = ", ".join(f"{name}={arguments[name]}" for name in names)
    raise ValueError(f"There is nothing to diagnose: no steps, or no state; got {got}.")


def _on_a_mesh(arguments: dict) -> tuple[dict, dict[str, int] | None]:
    """The same call on the steps that meet its tolerance, as Newton's method chooses
    them; and what it took to find them.
    """
    solver, controller = arguments["solver"], arguments["stepsize_controller"]
    if isinstance(controller, KNOWN_STEPS):
        return arguments, None
    call: dict[str, Any] = arguments | dict(
        solver=dataclasses.replace(solver, method=_plain(solver.method)),
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


def _differential_equation(arguments: dict) -> Problem:
    arguments, mesh_stats = _on_a_mesh(arguments)
    solver = arguments["solver"]
    capture = _Capture(_plain(solver.method))
    captured = _capture(
        diffeqsolve,
        arguments
        | dict(
            solver=dataclasses.replace(solver, method=capture),
            event=None,
            discrete_terminating_event=None,
            adjoint=None,
            max_steps="counted",
            progress_meter=diffrax.NoProgressMeter(),
        ),
    )
    recurrence: Any = captured.recurrence
    newton, grid = captured.newton, recurrence.grid
    points = np.concatenate([grid.tprev[:1], grid.tnext])
    # For Diffrax's solvers time runs forwards.
    points = points if arguments["t0"] < arguments["t1"] else -points
    plan = solver.method.plan(recurrence, default_platform())
    return Problem(recurrence, newton, plan, points, "time", mesh_stats)


def _recurrence(arguments: dict) -> Problem:
    method, xs = arguments["method"], jtu.tree_leaves(arguments["xs"])
    if arguments["length"] == 0 or (xs and len(xs[0]) == 0):
        raise ValueError("There is nothing to diagnose: 0 steps.")
    capture = arguments | dict(method=_Capture(_plain(method)))
    captured = _capture(solve_recurrence, capture)
    recurrence = captured.recurrence
    points = np.arange(-1.0, recurrence.num_steps)
    if arguments["reverse"]:
        points = recurrence.num_steps - 1 - points
    plan = method.plan(recurrence, default_platform())
    return Problem(recurrence, captured.newton, plan, points, "step")


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
