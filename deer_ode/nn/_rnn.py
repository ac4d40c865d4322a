"""Recurrent layers: any cell, both directions, many heads."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._auto import Auto
from .._scan import RecurrenceSolution
from ._cells import LEMCell
from ._layer import (
    AbstractRecurrentLayer,
    as_mask,
    fill_padding,
    refuse_options,
    solve_masked,
    together,
)


class RNN(AbstractRecurrentLayer):
    r"""Runs a cell over a sequence, all steps at once.

    $$h_i = \operatorname{cell}(h_{i-1}, x_i).$$

    The cell is one of Equinox's (`GRUCell`, `LSTMCell`), a [`deer_ode.nn.LEMCell`][],
    or any callable `(state, x) -> state` with a state of any pytree of floating arrays.

    !!! example

        >>> import equinox as eqx, jax.numpy as jnp, jax.random as jr
        >>> from deer_ode.nn import RNN
        >>> rnn = RNN(eqx.nn.GRUCell(2, 4, key=jr.key(0)))
        >>> rnn(jnp.ones((100, 2))).shape
        (100, 4)

        Of a batch of padded sequences:

        >>> import jax
        >>> batch, lengths = jnp.ones((3, 100, 2)), jnp.array([100, 7, 50])
        >>> jax.vmap(lambda xs, n: rnn(xs, length=n))(batch, lengths).shape
        (3, 100, 4)
    """

    cell: Callable[..., Any]
    init: Any
    reverse: bool = eqx.field(static=True)
    out_size: int = eqx.field(static=True)

    def __init__(
        self,
        cell: Callable[..., Any],
        init: PyTree = None,
        *,
        reverse: bool = False,
        **options: Any,
    ):
        """**Arguments:**

        - `cell`: one step.
        - `init`: the state before the first step, a parameter like others. By default
            zeros, whose shapes are known of Equinox's cells, and of a cell that has a
            method `initial_state`.
        - `reverse`: whether to go from the last step to the first.
        - `options`: none. Those of a call (`length`, `mask`, `method`, `guess`) raise
            an error that says so.

        **Raises:**

        - `TypeError`: for any of `options`.
        - `ValueError`: where `init` is needed and not given.
        """
        refuse_options("RNN", "`cell`, `init` and `reverse`", options)
        self.cell = cell
        self.init = init
        self.reverse = reverse
        state = jax.eval_shape(lambda: _initial_state(cell) if init is None else init)
        first = jtu.tree_leaves(state)[0]
        if len(first.shape) == 0:
            raise ValueError("`init` must hold vectors; got a number.")
        self.out_size = first.shape[-1]

    def solve(self, xs, *, length=None, mask=None, method=Auto(), guess=None):
        """As [`deer_ode.nn.AbstractRecurrentLayer`][]. Outputs are the states; of the
        two states of an LSTM or LEM, the first.
        """
        mask = as_mask(length, mask, xs.shape[0])
        # Equinox's cells take the input first.
        is_equinox = isinstance(self.cell, eqx.nn.GRUCell | eqx.nn.LSTMCell)
        solution = solve_masked(
            (lambda h, x: self.cell(x, h)) if is_equinox else self.cell,
            _initial_state(self.cell) if self.init is None else self.init,
            fill_padding(xs, mask),
            mask,
            reverse=self.reverse,
            method=method,
            guess=guess,
        )
        if isinstance(self.cell, eqx.nn.LSTMCell | LEMCell):
            return solution._replace(ys=solution.carries[0])
        return solution


def _initial_state(cell):
    if isinstance(cell, eqx.nn.GRUCell):
        return jnp.zeros(cell.hidden_size, cell.weight_hh.dtype)
    if isinstance(cell, eqx.nn.LSTMCell):
        zeros = jnp.zeros(cell.hidden_size, cell.weight_hh.dtype)
        return zeros, zeros
    if hasattr(cell, "initial_state"):
        return cell.initial_state()
    raise ValueError(
        f"The state that `{type(cell).__name__}` starts from is not known: give it as "
        "`RNN(cell, init)`, or give the cell a method `initial_state()`."
    )


class MultiHeadGRU(AbstractRecurrentLayer):
    r"""Gated recurrent units in many small heads.

    Each head reads the whole input and has a state of its own, of which no other head
    knows, so that the Jacobian is block-diagonal: with $H$ heads of $s$ states an
    iteration takes $s$ tangents and $H s^2$ numbers per step in place of $H s$ and
    $H^2 s^2$. A head of stride $k$ sees $k$ steps back, where others see one:

    $$\begin{aligned}
    r_i &= \sigma(W_r x_i + U_r h_{i-k} + b_r), \\
    z_i &= \sigma(W_z x_i + U_z h_{i-k} + b_z), \\
    n_i &= \tanh(W_n x_i + b_n + r_i \odot (U_n h_{i-k} + c_n)), \\
    h_i &= (1 - z_i) \odot n_i + z_i \odot h_{i-k}.
    \end{aligned}$$

    !!! example

        >>> import jax.numpy as jnp, jax.random as jr
        >>> from deer_ode.nn import MultiHeadGRU
        >>> gru = MultiHeadGRU(3, 4, 2, strides=(1, 8), key=jr.key(0))
        >>> gru(jnp.ones((100, 3))).shape
        (100, 8)

    ??? cite "References"

        Cho et al. (2014), *Learning phrase representations using RNN encoder-decoder
        for statistical machine translation*, section 2.3, in the variant of cuDNN.

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, section 4.4, for heads and strides.
    """

    from_input: Float[Array, "heads three_size inputs"]
    from_state: Float[Array, "heads three_size size"]
    bias: Float[Array, "heads three_size"]
    new_bias: Float[Array, "heads size"]
    strides: tuple[int, ...] = eqx.field(static=True)
    reverse: bool = eqx.field(static=True)
    out_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_size: int,
        *,
        strides: Sequence[int] = (1,),
        reverse: bool = False,
        timescales: tuple[float, float] = (2.0, 300.0),
        dtype=None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`: how many numbers each step reads.
        - `num_heads`: $H$.
        - `head_size`: $s$, how many states each head has.
        - `strides`: how far back the heads look, in turn: `(1, 2, 4)` gives every third
            head the same stride.
        - `reverse`: whether to go from the last step to the first.
        - `timescales`: the shortest and the longest memory to begin with, in steps:
            $b_z = \log(\tau - 1)$ with $\tau$ drawn between them, evenly in its
            logarithm. Other weights are normal, of variance 1 / inputs, and 1 / 4 of
            that in the states, which makes the recurrence contract.
        - `dtype`: of the parameters; JAX's default floating dtype unless given.
        - `key`: random, for the parameters.

        **Raises:**

        - `ValueError`: for numbers or strides below one, and timescales that are not
            above one and in order.
        """
        numbers = dict(num_heads=num_heads, head_size=head_size, input_size=input_size)
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"`MultiHeadGRU({name}=...)` must be 1 or more; got "
                                 f"{number}.")  # fmt: skip
        if len(strides) == 0 or min(strides) < 1:
            raise ValueError(f"`strides` must be 1 or more each; got {strides}.")
        shortest, longest = timescales
        if not 1 < shortest <= longest:
            raise ValueError(
                "`timescales` must be a shortest and a longest number of steps, above "
                f"1; got {timescales}."
            )
        keys = jr.split(key, 3)
        dtype = jnp.result_type(float) if dtype is None else dtype
        shape = (num_heads, 3 * head_size, input_size)
        self.from_input = jr.normal(keys[0], shape, dtype) / input_size**0.5
        shape = (num_heads, 3 * head_size, head_size)
        self.from_state = jr.normal(keys[1], shape, dtype) / (2 * head_size**0.5)
        shape, low, high = (num_heads, head_size), *np.log(timescales).tolist()
        log_tau = jr.uniform(keys[2], shape, dtype, low, high)
        zeros = jnp.zeros(shape, dtype)
        self.bias = jnp.concatenate([zeros, jnp.log(jnp.expm1(log_tau)), zeros], axis=1)
        self.new_bias = zeros
        self.strides = tuple(strides)
        self.reverse = reverse
        self.out_size = num_heads * head_size

    def solve(self, xs, *, length=None, mask=None, method=Auto(), guess=None):
        """As [`deer_ode.nn.AbstractRecurrentLayer`][]. States are told apart by their
        strides.
        """
        num_steps, num_heads = xs.shape[0], self.bias.shape[0]
        mask = as_mask(length, mask, num_steps)
        # What does not depend on the state is worked out once.
        inputs = self.bias[None] + jnp.einsum(
            "hsi,ti->ths",
            self.from_input,
            fill_padding(xs, mask),
            precision=jax.lax.Precision.HIGHEST,
        )
        stride_of = np.resize(self.strides, num_heads)
        solutions, ys = {}, jnp.zeros((num_steps, *self.new_bias.shape), inputs.dtype)
        for stride in np.unique(stride_of).tolist():
            (heads,) = np.nonzero(stride_of == stride)
            name = f"stride {stride}"
            solution = solutions[name] = self._solve_heads(
                heads,
                stride,
                inputs[:, heads],
                mask,
                method,
                None if guess is None else guess[name],
            )
            ys = ys.at[:, heads].set(solution.ys)
        return RecurrenceSolution(
            carry={name: s.carry for name, s in solutions.items()},
            ys=ys.reshape(num_steps, self.out_size),
            carries={name: s.carries for name, s in solutions.items()},
            # What fails has raised.
            result=optx.RESULTS.successful,
            stats=together([s.stats for s in solutions.values()]),
        )

    def _solve_heads(self, heads, stride, inputs, mask, method, guess):
        """Some heads of one stride; their outputs have shape `(steps, heads, size)`."""
        from_state, new_bias = self.from_state[heads], self.new_bias[heads]
        init = jnp.zeros(new_bias.shape, inputs.dtype)

        def step(h, x):
            # As a sum, since batched products of small matrices are slow on a CPU.
            r_h, z_h, n_h = jnp.split(jnp.sum(from_state * h[:, None], -1), 3, axis=-1)
            r_x, z_x, n_x = jnp.split(x, 3, axis=-1)
            z = jax.nn.sigmoid(z_x + z_h)
            n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * (n_h + new_bias))
            return n + z * (h - n)

        def solve(inputs, mask, guess):
            return solve_masked(
                step,
                init,
                inputs,
                mask,
                reverse=self.reverse,
                method=method,
                guess=guess,
            )

        if stride == 1:
            return solve(inputs, mask, guess)
        # As many sequences side by side as the stride is long.
        num_steps = inputs.shape[0]
        if mask is None:
            mask = jnp.ones(num_steps, bool)
        rest = -num_steps % stride

        def lanes(x):
            x = jnp.concatenate([x, jnp.zeros((rest, *x.shape[1:]), x.dtype)])
            return x.reshape(-1, stride, *x.shape[1:])

        def solve_lane(inputs, mask, guess):
            solution = solve(inputs, mask, guess)
            return solution.carry, solution.carries, solution.stats

        carry, carries, stats = jax.vmap(
            solve_lane, in_axes=(1, 1, 1), out_axes=(0, 1, 0)
        )(lanes(inputs), lanes(mask), guess)
        stats = dict(
            num_steps=num_steps,
            num_newton_steps=jnp.max(stats["num_newton_steps"]),
            newton_residual=jnp.max(stats["newton_residual"]),
            num_good_steps=num_steps,
            num_fallback_steps=jnp.sum(stats["num_fallback_steps"], dtype=jnp.int32),
        )
        ys = carries.reshape(-1, *init.shape)[:num_steps]
        return RecurrenceSolution(carry, ys, carries, optx.RESULTS.successful, stats)


