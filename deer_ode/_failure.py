"""What is said of a step that fails: which one, when, why, and what to do."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._foreign import unvmap_any, unvmap_max


NOT_FINITE, NO_DERIVATIVE, SINGULAR, NO_SOLUTION, NOT_CONVERGED = range(5)

_CAUSES = {
    NOT_FINITE: (
        "the field is not finite",
        "The state may leave the domain of the field, or overflow: look at the field "
        "there, take shorter steps, or end before",
    ),
    NO_DERIVATIVE: (
        "the derivative of the field is not finite",
        "The step of this solver needs it. `DEER(diffrax.Tsit5())` needs no more than "
        "the field; or give the field a finite derivative there (`jnp.where` on the "
        "argument of a root or a norm)",
    ),
    SINGULAR: (
        "the equations of the step are singular",
        "They have no solution, or many: check that there are as many independent "
        "equations as unknowns",
    ),
    NO_SOLUTION: (
        "no solution of the equations of the step was found",
        "Take shorter steps, or a tighter or more patient root finder",
    ),
    NOT_CONVERGED: (
        "Newton's method did not converge from there on",
        "Leave `fallback=False` out, so that such steps are sequential; give a better "
        "guess; or see `deer_ode.diagnose`",
    ),
}


class _Messages(Sequence):
    """One message, that is written when a step has failed."""

    def __init__(self):
        self._message = ""

    def write(self, step: Any, time: Any, cause: Any) -> np.ndarray:
        what, remedy = _CAUSES[int(cause)]
        self._message = (
            f"Step {int(step)}, from t = {float(time):.6g}: {what}. {remedy}. With "
            "`throw=False` the solve ends there, and `result` and `stats` say so."
        )
        return np.asarray(0, np.int32)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        del index
        return self._message


def error_if_failed(
    tree: PyTree[Array],
    is_failed: Bool[Array, ""],
    step: Int[Array, ""],
    time: Float[Array, ""],
    cause: Int[Array, ""],
) -> PyTree[Array]:
    """`tree`, unless a step failed. Of a batch the last step that failed is named."""
    messages = _Messages()
    time = lax.stop_gradient(time)
    lowest = jnp.asarray(-jnp.inf, time.dtype)
    any_failed = unvmap_any(is_failed)
    worst = unvmap_max(jnp.where(is_failed, step, -1))
    is_worst = is_failed & (step == worst)
    time = unvmap_max(jnp.where(is_worst, time, lowest))
    cause = unvmap_max(jnp.where(is_worst, cause, 0))
    index = lax.cond(
        any_failed,
        lambda *values: jax.pure_callback(
            messages.write, jax.ShapeDtypeStruct((), jnp.int32), *values
        ),
        lambda *_: jnp.asarray(0, jnp.int32),
        worst,
        time,
        cause,
    )
    return eqx.branched_error_if(tree, any_failed, index, messages)
