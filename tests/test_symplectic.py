"""Splitting methods for separable systems: what they promise, step by step and in
parallel.
"""

import itertools
import math

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import (
    DEER,
    BlanesMoan4,
    Constant,
    Newton,
    StormerVerlet,
    Yoshida4,
    diffeqsolve,
)

from .helpers import (
    DOORS,
    assert_close,
    assert_steps_agree,
    rounding,
    slow,
    slow_rows,
    sqrt_eps,
)


METHODS = {
    "StormerVerlet": (StormerVerlet(), 2),
    "Yoshida4": (Yoshida4(), 4),
    "BlanesMoan4": (BlanesMoan4(), 4),
}
each_method = pytest.mark.parametrize("name", METHODS)


# --- problems -----------------------------------------------------------------------


def separable(f, g):
    """`dq/dt = f(t, p)`, `dp/dt = g(t, q)` as a pair of terms."""
    return (
        diffrax.ODETerm(lambda t, p, args: f(t, p)),
        diffrax.ODETerm(lambda t, q, args: g(t, q)),
    )


def pendulum():
    return separable(lambda t, p: p, lambda t, q: -jnp.sin(q)), (
        jnp.array([1.0]),
        jnp.array([0.2]),
    )


def driven():
    """Mass, stiffness and force all vary with time, so both clocks matter."""
    f = lambda t, p: p / (1 + 0.5 * jnp.sin(t))
    g = lambda t, q: -(1 + 0.3 * jnp.cos(2 * t)) * q + jnp.cos(1.3 * t)
    return separable(f, g), (jnp.array([0.5]), jnp.array([0.3]))


def henon_heiles():
    def g(t, q):
        del t
        x, y = q
        return jnp.stack([-x - 2 * x * y, -y - x**2 + y**2])

    y0 = (jnp.array([0.1, -0.2]), jnp.array([0.3, 0.2]))
    return separable(lambda t, p: p, g), y0


PROBLEMS = {"pendulum": pendulum, "driven": driven, "Henon-Heiles": henon_heiles}
#: Of the table of both, the ordinary run has each system that is no simple one.
each_pair = pytest.mark.parametrize(
    "name, problem",
    slow_rows(
        [(name, problem) for name in METHODS for problem in PROBLEMS],
        lambda row: (
            row
            not in (
                ("Yoshida4", "driven"),
                ("BlanesMoan4", "Henon-Heiles"),
            )
        ),
    ),
)


def take_step(solver, terms, t0, t1, y, args=None):
    state = solver.init(terms, t0, t1, y, args)
    y1, y_error, _, state, _ = solver.step(terms, t0, t1, y, args, state, False)
    assert y_error is None and state is None
    return y1


def walk(solver, terms, ts, y):
    """Through all of `ts`, one step after the other."""

    def step(y, t):
        y = take_step(solver, terms, t[0], t[1], y)
        return y, y

    return lax.scan(step, y, (ts[:-1], ts[1:]))[1]


# --- the coefficients ---------------------------------------------------------------


def expansion(solver, degree):
    r"""$e^{k_0 A} e^{d_1 B} \cdots$ as numbers in front of words in A and B."""
    shears = [("A", solver.kicks[0])]
    for drift, kick in zip(solver.drifts, solver.kicks[1:], strict=True):
        shears += [("B", drift), ("A", kick)]
    words = {"": 1.0}
    for letter, length in shears:
        product = {}
        for word, number in words.items():
            for n in range(degree - len(word) + 1):
                power = word + n * letter
                term = number * length**n / math.factorial(n)
                product[power] = product.get(power, 0.0) + term
        words = product
    return words


def condition_errors(solver, degree):
    r"""What is missing from the words of $e^{A + B}$ of `degree` letters."""
    words = expansion(solver, degree)
    return [
        words.get("".join(word), 0.0) - 1 / math.factorial(degree)
        for word in itertools.product("AB", repeat=degree)
    ]


@each_method
def test_order_conditions(name):
    """All of them, whatever the fields are."""
    solver, order = METHODS[name]
    assert solver.order(None) == order
    for degree in range(1, order + 1):
        # The published coefficients have fifteen digits.
        np.testing.assert_allclose(condition_errors(solver, degree), 0, atol=1e-15)
    assert np.linalg.norm(condition_errors(solver, order + 1)) > 1e-4


