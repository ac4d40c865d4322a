"""What a new user tries first, and what is said where it cannot work."""

import warnings

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import (
    DEER,
    Constant,
    Newton,
    Obreshkov,
    ParallelAdjoint,
    Sequential,
    diffeqsolve,
    scan,
)

from .helpers import quick


#: Where the solver or the method is not what is looked at: the smallest programs.
EULER = diffrax.Euler()
SMALL = Newton(guess=Constant(), window=None, chunk=1, fallback=False)


def test_steep_forcing():
    """A ramp 2e-8 wide, in the middle of a step; the exact value is 1.6035267."""
    ramp = diffrax.LinearInterpolation(
        jnp.array([0.0, 3 - 1e-8, 3 + 1e-8, 6.0]), jnp.array([0.0, 0.0, 1.0, 1.0])
    )
    term = diffrax.ODETerm(lambda t, y, args: -0.5 * y + ramp.evaluate(t))
    y1 = diffeqsolve(term, DEER(), 0.0, 6.0, 0.05, jnp.array(1.0)).ys[0]
    # No worse than a jump within one step.
    assert abs(float(y1) - 1.6035267) < 0.03


def drag(t, v, args):
    del t, args
    return jnp.array([0.0, -9.8]) - 0.1 * jnp.linalg.norm(v) * v


def test_no_derivative_where_it_starts():
    solve = lambda solver: diffeqsolve(
        diffrax.ODETerm(drag), solver, 0.0, 2.0, 0.01, jnp.zeros(2)
    )
    terminal, rate = (9.8 / 0.1) ** 0.5, (9.8 * 0.1) ** 0.5
    exact = -terminal * np.tanh(2 * rate)
    np.testing.assert_allclose(solve(DEER()).ys[0], [0, exact], atol=1e-8)
    message = r"Step 0, from t = 0: the derivative of the field is not finite.*Tsit5"
    with pytest.raises(RuntimeError, match=message):
        solve(DEER(Obreshkov(1), SMALL))


def test_a_step_that_fails_is_named():
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t > 0.52, jnp.nan, -y))
    args = (term, DEER(Obreshkov(1), SMALL), 0.0, 1.0, 0.1, jnp.array(1.0))
    with pytest.raises(RuntimeError, match=r"Step 5, from t = 0\.5: .*not finite"):
        diffeqsolve(*args)
    sol = diffeqsolve(*args, throw=False)
    assert sol.result != diffrax.RESULTS.successful
    # Time backwards is the user's time.
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t < -0.52, jnp.nan, -y))
    with pytest.raises(RuntimeError, match=r"Step 5, from t = -0\.5: .*not finite"):
        loop = DEER(Obreshkov(1), Sequential())
        diffeqsolve(term, loop, 0.0, -1.0, -0.1, jnp.array(1.0))


def test_what_a_fit_meets_beyond_its_domain():
    """What stock Diffrax returns: not finite, and successful."""
    term = diffrax.ODETerm(lambda t, y, args: y**2)
    ours = diffeqsolve(term, DEER(), 0.0, 2.0, 0.1, jnp.array(1.0))
    stock = diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 2.0, 0.1, jnp.array(1.0))
    assert not np.isfinite(stock.ys[0]) and not np.isfinite(ours.ys[0])
    assert ours.result == stock.result == diffrax.RESULTS.successful


def test_an_inner_loop():
    def step(c, x):
        c = jnp.tanh(jax.lax.fori_loop(0, 3, lambda i, h: 0.5 * h + x, c))
        return c, c

    xs = jnp.asarray(np.random.default_rng(0).normal(size=(50, 3)))
    solve = quick(lambda xs: scan(step, jnp.zeros(3), xs, method=Newton()))
    _, ys = solve(xs)
    expected = jax.lax.scan(step, jnp.zeros(3), xs)[1]
    np.testing.assert_allclose(ys, expected, rtol=0, atol=1e-14)


def test_what_lax_scan_takes():
    step = lambda c, x: (0.5 * c + x, c)
    options = dict(unroll=4, _split_transpose=True)
    _, ys = scan(step, jnp.zeros(2), jnp.ones((10, 2)), **options)
    np.testing.assert_array_equal(
        ys, jax.lax.scan(step, jnp.zeros(2), jnp.ones((10, 2)), **options)[1]
    )


