"""One Jacobian of the field for all stages of a step: what stands for the derivative,
where it is used, and that it changes no answer and no gradient.
"""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deer_ode import (
    DEER,
    Constant,
    Dense,
    Exact,
    Newton,
    Obreshkov,
    SharedJacobian,
    diffeqsolve,
)
from deer_ode._discretisation import Grid, discretise
from deer_ode._discretisation._explicit_rk import SimplifiedStep

from .helpers import (
    assert_close,
    lotka_volterra,
    lotka_volterra_args,
    parallel_steps,
    quick,
    rounding,
    sequential_steps,
    slow,
    slow_rows,
)


SIZE = 3
#: Neither windows nor chunks nor a sequential finish: fewer programs to compile. What
#: does not converge is infinite.
SHARED, EXACT = (
    Newton(linearisation, guess=Constant(), window=None, chunk=1, fallback=False)
    for linearisation in (SharedJacobian(), Dense())
)
#: Fewer stages than others have, and the same formula.
SOLVER = diffrax.Bosh3()


def weights(dtype=jnp.float64, gain=2.0, width=24):
    keys = jr.split(jr.key(0), 2)
    first = gain * jr.normal(keys[0], (width, SIZE)) / SIZE**0.5
    second = gain * jr.normal(keys[1], (SIZE, width)) / width**0.5
    return first.astype(dtype), second.astype(dtype)


def field(t, y, args):
    first, second = args
    return second @ jnp.tanh(first @ y + jnp.sin(3 * t)[None])


def start(dtype=jnp.float64):
    return jnp.array([0.5, -0.3, 0.1], dtype)


def steps_of(
    h, term=diffrax.ODETerm(field), solver=diffrax.Tsit5(), y0=None, args=None
):
    """The recurrence of three steps of length `h`, the last of them padding."""
    ends = h * jnp.arange(1.0, 4.0)
    grid = Grid(ends - h, ends, jnp.array([True, True, False]))
    y0 = start() if y0 is None else y0
    args = weights() if args is None else args
    return discretise(solver, term, grid, y0, args).recurrence


def jacobians(recurrence):
    ys = recurrence.y0[None] + jnp.linspace(0.0, 0.4, 3)[:, None]
    values, A = recurrence.jacobians(ys, Dense())
    return values, A.matrix


def test_it_is_the_jacobian_up_to_the_third_power():
    steps = np.array([0.08, 0.04, 0.02, 0.01])
    errors = []

    @jax.jit
    def both(h):
        recurrence = steps_of(h)
        return jacobians(recurrence), jacobians(recurrence.simplified())

    for h in steps:
        (values, A), (same_values, simplified) = both(h)
        np.testing.assert_array_equal(np.asarray(values), np.asarray(same_values))
        # Padding does nothing, and its derivative is that of nothing.
        np.testing.assert_array_equal(np.asarray(simplified[2]), np.eye(SIZE))
        errors.append(float(jnp.max(jnp.abs(A - simplified))))
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # The next power is not negligible for the longest of them.
    assert 2.9 < slope < 3.2


def test_of_a_linear_field_it_is_the_series():
    """Tsit5 has the exponential's series up to its fifth power."""
    matrix = jr.normal(jr.key(1), (SIZE, SIZE))
    linear = lambda t, y, args: sum([args[0] @ y for _ in range(20)]) / 20
    h = 0.1
    steps = lambda matrix: steps_of(h, diffrax.ODETerm(linear), args=(matrix,))
    _, A = quick(lambda matrix: jacobians(steps(matrix).simplified()))(matrix)
    hJ, one = h * np.asarray(matrix), np.eye(SIZE)
    series = one + hJ @ (one + hJ / 2 @ (one + hJ / 3))
    assert_close(A[0], jnp.asarray(series), rounding())


def test_where_it_is_used():
    """Where it is less work, by objects and not by times."""
    is_simplified = lambda recurrence: recurrence.simplified() is not recurrence
    assert is_simplified(steps_of(0.1))
    cheap = diffrax.ODETerm(lotka_volterra)
    args = lotka_volterra_args()
    assert not is_simplified(steps_of(0.1, cheap, y0=start()[:2], args=args))
    # An exponential of this size is more work than the field.
    wide = diffrax.ODETerm(lambda t, y, args: jnp.sin(y) + jnp.roll(y, 1))
    assert not is_simplified(steps_of(0.1, wide, y0=jnp.zeros(60)))
    # One stage has nothing to share, and an implicit method solves for its own.
    assert not is_simplified(steps_of(0.1, solver=diffrax.Euler()))
    implicit = diffrax.ImplicitEuler(diffrax.VeryChord(rtol=1e-8, atol=1e-8))
    assert not is_simplified(steps_of(0.1, solver=implicit))
    # Asked for the exact Jacobian, Newton's method uses that.
    recurrence = steps_of(0.1)
    for linearisation in (Exact(), Dense()):
        solve = Newton(linearisation).start(recurrence)
        assert solve.recurrence is recurrence
    shared = Newton(SharedJacobian()).start(recurrence)
    assert shared.recurrence is not recurrence


