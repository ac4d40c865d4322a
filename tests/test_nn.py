"""Recurrent layers, against loops and their equations."""

import functools as ft
import inspect

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax.nn import sigmoid

from deer_ode import Newton, Sequential
from deer_ode.nn import RNN, Bidirectional, LEMCell, MultiHeadGRU
from deer_ode.nn._layer import as_mask

from .helpers import (
    assert_close,
    quick,
    rounding,
    slow,
    slow_rows,
)


NUM_STEPS, NUM_INPUTS = 11, 2

#: One window over all steps and no sequential finish: the smallest program, and what
#: does not converge in parallel fails. (Windows have tests of their own.)
NEWTON = Newton(window=None, chunk=1, fallback=False)


class OwnCell(eqx.Module):
    """A state of two leaves, which it knows the beginning of."""

    W: jax.Array

    def initial_state(self):
        return {"a": jnp.ones(3), "b": jnp.zeros(1)}

    def __call__(self, state, x):
        a = jnp.tanh(self.W @ state["a"] + jnp.sum(x))
        return {"a": a, "b": 0.5 * state["b"] + jnp.mean(a)}


def own_function(h, x):
    return jnp.tanh(0.5 * h) + jnp.mean(x)


def _inputs(seed=0, num_steps=NUM_STEPS):
    return normal(seed, num_steps, NUM_INPUTS)


