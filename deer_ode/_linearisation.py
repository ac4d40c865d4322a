"""Which Jacobian of the step map is kept: all of it, or something cheaper."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._custom_types import State


class AbstractLinearisation(eqx.Module):
    """How the map of one step is linearised about the iterate.

    Any choice leaves the answer of Newton's method unchanged, since the residual
    decides what an answer is; it changes how many iterations the answer takes and what
    an iteration costs. Derivatives always use the exact Jacobian.
    """

    @abc.abstractmethod
    def __call__(
        self, step: Callable[[State], State], y: State
    ) -> tuple[State, Float[Array, "..."]]:
        """The value of `step` at `y`, and its (approximate) Jacobian there."""

    @abc.abstractmethod
    def num_bytes(self, num_steps: int, state_size: int, dtype: np.dtype) -> int:
        """Memory that the Jacobians of all steps take."""

    @abc.abstractmethod
    def check_size(self, num_steps: int, state_size: int, dtype: np.dtype) -> None:
        """Raises `ValueError` where the Jacobians of all steps would be too large."""


class Dense(AbstractLinearisation):
    r"""The whole Jacobian, $\partial f_i / \partial y_{i-1}$: Newton's method (DEER).

    Converges quadratically. Costs `state` tangents per step of the base solver and
    `steps * state**2` numbers of memory.
    """

    max_bytes: int = eqx.field(static=True, default=4 * 2**30)

    def __call__(self, step, y):
        def with_value(y):
            value = step(y)
            return value, value

        A, value = jax.jacfwd(with_value, has_aux=True)(y)
        return value, A

    def num_bytes(self, num_steps, state_size, dtype):
        return num_steps * state_size**2 * np.dtype(dtype).itemsize

    def check_size(self, num_steps, state_size, dtype):
        needed = self.num_bytes(num_steps, state_size, dtype)
        if needed > self.max_bytes:
            raise ValueError(
                f"The dense Jacobians of {num_steps} steps of a state of {state_size} "
                f"numbers ({np.dtype(dtype).name}) need {needed:,} bytes, more than "
                f"the {self.max_bytes:,} allowed. Solve in shorter windows "
                "(`DEER(..., num_substeps=...)` in `diffrax.diffeqsolve`), keep only "
                "the diagonal (`Newton(linearisation=Diagonal())`), or, if the memory "
                "is there, allow it (`Newton(linearisation=Dense(max_bytes=...))`)."
            )


Dense.__init__.__doc__ = """**Arguments:**

- `max_bytes`: the most memory, in bytes, that the Jacobians of all steps may take; a
    solve that needs more is refused before it starts. Defaults to 4 GiB.
"""


class Diagonal(AbstractLinearisation):
    r"""Only the diagonal of the Jacobian: quasi-Newton (quasi-DEER).

    Exact, and as fast as `Dense`, where the step acts on each component by itself;
    otherwise it converges linearly where the dropped terms are small and slowly or not
    at all where they are not. Keeps `steps * state` numbers; derivatives of the
    solution need the dense Jacobians all the same.

    ??? cite "Reference"

        Gonzalez et al. (2024), *Towards scalable and stable parallelization of
        nonlinear RNNs*, section 4.1.
    """

    def __call__(self, step, y):
        value, pushforward = jax.linearize(step, y)
        basis = jnp.eye(y.shape[0], dtype=y.dtype)
        A = jax.vmap(lambda e: jnp.sum(pushforward(e) * e))(basis)
        return value, A

    def num_bytes(self, num_steps, state_size, dtype):
        return num_steps * state_size * np.dtype(dtype).itemsize

    def check_size(self, num_steps, state_size, dtype):
        del num_steps, state_size, dtype