def solve(solver, args, dt=0.05, term=diffrax.ODETerm(field), t1=6.0, y0=None):
    ts = jnp.linspace(0.0, t1, 7).astype(args[0].dtype)
    y0 = start(args[0].dtype) if y0 is None else y0
    run = diffeqsolve if isinstance(solver, DEER) else diffrax.diffeqsolve
    saveat = diffrax.SaveAt(ts=ts)
    return run(term, solver, 0.0, t1, dt, y0, args, saveat=saveat, throw=False)


def in_turn(args, term=diffrax.ODETerm(field), solver=SOLVER):
    """What `solve` gives, by steps of Diffrax's own code without its loop."""
    ts = jnp.linspace(0.0, 6.0, 121)
    ys, _ = sequential_steps(solver, term, ts, start(), args)
    return jnp.concatenate([start()[None], ys[19::20]])


@pytest.mark.parametrize(
    "linearisation, chunk",
    slow_rows(
        [(x, chunk) for x in (SharedJacobian(), Dense()) for chunk in (1, 4)],
        lambda row: row != (SharedJacobian(), 4),
    ),
    ids=str,
)
def test_answers_and_gradients_are_the_same(linearisation, chunk):
    method = Newton(
        linearisation, guess=Constant(), window=None, chunk=chunk, fallback=False
    )
    actual, expected = (
        quick(jax.value_and_grad(lambda args, ys=ys: jnp.sum(ys(args) ** 2)))(weights())
        for ys in (lambda args: solve(DEER(SOLVER, method), args).ys, in_turn)
    )
    assert_close(actual, expected, rounding())


@pytest.mark.slow(covered_by="test_answers_and_gradients_are_the_same")
def test_float32():
    args = weights(jnp.float32)
    expected = solve(diffrax.Tsit5(), args).ys
    actual = solve(DEER(diffrax.Tsit5(), SHARED), args)
    assert_close(actual.ys, expected, rounding(jnp.float32))
    assert int(actual.stats["num_fallback_steps"]) == 0


@pytest.mark.parametrize("dt", slow((0.5, 0.05, 0.01), lambda dt: dt != 0.5))
def test_as_many_iterations(dt):
    """Where steps are long, up to half as many again; nothing is finished in turn."""
    args, counts = weights(), []
    for method in (SHARED, EXACT):
        sol = solve(DEER(SOLVER, method), args, dt)
        assert int(sol.stats["num_fallback_steps"]) == 0
        counts.append(int(sol.stats["num_newton_steps"]))
    shared, exact = counts
    assert shared <= (exact if dt < 0.02 else 1.5 * exact) + 1


def test_a_field_that_overflows_on_the_way():
    """What is no number in the middle of a trial step reaches no answer."""

    def wild(t, y, args):
        return field(t, y, args) - jnp.exp(jnp.minimum(y**4, 200.0)) * y**3

    term, args = diffrax.ODETerm(wild), weights()
    expected = quick(lambda args: in_turn(args, term))(args)
    actual = solve(DEER(SOLVER, SHARED), args, term=term)
    assert_close(actual.ys, expected, rounding())


@pytest.mark.slow(covered_by="test_answers_and_gradients_are_the_same")
def test_a_stochastic_equation():
    """The noise is part of what is linearised."""
    path = diffrax.VirtualBrownianTree(0.0, 6.0, 1e-3, (), jr.key(3))
    noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * jnp.cos(y), path)
    term = diffrax.MultiTerm(diffrax.ODETerm(field), noise)
    # Of two stages one is saved.
    args = weights(width=128)

    @quick
    def each(h, args):
        recurrence = steps_of(h, term, diffrax.Heun(), args=args)
        assert recurrence.simplified() is not recurrence
        without_noise = steps_of(h, args=args).simplified()
        several = (recurrence, recurrence.simplified(), without_noise)
        return [jacobians(one)[1] for one in several]

    # The length as an argument: XLA works out what it makes of constants, here the
    # path, and takes long.
    A, simplified, plain = each(jnp.array(0.1), args)
    assert_close(simplified, A, 0.03)
    assert float(jnp.max(jnp.abs(plain - simplified))) > 0.01
    sol = quick(lambda args: solve(DEER(diffrax.Heun(), SHARED), args, term=term))(args)
    expected = quick(lambda args: in_turn(args, term, diffrax.Heun()))(args)
    assert_close(sol.ys, expected, rounding())
    assert int(sol.stats["num_fallback_steps"]) == 0


