"""Derivatives without all Jacobians at once: the same ones."""

import functools as ft

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import pytest

from deer_ode import (
    Auto,
    BlockDiagonal,
    Dense,
    Diagonal,
    Exact,
    Newton,
    scan,
    solve_recurrence,
)

from .helpers import (
    assert_close,
    both,
    pretend_accelerator,
    rounding,
    slow,
    slow_rows,
    tanh_cell,
    tanh_network,
)


def in_pairs(weights, y, x):
    """Entries `2 k` and `2 k + 1` belong together."""
    pairs = y.reshape(-1, 2)
    return jnp.tanh(jnp.einsum("kij,kj->ki", weights, pairs)).reshape(-1) + x


NUM_STEPS = 24

# Three of the Jacobians of four entries.
SMALL = 3 * 16 * 8


def problem(num_steps=NUM_STEPS):
    keys = jr.split(jr.key(0), 3)
    weights = 0.4 * jr.uniform(keys[0], (2, 2, 2), minval=-1.0)
    return weights, jr.normal(keys[1], (4,)), jr.normal(keys[2], (num_steps, 4))


def derivatives(run, *inputs):
    """Of first and second order, reverse and reverse over forward."""

    def value(weights, y0, xs):
        return jnp.sum(jnp.sin(run(both(ft.partial(in_pairs, weights)), y0, xs)))

    def along(weights, y0, xs):
        return jax.jvp(lambda w: value(w, y0, xs), (weights,), (weights,))[1]

    first = jax.grad(value, (0, 1, 2))(*inputs)
    return first, jax.grad(along, (0, 1, 2))(*inputs)


@pytest.fixture(scope="module")
def expected():
    in_turn = lambda f, y0, xs: lax.scan(f, y0, xs)[1]
    return jax.jit(ft.partial(derivatives, in_turn))(*problem())


LINEARISATIONS = (Exact(), Dense(), Dense(SMALL), Diagonal(), BlockDiagonal(2))


@pytest.mark.parametrize("chunk", (None, 9))
@pytest.mark.parametrize("linearisation", LINEARISATIONS, ids=str)
@pytest.mark.slow(covered_by="test_windows_of_any_length")
def test_derivatives(linearisation, chunk, expected):
    """Also with few Jacobians at a time, and whatever the forward pass used."""
    method = Newton(linearisation, chunk=chunk)
    ours = lambda f, y0, xs: solve_recurrence(f, y0, xs, method=method).ys
    actual = jax.jit(ft.partial(derivatives, ours))(*problem())
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "linearisation, length",
    slow_rows(
        [(x, length) for x in (Exact(), Dense()) for length in (1, 7, 8, 24)],
        lambda row: row != (Exact(), 7),
    ),
    ids=str,
)
def test_windows_of_any_length(linearisation, length, monkeypatch, expected):
    """With a last window that is full, and one that is not."""
    monkeypatch.setattr("deer_ode._implicit.tangent_window", lambda *_: length)
    method = Newton(linearisation, window=None, chunk=1)
    ours = lambda f, y0, xs: solve_recurrence(f, y0, xs, method=method).ys
    actual = jax.jit(ft.partial(derivatives, ours))(*problem())
    assert_close(actual, expected, rounding())


def test_the_default_is_the_loop(expected):
    """On a CPU JAX differentiates it: the same program as by hand."""
    found_by = lambda f, y0, xs: scan(f, y0, xs)[1]
    ours = jax.jit(ft.partial(derivatives, found_by))(*problem())
    assert_close(ours, expected, rounding())


@pytest.mark.parametrize(
    "unknowns", slow(((0, 1), (0,)), lambda unknowns: unknowns == (0,)), ids=str
)
def test_a_batch(unknowns):
    """Whose axis must be where JAX looks for it: with `y0` as an unknown, and not."""
    weights, y0, xs = tanh_network(NUM_STEPS, gain=0.9)
    batch = jnp.stack([xs, xs[::-1]])

    def value(run, weights, y0):
        states = jax.jit(lambda w, y0, x: run(both(ft.partial(tanh_cell, w)), y0, x)[1])
        return jnp.sum(jax.vmap(lambda x: states(weights, y0, x))(batch) ** 2)

    slopes = lambda run: jax.jit(jax.grad(ft.partial(value, run), unknowns))
    expected = slopes(lax.scan)(weights, y0)
    assert_close(slopes(newton)(weights, y0), expected, rounding())


