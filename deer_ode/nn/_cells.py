"""Cells: one step of a recurrent network, `(state, x) -> state`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


class LEMCell(eqx.Module):
    r"""Long expressive memory: two states that learn how fast to move.

    With $u$ the input, $\sigma$ the logistic function and $\odot$ the entrywise
    product,

    $$\begin{aligned}
    \Delta t &= \delta \, \sigma(W_1 y + V_1 u + b_1), &
    \bar{\Delta t} &= \delta \, \sigma(W_2 y + V_2 u + b_2), \\
    z' &= (1 - \Delta t) \odot z + \Delta t \odot \tanh(W_z y + V_z u + b_z), \\
    y' &= (1 - \bar{\Delta t}) \odot y + \bar{\Delta t} \odot
        \tanh(W_y z' + V_y u + b_y).
    \end{aligned}$$

    !!! example

        >>> import jax.numpy as jnp, jax.random as jr
        >>> from deer_ode.nn import LEMCell, RNN
        >>> rnn = RNN(LEMCell(2, 4, key=jr.key(0)))
        >>> rnn(jnp.ones((100, 2))).shape
        (100, 4)

    ??? cite "Reference"

        Rusch, Mishra, Erichson, Mahoney (2022), *Long expressive memory for sequence
        modeling*, equation 3.
    """

    from_input: eqx.nn.Linear
    from_y: Float[Array, "three_hidden hidden"]
    from_z: Float[Array, "hidden hidden"]
    dt: float = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        dt: float = 1.0,
        dtype=None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: how many numbers each step reads.
        - `hidden_size`: how many numbers $y$ and $z$ have, each.
        - `dt`: $\delta$, the longest step: from 0 (no motion) to 1 (no memory).
        - `dtype`: of the parameters; JAX's default floating dtype unless given.
        - `key`: random, for the parameters: uniform within
            $\pm 1/\sqrt{\text{hidden}}$.
        """
        if not 0 < dt <= 1:
            raise ValueError(
                f"`LEMCell(dt=...)` must be above 0 and at most 1; got {dt}."
            )
        keys = jr.split(key, 3)
        bound = hidden_size**-0.5
        dtype = jnp.result_type(float) if dtype is None else dtype
        self.from_input = eqx.nn.Linear(
            input_size, 4 * hidden_size, dtype=dtype, key=keys[0]
        )
        shape = (3 * hidden_size, hidden_size)
        self.from_y = jr.uniform(keys[1], shape, dtype, -bound, bound)
        shape = (hidden_size, hidden_size)
        self.from_z = jr.uniform(keys[2], shape, dtype, -bound, bound)
        self.dt = dt
        self.hidden_size = hidden_size

    def initial_state(self):
        zeros = jnp.zeros(self.hidden_size, self.from_z.dtype)
        return zeros, zeros

    def __call__(self, state, x):
        y, z = state
        inputs = jnp.split(self.from_input(x), 4)
        states = jnp.split(self.from_y @ y, 3)
        dt_z = self.dt * jax.nn.sigmoid(states[0] + inputs[0])
        dt_y = self.dt * jax.nn.sigmoid(states[1] + inputs[1])
        z = (1 - dt_z) * z + dt_z * jnp.tanh(states[2] + inputs[2])
        y = (1 - dt_y) * y + dt_y * jnp.tanh(self.from_z @ z + inputs[3])
        return y, z
