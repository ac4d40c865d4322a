"""The classifier of the training example, against its equations."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.nn import sigmoid

from deer_ode import Newton, Sequential
from deer_ode.nn import RNN, MultiHeadGRU
from examples.classifier import ResidualClassifier, mean_and_max, mean_and_std

from .helpers import (
    assert_close,
    finite_difference,
    quick,
    rounding,
    slow,
    sqrt_eps,
)
from .test_nn import drawn, normal


NUM_STEPS, NUM_INPUTS = 7, 2
SHORT = 4

#: The smallest program of a parallel solve.
NEWTON = Newton(window=None, chunk=1, fallback=False)


def inputs(seed=0, num_steps=NUM_STEPS):
    return normal(seed, num_steps, NUM_INPUTS)


@ft.cache
def classifier(num_layers=2, dropout=0.0, dtype=None):
    return drawn(lambda key: make_classifier(num_layers, dropout, dtype, key), 5)


def make_classifier(num_layers, dropout, dtype, key):
    keys = jr.split(key, 4)
    layers = [
        RNN(eqx.nn.GRUCell(4, 2, dtype=dtype, key=keys[1]), reverse=True),
        MultiHeadGRU(4, 2, 1, dtype=dtype, key=keys[0]),
    ]
    return ResidualClassifier(
        eqx.nn.Linear(NUM_INPUTS, 4, dtype=dtype, key=keys[2]),
        layers[:num_layers],
        width=4,
        num_classes=3,
        dropout=dropout,
        dtype=dtype,
        key=keys[3],
    )


def cross_entropy(model, xs, **kwargs):
    out = model(xs, **kwargs)
    return -jax.nn.log_softmax(out.logits)[1], out


@quick
def learn(model, xs, **kwargs):
    return jax.grad(cross_entropy, has_aux=True)(model, xs, **kwargs)


def learn_in_parallel(model, xs, length=NUM_STEPS, guess=None):
    """One program for all tests: of a padded sequence, from a guess."""
    if guess is None:
        # What the layers start from by themselves, as their initial states are zero.
        states = jax.eval_shape(lambda xs: model(xs, method=Sequential()).carries, xs)
        guess = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), states)
    return learn(model, xs, length=jnp.int32(length), guess=guess, method=NEWTON)


def by_the_book(model, xs):
    """The equations of the docstring."""
    us = jax.vmap(model.encoder)(xs)
    for norm, layer, mixer in zip(model.norms, model.layers, model.mixers, strict=True):
        a, b = jnp.split(
            jax.vmap(mixer)(layer(jax.vmap(norm)(us), method=Sequential())), 2, axis=-1
        )
        us = us + a * sigmoid(b)
    vs = jax.vmap(model.last_norm)(us)
    return model.last(jnp.concatenate([vs.mean(axis=0), vs.max(axis=0)]))


def test_poolings():
    us = jnp.array([[1.0], [3.0]])
    assert mean_and_max(us).tolist() == [2.0, 3.0]
    np.testing.assert_allclose(mean_and_std(us), [2.0, 1.0], rtol=rounding())
    mask = jnp.array([True, False])
    assert mean_and_max(us, mask).tolist() == [1.0, 1.0]
    np.testing.assert_allclose(mean_and_std(us, mask), [1.0, 0.0], atol=sqrt_eps())
    none = jnp.zeros(2, bool)
    assert mean_and_max(us, none).tolist() == [0.0, 0.0]
    slope = jax.grad(lambda us: jnp.sum(mean_and_std(us, none)))(us)
    np.testing.assert_array_equal(slope, 0.0)


def test_classifier():
    """Its equations; sequential steps; and from a guess in one iteration."""
    model, xs = classifier(), inputs()
    slope, out = learn_in_parallel(model, xs)
    assert_close(out.logits, quick(by_the_book)(model, xs), rounding())
    expected_slope, expected = learn(model, xs, method=Sequential())
    assert_close(out.logits, expected.logits, rounding())
    assert_close(slope, expected_slope, rounding())
    assert int(expected.stats["num_newton_steps"]) == 0
    assert int(out.stats["num_newton_steps"]) > 1
    assert out.stats["num_steps"] == NUM_STEPS
    assert int(out.stats["num_good_steps"]) == NUM_STEPS
    assert int(out.stats["num_fallback_steps"]) == 0
    again_slope, again = learn_in_parallel(model, xs, guess=out.carries)
    assert int(again.stats["num_newton_steps"]) == 1
    assert_close(again.logits, out.logits, rounding())
    assert_close(again_slope, slope, rounding())
    flat, unravel = ravel_pytree(model)
    direction = np.random.default_rng(0).normal(size=flat.shape)
    logits = lambda model: learn(model, xs, method=Sequential())[1].logits
    value = lambda model: -jax.nn.log_softmax(logits(model))[1]
    np.testing.assert_allclose(
        ravel_pytree(slope)[0] @ direction,
        finite_difference(lambda x: value(unravel(x)), flat, direction),
        rtol=sqrt_eps(),
        atol=sqrt_eps(),
    )


PADDED = {
    "length": learn_in_parallel,
    "mask": lambda model, xs, length: learn(
        model, xs, mask=jnp.arange(NUM_STEPS) < length, method=NEWTON
    ),
    "sequential": lambda model, xs, length: learn(
        model, xs, length=jnp.int32(length), method=Sequential()
    ),
}


@pytest.mark.parametrize("how", slow(PADDED, lambda how: how != "length"))
def test_classifier_ignores_padding(how):
    model, xs = classifier(), inputs(num_steps=SHORT)
    slope, out = learn(model, xs, method=Sequential())
    padding = jnp.full((NUM_STEPS - SHORT, NUM_INPUTS), jnp.nan)
    padded = jnp.concatenate([xs, padding])
    p_slope, p_out = PADDED[how](model, padded, SHORT)
    assert_close(p_out.logits, out.logits, rounding())
    assert_close(p_slope, slope, rounding())
    nothing = PADDED[how](model, jnp.full_like(padded, jnp.nan), 0)
    for leaf in jtu.tree_leaves((nothing[0], nothing[1].logits)):
        assert bool(jnp.all(jnp.isfinite(leaf)))


def test_bad_padding():
    model, xs, mask = classifier(), jnp.ones((4, NUM_INPUTS)), jnp.ones(4, bool)
    with pytest.raises(ValueError, match="either `length` or `mask`"):
        model(xs, length=3, mask=mask)
    with pytest.raises(ValueError, match="each of the 4 steps.*shape .3,"):
        model(xs, mask=mask[:3])


def test_classifier_of_a_batch():
    model = classifier(num_layers=1)
    batch = jnp.stack([inputs(seed) for seed in range(3)])
    lengths = jnp.array([NUM_STEPS, 3, NUM_STEPS], jnp.int32)
    run = quick(jax.vmap(lambda xs, n: model(xs, length=n).logits))
    short = quick(lambda xs: model(xs).logits)
    expected = jnp.stack(
        [short(x[:n]) for x, n in zip(batch, lengths.tolist(), strict=True)]
    )
    assert_close(run(batch, lengths), expected, rounding())


def test_dropout():
    """Only with a key, for whole sequences, and without bias."""
    plain = classifier(num_layers=1)
    model, xs = classifier(num_layers=1, dropout=0.4), inputs()
    run = quick(lambda model, xs, key: model(xs, key=key).logits)
    exact = run(plain, xs, None)
    assert_close(run(model, xs, None), exact, 0.0)
    assert_close(run(plain, xs, jr.key(0)), exact, rounding())
    many = quick(
        jax.vmap(lambda model, key: model(xs, key=key).logits, in_axes=(None, 0))
    )
    keys = jr.split(jr.key(1), 4000)
    assert len(np.unique(np.asarray(many(model, keys)[:, 0]))) > 1
    # Where the layers add nothing, logits are linear in what is left out at the end,
    # so that their mean over keys is the answer without.
    silent = lambda model: eqx.tree_at(
        lambda m: m.mixers, model, jtu.tree_map(jnp.zeros_like, model.mixers)
    )
    logits = many(silent(model), keys)
    # Four standard errors.
    error = 4 * jnp.std(logits, axis=0) / 4000**0.5
    exact = run(silent(plain), xs, None)
    assert bool(jnp.all(jnp.abs(jnp.mean(logits, axis=0) - exact) <= error))
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`dropout` must be from 0 to below 1"):
            classifier(dropout=dropout)


def test_dropout_leaves_the_same_outputs_out_at_all_steps():
    """A mixer that shows what it gets."""
    model = classifier(num_layers=1, dropout=0.5)
    seen = []

    class Spy(eqx.Module):
        inner: eqx.nn.Linear

        def __call__(self, x):
            jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
            return self.inner(x)

    # Four outputs, so that some are left out and some are not, for the key below.
    layer = MultiHeadGRU(4, 4, 1, key=jr.key(2))
    mixer = Spy(eqx.nn.Linear(layer.out_size, 8, key=jr.key(3)))
    model = eqx.tree_at(lambda m: (m.layers[0], m.mixers[0]), model, (layer, mixer))
    quick(lambda xs: model(xs, key=jr.key(0)).logits)(inputs())
    jax.effects_barrier()
    (outs,) = [np.stack(seen).reshape(NUM_STEPS, -1)]
    dropped = outs == 0
    np.testing.assert_array_equal(dropped, dropped[:1].repeat(NUM_STEPS, 0))
    assert 0 < dropped[0].sum() < 4


@pytest.mark.slow(covered_by="test_examples.py::test_sequential_has_the_same_losses")
def test_classifier_in_single_precision():
    model = classifier(num_layers=1, dtype=jnp.float32)
    xs, length = inputs().astype(jnp.float32), jnp.int32(SHORT)
    slope, out = learn(model, xs, length=length)
    expected_slope, expected = learn(model, xs, length=length, method=Sequential())
    assert out.logits.dtype == jnp.float32
    assert_close(out.logits, expected.logits, rounding(jnp.float32))
    assert_close(slope, expected_slope, rounding(jnp.float32))
