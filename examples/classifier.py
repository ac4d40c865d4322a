"""A classifier of sequences made of recurrent layers: the model that is trained.

Recurrent layers with a residual connection around each, pooled over the steps. To be
copied and changed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

import deer_ode
from deer_ode.nn import AbstractRecurrentLayer


def mean_and_max(
    us: Float[Array, "steps width"], mask: Bool[Array, " steps"] | None = None
) -> Float[Array, " two_width"]:
    """Mean and maximum over the steps where `mask` is true, of shape `(2 * width,)`;
    zero where there are none.
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
    """Mean and standard deviation over the steps where `mask` is true.

    Unlike a maximum they do not grow with the length of a sequence: for a model that is
    trained on pieces and used on the whole.
    """
    mask = jnp.ones(us.shape[0], bool) if mask is None else mask
    mean = _mean(us, mask)
    # The square root has no derivative at zero.
    floor = jnp.finfo(us.dtype).eps
    variance = _mean((us - mean[None]) ** 2, mask)
    return jnp.concatenate([mean, jnp.sqrt(variance + floor)])


def _mean(us, mask):
    count = jnp.maximum(jnp.sum(mask), 1).astype(us.dtype)
    return jnp.sum(jnp.where(mask[:, None], us, 0), axis=0) / count


class Classification(NamedTuple):
    """What `ResidualClassifier` returns for a sequence."""

    logits: Float[Array, " classes"]
    """One number per class."""
    carries: PyTree[Array]
    """The states of all layers: the `guess` of the next call."""
    stats: dict[str, Any]
    """As those of `deer_ode.solve_recurrence`, of all layers together: the largest
    number of Newton steps, the sum of what was finished sequentially.
    """


class ResidualClassifier(eqx.Module):
    r"""Recurrent layers with residual connections, for one sequence.

    With an encoder $e$ and layers $R_k$, for all steps $i$ at once,

    $$\begin{aligned}
    u^0_i &= e(x_i), \\
    u^k &= u^{k-1} + \operatorname{GLU}\left(M_k R_k(\operatorname{norm}(u^{k-1}))
        \right), \\
    v &= \operatorname{norm}(u^K), \\
    \text{logits} &= L \left[\operatorname{mean}_i v_i, \max_i v_i\right],
    \end{aligned}$$

    where $\operatorname{GLU}$ gates one half of its input by the logistic function of
    the other. Only the steps that are not padding are pooled. `jax.vmap` makes it a
    classifier of a batch.
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

        - `encoder`: from the input of a step to `width` numbers. Padding is encoded as
            well, from zeros, and not used.
        - `layers`: each takes `width` numbers per step; what it gives is brought back
            to `width`.
        - `width`: the size of what goes from layer to layer.
        - `num_classes`: how many numbers come out.
        - `pool`: how the steps become one vector: any `(us, mask) -> vector` that gives
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
        method=deer_ode.Auto(),
        guess: PyTree = None,
        key: PRNGKeyArray | None = None,
    ) -> Classification:
        """**Arguments:**

        - `xs`: the sequence, of shape `(steps, inputs)`.
        - `length`, `mask`, `method`, `guess`: as of
            `deer_ode.nn.AbstractRecurrentLayer`; `guess` is the `carries` of an earlier
            call.
        - `key`: random, for dropout: none unless given.
        """
        mask = _as_mask(length, mask, xs.shape[0])
        if mask is not None:
            # Padding may hold NaN, and zero times NaN would reach gradients.
            xs = jnp.where(mask[:, None], xs, 0)
        us = jax.vmap(self.encoder)(xs)
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
            if key is not None:
                key, now = jr.split(key)
                outs = self._drop(solution.ys, (1, layer.out_size), now)
            else:
                outs = solution.ys
            us = us + jax.nn.glu(jax.vmap(mixer)(outs))
        pooled = self.pool(jax.vmap(self.last_norm)(us), mask)
        if key is not None:
            pooled = self._drop(pooled, pooled.shape, key)
        return Classification(
            self.last(pooled),
            [s.carries for s in solutions],
            _together([s.stats for s in solutions]),
        )

    def _drop(self, outs, shape, key):
        """Dropout, by a mask of `shape`."""
        if self.dropout == 0:
            return outs
        is_kept = jr.bernoulli(key, 1 - self.dropout, shape)
        return jnp.where(is_kept, outs / (1 - self.dropout), 0)


def _as_mask(length, mask, num_steps: int):
    if length is not None and mask is not None:
        raise ValueError("Give either `length` or `mask`, not both.")
    if mask is not None and mask.shape != (num_steps,):
        raise ValueError(
            f"`mask` must have one entry for each of the {num_steps} steps; got shape "
            f"{mask.shape}."
        )
    if length is None:
        return mask
    length = jnp.asarray(length)
    return jnp.arange(num_steps, dtype=length.dtype) < length


def _together(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several layers as those of one."""
    of_layers = lambda name: [s[name] for s in stats]
    largest = lambda name: jax.tree.reduce(jnp.maximum, of_layers(name))
    return dict(
        num_steps=max(of_layers("num_steps")),
        num_good_steps=jax.tree.reduce(jnp.minimum, of_layers("num_good_steps")),
        num_newton_steps=largest("num_newton_steps"),
        newton_residual=largest("newton_residual"),
        num_fallback_steps=sum(of_layers("num_fallback_steps")),
    )
