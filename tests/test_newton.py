"""Newton's method on recurrences, against the loop that it replaces."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
from hypothesis import given, settings, strategies as st

from deer_ode import (
    Coarse,
    Constant,
    Dense,
    Diagonal,
    Newton,
    Trajectory,
    solve_recurrence,
)
from deer_ode._implicit import solve_trajectory
from deer_ode._misc import StateFlattener
from deer_ode._recurrence import Recurrence

from .helpers import (
    assert_close,
    both,
    finite_difference,
    random_like,
    rounding,
    slow,
    slow_rows,
    sqrt_eps,
    tree_dot,
    unchecked,
)


F32, F64 = np.float32, np.float64


def cell(params, y, x):
    return jnp.tanh(params["W"] @ y + params["b"] + x)


def recurrence(params, y0, xs, f=cell):
    step = lambda y, x: f(params, y, x)
    return Recurrence(step, y0, xs, StateFlattener(y0))


@eqx.filter_jit
def loop(params, y0, xs, f=cell):
    def step(y, x):
        y = f(params, y, x)
        return y, y

    return lax.scan(step, y0, xs)[1]


def problem(seed=0, num_steps=40, size=3, gain=1.0, dtype=jnp.float64):
    keys = jr.split(jr.key(seed), 4)
    params = {
        "W": gain * jr.normal(keys[0], (size, size), dtype) / size**0.5,
        "b": 0.1 * jr.normal(keys[1], (size,), dtype),
    }
    y0 = jr.normal(keys[2], (size,), dtype)
    return params, y0, jr.normal(keys[3], (num_steps, size), dtype)


@eqx.filter_jit
def solve(params, y0, xs, method, f=cell):
    solution = solve_trajectory(recurrence(params, y0, xs, f), method)
    return solution, method.result(solution, xs.shape[0])


#: What stands for the Jacobian.
LINEARISATIONS = (Dense(), Diagonal())


@pytest.mark.parametrize(
    "linearisation, dtype",
    slow_rows(
        [(x, dtype) for x in LINEARISATIONS for dtype in (F32, F64)],
        lambda row: (row[1] is F32) != isinstance(row[0], Diagonal),
    ),
    ids=lambda x: x.__name__ if isinstance(x, type) else type(x).__name__,
)
def test_agrees_with_the_loop(linearisation, dtype):
    """Whatever stands for the Jacobian, the answer is the loop's."""
    inputs = problem(dtype=dtype, gain=0.8)
    method = Newton(linearisation, Constant(), fallback=False)
    solution, result = solve(*inputs, method)
    assert_close(solution.ys, loop(*inputs), rounding(dtype))
    assert int(solution.num_fallback_steps) == 0
    assert int(solution.num_good_steps) == 40
    assert result == optx.RESULTS.successful
    # The tolerance: a few units of rounding of numbers that are about one.
    assert float(solution.residual) <= 64 * 3 * float(jnp.finfo(dtype).eps)


#: Neither windows nor chunks nor a sequential finish: fewer programs to compile. What
#: does not converge is infinite.
ALL_AT_ONCE = Newton(guess=Constant(), window=None, chunk=1, fallback=False)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), gain=st.floats(0.1, 1.2))
def test_random_stable_recurrences(seed, gain):
    inputs = problem(seed, gain=gain)
    solution, _ = solve(*inputs, ALL_AT_ONCE)
    assert_close(solution.ys, loop(*inputs), rounding())


@jax.jit
def loop_from(start, params, y0, xs, ys):
    """The loop that begins after so many of `ys`: one program for all such numbers."""

    def step(y, element):
        i, x, given = element
        y = jnp.where(i < start, given, cell(params, y, x))
        return y, y

    return lax.scan(step, y0, (jnp.arange(len(xs)), xs, ys))[1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), gain=st.floats(2.0, 30.0))