def normal(seed, *shape):
    """By NumPy: JAX compiles a program for each shape, of a quarter of a second."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def drawn(make, seed, **kwargs):
    """`make(key=...)`, with all its numbers drawn by NumPy for the same reason: about
    as large as those that layers begin with.
    """
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.uniform(-0.5, 0.5, x.shape), x.dtype)
    empty = eqx.filter_eval_shape(ft.partial(make, **kwargs), key=jr.key(0))
    is_array = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    return jtu.tree_map(lambda x: draw(x) if is_array(x) else x, empty)


def gru_cell():
    return drawn(ft.partial(eqx.nn.GRUCell, NUM_INPUTS, 3), 1)


def lstm_cell():
    return drawn(ft.partial(eqx.nn.LSTMCell, NUM_INPUTS, 3), 2)


CELLS = (
    "GRU", "GRU from one's own start", "LSTM", "LEM", "own cell", "own function",
)  # fmt: skip


@ft.cache
def _cells():
    gru, lstm = gru_cell(), lstm_cell()
    lem = drawn(ft.partial(LEMCell, NUM_INPUTS, 3, dt=0.6), 3)
    own = OwnCell(0.4 * normal(4, 3, 3))
    zeros = jnp.zeros(3)
    # A layer; its step in the order of `lax.scan`; its start; its output.
    return {
        "GRU": (RNN(gru), lambda h, x: gru(x, h), zeros, lambda h: h),
        "GRU from one's own start": (
            RNN(gru, jnp.ones(3)),
            lambda h, x: gru(x, h),
            jnp.ones(3),
            lambda h: h,
        ),
        "LSTM": (RNN(lstm), lambda h, x: lstm(x, h), (zeros, zeros), lambda h: h[0]),
        "LEM": (RNN(lem), lem, (zeros, zeros), lambda h: h[0]),
        "own cell": (RNN(own), own, own.initial_state(), lambda h: h),
        "own function": (
            RNN(own_function, jnp.ones(4)),
            own_function,
            jnp.ones(4),
            lambda h: h,
        ),
    }


def loop(step, init, xs, reverse=False):
    """The states, one after the other."""
    twice = lambda h, x: (step(h, x),) * 2
    return lax.scan(twice, init, xs, reverse=reverse)[1]


def backwards(layer):
    return eqx.tree_at(lambda m: m.reverse, layer, True)


@pytest.mark.parametrize(
    "name, reverse",
    slow_rows(
        [(name, reverse) for name in CELLS for reverse in (False, True)],
        # Each cell one way, and both ways each; a start of one's own with one of them.
        lambda row: (
            row[1] != (row[0] in ("LSTM", "own function"))
            # Of LEM there is a test of its own.
            or row[0] in ("GRU from one's own start", "LEM")
        ),
    ),
)
def test_rnn(name, reverse):
    """Outputs, last state, all states: those of a loop over the cell."""
    assert set(_cells()) == set(CELLS)
    layer, step, init, output = _cells()[name]
    xs = _inputs()
    layer = RNN(layer.cell, layer.init, reverse=reverse)
    states = loop(step, init, xs, reverse)
    # One with windows and a sequential finish, as users have it.
    method = Newton() if name == "own function" else NEWTON
    sol = quick(lambda m, xs: m.solve(xs, method=method))(layer, xs)
    assert_close(sol.carries, states, rounding())
    assert_close(sol.ys, output(states), rounding())
    last = jtu.tree_map(lambda x: x[0 if reverse else -1], states)
    assert_close(sol.carry, last, rounding())
    assert layer.out_size == jtu.tree_leaves(output(states))[0].shape[-1]
    assert int(sol.stats["num_fallback_steps"]) == 0


def test_rnn_learns_its_start():
    """`init` is a parameter like others."""
    layer, xs = RNN(gru_cell(), jnp.ones(3)), _inputs()
    ours = quick(jax.grad(lambda m: jnp.sum(jnp.sin(m(xs, method=NEWTON)))))(layer)
    direct = quick(
        jax.grad(
            lambda m: jnp.sum(jnp.sin(loop(lambda h, x: m.cell(x, h), m.init, xs)))
        )
    )(layer)
    assert_close(ours, direct, rounding())
    assert float(jnp.abs(ours.init).min()) > 0


def test_rnn_needs_a_start():
    with pytest.raises(ValueError, match="give it as `RNN.cell, init.`"):
        RNN(own_function)


def test_options_of_a_call_are_named():
    """Where they are given to the layer, and in the signature of the call."""
    cell = gru_cell()
    said = "takes `cell`, `init` and `reverse`; got `method`.*layer.xs.*method=[.]{3}"
    with pytest.raises(TypeError, match=said):
        RNN(cell, method=Newton())
    with pytest.raises(TypeError, match="unexpected keyword argument 'metod'"):
        RNN(cell)(_inputs(), metod=Newton())
    named = {"length", "mask", "method", "guess"}
    assert named < set(inspect.signature(RNN(cell)).parameters)


def test_lem_cell():
    """Its equations, with the parameters taken apart by name."""
    cell = LEMCell(NUM_INPUTS, 4, dt=0.3, key=jr.key(0))
    y, z, u = normal(1, 4), normal(2, 4), normal(3, NUM_INPUTS)

    def by_the_book(cell, y, z):
        V1, V2, Vz, Vy = jnp.split(cell.from_input.weight, 4)
        b1, b2, bz, by = jnp.split(cell.from_input.bias, 4)
        W1, W2, Wz = jnp.split(cell.from_y, 3)
        dt = 0.3 * sigmoid(W1 @ y + V1 @ u + b1)
        dt_bar = 0.3 * sigmoid(W2 @ y + V2 @ u + b2)
        new_z = (1 - dt) * z + dt * jnp.tanh(Wz @ y + Vz @ u + bz)
        new_y = (1 - dt_bar) * y + dt_bar * jnp.tanh(cell.from_z @ new_z + Vy @ u + by)
        return new_y, new_z

    actual = quick(lambda cell, y, z: cell((y, z), u))(cell, y, z)
    assert_close(actual, quick(by_the_book)(cell, y, z), rounding())
    assert_close(cell.initial_state(), (jnp.zeros(4), jnp.zeros(4)), 0.0)
    bound = 0.5 + 1e-12  # one over the root of four, and rounding
    for leaf in jtu.tree_leaves(cell):
        assert float(jnp.abs(leaf).max()) <= max(bound, NUM_INPUTS**-0.5 + 1e-12)
    for dt in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            LEMCell(2, 2, dt=dt, key=jr.key(0))


# --- many heads -----------------------------------------------------------------------


def heads_by_the_book(gru, xs):
    """The equations of the docstring, index by index."""
    num_heads, size = gru.new_bias.shape
    num_steps = xs.shape[0]
    Wr, Wz, Wn = jnp.split(gru.from_input, 3, axis=1)
    Ur, Uz, Un = jnp.split(gru.from_state, 3, axis=1)
    br, bz, bn = jnp.split(gru.bias, 3, axis=1)
    outs = []
    for j in range(num_heads):
        k = gru.strides[j % len(gru.strides)]
        h = {}
        for i in range(num_steps)[:: -1 if gru.reverse else 1]:
            before = h.get(i + k if gru.reverse else i - k, jnp.zeros(size))
            r = sigmoid(Wr[j] @ xs[i] + Ur[j] @ before + br[j])
            z = sigmoid(Wz[j] @ xs[i] + Uz[j] @ before + bz[j])
            n = jnp.tanh(Wn[j] @ xs[i] + bn[j] + r * (Un[j] @ before + gru.new_bias[j]))
            h[i] = (1 - z) * n + z * before
        outs.append(jnp.stack([h[i] for i in range(num_steps)]))
    return jnp.concatenate(outs, axis=-1)


def multi_head(strides=(1,), num_heads=3, size=2, **kwargs):
    # Biases are not zero, so that they are seen.
    make = ft.partial(MultiHeadGRU, NUM_INPUTS, num_heads, size, strides=strides)
    return drawn(make, 7, **kwargs)


@pytest.mark.parametrize(
    "strides, reverse",
    [
        ((2, 1), False),
        pytest.param((1,), False, marks=pytest.mark.slow),
        pytest.param((3,), True, marks=pytest.mark.slow),
        pytest.param((1,), True, marks=pytest.mark.slow),
        pytest.param((3,), False, marks=pytest.mark.slow),
        pytest.param((2, 1), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_multi_head_gru(strides, reverse):
    """Also where the stride does not divide the length."""
    # The equations are written out step by step, which is slow to compile.
    num_steps = 3 if strides == (2, 1) else 5
    gru = multi_head(strides, num_heads=2, reverse=reverse)
    xs = _inputs(num_steps=num_steps)

    def both(gru):
        sol = gru.solve(xs, method=NEWTON)
        return jnp.sum(jnp.sin(sol.ys)), sol

    slope, sol = quick(jax.grad(both, has_aux=True))(gru)
    expected_slope, expected = quick(
        jax.grad(
            lambda m: [jnp.sum(jnp.sin(ys := heads_by_the_book(m, xs))), ys],
            has_aux=True,
        )
    )(gru)
    assert_close(sol.ys, expected, rounding())
    assert_close(slope, expected_slope, rounding())
    assert sol.ys.shape == (num_steps, gru.out_size) == (num_steps, 4)
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert sol.stats["num_steps"] == num_steps


def test_strides_beyond_the_end():
    """Then every step starts from nothing."""
    gru, xs = multi_head((20,), num_heads=1), _inputs(num_steps=2)
    assert_close(quick(gru)(xs), quick(heads_by_the_book)(gru, xs), rounding())


@pytest.mark.parametrize("strides", ((1,), (2,)), ids=str)
def test_no_steps(strides):
    ys = multi_head(strides)(jnp.zeros((0, NUM_INPUTS)))
    assert ys.shape == (0, 6)


def zero_states(layer, xs):
    """The guess that a layer starts from by itself, where its initial state is zero:
    so that solves with a guess and without are one program.
    """
    states = jax.eval_shape(lambda xs: layer.solve(xs, method=Sequential()).carries, xs)
    return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), states)


def test_multi_head_states_as_a_guess():
    gru, xs = multi_head((1, 3)), _inputs()
    solve = quick(lambda gru, xs, guess: gru.solve(xs, method=NEWTON, guess=guess))
    cold = solve(gru, xs, zero_states(gru, xs))
    warm = solve(gru, xs, cold.carries)
    assert int(warm.stats["num_newton_steps"]) == 1
    assert int(cold.stats["num_newton_steps"]) > 1
    assert_close(warm.ys, cold.ys, rounding())


def test_timescales():
    """A head's memory, 1 / (1 - z) steps of constant input, is as asked for."""
    # Of JAX's generators the one that is quickest to compile.
    key = jr.key(0, impl="unsafe_rbg")
    make = lambda key: MultiHeadGRU(16, 50, 8, timescales=(3.0, 200.0), key=key)
    gru = jtu.tree_map(np.asarray, quick(make)(key))
    b_r, b_z, b_n = np.split(gru.bias, 3, axis=1)
    for zero in (b_r, b_n, gru.new_bias):
        np.testing.assert_array_equal(zero, 0.0)
    tau = 1 / (1 - 1 / (1 + np.exp(-b_z)))
    assert 3 * (1 - 1e-9) <= float(tau.min()) and float(tau.max()) <= 200 * (1 + 1e-9)
    # Even in the logarithm: the mean of 400 numbers is within four standard errors.
    where = (np.log(tau) - np.log(3)) / np.log(200 / 3)
    assert abs(where.mean() - 0.5) <= 4 / (12 * 400) ** 0.5
    one = lambda key: MultiHeadGRU(2, 2, 2, timescales=(5.0, 5.0), key=key)
    np.testing.assert_allclose(
        quick(one)(key).bias[:, 2:4],
        np.log(4.0),
        rtol=rounding(),
    )
    # Weights are normal, of the variance that is documented (100 times 24 draws or
    # more, so to four standard errors).
    for weights, variance in ((gru.from_input, 1 / 16), (gru.from_state, 1 / 32)):
        error = 4 * (2 / weights.size) ** 0.5
        assert abs(float(np.var(weights)) / variance - 1) <= error


