"""Measurements: `python -m benchmarks`."""

#: Modules of this package, `_affine` and so on, which make cases.
FAMILIES = ("affine", "gru", "ode", "hnn", "length", "sde")