@pytest.fixture
def uses(monkeypatch):
    """How often steps are traced as they are for an iteration."""
    traced = []
    call = SimplifiedStep.__call__
    monkeypatch.setattr(
        SimplifiedStep, "__call__", lambda *args: traced.append(1) or call(*args)
    )
    return traced


def test_solves_use_it(uses):
    """And nothing else does: another linearisation, or steps that are equations."""
    # Other steps than those of other tests, so that they are traced.
    steps = dict(dt=0.06, t1=0.6)
    # Traced, and not compiled.
    trace = lambda method: jax.eval_shape(
        lambda args: solve(DEER(diffrax.Tsit5(), method), args, **steps).ys, weights()
    )
    trace(Newton(guess=Constant(), window=None, chunk=1))
    term = diffrax.ODETerm(lambda t, y, args: jnp.tanh(y) - 2 * y)
    on = (Obreshkov(1), term, jnp.linspace(0.0, 0.6, 11))
    equations, expected = jax.jit(
        lambda y0: (
            parallel_steps(*on, y0, None, method=SHARED)[0],
            sequential_steps(*on, y0, None)[0],
        )
    )(jnp.ones(1))
    assert_close(equations, expected, rounding())
    assert uses == []
    trace(SHARED)
    assert uses


@pytest.mark.slow(covered_by="test_answers_and_gradients_are_the_same")
def test_a_batch_backwards():
    """A state of several arrays, in a batch, and time runs the other way."""

    def turning(t, y, args):
        parts = field(t, jnp.concatenate([y["z"], y["x"]]), args)
        return {"z": parts[:2], "x": parts[2:]}

    def end(solver, x):
        run = diffrax.diffeqsolve if type(solver) is diffrax.Tsit5 else diffeqsolve
        y0 = {"z": jnp.array([0.5, -0.3]), "x": x}
        term = diffrax.ODETerm(turning)
        return run(term, solver, 1.0, 0.0, -0.05, y0, weights(), max_steps=20).ys

    xs = jnp.array([[0.1], [0.4]])
    batch = lambda solver: jax.jit(jax.vmap(lambda x: end(solver, x)))(xs)
    expected = batch(diffrax.Tsit5())
    assert_close(batch(DEER(diffrax.Tsit5(), SHARED)), expected, rounding())


def test_where_nobody_counts_operations(monkeypatch):
    """As on some accelerators: what was asked for is done."""
    monkeypatch.setattr(
        "deer_ode._discretisation._step_map.num_operations", lambda *args: None
    )
    recurrence = steps_of(0.1)
    assert recurrence.simplified() is not recurrence


@pytest.mark.parametrize(
    "h, shared, exact",
    slow_rows(((0.05, 4, 3), (0.15, 7, 3), (0.3, 17, 3)), lambda row: row[0] != 0.05),
)
@pytest.mark.slow(covered_by="test_as_many_iterations")
def test_iterations_of_two_oscillators(h, shared, exact):
    """The first column of the table in docs/how-to-choose.md, give or take two."""
    keys = jr.split(jr.key(0), 2)
    first, second = jr.normal(keys[0], (32, 4)) / 2, jr.normal(keys[1], (4, 32)) / 6
    turn = jnp.array([[0, 1.0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.7], [0, 0, -1.7, 0]])

    def oscillators(t, y, args):
        size = jnp.sum(y**2)
        network = args[1] @ jnp.tanh(args[0] @ y)
        return turn @ y + 0.3 * network - 0.1 * y * size / (1 + size)

    y0 = jnp.array([1.0, 0.0, 0.5, 0.0])
    for linearisation, count in ((SharedJacobian(), shared), (Dense(), exact)):
        solver = DEER(diffrax.Tsit5(), Newton(linearisation))
        sol = diffeqsolve(
            diffrax.ODETerm(oscillators), solver, 0.0, 1000 * h, h, y0, (first, second)
        )
        assert abs(int(sol.stats["num_newton_steps"]) - count) <= 2