def test_custom_vjp():
    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda c, g: (g * c,))

    def slope(sine, method):
        term = diffrax.ODETerm(lambda t, y, a: -a * sine(y))
        solve = lambda a: diffeqsolve(
            term, DEER(EULER, method), 0.0, 1.0, 0.1, jnp.array(1.0), a
        )
        return jax.grad(lambda a: solve(a).ys[0])(2.0)

    loop = Sequential()
    np.testing.assert_allclose(slope(sine, loop), slope(jnp.sin, loop), rtol=1e-14)
    with pytest.raises(TypeError, match="custom_vjp.*custom_jvp"):
        slope(sine, Newton())


def test_an_end_at_infinity():
    event = diffrax.Event(lambda t, y, args, **kwargs: y < 0)
    args = (0.0, jnp.inf, 0.1, jnp.array(3.0))
    term = diffrax.ODETerm(lambda t, y, args: -jnp.ones(()))
    ours = diffeqsolve(term, DEER(EULER), *args, event=event)
    stock = diffrax.diffeqsolve(term, EULER, *args, event=event)
    np.testing.assert_allclose(ours.ts, stock.ts, rtol=1e-12)


def test_errors_of_diffrax_are_its_own():
    """Also where the state is a Python number, which the field returns as it is."""
    event = diffrax.Event(lambda t, y, args, **kwargs: (y,))
    term = diffrax.ODETerm(lambda t, y, args: y)
    with pytest.raises(ValueError, match="Event functions must return a scalar"):
        diffeqsolve(term, DEER(), 0, 1, 0.1, 1.0, event=event)


def test_an_end_at_infinity_by_the_older_name():
    with pytest.warns(match="discrete_terminating_event"):
        event = diffrax.DiscreteTerminatingEvent(lambda state, **kwargs: state.y < 0)
        args = (0.0, jnp.inf, 0.1, jnp.array(3.0))
        term = diffrax.ODETerm(lambda t, y, args: -jnp.ones(()))
        kwargs = dict(discrete_terminating_event=event)
        ours = diffeqsolve(term, DEER(EULER), *args, **kwargs)
        stock = diffrax.diffeqsolve(term, EULER, *args, **kwargs)
    np.testing.assert_allclose(ours.ts, stock.ts, rtol=1e-12)


def test_says_when_nothing_is_parallel():
    args = (0.0, 1.0, 0.1, jnp.array(1.0))
    term = diffrax.ODETerm(lambda t, y, args: -y)
    with pytest.warns(UserWarning, match="nothing is parallel.*ParallelAdjoint"):
        diffrax.diffeqsolve(term, DEER(EULER), *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffrax.diffeqsolve(term, DEER(EULER, Sequential()), *args)
        dense = dict(saveat=diffrax.SaveAt(dense=True), max_steps=10)
        adjoint = ParallelAdjoint()
        diffrax.diffeqsolve(term, DEER(EULER), *args, adjoint=adjoint, **dense)


def test_says_when_it_will_take_minutes():
    term = diffrax.ODETerm(lambda t, y, args: -jnp.sum(y) * y)
    solve = lambda method: (
        lambda y0: diffeqsolve(term, DEER(method=method), 0.0, 1.0, 0.001, y0)
    )
    y0 = jax.ShapeDtypeStruct((400,), jnp.float64)
    with pytest.warns(UserWarning, match=r"1,000 steps .* 400 numbers.*minutes"):
        jax.eval_shape(lambda y0: solve(Newton())(y0).ys, y0)


def test_a_field_of_another_shape():
    def wrong(t, y, args):
        return jnp.ones(3)

    message = r"field `.*wrong` must give .* shape \(2,\); got \(3,\)"
    with pytest.raises(ValueError, match=message):
        diffeqsolve(diffrax.ODETerm(wrong), DEER(), 0.0, 1.0, 0.1, jnp.ones(2))


def test_the_path_is_named():
    term = diffrax.ODETerm(lambda t, y, args: -y)
    newton = Newton(window=None, chunk=1)
    for method, path in ((None, "sequential"), (newton, "newton")):
        solver = DEER(EULER) if method is None else DEER(EULER, method)
        # An output of `jax.jit` like the others.
        stats = jax.jit(
            lambda y0, solver=solver: diffeqsolve(term, solver, 0.0, 1.0, 0.1, y0).stats
        )(jnp.array(1.0))
        assert stats["path"] == path