def test_dtype():
    single = dict(dtype=jnp.float32, key=jr.key(0))
    xs = jax.ShapeDtypeStruct((5, 2), jnp.float32)
    for make in (
        lambda: MultiHeadGRU(2, 2, 2, strides=(1, 2), **single),
        lambda: RNN(LEMCell(2, 3, **single)),
        lambda: RNN(eqx.nn.LSTMCell(2, 3, **single)),
    ):
        ys = jax.eval_shape(lambda xs, make=make: make()(xs), xs)
        assert ys.dtype == jnp.float32


BAD_HEADS = {
    "num_heads=...)` must be 1 or more; got 0": dict(num_heads=0),
    "head_size=...)` must be 1 or more; got -1": dict(head_size=-1),
    "input_size=...)` must be 1 or more; got 0": dict(input_size=0),
    "`strides` must be 1 or more each; got ()": dict(strides=()),
    "`strides` must be 1 or more each; got (1, 0)": dict(strides=(1, 0)),
    "above 1; got (1.0, 5.0)": dict(timescales=(1.0, 5.0)),
    "above 1; got (9.0, 5.0)": dict(timescales=(9.0, 5.0)),
}


@pytest.mark.parametrize("message", BAD_HEADS)
def test_bad_heads(message):
    good = dict(input_size=2, num_heads=2, head_size=2, key=jr.key(0))
    with pytest.raises(ValueError) as error:
        MultiHeadGRU(**good | BAD_HEADS[message])
    assert message in str(error.value)


