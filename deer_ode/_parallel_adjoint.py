"""`ParallelAdjoint`: Diffrax's time loop, all of its steps at once.

Diffrax hands its whole loop to the adjoint. The stock loop does the set-up, runs a
while loop over steps, and finishes: root finding for events, the save at `t1`, results.
Given in place of the while loop a function that makes the loop's final state in
parallel, everything before and after it stays Diffrax's own.
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
from jaxtyping import Array, PyTree

from ._counting import KnownSteps
from ._discretisation import Discretised, Grid, discretise
from ._events import find_events
from ._final_state import final_state, stats
from ._foreign import LoopState, has_noise, run_loop
from ._grid import (
    KNOWN_STEPS,
    LoopInputs,
    controller_grid,
    placeholder_grid,
    refuse,
)
from ._mesh import as_mesh_refinement, moved_with
from ._method import AbstractMethod
from ._predictor import from_solver_state
from ._refinement import Refined, Refinement, refine, sequential_mesh
from ._solver import DEER
from ._solving import find_outcome, raise_failure, solve


class _RunningMeter(diffrax.AbstractProgressMeter):
    """A meter that Diffrax has begun with, and will close."""

    meter: diffrax.AbstractProgressMeter
    state: PyTree[Array]

    def init(self):
        return self.state

    def step(self, state, progress):
        return self.meter.step(state, progress)

    def close(self, state):
        del state


def _method(
    inputs: LoopInputs, state: LoopState, grid: Grid, guess: Array | None
) -> AbstractMethod:
    """The method of the solver, with the progress meter. `guess` are flat states."""
    method = inputs.solver.method
    if guess is not None:
        predictor = from_solver_state(guess, state.y, grid.num_steps)
        method = method if predictor is None else method.start_from(predictor)
    if inputs.shows_progress:
        meter = _RunningMeter(inputs.progress_meter, state.progress_meter_state)
        method = method.report_to(meter)
    return method


def _make_all_steps(
    inputs: LoopInputs, state: LoopState, guess: Array | None
) -> tuple[LoopState, dict[str, Any]]:
    """What Diffrax's loop would end with, and the statistics of getting there."""
    is_known = isinstance(inputs.stepsize_controller, KNOWN_STEPS)
    if is_known:
        grid = controller_grid(inputs, state)
    else:
        grid, guess = placeholder_grid(inputs, state), None
    method = _method(inputs, state, grid, guess)
    discretised, refined = _discretised(inputs, state, grid), None
    if not is_known:
        discretised, refined = _on_a_mesh(inputs, state, discretised, method)
    solved = solve(inputs, state, discretised, method, refined)
    outcome = find_outcome(inputs, state, solved)
    if inputs.throw and not solved.always_succeeds:
        solved = raise_failure(inputs, solved, outcome)
    return final_state(inputs, state, solved, outcome), stats(solved, outcome)


def _discretised(inputs: LoopInputs, state: LoopState, grid: Grid) -> Discretised:
    # Whether a path reaches as far as the solve is seen once an event has ended that.
    return discretise(
        inputs.solver.solver,
        inputs.terms,
        grid,
        state.y,
        inputs.args,
        is_checked=inputs.event is None,
    )


def _on_a_mesh(
    inputs: LoopInputs,
    state: LoopState,
    discretised: Discretised,
    method: AbstractMethod,
) -> tuple[Discretised, Refined]:
    """The same equation on the mesh that meets the tolerance, and its solution."""
    controller = inputs.stepsize_controller
    mesh = as_mesh_refinement(controller)
    if mesh is not None:
        discretised = discretised.with_threshold(mesh.threshold(discretised.y0))
    order = inputs.solver.error_order(inputs.terms)
    recurrence = discretised.recurrence
    is_sequential = method.path(recurrence) == "sequential"
    # What a root finder leaves counts as error where steps are taken from rest, and no
    # mesh would be fine enough.
    must_be = recurrence.solves_equations or inputs.is_endless
    if is_sequential or must_be:
        refined = sequential_mesh(inputs, state, order, discretised.grid.num_steps)
    else:
        refined = _refined(inputs, state, discretised, method, order)
    # The mesh has no derivatives, but the times that it was made for may.
    grid = refined.grid
    moved = lambda times: moved_with(mesh, state.tprev, inputs.t1, times)
    grid = Grid(
        moved(grid.tprev),
        moved(grid.tnext),
        grid.active,
        has_jumps=mesh is None or mesh.jump_ts is not None,
    )
    if discretised.has_draws:
        return _discretised(inputs, state, grid), refined
    return discretised.on(grid), refined


