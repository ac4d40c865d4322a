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


class PairedDiagonal(AbstractLinearisation):
    r"""The diagonals of the four blocks of the Jacobian: for positions and momenta.

    For a state of two halves, $y = (q, p)$,

    $$A \approx \begin{pmatrix} \operatorname{diag} a & \operatorname{diag} b \\
    \operatorname{diag} c & \operatorname{diag} d \end{pmatrix}.$$

    Such matrices are closed under products, so the scan needs $O(n)$ work and memory
    per step. Exact where each degree of freedom moves by itself (Newton's method on
    many uncoupled oscillators); quasi-Newton where they are weakly coupled. Derivatives
    of the solution use the dense Jacobians all the same.
    """

    elementwise: bool = eqx.field(static=True, default=False)

    def __call__(self, step, y):
        if y.shape[0] % 2 != 0:
            raise ValueError(
                "`PairedDiagonal` needs a state of two halves of equal size, such as "
                f"`(q, p)`; got {y.shape[0]} numbers."
            )
        half = y.shape[0] // 2
        value, pushforward = jax.linearize(step, y)
        if self.elementwise:
            # Ones in one half: the sums of the rows of each block, of one entry each.
            ones = jnp.repeat(jnp.eye(2, dtype=y.dtype), half, axis=1)
            columns = jax.vmap(pushforward)(ones).reshape(2, 2, half)
            return value, jnp.swapaxes(columns, 0, 1)
        basis = jnp.eye(2 * half, dtype=y.dtype).reshape(2, half, 2 * half)
        own_entries = lambda e, k: pushforward(e).reshape(2, half)[:, k]
        kept = jax.vmap(jax.vmap(own_entries), in_axes=(0, None))(
            basis, jnp.arange(half)
        )
        return value, jnp.transpose(kept, (2, 0, 1))

    def num_bytes(self, num_steps, state_size, dtype):
        return 2 * num_steps * state_size * np.dtype(dtype).itemsize

    def check_size(self, num_steps, state_size, dtype):
        del num_steps, state_size, dtype


PairedDiagonal.__init__.__doc__ = """**Arguments:**

- `elementwise`: a promise that each degree of freedom moves by itself. Two tangents
    then give all four diagonals, in place of one for each entry of the state. A promise
    that is not true costs iterations, not the answer.
"""