class Bidirectional(AbstractRecurrentLayer):
    """Two layers, of which one should run backwards, side by side.

    !!! example

        >>> import jax.numpy as jnp, jax.random as jr
        >>> from deer_ode.nn import Bidirectional, MultiHeadGRU
        >>> keys = jr.split(jr.key(0))
        >>> layer = Bidirectional(
        ...     MultiHeadGRU(3, num_heads=4, head_size=2, key=keys[0]),
        ...     MultiHeadGRU(3, num_heads=4, head_size=2, reverse=True, key=keys[1]),
        ... )
        >>> layer(jnp.ones((100, 3))).shape
        (100, 16)
    """

    forward: AbstractRecurrentLayer
    backward: AbstractRecurrentLayer

    @property
    def out_size(self) -> int:
        return self.forward.out_size + self.backward.out_size

    def solve(self, xs, *, length=None, mask=None, method=Auto(), guess=None):
        """As [`deer_ode.nn.AbstractRecurrentLayer`][]; outputs are those of both, one
        after the other, and `carries` a pair.
        """
        both = [
            layer.solve(
                xs,
                length=length,
                mask=mask,
                method=method,
                guess=None if guess is None else guess[k],
            )
            for k, layer in enumerate((self.forward, self.backward))
        ]
        return RecurrenceSolution(
            carry=tuple(s.carry for s in both),
            ys=jnp.concatenate([s.ys for s in both], axis=-1),
            carries=tuple(s.carries for s in both),
            result=optx.RESULTS.successful,
            stats=together([s.stats for s in both]),
        )


Bidirectional.__init__.__doc__ = """**Arguments:**

- `forward`, `backward`: the layers; the second one is made with `reverse=True`.
"""
