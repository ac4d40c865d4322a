"""What Diffrax gives its loop, and the grid of the steps that the loop would make."""

from typing import Any, NamedTuple, NoReturn

import diffrax
import jax.lax as lax
import jax.numpy as jnp

from ._counting import KnownSteps
from ._discretisation import Grid
from ._foreign import LoopState, constant_steps, even_steps
from ._solver import DEER


class LoopInputs(NamedTuple):
    """What Diffrax gives the loop of an adjoint, and what is known of its steps."""

    args: Any
    terms: Any
    solver: DEER
    stepsize_controller: diffrax.AbstractStepSizeController
    event: diffrax.Event | None
    saveat: diffrax.SaveAt
    t0: Any
    t1: Any
    dt0: Any
    max_steps: int | None
    progress_meter: diffrax.AbstractProgressMeter
    throw: bool
    known: KnownSteps | None
    is_endless: bool
    """Whether it is known while tracing that only an event can end the solve."""

    @property
    def condition_kwargs(self) -> dict[str, Any]:
        """What the condition of an event is given beside time, state and `args`."""
        names = "terms solver t0 t1 dt0 saveat stepsize_controller max_steps".split()
        return {name: getattr(self, name) for name in names}

    @property
    def shows_progress(self) -> bool:
        return not isinstance(self.progress_meter, diffrax.NoProgressMeter)


KNOWN_STEPS = (diffrax.ConstantStepSize, diffrax.StepTo)


def controller_grid(inputs: LoopInputs, state: LoopState) -> Grid:
    """The steps that the controller would make, known without solving anything."""
    controller, known = inputs.stepsize_controller, inputs.known
    if isinstance(controller, diffrax.StepTo):
        return _given_grid(controller, inputs, state)
    max_steps = _check_max_steps(inputs.max_steps)
    t1 = inputs.t1
    if known is not None:
        first = jnp.minimum(state.tnext, t1)
        tprev, tnext = even_steps(state.tprev, first, t1, known.num_steps)
        return Grid(tprev, tnext, jnp.ones(known.num_steps, bool), True)
    tprev, tnext = constant_steps(state, t1, max_steps)
    return Grid(tprev, tnext, tprev < t1)


def placeholder_grid(inputs: LoopInputs, state: LoopState) -> Grid:
    """As many steps as there is room for, of a mesh that is not known yet."""
    max_steps = _check_max_steps(inputs.max_steps)
    points = jnp.linspace(
        lax.stop_gradient(state.tprev),
        lax.stop_gradient(inputs.t1),
        max_steps + 1,
        dtype=jnp.result_type(inputs.t1),
    )
    return Grid(points[:-1], points[1:], jnp.ones(max_steps, bool))


def _given_grid(
    controller: diffrax.StepTo, inputs: LoopInputs, state: LoopState
) -> Grid:
    ts = jnp.asarray(controller.ts)
    num_steps = ts.shape[0] - 1
    if inputs.max_steps is not None:
        num_steps = min(num_steps, inputs.max_steps)
    # Through the state and not `ts` alone, since there Diffrax's check of the ends
    # hangs: what is not used is not checked.
    dtype = jnp.result_type(inputs.t1)
    tnext = ts[1 : num_steps + 1].astype(dtype).at[0].set(state.tnext)
    tprev = jnp.concatenate([jnp.asarray(state.tprev)[None], tnext[:-1]])
    return Grid(tprev, tnext, jnp.ones(num_steps, bool), True)


def refuse(controller: diffrax.AbstractStepSizeController) -> NoReturn:
    raise ValueError(
        "`ParallelAdjoint` solves for all steps at once, so they must be known "
        "beforehand (`ConstantStepSize()` or `StepTo(ts)`) or follow from a "
        "tolerance (`PIDController(rtol, atol)` or `deer_ode.MeshRefinement`). With "
        f"`{type(controller).__name__}` use `DEER(solver, num_substeps=...)` and "
        "Diffrax's default adjoint: its steps are then solved window by window."
    )


def _check_max_steps(max_steps: int | None) -> int:
    if max_steps is None:
        raise ValueError(
            "`ParallelAdjoint` needs to know at most how many steps there are: give "
            "`max_steps=...` (the number of steps is best), or use "
            "`deer_ode.diffeqsolve`, which counts them."
        )
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1; got {max_steps}.")
    return max_steps
