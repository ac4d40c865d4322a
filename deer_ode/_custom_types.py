"""Names for the arrays and pytrees that the package passes about."""

from typing import Any, TypeAlias

from jaxtyping import Array, Bool, Float, PyTree


Y: TypeAlias = PyTree[Any]
"""A state, as Diffrax's `y0`: any pytree of floating or complex arrays."""

Args: TypeAlias = PyTree[Any]

State: TypeAlias = Float[Array, " state"]
"""A state as one real vector (complex leaves count twice)."""

Trajectory: TypeAlias = Float[Array, "steps state"]
"""States after each step, the initial one excluded."""

Mask: TypeAlias = Bool[Array, " steps"]

StepCounts: TypeAlias = range
"""Numbers of steps, known while tracing, in ascending order."""
