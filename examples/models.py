"""The classifiers that `examples.classify` trains."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import deer_ode
from deer_ode.nn import Bidirectional, MultiHeadGRU
from examples.classifier import (
    Classification,
    ResidualClassifier,
    mean_and_max,
    mean_and_std,
)


class LogEnergies(eqx.Module):
    r"""Logarithms of the energies behind filters that are learned:
    $W \log(e^\epsilon + p^2 + q^2)$ with $(p, q) = F x$.
    """

    filters: Array
    log_floor: Array
    last: eqx.nn.Linear

    def __init__(self, in_size: int, filters: int, out_size: int, *, key: PRNGKeyArray):
        keys = jr.split(key)
        self.filters = jr.normal(keys[0], (filters, in_size)) / in_size**0.5
        self.log_floor = jnp.full(filters // 2, np.log(0.01))
        self.last = eqx.nn.Linear(filters // 2, out_size, key=keys[1])

    def __call__(self, x):
        p, q = jnp.split(self.filters @ x, 2)
        return self.last(jnp.log(jnp.exp(self.log_floor) + p**2 + q**2))


def resonators(num_channels: int, num_heads: int, *, key: PRNGKeyArray) -> MultiHeadGRU:
    """A recurrent layer that begins as a bank of resonators, from slow to fast: heads
    of two states that turn by an angle at each step, and hardly gate anything.
    """
    gru = MultiHeadGRU(num_channels, num_heads, 2, key=key)
    angles = jnp.pi * jnp.geomspace(0.08, 0.9, num_heads)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], axis=-2)
    # What decides the gates has a tenth of its usual weight.
    weak = jnp.repeat(jnp.array([0.1, 0.1, 1.0]), 2)[:, None]
    from_state = (0.1 * gru.from_state).at[:, 4:].set(turn)
    bias = jnp.tile(jnp.repeat(jnp.array([3.0, -3.0, 0.0]), 2), (num_heads, 1))
    return eqx.tree_at(
        lambda g: (g.from_input, g.from_state, g.bias),
        gru,
        (0.3 * weak * gru.from_input, from_state, bias),
    )


class VibrationClassifier(eqx.Module):
    """Resonators, the logarithms of their energies, and a classifier of these."""

    resonators: MultiHeadGRU
    log_floor: Array
    classifier: ResidualClassifier

    def __call__(
        self, xs, *, length=None, method=deer_ode.Auto(), guess=None, key=None
    ) -> Classification:
        guesses = (None, None) if guess is None else guess
        front = self.resonators.solve(
            xs, length=length, method=method, guess=guesses[0]
        )
        pairs = front.ys.reshape(xs.shape[0], -1, 2)
        energies = jnp.log(jnp.exp(self.log_floor) + jnp.sum(pairs**2, axis=-1))
        out = self.classifier(
            energies, length=length, method=method, guess=guesses[1], key=key
        )
        worst = {
            name: jnp.maximum(front.stats[name], out.stats[name])
            for name in ("num_newton_steps", "num_fallback_steps")
        }
        return Classification(out.logits, (front.carries, out.carries), worst)


def make_model(options, num_channels: int, num_classes: int):
    front_key, model_key, *keys = jr.split(jr.key(options.seed), 2 + options.layers)
    is_vibration = options.task == "bearings"

    def layer(key):
        sizes = (options.width, options.heads // 2, options.head_size)
        forward, backward = jr.split(key)
        return Bidirectional(
            MultiHeadGRU(*sizes, key=forward),
            MultiHeadGRU(*sizes, reverse=True, key=backward),
        )

    if is_vibration:
        encoder = eqx.nn.Linear(options.filters, options.width, key=model_key)
    else:
        encoder = LogEnergies(
            num_channels, options.filters, options.width, key=front_key
        )
    classifier = ResidualClassifier(
        encoder,
        [layer(key) for key in keys],
        width=options.width,
        num_classes=num_classes,
        # Trained on crops.
        pool=mean_and_std if is_vibration else mean_and_max,
        dropout=options.dropout,
        key=jr.fold_in(model_key, 1),
    )
    if not is_vibration:
        return classifier
    return VibrationClassifier(
        resonators(num_channels, options.filters, key=front_key),
        jnp.full(options.filters, np.log(0.01)),
        classifier,
    )


def apply(model, xs, lengths, method, guess=None, key=None) -> Classification:
    """The model on a batch."""
    keys = None if key is None else jr.split(key, len(xs))

    def one(xs, length, guess, key):
        return model(xs, length=length, method=method, guess=guess, key=key)

    return jax.vmap(one)(xs, lengths, guess, keys)