newton = ft.partial(scan, method=Newton())


def gradient(run):
    def value(weights, y0, xs):
        f = both(ft.partial(tanh_cell, weights))
        return jnp.sum(run(f, y0, xs)[1] ** 2)

    return jax.jit(jax.grad(value, (0, 1, 2)))


@pytest.mark.slow(covered_by="test_windows_of_any_length")
def test_many_windows():
    """Of 1,300 steps, the Jacobians of 512 at a time."""
    inputs = tanh_network(1300, gain=0.9)
    assert_close(gradient(newton)(*inputs), gradient(lax.scan)(*inputs), rounding())


def test_no_derivative_at_the_start():
    """Of a root at zero; `y0` is no unknown, and the padding repeats that step."""

    def value(run, xs):
        mixed = jnp.array([[0.5, 0.2], [0.1, 0.4]])
        step = lambda y, x: mixed @ jnp.sqrt(y) + x
        return jnp.sum(run(both(step), jnp.zeros(2), xs)[1])

    xs = jr.uniform(jr.key(0), (600, 2))
    slopes = lambda run: jax.jit(jax.grad(ft.partial(value, run)))(xs)
    expected = slopes(lax.scan)
    assert bool(jnp.all(jnp.isfinite(expected)))
    assert_close(slopes(newton), expected, rounding())
    ours = ft.partial(value, newton)
    _, along = jax.jit(lambda xs: jax.jvp(ours, (xs,), (jnp.ones_like(xs),)))(xs)
    assert_close(along, jnp.sum(expected), rounding())


@pytest.mark.parametrize(
    "method, num_steps",
    slow_rows(
        [(method, n) for method in (Auto(), Newton()) for n in (8, 600)],
        lambda row: row not in ((Auto(), 8), (Newton(), 600)),
    ),
    ids=str,
)
def test_steps_that_have_forward_derivatives_only(num_steps, method):
    def step(y, x):
        _, turned = lax.while_loop(
            lambda carry: carry[0] < 3,
            lambda carry: (carry[0] + 1, jnp.tanh(0.9 * carry[1])),
            (0, y),
        )
        return (turned + x,) * 2

    xs = jr.normal(jr.key(0), (num_steps, 2))

    def along(run):
        states = lambda xs: run(step, jnp.zeros(2), xs)[1]
        return jax.jit(lambda xs: jax.jvp(states, (xs,), (jnp.cos(xs),)))(xs)

    assert_close(along(ft.partial(scan, method=method)), along(lax.scan), rounding())


def test_little_memory_allowed():
    """Of 1,300 steps the Jacobians of 36, and of none."""
    inputs = tanh_network(1300, gain=0.9)
    run = ft.partial(scan, method=Newton(Dense(36 * 9 * 8), window=None))
    assert_close(gradient(run)(*inputs), gradient(lax.scan)(*inputs), rounding())
    # Halved from 512 until they fit.
    text = str(jax.make_jaxpr(gradient(run))(*inputs))
    assert "f64[32,3,3]" in text and "f64[512,3,3]" not in text
    with pytest.raises(ValueError, match="dense Jacobians of 1 steps.*72 bytes"):
        gradient(ft.partial(scan, method=Newton(Dense(8))))(*inputs)


def test_both_branches_of_a_program_for_any_platform(monkeypatch):
    """Where there is an accelerator both are traced, and JAX chooses."""
    inputs = tanh_network(70, gain=0.9)
    pretend_accelerator(monkeypatch)
    run = ft.partial(scan, method=Newton(Dense(20 * 9 * 8)))
    assert_close(gradient(run)(*inputs), gradient(lax.scan)(*inputs), rounding())
    assert "platform_index" in str(jax.make_jaxpr(gradient(run))(*inputs))


def test_memory_of_gradients():
    """Beside 4,000 steps of 16 numbers their Jacobians would be sixteen times as much.

    A few trajectories are needed: the states, what changes them, and what JAX keeps to
    work that out.
    """
    inputs = tanh_network(4000, gain=0.9, size=16)
    program = gradient(newton).lower(*inputs).compile()
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 8 * inputs[2].nbytes