@each_method
def test_steps_are_palindromes(name):
    solver, _ = METHODS[name]
    assert solver.kicks == solver.kicks[::-1]
    assert solver.drifts == solver.drifts[::-1]


def test_optimised_coefficients_are_better():
    """At equal numbers of kicks, as errors of fourth order are compared."""

    def error(name):
        solver, _ = METHODS[name]
        constant = np.linalg.norm(condition_errors(solver, 5))
        return constant * len(solver.drifts) ** 4

    # 0.60 against 14.9; more than an order of magnitude is what the choice rests on.
    assert error("BlanesMoan4") < error("Yoshida4") / 10


# --- one step -----------------------------------------------------------------------


@each_pair
def test_order(name, problem):
    solver, order = METHODS[name]
    terms, y0 = PROBLEMS[problem]()
    t1 = 4.0
    # With time for its own state a pair is an ordinary system for any other solver.
    system = diffrax.ODETerm(
        lambda t, y, args: (terms[0].vf(t, y[1], args), terms[1].vf(t, y[0], args))
    )
    exact = diffrax.diffeqsolve(
        system, diffrax.Dopri8(scan_kind="bounded"), 0.0, t1, t1 / 800, y0
    ).ys
    exact = jax.tree_util.tree_map(lambda y: y[0], exact)
    # From where the next power no longer shows, to well above rounding.
    nums = {2: (200, 300, 450, 700), 4: (80, 120, 180, 270)}[order]
    errors = []
    for num in nums:
        end = jax.tree_util.tree_map(
            lambda y: y[-1], walk(solver, terms, jnp.linspace(0, t1, num + 1), y0)
        )
        errors.append(jfu.ravel_pytree((end[0] - exact[0], end[1] - exact[1]))[0])
    sizes = [float(jnp.linalg.norm(e)) for e in errors]
    assert min(sizes) > 1e-12
    slope = np.polyfit(np.log(1 / np.array(nums)), np.log(sizes), 1)[0]
    assert abs(slope - order) < 0.15, (slope, sizes)


@each_pair
def test_symplectic(name, problem):
    solver, _ = METHODS[name]
    terms, y0 = PROBLEMS[problem]()
    flat, unravel = jfu.ravel_pytree(y0)
    step = lambda y: jfu.ravel_pytree(take_step(solver, terms, 0.3, 0.7, unravel(y)))[0]
    M = jax.jacfwd(step)(flat)
    eye, zero = np.eye(flat.size // 2), np.zeros((flat.size // 2,) * 2)
    omega = np.block([[zero, eye], [-eye, zero]])
    assert_close(np.asarray(M.T @ omega @ M), omega, rounding(), what=name)
    # That of the identity would be as well.
    assert not np.allclose(M, np.eye(flat.size), atol=0.1)


@each_pair
def test_reversible(name, problem):
    """There and back again, also far from time zero, where times are coarse."""
    solver, _ = METHODS[name]
    terms, y0 = PROBLEMS[problem]()
    for start in (0.0, 1e4):
        ts = start + jnp.linspace(0, 10, 101)
        end = jax.tree_util.tree_map(lambda y: y[-1], walk(solver, terms, ts, y0))
        back = walk(solver, terms, ts[::-1], end)
        back = jax.tree_util.tree_map(lambda y: y[-1], back)
        # Times of stages are rounded relative to the time; only fields of time see it.
        sees_time = problem == "driven" and start > 0
        tol = rounding() * (start if sees_time else 1)
        assert_close(back, y0, tol, what=name)
        assert not np.allclose(end[0], y0[0], atol=1e-3)


@each_method
def test_coefficients_do_not_round_with_time(name):
    """Steps of an autonomous system depend on their length and on nothing else."""
    solver, _ = METHODS[name]
    terms, y0 = pendulum()
    h = 0.125  # so that the ends of the step are exact
    step = jax.jit(lambda t: take_step(solver, terms, t, t + h, y0))
    near, far = (step(jnp.asarray(t)) for t in (0.0, 2.0**40))
    # Differences of times within the step would be wrong by 1e-3 there.
    assert_close(far, near, 4 * float(jnp.finfo(jnp.float64).eps))


# --- in Diffrax, and in parallel ----------------------------------------------------


def tree_problem(dtype=jnp.float64):
    """Parts of different shapes, forces of parameters and of time."""
    y0 = (
        {"a": jnp.array([0.5, -0.3], dtype), "b": jnp.array(0.2, dtype)},
        {"a": jnp.array([0.1, 0.4], dtype), "b": jnp.array(-0.6, dtype)},
    )
    args = {"k": jnp.asarray(1.3, dtype), "m": jnp.asarray(0.8, dtype)}

    def velocity(t, p, args):
        del t
        return {"a": p["a"] / args["m"], "b": jnp.tanh(p["b"])}

    def force(t, q, args):
        shared = jnp.sum(q["a"]) + q["b"] + jnp.cos(t)
        return {"a": -args["k"] * jnp.sin(q["a"]) - 0.1 * shared, "b": -shared}

    return (diffrax.ODETerm(velocity), diffrax.ODETerm(force)), y0, args


SAVE_TS = np.array([0.0, 0.13, 0.5, 0.99, 2.0])


def value_and_grad(solve, solver, dt0=0.05, **kwargs):
    terms, y0, args = tree_problem()

    def loss(inputs):
        y0, args = inputs
        saveat = diffrax.SaveAt(ts=SAVE_TS, t1=True)
        sol = solve(terms, solver, 0.0, 2.0, dt0, y0, args, saveat=saveat, **kwargs)
        return sum(jnp.sum(y**2) for y in jax.tree_util.tree_leaves(sol.ys)), sol.ys

    (_, ys), grads = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))((y0, args))
    return ys, grads


