"""Differential equations and recurrences, solved in parallel over time (DEER)."""

import importlib.metadata as _metadata

from . import nn as nn
from ._affine import affine_scan as affine_scan
from ._auto import Auto as Auto
from ._damping import (
    AbstractDamping as AbstractDamping,
    LevenbergMarquardt as LevenbergMarquardt,
    Scaled as Scaled,
    Undamped as Undamped,
)
from ._diagnose import diagnose as diagnose
from ._diagnosis import Diagnosis as Diagnosis
from ._discretisation import (
    AbstractImplicitTerm as AbstractImplicitTerm,
    AveragedExponential as AveragedExponential,
    BlanesMoan4 as BlanesMoan4,
    DAETerm as DAETerm,
    ExponentialRosenbrockEuler as ExponentialRosenbrockEuler,
    Exprb32 as Exprb32,
    Exprb43 as Exprb43,
    GaussLegendre as GaussLegendre,
    InitialValues as InitialValues,
    MassMatrixTerm as MassMatrixTerm,
    Obreshkov as Obreshkov,
    RadauIIA as RadauIIA,
    StormerVerlet as StormerVerlet,
    Yoshida4 as Yoshida4,
    consistent_initial_values as consistent_initial_values,
)
from ._integrate import diffeqsolve as diffeqsolve
from ._linearisation import (
    AbstractLinearisation as AbstractLinearisation,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
    Exact as Exact,
    PairedDiagonal as PairedDiagonal,
    SharedJacobian as SharedJacobian,
)
from ._mesh import MeshRefinement as MeshRefinement
from ._method import AbstractMethod as AbstractMethod, Sequential as Sequential
from ._newton import Newton as Newton
from ._parallel_adjoint import ParallelAdjoint as ParallelAdjoint
from ._predictor import (
    AbstractPredictor as AbstractPredictor,
    Adaptive as Adaptive,
    Coarse as Coarse,
    Constant as Constant,
    Trajectory as Trajectory,
)
from ._recurrence import AbstractRecurrence as AbstractRecurrence
from ._scan import (
    RecurrenceSolution as RecurrenceSolution,
    scan as scan,
    solve_recurrence as solve_recurrence,
)
from ._solver import DEER as DEER
from ._window import Window as Window


try:
    __version__ = _metadata.version("deer_ode")
except _metadata.PackageNotFoundError:  # run from the source tree
    __version__ = "0+unknown"
