"""What once passed for converged and was not."""

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import DEER, Newton, diffeqsolve, scan


def _unequal(c, x):
    return jnp.stack([c[0], 0.9 * jnp.cos(2 * c[1])])


#: A step, where it starts, its inputs, and how far off the answer may be.
CASES = {
    "infinite derivative": (
        lambda y, x: jnp.sqrt(y - 1) + x,
        jnp.float32(1),
        jnp.full(5, 1.5, jnp.float32),
        1e-6,
    ),
    "near overflow": (
        lambda y, x: y + x,
        jnp.float16(20),
        jnp.ones(50, jnp.float16),
        0.0,
    ),
    "unequal entries": (
        _unequal,
        jnp.array([1e6, 0.3], jnp.float32),
        jnp.zeros(200, jnp.float32),
        1e-5,
    ),
    # Steps round the same way over long stretches, which takes the loop itself 1.6e-3
    # away from the exact answer, by double precision. An eighth of that is not wrong.
    "residuals that add up": (
        lambda y, x: y + 1e-5 * jnp.sin(3 * y),
        jnp.float32(0.9),
        jnp.zeros(200_000, jnp.float32),
        2e-4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_answer_is_the_sequential_one(name):
    step, init, xs, error = CASES[name]
    f = lambda c, x: (step(c, x),) * 2
    _, actual = jax.jit(lambda: scan(f, init, xs, method=Newton()))()
    _, expected = jax.jit(lambda: lax.scan(f, init, xs))()
    actual, expected = (np.asarray(y, np.float64) for y in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=error)


@pytest.mark.slow(covered_by="test_answer_is_the_sequential_one")
def test_residuals_that_add_up_step_by_step():
    """In short windows, of single steps, each rounds by half a unit of about one: a
    random walk of so many.
    """
    step, init, xs, _ = CASES["residuals that add up"]
    f = lambda c, x: (step(c, x),) * 2
    _, actual = jax.jit(lambda: scan(f, init, xs, method=Newton(chunk=1)))()
    _, expected = jax.jit(lambda: lax.scan(f, init, xs))()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=200_000**0.5 * 2.0**-22)


def test_gradient_past_an_infinite_derivative():
    f = lambda y, x: (jnp.sqrt(y - 1) + x,) * 2
    slopes = [
        jax.grad(lambda xs, run=run: run(f, jnp.array(1.0), xs)[0])(jnp.full(4, 1.5))
        for run in (scan, lax.scan)
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-12)


def test_differential_equation_from_an_infinite_derivative():
    term = diffrax.ODETerm(lambda t, y, args: jnp.sqrt(y - 1) + 0.5)
    args = (term, DEER(diffrax.Euler(), Newton()), 0.0, 1.0, 0.1, jnp.array(1.0))
    sol = diffeqsolve(*args)
    expected = diffrax.diffeqsolve(term, diffrax.Euler(), *args[2:])
    np.testing.assert_allclose(sol.ys, expected.ys, rtol=1e-13)


def test_steps_that_cannot_be_solved_for_are_refused():
    mean = lambda y, x: (lax.pmean(y, "lanes") + x,) * 2
    solve = lambda y: scan(mean, y, jnp.ones(3), method=Newton())
    with pytest.raises(ValueError, match="`psum`, which joins what is mapped"):
        jax.vmap(solve, axis_name="lanes")(jnp.ones(2))

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (sine(x), x), lambda x, t: (t * jnp.cos(x),))
    with pytest.raises(TypeError, match="custom_vjp.*custom_jvp"):
        step = lambda y, x: (sine(y), None)
        scan(step, jnp.array(1.0), jnp.ones(3), method=Newton())
    # A loop needs no derivatives in forward mode.
    slope = jax.grad(lambda y: scan(step, y, jnp.ones(3))[0])
    expected = jax.grad(lambda y: jnp.sin(jnp.sin(jnp.sin(y))))
    np.testing.assert_allclose(slope(jnp.array(1.0)), expected(1.0), rtol=1e-14)
