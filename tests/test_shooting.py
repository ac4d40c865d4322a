"""Several steps as one: the same answers, for any number of them."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
import pytest

from deer_ode import (
    DEER,
    Constant,
    Dense,
    Newton,
    Obreshkov,
    RadauIIA,
    Trajectory,
    Window,
    diffeqsolve,
    solve_recurrence,
)
from deer_ode._plan import _chunk_that_fits

from .helpers import (
    ROOT_FINDER,
    assert_close,
    both,
    quick,
    rounding,
    slow,
    slow_rows,
    solve_tanh_network as solve,
    tanh_cell,
    tanh_network,
)


@eqx.filter_jit
def loop(weights, y0, xs, reverse=False):
    f = both(ft.partial(tanh_cell, weights))
    return lax.scan(f, y0, xs, reverse=reverse)[1]


CHUNKS = (1, 2, 7, 50, 51, 1000)


WINDOWS = (None, Window(16), Window(24))
#: Chunks of the whole, of what is left over, and longer than all, with and without
#: windows.
ORDINARY = ((2, None), (7, Window(24)), (50, Window(16)), (1000, None))


@pytest.mark.parametrize(
    "chunk, window",
    slow_rows(
        [(chunk, window) for chunk in CHUNKS for window in WINDOWS],
        lambda row: row not in ORDINARY,
    ),
    ids=str,
)
def test_any_chunk(chunk, window):
    """Chunks that do not divide the steps, and are longer than all of them."""
    inputs = tanh_network(50, gain=0.8)
    method = Newton(window=window, chunk=chunk, fallback=False)
    sol = solve(*inputs, method, reverse=chunk == 7)
    assert_close(sol.ys, loop(*inputs, reverse=chunk == 7), rounding())
    assert int(sol.stats["num_good_steps"]) == 50
    assert int(sol.stats["num_fallback_steps"]) == 0


def test_fewer_iterations():
    """A chunk goes right through what Newton's method finds step by step."""
    inputs = tanh_network(200, gain=3.0, seed=3)
    plain, chunks = (
        solve(*inputs, Newton(window=None, chunk=chunk, fallback=False))
        for chunk in (1, 100)
    )
    count = lambda sol: int(sol.stats["num_newton_steps"])
    # Two chunks: the second one is right once the first one is.
    assert count(chunks) <= 3 < count(plain)


@pytest.mark.parametrize(
    "window, fallback",
    slow_rows(
        [
            (window, fallback)
            for window in (None, Window(8))
            for fallback in (True, False)
        ],
        lambda row: (row[0] is None) != row[1],
    ),
    ids=str,
)
def test_the_step_that_is_not_a_number(window, fallback):
    """The first one, within a chunk."""
    xs = jnp.ones(40).at[21].set(-1.0)
    f = both(lambda y, x: 0.5 * y + jnp.sqrt(x))
    method = Newton(window=window, chunk=8, fallback=fallback)
    run = jax.jit(
        lambda: solve_recurrence(f, jnp.array(0.3), xs, method=method, throw=False)
    )
    sol = run()
    expected = lax.scan(f, jnp.array(0.3), xs)[1]
    assert int(sol.stats["first_nonfinite_step"]) == 21
    assert_close(sol.ys[:21], expected[:21], rounding())
    if fallback:
        assert bool(jnp.all(jnp.isnan(sol.ys[21:])))
    else:
        assert int(sol.stats["num_good_steps"]) == 21
        assert sol.result == optx.RESULTS.nonfinite


@pytest.mark.parametrize("fallback", (True, False))
def test_a_state_within_a_chunk_that_is_not_finite(fallback):
    """Where the chunk ends well: right with a finish, and no answer without one."""

    def step(y, i):
        y = jnp.where(i == 10, jnp.inf, jnp.where(i == 12, 0.0, 0.5 * y + 1))
        return (y,) * 2

    method = Newton(chunk=8, fallback=fallback)
    inputs = jnp.array(0.3), jnp.arange(32)
    sol = jax.jit(lambda: solve_recurrence(step, *inputs, method=method, throw=False))()
    assert int(sol.stats["first_nonfinite_step"]) == 10
    if fallback:
        assert_close(sol.ys[12:], lax.scan(step, *inputs)[1][12:], rounding())
    else:
        assert sol.result == optx.RESULTS.nonfinite
        assert int(sol.stats["num_good_steps"]) == 10


def test_numbers_within_a_chunk_that_are_larger_than_its_ends():
    """Rounding is that of the large ones: no iteration makes the residual smaller.

    Chunks of 16 steps are periods of both.
    """
    times = jnp.arange(2048) / 16
    wave = both(lambda y, t: y + jnp.cos(2 * jnp.pi * t) / 16)
    method = Newton(chunk=16, window=None, fallback=False)
    run = lambda times: solve_recurrence(wave, jnp.array(0.0), times, method=method).ys
    expected = lax.scan(wave, jnp.array(0.0), times)[1]
    assert_close(quick(run)(times), expected, rounding())


@pytest.mark.slow(
    covered_by="test_numbers_within_a_chunk_that_are_larger_than_its_ends"
)
def test_a_component_of_a_state_that_is_larger_within_a_chunk():
    """The same of a differential equation, by steps that are almost exact."""
    oscillator = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -y[0]]))
    dt0 = float(jnp.pi) / 8
    sol = diffeqsolve(
        oscillator, DEER(diffrax.Dopri8(), Newton(chunk=16, window=None)), 0.0,
        2048 * dt0, dt0, jnp.array([0.0, 1.0]),
    )  # fmt: skip
    assert int(sol.stats["num_fallback_steps"]) == 0
    assert int(sol.stats["num_newton_steps"]) <= 8


