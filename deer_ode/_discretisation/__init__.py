"""Differential equation terms and a time grid, made into a recurrence."""

from ._base import Grid as Grid
from ._step_map import (
    StepMap as StepMap,
    check_one_step as check_one_step,
    interpolate_step as interpolate_step,
    one_step as one_step,
    tracing_steps as tracing_steps,
)
from ._steps import Steps as Steps, take_steps as take_steps