def both_directions():
    return Bidirectional(
        multi_head(),
        RNN(lstm_cell(), reverse=True),
    )


def test_bidirectional():
    layer, xs = both_directions(), _inputs()
    solve = quick(lambda m, xs, guess: m.solve(xs, method=NEWTON, guess=guess))
    nothing = zero_states(layer, xs)
    sol = solve(layer, xs, nothing)
    parts = quick(
        lambda m, xs: [l(xs, method=Sequential()) for l in (m.forward, m.backward)]
    )(layer, xs)
    assert_close(sol.ys, jnp.concatenate(parts, axis=-1), rounding())
    assert layer.out_size == 9 == sol.ys.shape[-1]
    # The second half of the outputs knows what is to come and not what was.
    later = solve(layer, xs.at[0].add(1.0), nothing).ys
    np.testing.assert_allclose(later[1:, 6:], sol.ys[1:, 6:], atol=rounding())
    again = solve(layer, xs, sol.carries)
    assert int(again.stats["num_newton_steps"]) == 1
    assert_close(again.ys, sol.ys, rounding())


# --- padding --------------------------------------------------------------------------

LAYERS = {
    "GRU": lambda: _cells()["GRU"][0],
    "LSTM backwards": lambda: RNN(_cells()["LSTM"][0].cell, reverse=True),
    "own cell": lambda: _cells()["own cell"][0],
    "strides": lambda: multi_head((3,)),
    "strides backwards": lambda: multi_head((2,), reverse=True),
    "both directions": both_directions,
}


def squares(ys):
    return sum(jnp.sum(jnp.sin(y)) for y in jtu.tree_leaves(ys))


#: One after the other, from the last to the first, and several at once.
SIMILAR = ("LSTM backwards", "both directions", "own cell", "strides backwards")


@quick
def gradients(layer, xs, weights, **kwargs):
    """Of a sum of outputs, by layer and inputs; and the solution."""

    def loss(layer, xs):
        sol = layer.solve(xs, **kwargs)
        per_step = jax.vmap(squares)(sol.ys)
        return jnp.sum(weights * per_step), (sol.ys, sol.carry)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(layer, xs)


