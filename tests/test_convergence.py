"""Hard dynamics: the answer is the sequential one, or says where it could not be."""

import functools

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import deer_ode
from benchmarks import _hard
from deer_ode import (
    Auto,
    LevenbergMarquardt,
    Newton,
    Trajectory,
    Window,
    solve_recurrence,
)

from .helpers import assert_close, both, rounding, slow, slow_rows, sqrt_eps


def problems():
    found = {p.name: p for p in _hard.equations() + _hard.recurrences()}
    assert len(found) >= 30
    return found


PROBLEMS = problems()

#: One of each kind: chaos, networks, and states that become NaN. Stiffness and fields
#: that are nowhere finite have their own tests. Each takes four programs, and equations
#: take long to compile.
ORDINARY = (
    "Lorenz, 10 Lyapunov times, Tsit5",
    "GRU, weights x 100",
    "square root of y - 10",
)
assert PROBLEMS.keys() >= set(ORDINARY)

#: How many times more than a rounding error of 4 units in each step leads to.
NOISE = 50


def bound_of_rounding(problem, expected):
    """For each step how far off other errors of rounding lead by then."""
    noisy = eqx.filter_jit(problem.noisy)
    worst = np.zeros(expected.shape[0])
    for key in jr.split(jr.key(0), 3):
        off = distance(np.asarray(noisy(problem.start, key)), expected)
        worst = np.maximum(worst, off.max(axis=1))
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    return NOISE * np.maximum.accumulate(worst) + rounding() * scale


def distance(actual, expected):
    """Zero where either is not a finite number."""
    with np.errstate(invalid="ignore"):
        off = np.abs(actual - expected)
    return np.where(np.isfinite(off), off, 0.0)


def check(problem, method, expected, bound):
    actual, stats = eqx.filter_jit(problem.solve)(problem.start, method)
    actual = np.asarray(actual)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), finite)
    off = distance(actual, expected).max(axis=1)
    assert (off <= bound).all(), (method, off.max(), int(np.argmax(off > bound)))
    # Even where rounding decides what the answer is, every step is a step.
    step_again = eqx.filter_jit(problem.again)
    left = distance(np.asarray(step_again(problem.start, jnp.asarray(actual))), actual)
    scale = np.abs(expected[finite]).max(initial=0.0)
    # The equations within a step of Kvaerno5 are solved to a relative 1e-10.
    tolerance = 1e-9 if problem.name.endswith("Kvaerno5") else rounding()
    assert left.max() <= tolerance * scale, (method, left.max())
    where = np.flatnonzero(~finite.all(axis=1))
    assert int(stats["first_nonfinite_step"]) == (where[0] if where.size else -1)


@functools.cache
def twin_and_bound(name):
    problem = PROBLEMS[name]
    expected = np.asarray(eqx.filter_jit(problem.twin)(problem.start))
    return expected, bound_of_rounding(problem, expected)


