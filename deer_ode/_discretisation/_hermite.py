"""Interpolation from the solution and its derivatives at both ends of a step."""

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, PyTree

from .._custom_types import Y


def fraction_of_step(t0, t1, t) -> Array:
    """Where `t` is between `t0` and `t1`: 0 to 1. A step of no length has one value."""
    length = jnp.asarray(t1) - jnp.asarray(t0)
    safe = jnp.where(length == 0, 1, length)
    return jnp.where(length == 0, 0, (t - t0) / safe)


class HermiteInterpolation(diffrax.AbstractLocalInterpolation):
    r"""The polynomial with the values and the first derivatives of both ends.

    `derivatives0` and `derivatives1` hold $h \dot y$, or $h \dot y, h^2 \ddot y$, at
    the start and at the end of a step of length $h$: a cubic or a quintic.
    """

    t0: ArrayLike
    t1: ArrayLike
    y0: PyTree[ArrayLike]
    y1: PyTree[ArrayLike]
    derivatives0: tuple[PyTree[ArrayLike], ...]
    derivatives1: tuple[PyTree[ArrayLike], ...]

    def evaluate(self, t0, t1=None, left=True) -> Y:
        del left
        if t1 is not None:
            return jtu.tree_map(
                lambda a, b: b - a, self.evaluate(t0), self.evaluate(t1)
            )
        s = fraction_of_step(self.t0, self.t1, t0)
        r = 1 - s
        if len(self.derivatives0) == 1:
            weights0 = (r**2 * (1 + 2 * s), s * r**2)
            weights1 = (s**2 * (1 + 2 * r), -r * s**2)
        else:
            weights0 = (
                r**3 * (1 + 3 * s + 6 * s**2),
                s * r**3 * (1 + 3 * s),
                s**2 * r**3 / 2,
            )
            weights1 = (
                s**3 * (1 + 3 * r + 6 * r**2),
                -r * s**3 * (1 + 3 * r),
                r**2 * s**3 / 2,
            )
        weights = weights0 + weights1

        def combine(*values):
            terms = [
                jnp.asarray(w, jnp.asarray(v).dtype) * v
                for w, v in zip(weights, values, strict=True)
            ]
            return sum(terms[1:], terms[0])

        return jtu.tree_map(
            combine, self.y0, *self.derivatives0, self.y1, *self.derivatives1
        )
