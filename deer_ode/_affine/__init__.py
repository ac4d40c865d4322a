"""Affine recurrences: transition matrices, and scans over them."""

from ._affine_scan import (
    affine_scan as affine_scan,
    affine_solve as affine_solve,
    scan_steps as scan_steps,
    scan_steps_transposed as scan_steps_transposed,
)
from ._arrays import matmul as matmul, matvec as matvec, shift as shift
from ._transitions import (
    AbstractTransition as AbstractTransition,
    BlockTransition as BlockTransition,
    DenseTransition as DenseTransition,
    DiagonalTransition as DiagonalTransition,
    transition_of as transition_of,
)
