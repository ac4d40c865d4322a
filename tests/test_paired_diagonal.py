"""`PairedDiagonal`: many oscillators, coupled weakly or not at all."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from deer_ode import DEER, Dense, Newton, PairedDiagonal, StormerVerlet, diffeqsolve

from .helpers import assert_close, rounding, slow


NUM_OSCILLATORS = 5

#: Neither windows nor chunks: fewer programs to compile.
PAIRED = Newton(linearisation=PairedDiagonal(), window=None, chunk=1)
EXACT = Newton(linearisation=Dense(), window=None, chunk=1)


def chain(coupling):
    """Pendulums in a row, joined by springs."""

    def force(t, q, args):
        del t
        after = jnp.concatenate([q[1:], q[-1:]])
        before = jnp.concatenate([q[:1], q[:-1]])
        return -args * jnp.sin(q) + coupling * (after - 2 * q + before)

    terms = (diffrax.ODETerm(lambda t, p, args: p), diffrax.ODETerm(force))
    q0, p0 = jr.normal(jr.key(0), (2, NUM_OSCILLATORS))
    return terms, (q0, p0)


def solve(coupling, gravity, method=None):
    terms, y0 = chain(coupling)
    kwargs = dict(saveat=diffrax.SaveAt(steps=True), max_steps=200)
    if method is None:
        return diffrax.diffeqsolve(
            terms, StormerVerlet(), 0.0, 8.0, 0.04, y0, gravity, **kwargs
        )
    return diffeqsolve(
        terms, DEER(StormerVerlet(), method), 0.0, 8.0, 0.04, y0, gravity, **kwargs
    )


@pytest.mark.parametrize("coupling", slow((0.0, 1e-3), lambda coupling: coupling == 0))
def test_the_answer_is_the_sequential_one(coupling):
    gravity = jnp.array(1.3)
    sol = solve(coupling, gravity, PAIRED)
    expected = solve(coupling, gravity)
    assert_close(sol.ys, expected.ys, rounding())
    assert int(sol.stats["num_fallback_steps"]) == 0
    # Without coupling it is Newton's method itself.
    exact = solve(coupling, gravity, EXACT)
    iterations = [int(s.stats["num_newton_steps"]) for s in (sol, exact)]
    if coupling == 0:
        assert iterations[0] == iterations[1]
    else:
        assert iterations[0] > iterations[1]


@pytest.mark.slow(covered_by="test_newton.py::test_gradients_are_exact_in_every_mode")
def test_gradients_are_exact_where_the_linearisation_is_not():
    def loss(gravity, method):
        q, _ = solve(0.01, gravity, method).ys
        return jnp.sum(q[-1] ** 2)

    slope = lambda method: jax.jit(jax.grad(lambda g: loss(g, method)))(jnp.array(1.3))
    actual, expected = slope(PAIRED), slope(None)
    assert_close(actual, expected, rounding())


def test_an_odd_state_is_refused():
    term = diffrax.ODETerm(lambda t, y, args: -y)
    method = Newton(linearisation=PairedDiagonal())
    with pytest.raises(ValueError, match="two halves.*3 numbers"):
        diffeqsolve(term, DEER(diffrax.Heun(), method), 0.0, 1.0, 0.1, jnp.ones(3))
