"""Windows that move along a trajectory, and the choice of how to go: same answers."""

import dataclasses
import functools as ft

import diffrax
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
    DEER,
    Auto,
    Dense,
    Newton,
    Obreshkov,
    Sequential,
    Window,
    diffeqsolve,
    scan,
    solve_recurrence,
)
from deer_ode._misc import is_reasonable
from deer_ode._plan import tracing_for

from .helpers import (
    assert_close,
    both,
    rounding,
    slow,
    slow_rows,
    solve_tanh_network as solve,
    tanh_cell,
    tanh_network,
)


F32 = jnp.float32


# --- what once went wrong -----------------------------------------------------------


def _sine(y, x):
    return jnp.sin(y) + x


def _recovers(y, x):
    return jnp.where(jnp.isnan(y), 0.0, jnp.sin(y) + jnp.where(x > 0, jnp.nan, 1.0))


def _forgets(y, x):
    return 0.5 * jnp.tanh(y) + x


def _large_units(y, x):
    return F32(0.5) * y + F32(1e10) * (1 + jnp.sin(x) * jnp.tanh(y / F32(1e10)))


def _times(y, x):
    return x * y


_pulses = jnp.where(jnp.arange(700) % 100 == 99, 1e11, 0.0).astype(F32)
_rates = jnp.where((jnp.arange(1500) // 100) % 2 == 0, 1.3, 1 / 1.3).astype(F32)

#: A step, where it starts, inputs, windows, and the first state that is not finite.
CASES = {
    "pulses": (_sine, F32(0.3), _pulses, Window(), -1),
    "NaN that disappears": (
        _recovers,
        jnp.asarray(0.3),
        jnp.zeros(200).at[jnp.array([50, 62])].set(1.0),
        Window(20),
        50,
    ),
    "a window that divides the steps": (
        _recovers,
        jnp.asarray(0.3),
        jnp.zeros(400).at[50].set(1.0),
        Window(20),
        50,
    ),
    "a short window": (
        _forgets,
        jnp.asarray(0.3),
        jnp.sin(jnp.arange(200.0)),
        Window(8),
        -1,
    ),
    "large units": (
        _large_units,
        F32(0.3),
        jnp.arange(3000, dtype=F32),
        Window(),
        -1,
    ),
    "growth and back": (_times, F32(0.3), _rates, Window(), -1),
}


@pytest.mark.parametrize(
    "name",
    slow(
        CASES,
        lambda name: (
            name in ("a short window", "large units", "a window that divides the steps")
        ),
    ),
)
def test_answers_that_were_wrong_once(name):
    step, y0, xs, window, nonfinite = CASES[name]
    solve = lambda: solve_recurrence(both(step), y0, xs, method=Newton(window=window))
    sol = jax.jit(lambda: solve()._replace(result=None))()
    expected = jax.jit(lambda: lax.scan(both(step), y0, xs))()[1]
    assert int(sol.stats["first_nonfinite_step"]) == nonfinite
    np.testing.assert_array_equal(np.isnan(sol.ys), np.isnan(expected))
    # Relative, state by state: thousands of roundings of 1e-7 where nothing is
    # forgotten. What once was wrong was wrong in all digits.
    np.testing.assert_allclose(sol.ys, expected, rtol=1e-4, atol=1e-6)


# --- recurrences --------------------------------------------------------------------


def problem(num_steps=100, size=3, gain=0.8, seed=0):
    return tanh_network(num_steps, size, gain, seed)


@eqx.filter_jit
def loop(weights, y0, xs, reverse=False, noise=0.0):
    """One after the other, each state off by so many units of rounding at random."""
    unit = noise * float(jnp.finfo(y0.dtype).eps)

    def step(y, inputs):
        x, kick = inputs
        y = tanh_cell(weights, y, x) * (1 + unit * kick)
        return y, y

    kicks = jr.rademacher(jr.key(7), xs.shape, xs.dtype)
    return lax.scan(step, y0, (xs, kicks), reverse=reverse)[1]


def bound(*inputs, reverse=False):
    """How far an answer may be off: rounding, as the recurrence multiplies it."""
    off = loop(*inputs, reverse, noise=4.0) - loop(*inputs, reverse)
    return 50 * float(jnp.abs(off).max()) + rounding()


WINDOWS = (Window(8), Window(16), Window(1000), None)


def solve_in_parallel(*inputs, method, **kwargs):
    """No step is left to a loop: what does not converge is infinite. Without the finish
    there is half as much to compile.
    """
    method = dataclasses.replace(method, fallback=False)
    return solve(*inputs, method, throw=False, **kwargs)


#: Steps that windows cut, and a single step. Without windows it is in `test_scan.py`.
CUT_OR_SINGLE = ((Window(8), 101, True), (Window(16), 1, False))


@pytest.mark.parametrize(
    "window, num_steps, reverse",
    slow_rows(
        [
            (window, *row)
            for window in WINDOWS
            for row in ((1, False), (3, False), (101, True))
        ],
        lambda row: row not in CUT_OR_SINGLE,
    ),
    ids=str,
)
def test_contractive(window, num_steps, reverse):
    """Windows that do not divide the steps, and are longer than all of them."""
    inputs = problem(num_steps)
    sol = solve_in_parallel(*inputs, method=Newton(window=window), reverse=reverse)
    assert_close(sol.ys, loop(*inputs, reverse), rounding())
    assert_close(sol.carries, sol.ys, 0.0)
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert int(sol.stats["num_good_steps"]) == num_steps


# The programs of the next test.
each_window = pytest.mark.parametrize(
    "window", slow(WINDOWS, lambda w: w not in (Window(16), None)), ids=str
)


@each_window
def test_wild(window):
    inputs = problem(gain=10.0, seed=2)
    sol = solve(*inputs, Newton(window=window))
    tol = bound(*inputs)
    assert tol < 1e-3
    assert_close(sol.ys, loop(*inputs), tol)


@each_window
def test_warm(window):
    inputs = problem(gain=1.2)
    method = Newton(window=window)
    cold = solve(*inputs, method)
    warm = solve(*inputs, method, guess=cold.carries)
    assert_close(warm.ys, loop(*inputs), bound(*inputs))
    counts = [int(sol.stats["num_newton_steps"]) for sol in (warm, cold)]
    assert counts[0] < counts[1]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    # Compiled once for each pair.
    case=st.sampled_from(((Window(1), 7), (Window(16), 90))),
    gain=st.floats(0.1, 12.0),
    seed=st.integers(0, 2**31 - 1),
)
def test_random(case, gain, seed):
    window, num_steps = case
    inputs = problem(num_steps, gain=gain, seed=seed)
    sol = solve(*inputs, Newton(window=window))
    assert_close(sol.ys, loop(*inputs), bound(*inputs))


def test_a_hopeless_recurrence_wastes_little():
    """Chaos in every step: rounding is all over the place after 50 of them."""
    f = both(lambda y, x: 4 * y * (1 - y) + x)
    xs = jnp.zeros(4000)
    method = Newton(window=Window(256))
    sol = jax.jit(
        lambda: solve_recurrence(f, jnp.asarray(0.3), xs, method=method)._replace(
            result=None
        )
    )()
    # Each state is what the one before it leads to.
    before = jnp.concatenate([jnp.array([0.3]), sol.ys[:-1]])
    np.testing.assert_allclose(sol.ys, 4 * before * (1 - before), rtol=0, atol=1e-13)
    assert_close(sol.ys[:20], lax.scan(f, jnp.asarray(0.3), xs[:20])[1], 1e-9)
    # A window fails after twice 8 iterations without progress; then 4 windows of steps
    # are sequential, the next time 16. So 12 failures are more than 4,000 steps have.
    assert int(sol.stats["num_newton_steps"]) <= 12 * 16
    assert int(sol.stats["num_fallback_steps"]) > 2000


def logistic(last, **kwargs):
    f = both(lambda y, x: 4 * y * (1 - y) + x)
    xs = jnp.zeros(1000).at[-1].set(last)
    return solve_recurrence(f, jnp.asarray(0.3), xs, method=Newton(**kwargs))


@pytest.mark.parametrize("last", slow((np.inf, np.nan), np.isnan))
def test_an_infinite_error_is_no_progress(last):
    """Of the last step, whatever comes before it: two tries of 8 iterations each."""
    stats = jax.jit(lambda last: logistic(last).stats)(last)
    assert int(stats["num_newton_steps"]) == 16


@pytest.mark.parametrize(
    "window", slow((Window(), None, Window(100)), lambda w: w is not None), ids=str
)
def test_one_window_is_one(window):
    sol = solve(*problem(), Newton(window=window))
    assert int(sol.stats["num_windows"]) == 1


@pytest.mark.parametrize(
    "window", slow((None, Window(300)), lambda w: w is None), ids=str
)
def test_windows_there_is_no_memory_for_are_left_out(window):
    inputs = problem(400)
    # Jacobians of 40 steps, of which the first window has many more.
    scarce = Dense(40 * 9 * 8)
    sol = solve_in_parallel(*inputs, method=Newton(scarce, window=Window(25)))
    assert_close(sol.ys, loop(*inputs), rounding())
    with pytest.raises(ValueError, match="dense Jacobians of .* steps"):
        solve(*inputs, Newton(scarce, window=window, chunk=1))
    # Several steps are taken as one instead.
    sol = solve_in_parallel(*inputs, method=Newton(scarce, window=window))
    assert_close(sol.ys, loop(*inputs), rounding())


def test_what_overflows_is_not_reasonable():
    largest = jnp.array([1e36], F32)
    ys = jnp.array([[1e38], [np.inf], [np.nan], [-np.inf]], F32)
    assert is_reasonable(ys, largest).tolist() == [True, False, False, False]


HARD = problem(gain=6.0, seed=4)


@pytest.mark.parametrize(
    "window", slow((Window(8), None), lambda w: w is None), ids=str
)
def test_without_a_finish(window):
    method = Newton(window=window, newton_max_steps=3, fallback=False)
    sol = solve(*HARD, method, throw=False)
    good = int(sol.stats["num_good_steps"])
    assert 0 < good < 100
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert_close(sol.carries[:good], loop(*HARD)[:good], bound(*HARD))
    assert bool(jnp.all(jnp.isinf(sol.carries[good:])))
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        solve(*HARD, method)


def test_nothing_is_put_out_after_the_answer():
    """Also where `ys` is not the carry itself."""
    f = lambda y, x: (jnp.sin(30 * y) + x, 2 * y)
    method = Newton(window=None, chunk=1, newton_max_steps=2, fallback=False)
    sol = solve_recurrence(
        f, jnp.asarray(0.3), jnp.linspace(0.0, 1.0, 20), method=method, throw=False
    )
    good = int(sol.stats["num_good_steps"])
    assert 0 < good < 19
    np.testing.assert_allclose(sol.ys[1:good], 2 * sol.carries[: good - 1])
    assert bool(jnp.all(jnp.isinf(sol.ys[good:])))


METHODS = {
    "windows": Newton(window=Window(8)),
    "long windows": Newton(window=Window(64)),
    "fallen back": Newton(window=None, newton_max_steps=2),
    "Auto": Auto(),
}


@pytest.mark.parametrize(
    "name, size",
    slow_rows(
        [*((name, 4) for name in METHODS), ("windows", 30), ("Auto", 30)],
        lambda row: row != ("long windows", 4),
    ),
)
def test_gradients(name, size):
    """Those of `lax.scan`, however the answer was found."""
    inputs = problem(size=size, gain=0.9)

    def loss(run, weights, y0, xs):
        return jnp.sum(jnp.sin(run(both(ft.partial(tanh_cell, weights)), y0, xs)[1]))

    ours = ft.partial(scan, method=METHODS[name])
    slopes = [
        jax.jit(jax.grad(ft.partial(loss, run), (0, 1, 2)))(*inputs)
        for run in (ours, lax.scan)
    ]
    assert_close(*slopes, rounding())


# --- differential equations ---------------------------------------------------------


def lorenz(t, y, args):
    del t, args
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


@eqx.filter_jit
def integrate(solver, method, t1, dt0, y0):
    return diffeqsolve(
        diffrax.ODETerm(lorenz),
        DEER(solver, method),
        0.0,
        t1,
        dt0,
        y0,
        saveat=diffrax.SaveAt(steps=True),
    )


ON_THE_ATTRACTOR = jnp.array([-3.3, -5.7, 14.0])


@pytest.mark.parametrize(
    "solver, dt0, window",
    (
        (diffrax.Heun(), 0.01, Window(16)),
        pytest.param(Obreshkov(1), 0.02, Window(8), marks=pytest.mark.slow),
        pytest.param(Obreshkov(), 0.02, Window(8), marks=pytest.mark.slow),
    ),
    ids=("map", "equation", "equation of a high order"),
)
def test_lorenz(solver, dt0, window):
    arguments = (1.5, dt0, ON_THE_ATTRACTOR)
    sol = integrate(solver, Newton(window=window), *arguments)
    expected = integrate(solver, Sequential(), *arguments)
    # Errors grow by e^(0.9 t) on average and by a factor of ten more at times.
    assert_close(sol.ys, expected.ys, 100 * rounding())
    assert (
        int(sol.stats["num_newton_steps"])
        > 0
        == int(expected.stats["num_newton_steps"])
    )


def test_windows_begin_afresh():
    """After the whole interval, which does not converge, as planned for an accelerator,
    they leave no step sequential.
    """
    arguments = (diffrax.Heun(), Newton(), 30.0, 0.005, jnp.ones(3))
    with tracing_for("accelerator"):
        # By a function of its own, which is not in a cache.
        sol = eqx.filter_jit(lambda y0: integrate.__wrapped__(*arguments[:-1], y0))(
            arguments[-1]
        )
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert int(sol.stats["num_windows"]) > 1


@pytest.mark.slow(covered_by="test_documented_rows.py::test_row")
def test_windows_last_where_the_whole_does_not():
    run = lambda method, y0: integrate(diffrax.Tsit5(), method, 20.0, 0.01, y0)
    whole = run(Newton(window=None), ON_THE_ATTRACTOR)
    windows = run(Newton(window=Window(128)), ON_THE_ATTRACTOR)
    assert int(whole.stats["num_fallback_steps"]) > 0
    assert int(windows.stats["num_fallback_steps"]) == 0
    assert int(windows.stats["num_windows"]) > 2000 // 128
    # What chaos makes of four units of rounding at the beginning, times 50.
    expected = run(Sequential(), ON_THE_ATTRACTOR)
    off = run(Sequential(), ON_THE_ATTRACTOR * (1 + 2.0**-50))
    error = np.maximum.accumulate(np.abs(off.ys - expected.ys).max(axis=1))
    assert error[-1] < 1e-4
    for sol in (whole, windows):
        actual = np.abs(sol.ys - expected.ys).max(axis=1)
        assert np.all(actual <= 50 * error + rounding())


@pytest.mark.slow(covered_by="test_documented_rows.py::test_row")
def test_many_windows_last_over_long_chaos():
    """Fifty Lyapunov times, with the default options: no step is left to a loop."""

    @jax.jit
    def run(y0):
        solver = DEER(diffrax.Tsit5(), Newton())
        sol = diffeqsolve(diffrax.ODETerm(lorenz), solver, 0.0, 55.19, 0.005, y0)
        return sol.stats

    stats = run(jnp.ones(3))
    assert int(stats["num_steps"]) == 11_038
    assert int(stats["num_fallback_steps"]) == 0
    assert int(stats["num_newton_steps"]) <= 140