@pytest.mark.parametrize(
    "name, method",
    slow_rows(
        [(name, method) for name in PROBLEMS for method in (Auto(), Newton())],
        # On a CPU the default is the loop that the answer is compared with.
        lambda row: row[0] not in ORDINARY or row[1] == Auto(),
    ),
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_hard_dynamics(name, method):
    check(PROBLEMS[name], method, *twin_and_bound(name))


REMEDIES = {
    "plain": Newton(window=None),
    "a short window": Newton(window=Window(32)),
    "damped": Newton(damping=LevenbergMarquardt()),
}


@pytest.mark.parametrize(
    "name", ("Lorenz, 10 Lyapunov times, Tsit5", "GRU, weights x 10")
)
@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.slow(covered_by="test_hard_dynamics")
def test_every_remedy(name, remedy):
    check(PROBLEMS[name], REMEDIES[remedy], *twin_and_bound(name))


@pytest.mark.slow(covered_by="test_hard_dynamics")
def test_trained_network():
    """Five layers that do what they were trained for."""
    cells, accuracy = _hard.train_classifier(80, 60, 4)
    assert accuracy >= 0.8
    xs = _hard.signals(jr.key(2), 1, 60)[0][0]
    expected = xs
    for cell in cells:
        step = both(lambda y, x, cell=cell: cell(x, y))
        expected = lax.scan(step, jnp.zeros(4), expected)[1]
    run = eqx.filter_jit(_hard.layers)
    for method in (Auto(), Newton()):
        assert_close(run(cells, xs, method)[0], expected, rounding())
    assert int(run(cells, xs, Newton())[1]["num_fallback_steps"]) == 0


# --- many recurrences ---------------------------------------------------------------

LANES, STEPS, SIZE = 100, 60, 3

KINDS = {
    "tanh": lambda y, z: jnp.tanh(z),
    "relu": lambda y, z: jnp.maximum(z, 0.0),
    "linear": lambda y, z: z,
    "sine": lambda y, z: jnp.sin(3 * z),
    "gated": lambda y, z: y + jax.nn.sigmoid(z) * (jnp.tanh(z) - y),
    "square": lambda y, z: 1 - z**2,
    "root": lambda y, z: jnp.sqrt(z),
}


@eqx.filter_jit
def many(key, gain, kind, method):
    """For each lane whether its answer is the loop's, and what it says of itself."""

    def one(key):
        keys = jr.split(key, 4)
        W = gain * jr.normal(keys[0], (SIZE, SIZE)) / SIZE**0.5
        xs = jr.normal(keys[1], (STEPS, SIZE))
        start = jr.normal(keys[2], (SIZE,))
        full = lambda a, b: jnp.matmul(a, b, precision="highest")

        step = both(lambda y, x: lax.switch(kind, [*KINDS.values()], y, full(W, y) + x))

        def noisy(y, inputs):
            x, key = inputs
            y = _hard.rounded_otherwise(step(y, x)[0], key)
            return y, y

        sol = solve_recurrence(step, start, xs, method=method, throw=False)
        expected = lax.scan(step, start, xs)[1]
        several = jax.vmap(
            lambda key: lax.scan(noisy, start, (xs, jr.split(key, STEPS)))[1]
        )
        off = several(jr.split(keys[3], 3)) - expected[None]
        # Past overflow all is allowed.
        off = jnp.where(jnp.isfinite(off), jnp.abs(off), jnp.inf)
        noise = jnp.max(off, axis=(0, 2))
        size = lax.cummax(jnp.max(jnp.abs(expected), axis=1))
        bound = NOISE * lax.cummax(noise) + rounding() * size
        # NaN on some machines, since XLA's maximum of NaN is either.
        bound = jnp.where(jnp.isnan(bound), jnp.inf, bound)
        same = jnp.abs(sol.ys - expected) <= bound[:, None]
        same = same | (jnp.isnan(sol.ys) & jnp.isnan(expected))
        same = same | jnp.isinf(bound)[:, None]
        steps = jnp.arange(STEPS, dtype=jnp.int32)
        claimed = steps < sol.stats["num_good_steps"]
        fine = jnp.all(same | ~claimed[:, None])
        tight = jnp.isfinite(bound[-1]) & (bound[-1] <= 1e-6 * size[-1])
        return fine, tight, sol.stats["num_good_steps"]

    return jax.vmap(one)(jr.split(key, LANES))


def pytest_generate_tests(metafunc):
    if "num_recurrences" in metafunc.fixturenames:
        count = metafunc.config.getoption("--recurrences")
        metafunc.parametrize("num_recurrences", [count])


# Each is a program that takes long to compile; the first has all parts of the others.
@pytest.mark.parametrize(
    "method",
    slow(
        (
            Newton(window=Window(16)),
            Newton(window=None),
            Newton(window=Window(16), fallback=False),
        ),
        lambda method: method != Newton(window=Window(16)),
    ),
    ids=("windows", "whole", "without a finish"),
)
def test_no_wrong_answer_is_called_right(num_recurrences, method):
    """Stable and unstable ones; `--recurrences` for more of them."""
    total = tight = 0

    @settings(
        max_examples=-(-num_recurrences // LANES), deadline=None, derandomize=True
    )
    @given(
        st.integers(0, 2**31 - 1),
        st.sampled_from([0.3, 0.9, 1.5, 3.0, 10.0]),
        st.integers(0, len(KINDS) - 1),
    )
    def run(seed, gain, kind):
        nonlocal total, tight
        fine, is_tight, num_good = many(
            jr.key(seed), jnp.asarray(gain), jnp.asarray(kind), method
        )
        assert bool(jnp.all(fine)), np.flatnonzero(~np.asarray(fine))
        if method.fallback:
            assert bool(jnp.all(num_good == STEPS))
        total += LANES
        tight += int(jnp.sum(is_tight))

    run()
    # Hypothesis may find fewer examples than asked for, but not by much.
    assert total >= 0.9 * num_recurrences
    # The comparison means something for most of them.
    assert tight >= 0.4 * total


def test_debug_nans():
    """Iterates that are no numbers raise nothing where the answer is finite."""
    xs = jnp.linspace(-2.0, 2.0, 40)
    # From here a step leads to what is not a number.
    far = Newton(guess=Trajectory(jnp.full(40, jnp.inf)))

    def loss(scale, solve):
        wild = both(lambda y, x: jnp.sinh(scale * jnp.sin(20 * y)) + x)
        return jnp.sum(solve(wild, 0.1, xs)[1])

    parallel = functools.partial(deer_ode.scan, method=far)
    expected = loss(0.7, lax.scan)
    with jax.debug_nans(True):
        value = jax.jit(lambda scale: loss(scale, parallel))(0.7)
        slope = jax.jit(jax.grad(lambda scale: loss(scale, parallel)))(0.7)
    # The sum of forty states of a chaotic map, which lose half their digits.
    assert_close(value, expected, sqrt_eps())
    assert bool(jnp.isfinite(slope))
