r"""When a step is right: one scale, one tolerance.

The residual $r_i$ of a step is accepted by its componentwise backward error: it is
small beside the terms that cancel in it, $|y_i| + |A_i| |y_{i-1}|$ (Oettli, Prager
1964). Small residuals may add up, so the correction has to be small as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._affine import scan_steps
from ._custom_types import Mask, Trajectory
from ._misc import ROUNDING_UNITS, finite, leading_true, running
from ._recurrence import AbstractRecurrence, Linearised


# A correction leaves its square: with half of the digits right before it, all are right
# after it. The quarter is for second derivatives above one.
_HALF_THE_DIGITS = 1 / 4

# In units of rounding: a correction that is all rounding.
_CORRECTION_UNITS = 8


class Accepted(NamedTuple):
    is_right: Mask
    """Whether the residual passes."""
    is_small: Mask
    """Whether the correction leaves nothing to correct."""
    at_rounding: Mask
    """Whether both are no more than rounding."""
    error: Float[Array, " steps"]
    """The residual in units of its tolerance."""


class Acceptance(eqx.Module):
    """The test of every step, about one linearisation."""

    rtol: float | Float[Array, ""] | None
    atol: float | Float[Array, ""] | None
    norm: Callable[[Array], Array] = eqx.field(static=True)

    @property
    def is_default(self) -> bool:
        return self.rtol is None and self.atol is None

    def __call__(
        self,
        recurrence: AbstractRecurrence,
        linearised: Linearised,
        correction: Trajectory,
        is_exact: bool,
        is_known: Mask,
        is_sane: Mask,
    ) -> Accepted:
        """`is_exact` is whether `A` leaves nothing out, `is_known` which steps need no
        test, `is_sane` which corrected states are finite and not absurdly large.
        """
        scale = linearised.defect_scale
        if linearised.per_unit is not None:
            largest_change = jnp.max(jnp.abs(correction), axis=-1, keepdims=True)
            scale = scale + linearised.per_unit * finite(largest_change)
        tolerance = self._tolerance(recurrence, scale)
        error = jax.vmap(self.norm)(linearised.defect / tolerance)
        error = jnp.where(is_known, 0, error)
        # NaN is not right.
        is_right = is_known | ((error <= 1) & is_sane)
        if not self.is_default:
            return Accepted(is_right, jnp.ones_like(is_right), is_right, error)
        bound = self._bound(recurrence, linearised, is_exact)
        is_small = jnp.all(jnp.abs(correction) <= bound, axis=-1)

        def compare_with_rounding():
            added_up = jnp.abs(scan_steps(linearised.A, linearised.rounding))
            eps = jnp.asarray(recurrence.eps, correction.dtype)[None]
            floor = ROUNDING_UNITS * eps * running(lax.cummax, finite(added_up))
            return jnp.all(jnp.abs(correction) <= jnp.maximum(bound, floor), axis=-1)

        # Whether the first step that fails does so by its correction alone.
        first = leading_true(is_right & is_small)
        last = is_right.shape[0] - 1
        is_needed = (first <= last) & is_right[jnp.minimum(first, last)]
        at_rounding = lax.cond(is_needed, compare_with_rounding, lambda: is_small)
        return Accepted(is_right, is_small, is_right & at_rounding, error)

    def _tolerance(self, recurrence, scale):
        dtype = scale.dtype
        if self.rtol is None:
            rtol = ROUNDING_UNITS * jnp.asarray(recurrence.eps, dtype)
        else:
            rtol = jnp.asarray(self.rtol, dtype)
        # Below the smallest normal number relative accuracy has no meaning.
        atol = jnp.finfo(dtype).tiny if self.atol is None else self.atol
        return jnp.asarray(atol, dtype) + jnp.broadcast_to(rtol, scale.shape) * scale

    def _bound(self, recurrence, linearised, is_exact):
        """The largest correction that leaves nothing to correct.

        The correction is the sum of all residuals to first order; what is left after it
        is of second order. With a Jacobian that leaves something out it is of first
        order: then the correction must be no more than rounding adds up to.
        """
        dtype = linearised.scale.dtype
        eps = jnp.asarray(recurrence.eps, dtype)[None]
        share = _HALF_THE_DIGITS * jnp.sqrt(eps)
        if not is_exact:
            num_steps = linearised.scale.shape[0]
            share = jnp.minimum(share, num_steps**0.5 * _CORRECTION_UNITS * eps)
        share = jnp.maximum(share, _CORRECTION_UNITS * eps)
        largest = recurrence.largest_scale(linearised.scale)
        return share * largest + jnp.finfo(dtype).tiny
