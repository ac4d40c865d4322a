"""Differential equation terms and a time grid, made into a recurrence."""

from ._adaptive import (
    AdaptiveSolution as AdaptiveSolution,
    AdaptiveSteps as AdaptiveSteps,
    solve_adaptively as solve_adaptively,
)
from ._averaged import AveragedExponential as AveragedExponential
from ._base import Grid as Grid
from ._collocation import GaussLegendre as GaussLegendre, RadauIIA as RadauIIA
from ._consistent import (
    InitialValues as InitialValues,
    consistent_initial_values as consistent_initial_values,
)
from ._discretise import Discretised as Discretised, discretise as discretise
from ._exponential import (
    ExponentialRosenbrockEuler as ExponentialRosenbrockEuler,
    Exprb32 as Exprb32,
    Exprb43 as Exprb43,
)
from ._implicit_terms import (
    AbstractImplicitTerm as AbstractImplicitTerm,
    DAETerm as DAETerm,
    MassMatrixTerm as MassMatrixTerm,
)
from ._obreshkov import Obreshkov as Obreshkov
from ._one_step import (
    check_one_step as check_one_step,
    one_step as one_step,
    tracing_steps as tracing_steps,
)
from ._steps import Steps as Steps
from ._symplectic import (
    BlanesMoan4 as BlanesMoan4,
    StormerVerlet as StormerVerlet,
    Yoshida4 as Yoshida4,
)
