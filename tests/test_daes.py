"""Differential-algebraic equations: constraints, orders, gradients, initial values."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import pytest
import scipy.integrate

from deer_ode import (
    DEER,
    Constant,
    DAETerm,
    MassMatrixTerm,
    Newton,
    RadauIIA,
    Sequential,
    consistent_initial_values,
    diffeqsolve,
)

from .helpers import (
    assert_close,
    parallel_steps,
    quick,
    rounding,
    sequential_steps,
    sqrt_eps,
)


GRAVITY = 9.81
ANGLE = np.pi / 2 - 0.2
UP = np.array([0.0, 1.0])

#: Neither windows nor chunks, and no step is left to a loop: fewer programs to compile.
#: What does not converge fails.
ALL_AT_ONCE = Newton(guess=Constant(), window=None, chunk=1, fallback=False)

#: A regression over a few step sizes still sees the terms of higher order.
SLACK = 0.15


def motion(y, dy, gravity):
    (q, v, tension), (dq, dv, _) = y, dy
    return q, v, dq - v, dv + tension * q + gravity * jnp.asarray(UP)


def index_3(t, y, dy, gravity):
    """A pendulum in Cartesian coordinates, with its constraint as it is."""
    q, _, *motions = motion(y, dy, gravity)
    return *motions, jnp.sum(q**2) - 1


def index_2(t, y, dy, gravity):
    """The same, with the time derivative of the constraint."""
    q, v, *motions = motion(y, dy, gravity)
    return *motions, jnp.sum(q * v)


PENDULUM = DAETerm(index_3)
FORMS = {"index 3": PENDULUM, "index 2": DAETerm(index_2)}


def start(angle, speed=0.0):
    """On the circle and along it; the tension is for the solver to find."""
    s, c = jnp.sin(angle), jnp.cos(angle)
    q, v = jnp.stack([s, -c]), speed * jnp.stack([c, s])
    return q, v, jnp.zeros_like(s)


def angle_after(t, angle=ANGLE, gravity=GRAVITY):
    """By the reduced equation, and another library."""
    return scipy.integrate.solve_ivp(
        lambda t, y: [y[1], -gravity * np.sin(y[0])], (0.0, t), [angle, 0.0],
        method="DOP853", rtol=1e-13, atol=1e-13,
    ).y[0, -1]  # fmt: skip


@quick
def swing(term, solver, dt0, max_steps):
    """One program for all step sizes: those that take fewer steps are padded."""
    y0 = start(jnp.asarray(ANGLE))
    sol = diffeqsolve(
        term, DEER(solver, ALL_AT_ONCE), 0.0, 2.0, dt0, y0, jnp.asarray(GRAVITY),
        max_steps=max_steps, saveat=diffrax.SaveAt(steps=True), throw=False,
    )  # fmt: skip
    return sol.ys, sol.stats


@pytest.mark.parametrize(
    "form, num_stages",
    [
        pytest.param("index 3", 1, marks=pytest.mark.slow),
        ("index 3", 2),
        pytest.param("index 3", 3, marks=pytest.mark.slow),
        pytest.param("index 2", 1, marks=pytest.mark.slow),
        pytest.param("index 2", 2, marks=pytest.mark.slow),
        pytest.param("index 2", 3, marks=pytest.mark.slow),
    ],
)
def test_pendulum(form, num_stages):
    """Positions are of order 2s - 1, and the constraint holds to rounding."""
    counts = (400, 800, 1600) if num_stages == 1 else (50, 100, 200)
    final = angle_after(2.0)
    expected = np.array([np.sin(final), -np.cos(final)])
    errors = []
    for n in counts:
        dt0 = jnp.asarray(2.0 / n)
        ys, stats = swing(FORMS[form], RadauIIA(num_stages), dt0, max(counts))
        assert int(stats["num_steps"]) == n
        q, v, _ = (np.asarray(y[:n]) for y in ys)
        if form == "index 3":
            np.testing.assert_allclose(np.sum(q**2, axis=1), 1, rtol=0, atol=1e-12)
        else:
            np.testing.assert_allclose(np.sum(q * v, axis=1), 0, rtol=0, atol=1e-12)
        errors.append(np.abs(q[-1] - expected).max())
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order > 2 * num_stages - 1 - SLACK, errors
    # |v|^2 - g q_y, which an energy of zero speed at the start makes this; of order s.
    tension = 3 * GRAVITY * np.cos(final) - 2 * GRAVITY * np.cos(ANGLE)
    found = float(ys[2][counts[-1] - 1])
    assert abs(found - tension) < (3.0 if num_stages == 1 else 1.0)


@pytest.mark.slow(covered_by="test_pendulum")
def test_pendulum_has_no_spurious_solution():
    """A coarse guess leads Newton to other solutions of the same equations, on which
    the pendulum jumps through the circle.
    """
    num_steps = 200
    ts = jnp.linspace(0.0, 2.0, num_steps + 1)

    @jax.jit
    def both(y0, g):
        y0 = consistent_initial_values(PENDULUM, 0.0, y0, g).y0
        steps = (parallel_steps, sequential_steps)
        return [by(RadauIIA(2), PENDULUM, ts, y0, g)[0] for by in steps]

    ys, expected = both(start(jnp.asarray(ANGLE)), jnp.asarray(GRAVITY))
    # A system of index 3 magnifies rounding by h^-2 in its multiplier.
    assert_close(ys[:2], expected[:2], rounding())
    assert_close(ys[2], expected[2], rounding() * num_steps**2)
    final = angle_after(2.0)
    q = np.asarray(ys[0][-1])
    np.testing.assert_allclose(q, [np.sin(final), -np.cos(final)], atol=1e-5)


@pytest.mark.slow(covered_by="test_mass_matrix_by_a_function_and_gradients")
def test_gradients_of_the_pendulum():
    """With respect to gravity, the initial angle and the grid itself."""

    def loss(inputs):
        gravity, angle, end = inputs
        # A graded grid that moves with its end.
        fractions = jnp.linspace(0.0, 1.0, 17)
        ts = end * (fractions + 0.3 * fractions * (1 - fractions))
        y0 = consistent_initial_values(PENDULUM, 0.0, start(angle), gravity).y0
        (q, _, tension), _ = parallel_steps(RadauIIA(2), PENDULUM, ts, y0, gravity)
        return q[-1, 0] + 0.1 * tension[-1]

    x = jnp.array([GRAVITY, ANGLE, 0.8])
    # One program for all: the values of those to the sides come with gradients.
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    _, grad = value_and_grad(x)
    value = lambda x: value_and_grad(x)[0]
    h = 1e-5
    expected = jnp.stack(
        [(value(x + h * e) - value(x - h * e)) / (2 * h) for e in jnp.eye(3)]
    )
    # Central differences leave h^2 and rounding / h, which the multiplier magnifies.
    assert_close(grad, expected, 1e-6)


# --- index 1 ------------------------------------------------------------------------


def decay(t, y, dy, args):
    (y, z), (dy, _) = y, dy
    return dy + args * y * z, z - jnp.cos(y) - t


@jax.jit
def implicit_euler(y0, args, ts):
    """The reduced equation step by step, which is what one stage makes of it."""
    # Python's loop over Newton steps, so that derivatives are those of the solution.
    slope = lambda t, y: -args * y * (jnp.cos(y) + t)

    def step(y0, times):
        t0, t1 = times
        y = y0
        for _ in range(6):
            equation = lambda y: y - y0 - (t1 - t0) * slope(t1, y)
            y = y - equation(y) / jax.grad(equation)(y)
        return y, y

    return jnp.concatenate([y0[None], jax.lax.scan(step, y0, (ts[:-1], ts[1:]))[1]])


def decay_field(t, y, args):
    y, z = y
    return -args * y * z, z - jnp.cos(y) - t


MASSES = {
    "array": jnp.diag(jnp.array([1.0, 0.0])),
    "function": lambda t, y, args: jnp.diag(jnp.stack([jnp.exp(t * 0), 0.0 * t])),
    "operator": lx.FunctionLinearOperator(
        lambda y: (y[0], jnp.zeros(())), (jnp.zeros(()), jnp.zeros(()))
    ),
}


def test_index_1_in_every_form():
    """The stages satisfy the constraint, so it is collocation for the reduced one. And
    no step is left to a loop: what does not converge fails.
    """
    solver, args, ts = RadauIIA(1), jnp.array(0.8), np.linspace(0.0, 1.0, 9)
    y0 = (jnp.array(1.0), jnp.array(0.0))
    solve = lambda y0: diffeqsolve(
        DAETerm(decay), DEER(solver, ALL_AT_ONCE), 0.0, 1.0, 0.125, y0, args,
        saveat=diffrax.SaveAt(t0=True, ts=[0.3], steps=True), throw=False,
    )  # fmt: skip
    sol = quick(solve)(y0)
    assert sol.result == diffrax.RESULTS.successful
    steps = lambda term: quick(
        lambda y0: parallel_steps(solver, term, jnp.asarray(ts), y0, args)[0]
    )
    expected = np.asarray(implicit_euler(y0[0], args, ts))
    after = 3
    # One stage makes straight lines.
    between = np.interp([0.3], ts, expected)
    saved = lambda xs, x: np.concatenate([xs[:after], x, xs[after:]])
    assert_close(sol.ts, saved(ts, [0.3]), rounding())
    assert_close(sol.ys[0], saved(expected, between), rounding())
    # At the points of the grid; between them the polynomials of both are different.
    on_grid = np.asarray(sol.ts) != 0.3
    multiplier = jnp.cos(sol.ys[0]) + sol.ts
    assert_close(sol.ys[1][on_grid], multiplier[on_grid], rounding())
    assert_close(sol.stats["initial_correction"], jnp.cos(1.0), rounding())
    made = jtu.tree_map(lambda x: x[on_grid][1:], sol.ys)
    # Steps by themselves, without a solve around them, begin where they are told to.
    consistent = (y0[0], jnp.cos(y0[0]))
    for name in ("array", "operator"):
        term = MassMatrixTerm(decay_field, MASSES[name])
        assert_close(steps(term)(consistent), made, rounding(), what=name)


def test_mass_matrix_by_a_function_and_gradients():
    y0 = jnp.array(1.0)
    term = MassMatrixTerm(decay_field, MASSES["function"])
    ts = jnp.linspace(0.0, 1.0, 9)

    def loss(inputs, implicit):
        y0, args = inputs
        if implicit:
            start = (y0, jnp.cos(y0))
            ys = parallel_steps(RadauIIA(1), term, ts, start, args)[0][0]
        else:
            ys = implicit_euler(y0, args, ts)[1:]
        return jnp.sum(ys**2), ys

    inputs = (y0, jnp.array(0.8))
    grad = quick(jax.grad(loss, has_aux=True))
    assert_close(grad(inputs, True), grad(inputs, False), rounding())


@pytest.mark.slow(covered_by="test_index_1_in_every_form")
def test_backward_in_time():
    """Diffrax turns time round, which the derivative in the equation must notice."""
    args = jnp.array(0.8)
    y0 = (jnp.array(0.5), jnp.array(0.0))
    solve = lambda y0: diffeqsolve(
        DAETerm(decay), DEER(RadauIIA(2), ALL_AT_ONCE), 1.0, 0.0, -1 / 256, y0, args,
        throw=False,
    )  # fmt: skip
    sol = eqx.filter_jit(solve)(y0)
    back = scipy.integrate.solve_ivp(
        lambda t, y: -0.8 * y * (np.cos(y) + t), (1.0, 0.0), [0.5], method="DOP853",
        rtol=1e-13, atol=1e-13,
    ).y[0, -1]  # fmt: skip
    # A method of order 3.
    np.testing.assert_allclose(float(sol.ys[0][-1]), back, rtol=1e-7)


# --- initial values -----------------------------------------------------------------


def test_consistent_initial_values():
    """They find the tension of the string, |v|^2 - g q_y, and its derivatives."""

    def tension(angle, speed, gravity):
        initial = consistent_initial_values(PENDULUM, 0.0, start(angle, speed), gravity)
        return initial.y0[2], initial

    angle, speed, gravity = inputs = tuple(map(jnp.asarray, (0.6, 1.7, GRAVITY)))
    known = speed**2 + gravity * np.cos(angle)
    by_all = quick(jax.value_and_grad(tension, (0, 1, 2), has_aux=True))
    (value, initial), grads = by_all(*inputs)
    assert_close(value, known, rounding())
    assert_close(initial.correction, jnp.abs(value), rounding())
    assert float(initial.residual) < rounding()
    assert_close(initial.y0[:2], start(*inputs[:2])[:2], 0.0)
    slopes = (-gravity * np.sin(angle), 2 * speed, np.cos(angle))
    assert_close(grads, tuple(map(jnp.asarray, slopes)), sqrt_eps())


@pytest.mark.parametrize("t0", [0, np.int64(0), jnp.array(0)], ids=["int", "np", "jnp"])
def test_consistent_from_a_whole_time(t0):
    """The constraint moves in time, whatever the dtype of the time."""
    term = DAETerm(lambda t, y, dy, args: jnp.stack([dy[0] - y[1], y[0] - jnp.sin(t)]))
    initial = quick(lambda y0: consistent_initial_values(term, t0, y0))(jnp.zeros(2))
    assert_close(initial.y0, jnp.array([0.0, 1.0]), 1e-14)


def test_inconsistent_initial_values():
    """A pendulum off its circle; and a solve, of what is smaller to compile, from where
    the algebraic equation has no solution.
    """
    on = q, v, tension = start(jnp.asarray(ANGLE))
    made = quick(
        lambda y0: consistent_initial_values(PENDULUM, 0.0, y0, jnp.asarray(GRAVITY))
    )
    assert float(made(on).residual) < rounding()
    assert float(made((1.1 * q, v, tension)).residual) > 1e-3
    # Nor may its speed point out of the circle, though the constraint holds.
    assert float(made((q, q, tension)).residual) > 1e-3

    term = DAETerm(
        lambda t, y, dy, args: jnp.stack([dy[0] - y[1], y[0] - 1 - y[1] ** 2])
    )
    solve = eqx.filter_jit(
        lambda y0, throw: diffeqsolve(
            term, DEER(RadauIIA(1), Sequential()), 0.0, 0.1, 0.05, y0, throw=throw
        )
    )
    off = jnp.array([0.1, 0.5])
    with pytest.raises(Exception, match="initial values are not consistent"):
        jax.block_until_ready(solve(off, True).ys)
    assert float(solve(off, False).stats["initial_residual"]) > 1e-3
    # By the same program, which does not always raise.
    fine = solve(jnp.array([1.3, 0.5]), True)
    assert float(fine.stats["initial_residual"]) < rounding()
    assert fine.result == diffrax.RESULTS.successful