def test_without_a_finish():
    inputs = tanh_network(101, gain=6.0, seed=4)
    method = Newton(window=None, chunk=4, newton_max_steps=3, fallback=False)
    sol = solve(*inputs, method, throw=False)
    good = int(sol.stats["num_good_steps"])
    assert 0 < good < 101 and good % 4 == 0
    assert sol.result == optx.RESULTS.nonlinear_max_steps_reached
    # Three chunks are right for certain; what chaos makes of rounding until then.
    assert_close(sol.carries[:good], loop(*inputs)[:good], 1e-6)
    assert bool(jnp.all(jnp.isinf(sol.carries[good:])))


@pytest.mark.parametrize("num_steps", slow((48, 50), lambda n: n == 48))
def test_a_given_guess(num_steps):
    inputs = tanh_network(num_steps, gain=1.2)
    plain = Newton(chunk=8, window=None, fallback=False)
    cold = solve(*inputs, plain)
    for method, guess in (
        (plain, cold.carries),
        (plain.start_from(Trajectory(cold.carries)), None),
    ):
        warm = solve(*inputs, method, guess=guess)
        assert_close(warm.ys, cold.ys, rounding())
        assert (
            int(warm.stats["num_newton_steps"])
            == 1
            < int(cold.stats["num_newton_steps"])
        )


def test_jacobians_that_do_not_fit():
    """Where 100 of them would, for 4,000 steps: the solve goes on all the same."""
    inputs = tanh_network(4000, gain=0.8)
    few = Newton(Dense(100 * 9 * 8), window=None, fallback=False)
    assert_close(solve(*inputs, few).ys, loop(*inputs), rounding())


@pytest.mark.parametrize(
    "num_steps, bytes_per_step, max_bytes, chunk",
    ((100, 1, 100, 1), (101, 1, 100, 2), (100, 10, 100, 16), (100, 10, 5, 100)),
)
def test_chunk_that_fits(num_steps, bytes_per_step, max_bytes, chunk):
    fits = lambda n: n * bytes_per_step <= max_bytes
    assert _chunk_that_fits(num_steps, fits) == chunk


# --- differential equations ---------------------------------------------------------


def pendulum(t, y, args):
    angle, speed = y
    return jnp.stack([speed, -args * jnp.sin(angle) + 0.1 * jnp.cos(t)])


@pytest.mark.parametrize(
    "max_steps, window",
    [
        (123, None),
        pytest.param(100, None, marks=pytest.mark.slow),
        pytest.param(100, Window(40), marks=pytest.mark.slow),
        pytest.param(123, Window(40), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_differential_equation(max_steps, window):
    """With padding, saves and an event, and its gradients."""

    def run(solver, args, solve):
        sol = solve(
            diffrax.ODETerm(pendulum), solver, 0.0, 10.0, 0.1, jnp.array([2.0, 0.0]),
            args, saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 10.0, 30), t1=True),
            max_steps=max_steps,
            event=diffrax.Event(lambda t, y, args, **kwargs: t > 7.7),
        )  # fmt: skip
        return jnp.sum(jnp.where(jnp.isfinite(sol.ys), sol.ys, 0) ** 2), sol.ys

    def both_of(solver, solve):
        fn = jax.value_and_grad(lambda a: run(solver, a, solve), has_aux=True)
        return quick(fn)(jnp.array(1.3))

    method = Newton(guess=Constant(), chunk=8, window=window, fallback=False)
    chunked = DEER(diffrax.Heun(), method)
    actual = both_of(chunked, diffeqsolve)
    assert_close(actual, both_of(diffrax.Heun(), diffrax.diffeqsolve), rounding())


def test_batches():
    weights, y0, xs = tanh_network(60, gain=1.0)
    starts = jnp.stack([y0, 2 * y0, -y0])
    method = Newton(chunk=8, window=None, fallback=False)
    run = lambda y0: solve(weights, y0, xs, method).ys
    expected = quick(jax.vmap(lambda y0: loop(weights, y0, xs)))(starts)
    assert_close(quick(jax.vmap(run))(starts), expected, rounding())


@pytest.mark.parametrize(
    "solver",
    (RadauIIA(2), Obreshkov(), diffrax.ImplicitEuler(root_finder=ROOT_FINDER)),
    ids=("collocation", "Obreshkov", "implicit Euler"),
)
def test_steps_that_are_equations(solver):
    with pytest.raises(ValueError, match=r"chunk=4.*only explicit steps"):
        diffeqsolve(
            diffrax.ODETerm(pendulum), DEER(solver, Newton(chunk=4)), 0.0, 1.0, 0.1,
            jnp.array([2.0, 0.0]), 1.0,
        )  # fmt: skip


@pytest.mark.parametrize("chunk", (0, -1, True))
def test_wrong_chunks(chunk):
    with pytest.raises(ValueError, match="`Newton.chunk=.*positive integer.*got"):
        Newton(chunk=chunk)


@pytest.mark.parametrize(
    "solver",
    [diffrax.Euler(), pytest.param(diffrax.EulerHeun(), marks=pytest.mark.slow)],
)
def test_explicit_steps_without_a_tableau(solver):
    term = diffrax.ODETerm(lambda t, y, args: -jnp.sin(y))
    noise = diffrax.ControlTerm(
        lambda t, y, args: 0.1 * y,
        diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(0)),
    )
    if isinstance(solver, diffrax.EulerHeun):
        term = diffrax.MultiTerm(term, noise)
    problem = (0.0, 1.0, 1 / 16, jnp.array(1.0))
    method = Newton(guess=Constant(), chunk=4, window=None, fallback=False)
    sol = diffeqsolve(term, DEER(solver, method), *problem)
    expected = diffrax.diffeqsolve(term, solver, *problem)
    assert_close(sol.ys, expected.ys, rounding())