def test_random_wild_recurrences_are_right_or_say_so(seed, gain):
    """Saturating cells with large weights, where full convergence is not to be had."""
    inputs = problem(seed, gain=gain)
    expected = loop(*inputs)
    limited = dict(guess=Constant(), newton_max_steps=5, window=None, chunk=1)
    solution, result = solve(*inputs, Newton(**limited, fallback=False))
    good = int(solution.num_good_steps)
    assert (good == 40) == bool(result == optx.RESULTS.successful)
    # Five iterations make five steps right, of which the last has not been looked at.
    assert good >= 4
    # What is called good is: not bit for bit, since errors of rounding grow by up to
    # the gain in each step, but far below any wrong branch.
    error = np.abs(np.asarray(solution.ys - expected))[:4]
    assert error.max() <= rounding() * gain**4
    finished, result = solve(*inputs, Newton(**limited))
    assert result == optx.RESULTS.successful
    assert int(finished.num_fallback_steps) == 40 - good
    # The tail is the loop's own, from the prefix on.
    assert_close(finished.ys, loop_from(good, *inputs, finished.ys), rounding())


def test_k_iterations_make_k_steps_right():
    """Whatever the Jacobians: here they are wrong by construction."""
    inputs = problem(gain=20.0)
    method = Newton(Diagonal(), Constant(), newton_max_steps=7, fallback=False)
    solution, _ = solve(*inputs, method)
    assert_close(solution.ys[:7], loop(*inputs)[:7], rounding() * 20**2)


def explode(params, y, x):
    # From 0.5 it falls to zero; iterates that stray above one overflow at once.
    del x
    return jnp.where(jnp.abs(y) <= 1, params["a"] * y, jnp.exp(1000 * y))


def test_overflowing_iterates_are_held():
    """A guess in the region of overflow: the exact prefix grows all the same."""
    params, y0 = {"a": jnp.asarray(0.9)}, jnp.array([0.5])
    xs = jnp.zeros((20, 1))
    guess = Trajectory(jnp.full((20, 1), 30.0))
    solution, result = solve(
        params, y0, xs, Newton(guess=guess, fallback=False), explode
    )
    assert result == optx.RESULTS.successful
    assert_close(solution.ys, loop(params, y0, xs, explode), rounding())
    assert int(solution.num_newton_steps) <= 21


def root(params, y, x):
    return jnp.sqrt(y - params["a"]) + x


@pytest.mark.parametrize("fallback", (True, False))
def test_non_finite_answers(fallback):
    """sqrt(y - 10) + x from 0: the true answer is not a number, and ours says so."""
    params, y0 = {"a": jnp.asarray(10.0)}, jnp.array([12.0])
    xs = jnp.full((9, 1), 10.2).at[4].set(5.0)
    method = Newton(guess=Constant(), fallback=fallback)
    solution, result = solve(params, y0, xs, method, root)
    expected = loop(params, y0, xs, root)
    assert bool(jnp.all(jnp.isfinite(expected[:5]) & jnp.isnan(expected[5:])[:1]))
    if fallback:
        assert result == optx.RESULTS.successful
        assert_close(solution.ys, expected, rounding())
    else:
        assert result == optx.RESULTS.nonfinite
        assert int(solution.num_good_steps) == 5
        assert_close(solution.ys[:5], expected[:5], rounding())


def test_gives_up_with_a_reason():
    inputs = problem(gain=30.0)
    method = Newton(guess=Constant(), newton_max_steps=2, fallback=False)
    solution, result = solve(*inputs, method)
    assert result == optx.RESULTS.nonlinear_max_steps_reached
    assert int(solution.num_newton_steps) == 2
    assert 1 <= int(solution.num_good_steps) < 40


