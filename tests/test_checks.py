"""Checks of the user fail a solve exactly when the answer trips them.

The answer decays to `exp(-1)`; Newton's method begins from a constant one, so a check
for values above the answer's, later on, is tripped by the guess alone.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import (
    DEER,
    Auto,
    Constant,
    Newton,
    Obreshkov,
    ParallelAdjoint,
    RadauIIA,
    diffeqsolve,
    scan,
)

from .helpers import slow


NEWTON = Newton(guess=Constant(), window=None)
TRIPPED = "below what is allowed"


def field(t, y, args):
    rate, least = args
    y = eqx.error_if(y, y < least, TRIPPED)
    # Of guesses only: the answer is below this from the first step on.
    y = eqx.error_if(y, (t > 0.5) & (y > 0.9), "of a guess")
    return -rate * y


def drop_in(solver, method, args):
    return diffeqsolve(
        diffrax.ODETerm(field),
        DEER(solver, method),
        0.0,
        1.0,
        0.05,
        jnp.array(1.0),
        args,
    ).ys[0]


def adjoint(solver, method, args):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), DEER(solver, method), 0.0, 1.0, 0.05, jnp.array(1.0),
        args, adjoint=ParallelAdjoint(), max_steps=20,
    ).ys[0]  # fmt: skip


def windowed(solver, method, args):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), DEER(solver, method, num_substeps=10), 0.0, 1.0, 0.5,
        jnp.array(1.0), args,
    ).ys[0]  # fmt: skip


def stock(solver, method, args):
    del method
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), solver, 0.0, 1.0, 0.05, jnp.array(1.0), args
    ).ys[0]


WAYS = {
    "drop-in, sequential": (drop_in, diffrax.Bosh3(), Auto()),
    "drop-in, Newton": (drop_in, diffrax.Bosh3(), NEWTON),
    "adjoint, Newton": (adjoint, diffrax.Bosh3(), NEWTON),
    "windows, Newton": (windowed, diffrax.Bosh3(), NEWTON),
    "Obreshkov": (drop_in, Obreshkov(), NEWTON),
    "RadauIIA": (drop_in, RadauIIA(2), NEWTON),
    "RadauIIA, sequential": (drop_in, RadauIIA(2), Auto()),
    "Obreshkov in stock Diffrax": (stock, Obreshkov(), None),
}
ORDINARY = ("drop-in, sequential", "drop-in, Newton", "windows, Newton", "Obreshkov")


@pytest.mark.parametrize("way", slow(WAYS, lambda way: way not in ORDINARY))
def test_the_answer_decides(way):
    solve, solver, method = WAYS[way]
    value_and_slope = eqx.filter_jit(
        jax.value_and_grad(lambda rate, least: solve(solver, method, (rate, least)))
    )
    rate = jnp.array(1.0)
    value, slope = value_and_slope(rate, jnp.array(0.3))
    np.testing.assert_allclose([value, -slope], np.exp(-1), rtol=1e-4)
    with pytest.raises(RuntimeError, match=TRIPPED):
        jax.block_until_ready(value_and_slope(rate, jnp.array(0.5)))


@pytest.mark.parametrize(
    "method",
    slow((Auto(), Newton()), lambda method: isinstance(method, Auto)),
    ids=("sequential", "Newton"),
)
def test_of_a_batch(method):
    solve = eqx.filter_jit(
        jax.vmap(
            lambda r, least: drop_in(diffrax.Bosh3(), method, (r, least)), (0, None)
        )
    )
    rates = jnp.array([0.5, 1.0])
    z = 0.05 * np.array(rates)
    # A step of this method is the series up to the third power.
    exact = (1 - z + z**2 / 2 - z**3 / 6) ** 20
    np.testing.assert_allclose(solve(rates, jnp.array(0.3)), exact, rtol=1e-12)
    with pytest.raises(RuntimeError, match=TRIPPED):
        jax.block_until_ready(solve(rates, jnp.array(0.5)))


@pytest.mark.parametrize("where", ("carry", "output"))
@pytest.mark.parametrize("method", (Auto(), Newton()), ids=("sequential", "Newton"))
def test_of_a_recurrence(method, where):
    def step(c, x):
        checked = eqx.error_if(c, c > 5, "too much")
        carry, out = (checked, c) if where == "carry" else (c, checked)
        return 0.9 * carry + x, out

    run = eqx.filter_jit(lambda xs: scan(step, jnp.array(0.0), xs, method=method)[1])
    assert float(run(0.1 * jnp.ones(10))[-1]) < 1
    with pytest.raises(RuntimeError, match="too much"):
        jax.block_until_ready(run(jnp.ones(10)))


@pytest.mark.parametrize(
    "method",
    slow((Auto(), Newton()), lambda method: isinstance(method, Auto)),
    ids=("sequential", "Newton"),
)
def test_beyond_an_event_nothing_counts(method):
    """Neither in the field, nor in the condition, nor of a path that is too short."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, shape=(), key=jax.random.key(0))

    def drift(t, y, least):
        del t
        return -eqx.error_if(jnp.ones(()), y < least, TRIPPED)

    def condition(t, y, least, **kwargs):
        del t, kwargs
        return eqx.error_if(y, y < least, "the condition") < 0

    terms = diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(lambda t, y, args: 1e-6, path)
    )

    @eqx.filter_jit
    def end(y0, least):
        return diffeqsolve(
            terms, DEER(diffrax.Euler(), method), 0.0, 2.0, 0.1, y0, least,
            event=diffrax.Event(condition),
        ).ts[0]  # fmt: skip

    assert abs(float(end(jnp.array(0.45), jnp.array(-0.5))) - 0.5) < 1e-6
    with pytest.raises(RuntimeError, match=TRIPPED):
        jax.block_until_ready(end(jnp.array(0.45), jnp.array(0.3)))
    # It is asked for more than there is.
    with pytest.raises(RuntimeError):
        jax.block_until_ready(end(jnp.array(1.45), jnp.array(-0.5)))