def _refined(
    inputs: LoopInputs,
    state: LoopState,
    discretised: Discretised,
    method: AbstractMethod,
    order: Any,
) -> Refined:
    controller = as_mesh_refinement(inputs.stepsize_controller)
    if controller is None:
        refuse(inputs.stepsize_controller)
    if has_noise(inputs.terms):
        raise ValueError(
            "A stochastic differential equation cannot be solved to a tolerance in "
            "parallel: its steps must be known beforehand (`ConstantStepSize()` or "
            f"`StepTo(ts)`); got {type(inputs.stepsize_controller).__name__}. "
            "`DEER(solver, num_substeps=...)` and Diffrax's default adjoint solve it "
            "window by window."
        )
    until_event = None
    if inputs.event is not None:
        until_event = lambda grid, ys: find_events(inputs, state, grid, ys).happened
    if controller.error_order is not None:
        order = controller.error_order
    return refine(Refinement(controller, discretised, method, order, until_event))


def _check_solver(solver: diffrax.AbstractSolver) -> None:
    if type(solver) is not DEER:
        raise ValueError(
            "`ParallelAdjoint` needs a solver that takes its steps in parallel: "
            f"`DEER({type(solver).__name__}(...))` in place of "
            f"`{type(solver).__name__}(...)`."
        )
    if solver.num_substeps is not None:
        raise ValueError(
            "`DEER(..., num_substeps=...)` is for Diffrax's own adjoints, which "
            "solve window by window. Leave out `num_substeps`, or leave out "
            "`ParallelAdjoint`."
        )


class AbstractParallelAdjoint(diffrax.AbstractAdjoint):
    """All steps of Diffrax's loop at once."""

    takes_all_steps: ClassVar[bool] = True

    known: eqx.AbstractVar[KnownSteps | None]
    """The steps, if it is known while tracing that all of them are made."""
    is_endless: ClassVar[bool] = False

    def loop(
        self,
        *,
        init_state,
        passed_solver_state,
        passed_controller_state,
        throw,
        **loop_kwargs,
    ):
        del passed_controller_state
        _check_solver(loop_kwargs["solver"])
        inputs = LoopInputs(
            **loop_kwargs, throw=throw, known=self.known, is_endless=self.is_endless
        )
        guess = init_state.solver_state.ys if passed_solver_state else None
        return run_loop(
            self,
            lambda state: _make_all_steps(inputs, state, guess),
            init_state=init_state,
            **loop_kwargs,
        )


class ParallelAdjoint(AbstractParallelAdjoint):
    r"""Makes `diffrax.diffeqsolve` take all its steps in parallel.

    `diffrax.diffeqsolve(terms, DEER(solver), ..., adjoint=ParallelAdjoint(),
    max_steps=...)` gives the solution of `solver` on the same steps, with everything
    that Diffrax's `Solution` has. Its `stats` also hold

    - `path`: `"newton"`, or `"sequential"` where [`deer_ode.Auto`][] chose a loop over
        the steps;
    - `num_newton_steps`: iterations of Newton's method, over windows of the interval or
        all of it; zero for sequential steps;
    - `newton_residual`: the largest residual of the converged steps, in units of the
        state, before the last correction;
    - `newton_damping`: the largest $\lambda$ of [`deer_ode.LevenbergMarquardt`][];
    - `num_windows`: how often a window moved on, and one;
    - `num_fallback_steps`: how many steps were sequential;
    - `first_nonfinite_step`: the first step to a state that is not finite, counted from
        zero; -1 if there is none.

    The steps are known beforehand (`ConstantStepSize()` or `StepTo(ts)`), or follow
    from a tolerance ([`deer_ode.MeshRefinement`][]). A solve is sized for `max_steps`
    steps, and iterations on accelerators pay for those that are not needed: give the
    true number. [`deer_ode.diffeqsolve`][] does so by itself.

    Derivatives are exact, those of the discrete solution, forward and reverse and to
    any order, by the implicit function theorem, for which only the trajectory is kept;
    or, where the steps are sequential, JAX's own of the loop over them, for which only
    the trajectory is kept as well.
    """

    known: ClassVar[None] = None


class CountedSteps(AbstractParallelAdjoint):
    """As [`deer_ode.ParallelAdjoint`][], for steps that are known.

    Nothing need be done for steps that may not be there, which is a tenth of the time
    of a loop over cheap ones, and `max_steps` may be larger. What is saved where steps
    end is not interpolated.
    """

    known: KnownSteps = eqx.field(static=True)


class EndlessSteps(AbstractParallelAdjoint):
    """As [`deer_ode.ParallelAdjoint`][], for a tolerance over an interval that only an
    event ends: its steps are chosen sequentially.
    """

    known: ClassVar[None] = None
    is_endless: ClassVar[bool] = True
