r"""How a small perturbation of an answer grows.

$$v_i = A_i v_{i-1},$$

with the exact Jacobians $A_i$ along the answer, brought back to length one after every
step, so that nothing overflows.
"""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from ._linearisation import AbstractLinearisation
from ._recurrence import AbstractRecurrence


def _normalised(v, otherwise):
    """`v` at length one, and the logarithm of what that length was."""
    largest = jnp.max(jnp.abs(v))
    scaled = v / jnp.where(largest > 0, largest, 1)
    norm = jnp.linalg.norm(scaled)
    unit = scaled / jnp.where(norm > 0, norm, 1)
    # Where nothing is left, what comes after has its own beginning.
    return jnp.where(largest > 0, unit, otherwise), jnp.log(largest) + jnp.log(norm)


@eqx.filter_jit
def log_growth(
    recurrence: AbstractRecurrence, linearisation: AbstractLinearisation, ys
) -> Float[Array, " steps"]:
    r"""$\log |v_i| / |v_{i-1}|$ of the perturbation that grows most, to good accuracy.

    A perturbation in any direction ends in the one that grows fastest, but loses on the
    way what it had of others. One sent backwards by the transposed matrices first ends
    near the direction from which growth over the whole interval is largest, so that
    nothing need be thrown away as a transient.
    """
    A = recurrence.linearise(ys, linearisation).A
    anyhow = A.passed_on(jr.normal(jr.key(0), ys.shape[1:], ys.dtype))
    anyhow = anyhow / jnp.linalg.norm(anyhow)

    def forwards(v, A_i):
        return _normalised(A_i.passed_on(A_i.apply(v)), anyhow)

    def backwards(v, A_i):
        (v,) = jax.linear_transpose(A_i.apply, v)(v)
        return _normalised(v, anyhow)

    start, _ = lax.scan(backwards, anyhow, A, reverse=True)
    return lax.scan(forwards, start, A)[1]


def largest_growth(changes: Float[np.ndarray, " steps"]) -> float:
    r"""$\max_{j \le i} \log_{10} |v_i| / |v_j|$."""
    largest = now = 0.0
    for change in changes:
        now = max(0.0, now + float(change))
        largest = max(largest, now)
    return largest / float(np.log(10))
