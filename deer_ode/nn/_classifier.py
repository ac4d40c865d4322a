"""A classifier of sequences made of recurrent layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._auto import Auto
from ._layer import AbstractRecurrentLayer, as_mask, fill_padding, together


def mean_and_max(
    us: Float[Array, "steps width"], mask: Bool[Array, " steps"] | None = None
) -> Float[Array, " two_width"]:
    """Mean and maximum over the steps that there are; zero where there are none.

    **Arguments:**

    - `us`: of shape `(steps, width)`.
    - `mask`: which steps there are; all of them unless given.

    **Returns:**

    Both, one after the other, of shape `(2 * width,)`.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode.nn import mean_and_max
        >>> mean_and_max(jnp.array([[1.0], [3.0]])).tolist()
        [2.0, 3.0]
    """
    if mask is None:
        return jnp.concatenate([jnp.mean(us, axis=0), jnp.max(us, axis=0)])
    lowest = jnp.finfo(us.dtype).min
    largest = jnp.max(jnp.where(mask[:, None], us, lowest), axis=0)
    largest = jnp.where(jnp.any(mask), largest, jnp.zeros_like(largest))
    return jnp.concatenate([_mean(us, mask), largest])


def mean_and_std(
    us: Float[Array, "steps width"], mask: Bool[Array, " steps"] | None = None
) -> Float[Array, " two_width"]:
    """Mean and standard deviation over the steps that there are.

    Unlike a maximum they do not grow with the length of a sequence: for a model that is
    trained on pieces and used on the whole.

    **Arguments:** as [`deer_ode.nn.mean_and_max`][].

    **Returns:**

    Both, one after the other, of shape `(2 * width,)`.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode.nn import mean_and_std
        >>> [round(float(x), 3) for x in mean_and_std(jnp.array([[1.0], [3.0]]))]
        [2.0, 1.0]
    """
    mask = jnp.ones(us.shape[0], bool) if mask is None else mask
    mean = _mean(us, mask)
    # The root of nothing has no derivative.
    floor = jnp.finfo(us.dtype).eps
    variance = _mean((us - mean[None]) ** 2, mask)
    return jnp.concatenate([mean, jnp.sqrt(variance + floor)])


def _mean(us, mask):
    count = jnp.maximum(jnp.sum(mask), 1).astype(us.dtype)
    return jnp.sum(jnp.where(mask[:, None], us, 0), axis=0) / count


class Classification(NamedTuple):
    """What [`deer_ode.nn.ResidualClassifier`][] says of a sequence.

    **Fields:**

    - `logits`: one number per class, of shape `(classes,)`.
    - `carries`: the states of all layers: the `guess` for the next time.
    - `stats`: as those of [`deer_ode.solve_recurrence`][], of all layers together: the
        most Newton steps of a layer, the sum of what was finished sequentially.
    """

    logits: Float[Array, " classes"]
    carries: PyTree[Array]
    stats: dict[str, Any]


class ResidualClassifier(eqx.Module):
    r"""A deep classifier of sequences: recurrent layers with a way around each.

    With an encoder $e$ and layers $R_k$, for all steps $i$ at once,

    $$\begin{aligned}
    u^0_i &= e(x_i), \\
    u^k &= u^{k-1} + \operatorname{GLU}\left(M_k R_k(\operatorname{norm}(u^{k-1}))
        \right), \\
    v &= \operatorname{norm}(u^K), \\
    \text{logits} &= L \left[\operatorname{mean}_i v_i, \max_i v_i\right],
    \end{aligned}$$

    where $\operatorname{GLU}$ gates one half of its input by the logistic function of
    the other. What is pooled are the steps that are not padding. For one sequence;
    `jax.vmap` makes it one for a batch.

    !!! example

        >>> import equinox as eqx, jax.numpy as jnp, jax.random as jr
        >>> from deer_ode.nn import MultiHeadGRU, ResidualClassifier
        >>> keys = jr.split(jr.key(0), 4)
        >>> model = ResidualClassifier(
        ...     eqx.nn.Linear(2, 8, key=keys[0]),
        ...     [MultiHeadGRU(8, 4, 2, key=key) for key in keys[1:3]],
        ...     width=8,
        ...     num_classes=3,
        ...     key=keys[3],
        ... )
        >>> model(jnp.ones((100, 2)), length=60).logits.shape
        (3,)
    """

    encoder: Callable[[Array], Array]
    norms: list[eqx.nn.LayerNorm]
    layers: list[AbstractRecurrentLayer]
    mixers: list[eqx.nn.Linear]
    last_norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear
    pool: Callable[..., Array] = eqx.field(static=True)
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        encoder: Callable[[Array], Array],
        layers: Sequence[AbstractRecurrentLayer],
        *,
        width: int,
        num_classes: int,
        pool: Callable[..., Array] = mean_and_max,
        dropout: float = 0.0,
        dtype=None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `encoder`: from the input of a step to `width` numbers.
        - `layers`: each takes `width` numbers per step; what it gives is brought back
            to `width`.
        - `width`: the size of what goes from layer to layer.
        - `num_classes`: how many numbers come out.
        - `pool`: how the steps become one: [`deer_ode.nn.mean_and_max`][],
            [`deer_ode.nn.mean_and_std`][], or any `(us, mask) -> vector` that gives
            `2 * width` numbers.
        - `dropout`: which part of a layer's outputs is left out while training, for the
            whole of a sequence.
        - `dtype`: of the parameters; JAX's default floating dtype unless given.
        - `key`: random, for the parameters.
        """
        if len(layers) == 0:
            raise ValueError("`ResidualClassifier` needs at least one layer.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be from 0 to below 1; got {dropout}.")
        self.encoder = encoder
        self.layers = list(layers)
        self.norms = [eqx.nn.LayerNorm(width, dtype=dtype) for _ in layers]
        *keys, last_key = jr.split(key, len(self.layers) + 1)
        self.mixers = [
            eqx.nn.Linear(layer.out_size, 2 * width, dtype=dtype, key=key)
            for layer, key in zip(layers, keys, strict=True)
        ]
        self.last_norm = eqx.nn.LayerNorm(width, dtype=dtype)
        self.last = eqx.nn.Linear(2 * width, num_classes, dtype=dtype, key=last_key)
        self.pool = pool
        self.dropout = dropout

    def __call__(
        self,
        xs: Float[Array, "steps inputs"],
        *,
        length=None,
        mask=None,
        method=Auto(),
        guess: PyTree = None,
        key: PRNGKeyArray | None = None,
    ) -> Classification:
        """**Arguments:**

        - `xs`: the sequence, of shape `(steps, inputs)`.
        - `length`, `mask`, `method`, `guess`: as of
            [`deer_ode.nn.AbstractRecurrentLayer`][]; `guess` is the `carries` of an
            earlier call.
        - `key`: random, for dropout: none unless given.

        **Returns:**

        A [`deer_ode.nn.Classification`][].
        """
        mask = as_mask(length, mask, xs.shape[0])
        us = jax.vmap(self.encoder)(fill_padding(xs, mask))
        solutions = []
        parts = zip(self.norms, self.layers, self.mixers, strict=True)
        for k, (norm, layer, mixer) in enumerate(parts):
            solution = layer.solve(
                jax.vmap(norm)(us),
                mask=mask,
                method=method,
                guess=None if guess is None else guess[k],
            )
            solutions.append(solution)
            outs = solution.ys
            if key is not None and self.dropout > 0:
                key, now = jr.split(key)
                kept = jr.bernoulli(now, 1 - self.dropout, (1, layer.out_size))
                outs = jnp.where(kept, outs / (1 - self.dropout), 0)
            us = us + jax.nn.glu(jax.vmap(mixer)(outs))
        pooled = self.pool(jax.vmap(self.last_norm)(us), mask)
        if key is not None and self.dropout > 0:
            kept = jr.bernoulli(key, 1 - self.dropout, pooled.shape)
            pooled = jnp.where(kept, pooled / (1 - self.dropout), 0)
        return Classification(
            self.last(pooled),
            [s.carries for s in solutions],
            together([s.stats for s in solutions]),
        )