@pytest.mark.parametrize(
    "linearisation",
    slow(LINEARISATIONS, lambda x: isinstance(x, Dense)),
    ids=lambda x: type(x).__name__,
)
def test_gradients_are_exact_in_every_mode(linearisation):
    """Also with the diagonal only, and after a sequential finish."""
    inputs = problem(gain=0.8)

    def loss(method):
        def of(params, y0, xs):
            ys = (
                loop(params, y0, xs)
                if method is None
                else (solve_trajectory(recurrence(params, y0, xs), method).ys)
            )
            return jnp.sum(jnp.sin(ys))

        return of

    argnums = (0, 1, 2)
    at_once = dict(window=None, chunk=1)
    converged = Newton(linearisation, Constant(), **at_once, fallback=False)
    finished = Newton(linearisation, Constant(), newton_max_steps=1, **at_once)
    expected = jax.jit(jax.grad(loss(None), argnums))(*inputs)
    with_gradient = jax.jit(jax.value_and_grad(loss(converged), argnums))
    assert_close(with_gradient(*inputs)[1], expected, rounding(), what="converged")
    actual = jax.jit(jax.grad(loss(finished), argnums))(*inputs)
    assert_close(actual, expected, rounding(), what="finished")
    forward = jax.jit(jax.jacfwd(loss(converged), argnums))(*inputs)
    assert_close(forward, expected, rounding())
    # And against finite differences, so not only against another derivative; these
    # are good to the square root of rounding.
    direction = random_like(jr.key(1), inputs)
    slope = finite_difference(
        lambda inputs: with_gradient(*inputs)[0], inputs, direction
    )
    np.testing.assert_allclose(
        tree_dot(expected, direction), slope, rtol=sqrt_eps(), atol=sqrt_eps()
    )


def test_hessian():
    params, y0, xs = problem(num_steps=12, size=2, gain=0.9)

    def loss(solver):
        return lambda y0, b: jnp.sum(jnp.sin(solver(params | {"b": b}, y0, xs)))

    def ours(params, y0, xs):
        return solve_trajectory(recurrence(params, y0, xs), ALL_AT_ONCE).ys

    actual = jax.jit(jax.hessian(loss(ours), (0, 1)))(y0, params["b"])
    expected = jax.jit(jax.hessian(loss(loop), (0, 1)))(y0, params["b"])
    assert_close(actual, expected, rounding())


def test_vmap_leaves_converged_lanes_alone():
    """One lane converges at once, another takes long: both are right."""
    params, y0, xs = problem(gain=1.5)
    method = ALL_AT_ONCE
    gains = jnp.array([0.1, 1.0])

    def run(gain):
        scaled = params | {"W": gain * params["W"]}
        solution = solve_trajectory(recurrence(scaled, y0, xs), method)
        return solution.ys, solution.num_newton_steps

    ys, counts = jax.jit(jax.vmap(run))(gains)
    expected = jax.vmap(lambda g: loop(params | {"W": g * params["W"]}, y0, xs))(gains)
    assert_close(ys, expected, rounding())
    assert int(counts[0]) < int(counts[1])
    alone = jnp.stack([jax.jit(run)(gain)[1] for gain in gains])
    np.testing.assert_array_equal(np.asarray(counts), np.asarray(alone))


@pytest.mark.parametrize("num_steps", (0, 1))
def test_short(num_steps):
    inputs = (
        problem(num_steps=num_steps)
        if num_steps
        else (
            *problem(num_steps=1)[:2],
            jnp.zeros((0, 3)),
        )
    )
    step = recurrence(*problem(num_steps=1)).f
    params, y0, xs = inputs
    rec = Recurrence(step, y0, xs, StateFlattener(y0))
    solution = solve_trajectory(rec, Newton(guess=Constant()))
    assert_close(solution.ys, loop(params, y0, xs), rounding())


def test_a_good_guess_is_worth_iterations():
    inputs = problem(gain=1.5)
    answer = loop(*inputs)
    cold, _ = solve(*inputs, ALL_AT_ONCE)
    warm_method = eqx.tree_at(lambda m: m.guess, ALL_AT_ONCE, Trajectory(answer))
    warm, _ = solve(*inputs, warm_method)
    assert int(warm.num_newton_steps) == 1 < int(cold.num_newton_steps)
    assert_close(warm.ys, answer, rounding())