@pytest.mark.parametrize("name", slow(LAYERS, lambda name: name in SIMILAR))
def test_padding_changes_nothing(name):
    """Not even padding of NaN: outputs, states and gradients are the short ones."""
    layer, num_there = LAYERS[name](), 6
    short = _inputs(num_steps=num_there)
    is_there = jnp.arange(NUM_STEPS) < num_there
    (slope, x_slope), out = gradients(
        layer, short, jnp.ones(num_there), method=Sequential()
    )
    for fill in (jnp.nan, jnp.inf, 3.0):
        padding = jnp.full((NUM_STEPS - num_there, NUM_INPUTS), fill)
        (p_slope, px_slope), (ys, carry) = gradients(
            layer,
            jnp.concatenate([short, padding]),
            is_there.astype(float),
            length=jnp.int32(num_there),
            method=NEWTON,
        )
        assert_close(jtu.tree_map(lambda y: y[:num_there], ys), out[0], rounding())
        assert_close(p_slope, slope, rounding())
        assert_close(px_slope[:num_there], x_slope, rounding())
        np.testing.assert_array_equal(px_slope[num_there:], 0.0)
        # States of strides end at different steps, so lanes are in another order.
        if "strides" not in name and "both" not in name:
            assert_close(carry, out[1], rounding())


@pytest.mark.parametrize("name", slow(LAYERS, lambda name: name in SIMILAR))
def test_mask_of_a_prefix_is_a_length(name):
    layer, xs = LAYERS[name](), _inputs()
    # The mask is what is looked at, and the smallest program will do.
    run = quick(
        lambda m, xs, **kwargs: m.solve(xs, method=Sequential(), **kwargs).carries
    )
    mask = jnp.arange(NUM_STEPS) < 4
    assert_close(run(layer, xs, mask=mask), run(layer, xs, length=jnp.int32(4)), 0.0)


def test_mask_with_gaps():
    """Steps that are not there leave the state alone."""
    layer, xs = LAYERS["GRU"](), _inputs()
    mask = jnp.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0], bool)
    kept = quick(layer)(xs[np.asarray(mask)])
    ys = quick(layer)(jnp.where(mask[:, None], xs, jnp.nan), mask=mask)
    assert_close(ys[np.asarray(mask)], kept, rounding())
    np.testing.assert_allclose(ys[3], ys[2], rtol=0, atol=0)
    np.testing.assert_array_equal(ys[0], 0.0)


@pytest.mark.parametrize("name", slow(LAYERS, lambda name: name != "GRU"))
def test_nothing_but_padding(name):
    layer, xs = LAYERS[name](), jnp.full((NUM_STEPS, NUM_INPUTS), jnp.nan, float)
    weights, nothing = jnp.ones(NUM_STEPS), jnp.int32(0)
    slopes, _ = gradients(layer, xs, weights, length=nothing, method=NEWTON)
    for leaf in jtu.tree_leaves(slopes):
        assert bool(jnp.all(jnp.isfinite(leaf)))


@pytest.mark.parametrize("dtype", slow(("int32", "int64"), lambda t: t == "int32"))
def test_batches_of_padded_sequences(dtype):
    """`jax.vmap` over sequences and their lengths, of any integer dtype."""
    layer = LAYERS["strides"]()
    batch = jnp.stack([_inputs(seed) for seed in range(3)])
    lengths = jnp.array([11, 0, 5], dtype)
    ys = quick(jax.vmap(lambda xs, n: layer(xs, length=n)))(batch, lengths)
    for xs, n, y in zip(batch, lengths.tolist(), ys, strict=True):
        if n > 0:
            assert_close(y[:n], quick(layer)(xs[:n]), rounding())
        else:
            np.testing.assert_array_equal(y, 0.0)


def test_a_length_of_few_bits():
    """The count of steps does not begin again at 256."""
    mask = as_mask(np.uint8(200), None, 1000)
    assert mask is not None and int(mask.sum()) == 200 == int(np.argmin(mask))


def test_bad_padding():
    for layer in (LAYERS["GRU"](), LAYERS["strides"]()):
        width = NUM_INPUTS
        xs, mask = jnp.ones((4, width)), jnp.ones(4, bool)
        with pytest.raises(ValueError, match="either `length` or `mask`"):
            layer(xs, length=3, mask=mask)
        with pytest.raises(ValueError, match="each of the 4 steps.*shape .3,"):
            layer(xs, mask=mask[:3])