@pytest.mark.parametrize("name", slow(METHODS, lambda name: name != "StormerVerlet"))
def test_parallel_agrees_with_stock(name):
    ts, times = jnp.linspace(0.0, 2.0, 41), jnp.asarray(SAVE_TS[1:])
    assert_steps_agree(METHODS[name][0], tree_problem, ts, times)


@pytest.mark.parametrize(
    "name, door",
    slow_rows(
        [(name, door) for name in METHODS for door in DOORS],
        lambda row: row != ("StormerVerlet", "c"),
    ),
)
@pytest.mark.slow(covered_by="test_parallel_agrees_with_stock")
def test_doors(name, door):
    """The same through whole solves, with saves."""
    solver, _ = METHODS[name]
    kwargs = dict(num_substeps=5, dt0=0.25) if door == "c" else dict(max_steps=42)
    expected = value_and_grad(diffrax.diffeqsolve, solver)
    assert_close(value_and_grad(DOORS[door], solver, **kwargs), expected, rounding())


@pytest.mark.slow(covered_by="test_solvers.py::test_float32")
def test_float32():
    solver = StormerVerlet()
    method = Newton(guess=Constant(), window=None, chunk=1)
    f32 = jnp.float32
    terms, y0, args = tree_problem(f32)

    def run(solve, solver):
        sol = solve(terms, solver, f32(0), f32(2), f32(0.05), y0, args)
        return sol.ys

    expected = run(diffrax.diffeqsolve, solver)
    assert jax.tree_util.tree_leaves(expected)[0].dtype == f32
    assert_close(run(diffeqsolve, DEER(solver, method)), expected, rounding(f32))


@pytest.mark.slow(covered_by="test_parallel_agrees_with_stock")
def test_gradient_of_the_energy():
    """Of a whole solve with respect to the initial state: by finite differences."""
    terms, y0 = henon_heiles()

    @jax.jit
    @jax.value_and_grad
    def loss(scale):
        start = (scale * y0[0], y0[1])
        solver = DEER(StormerVerlet(), Newton(guess=Constant(), window=None, chunk=1))
        sol = diffeqsolve(terms, solver, 0.0, 5.0, 0.1, start)
        return jnp.sum(sol.ys[0] ** 3)

    eps = 1e-5
    above, below = (loss(jnp.array(1 + e))[0] for e in (eps, -eps))
    _, slope = loss(jnp.array(1.0))
    assert_close(slope, (above - below) / (2 * eps), sqrt_eps())