def test_tolerances_are_used():
    """A loose tolerance stops early, with a residual of its size."""
    inputs = problem(gain=1.2)
    at_once = dict(guess=Constant(), window=None, chunk=1, fallback=False)
    loosely = dict(rtol=0.0, atol=1e-2, **at_once)
    loose, _ = solve(*inputs, Newton(**loosely))
    tight, _ = solve(*inputs, ALL_AT_ONCE)
    assert int(loose.num_newton_steps) < int(tight.num_newton_steps)
    assert float(tight.residual) < float(loose.residual) <= 1e-2
    solution, _ = solve(*inputs, Newton(**loosely, norm=optx.two_norm))
    assert float(solution.residual) <= 1e-2


def long_ones():
    """Gains, and recurrences with them: by Newton's method, and the loop."""
    size, num_steps = 8, 1100
    keys = jr.split(jr.key(0), 3)
    weights = jr.normal(keys[0], (size, size)) / size**0.5
    # The last one is hard.
    gains = jnp.array([0.3, 0.6, 0.9, 3.0])
    xs = jr.normal(keys[1], (num_steps, size))

    def states(gain):
        f = both(lambda y, x: jnp.tanh(gain * (weights @ y)) + x)
        sol = solve_recurrence(f, jnp.zeros(size), xs, method=Newton())
        return sol.ys, sol.stats["num_newton_steps"]

    def loop(gain):
        f = both(lambda y, x: jnp.tanh(gain * (weights @ y)) + x)
        return lax.scan(f, jnp.zeros(size), xs)[1]

    return gains, states, loop


def test_a_batch_of_long_ones():
    """One after the other on a CPU: in the memory of one, each with its own count."""
    gains, states, loop = long_ones()
    batch = jax.jit(jax.vmap(states)).lower(gains).compile()
    ys, counts = batch(gains)
    assert_close(ys[:3], jax.vmap(loop)(gains[:3]), rounding())
    single = jax.jit(states).lower(gains[0]).compile()
    assert counts.tolist() == [int(single(gain)[1]) for gain in gains]
    assert counts[0] < counts[3]
    used = lambda program: program.memory_analysis().temp_size_in_bytes
    assert used(batch) < 2 * used(single)


@pytest.mark.slow(covered_by="test_tangent.py::test_a_batch")
def test_gradients_of_a_batch_of_long_ones():
    gains, states, loop = long_ones()

    def slopes(run):
        loss = lambda gain: jnp.mean(run(gain) ** 2)
        return jax.jit(jax.vmap(jax.vmap(jax.grad(loss))))(gains[:3][None])

    ours = slopes(lambda gain: states(gain)[0])
    assert_close(ours, slopes(loop), rounding())


def test_bad_input():
    inputs = problem(num_steps=5)
    with pytest.raises(ValueError, match="newton_max_steps.*got 0"):
        Newton(newton_max_steps=0)
    with pytest.raises(ValueError, match="rtol.*negative; got -1"):
        Newton(rtol=-1.0)
    with pytest.raises(ValueError, match="Coarse.every.*got 0"):
        Coarse(every=0)
    with pytest.raises(ValueError, match="each of the 5 steps.*shape .4, 3"):
        solve(*inputs, Newton(guess=Trajectory(jnp.zeros((4, 3)))))
    with pytest.raises(ValueError, match=r"3 numbers.*got 2 numbers"):
        solve(*inputs, Newton(guess=Trajectory(jnp.zeros((5, 2)))))
    with pytest.raises(ValueError, match="need 360 bytes, more than the 100"):
        solve(*inputs, Newton(Dense(max_bytes=100), Constant(), window=None, chunk=1))
    for bad in (dict(linearisation=0.5), dict(guess=jnp.zeros((5, 3)))):
        with pytest.raises(ValueError, match="must be a"):
            unchecked(Newton.__check_init__)(_fake(**bad))


class _Fake:
    pass


def _fake(**fields):
    """What `Newton(**fields)` is without run-time types."""
    fake, method = _Fake(), Newton()
    names = ("linearisation", "guess", "rtol", "atol", "newton_max_steps")
    fake.__dict__ = {name: getattr(method, name) for name in names} | fields
    return fake