@each_method
def test_interpolation(name):
    """Cubic, through both ends with the right slopes."""
    solver, _ = METHODS[name]
    terms, y0 = driven()
    t0, t1 = 0.3, 0.5
    _, _, info, _, _ = solver.step(terms, t0, t1, y0, None, None, False)
    path = solver.interpolation_cls(t0=t0, t1=t1, **info)
    for t, y in ((t0, y0), (t1, info["y1"])):
        value, slope = jax.jvp(path.evaluate, (jnp.asarray(t),), (jnp.asarray(1.0),))
        assert_close(value, y, rounding())
        assert_close(slope, solver.func(terms, t, y, None), rounding())


def test_adaptive_steps_are_refused():
    terms, y0 = pendulum()
    with pytest.raises(RuntimeError, match="error estimate"):
        diffrax.diffeqsolve(
            terms, StormerVerlet(), 0.0, 1.0, 0.1, y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        )  # fmt: skip


# --- long times ---------------------------------------------------------------------


def pendulum_energy(ys):
    q, p = ys
    return np.asarray(p[:, 0] ** 2 / 2 - jnp.cos(q[:, 0]))


# Steps with which the default guess, of eight steps at once, still has the right phase
# after the whole interval, so that Newton's method converges.
@pytest.mark.parametrize(
    "name, dt",
    slow_rows(
        (("StormerVerlet", 0.01), ("Yoshida4", 0.02), ("BlanesMoan4", 0.05)),
        lambda row: row[0] != "StormerVerlet",
    ),
)
def test_energy_over_a_hundred_thousand_steps(name, dt):
    solver, order = METHODS[name]
    terms, y0 = pendulum()
    num_steps = 100_000
    t1 = num_steps * dt

    def run(solve, solver, **kwargs):
        saveat = diffrax.SaveAt(steps=True)
        return solve(terms, solver, 0.0, t1, dt, y0, saveat=saveat, **kwargs)

    parallel = run(diffeqsolve, DEER(solver, Newton(window=None)))
    sequential = run(diffrax.diffeqsolve, solver, max_steps=num_steps)
    assert int(parallel.stats["num_steps"]) == num_steps
    # It was the parallel iteration that found this.
    assert int(parallel.stats["num_fallback_steps"]) == 0
    assert int(parallel.stats["num_newton_steps"]) < 20

    energy = pendulum_energy(parallel.ys)
    # Both round every shear, in other ways; each such error moves the energy by about
    # the rounding of one number, and as they have no common sign they add up like a
    # random walk. Ten times its typical distance; with a common sign they would be
    # thirty times beyond even that.
    num_shears = num_steps * (len(solver.kicks) + len(solver.drifts))
    eps = float(jnp.finfo(jnp.float64).eps)
    difference = np.abs(energy - pendulum_energy(sequential.ys)).max()
    assert difference < 10 * num_shears**0.5 * eps, difference

    # What the method itself does to the energy goes up and down with the motion.
    start = pendulum_energy(jax.tree_util.tree_map(lambda y: y[None], y0))[0]
    error = energy - start
    size = np.abs(error).max()
    assert 1e3 * difference < size < dt**order
    tenths = np.abs(error).reshape(10, -1).max(axis=1)
    # Each tenth sees dozens of periods, and all of them the same extremes.
    np.testing.assert_allclose(tenths, size, rtol=0.02)
    trend = np.polyfit(np.linspace(0, 1, num_steps), error, 1)[0]
    assert abs(trend) < 0.01 * size, (trend, size)


def test_energy_is_lost_by_other_methods():
    """Of higher order even; so the test above is not satisfied by anything."""
    terms, y0 = pendulum()
    system = diffrax.ODETerm(
        lambda t, y, args: (terms[0].vf(t, y[1], args), terms[1].vf(t, y[0], args))
    )
    sol = diffeqsolve(
        system, DEER(diffrax.Bosh3(), Newton()), 0.0, 1000.0, 0.05, y0,
        saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    error = pendulum_energy(sol.ys) - pendulum_energy(
        jax.tree_util.tree_map(lambda y: y[None], y0)
    )
    tenths = np.abs(error).reshape(10, -1).max(axis=1)
    assert tenths[-1] > 5 * tenths[0]
