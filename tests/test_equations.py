"""Solvers whose steps are equations: their order, stability, and sequential twins."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
import scipy.integrate

from deer_ode import (
    DEER,
    AveragedExponential,
    Coarse,
    Constant,
    DAETerm,
    Diagonal,
    GaussLegendre,
    MassMatrixTerm,
    Newton,
    Obreshkov,
    RadauIIA,
    Trajectory,
    Window,
    diffeqsolve,
)
from deer_ode._discretisation import Grid, discretise
from deer_ode._implicit import solve_trajectory

from .helpers import (
    DOORS,
    ROOT_FINDER,
    assert_close,
    assert_steps_agree,
    finite_difference,
    lotka_volterra,
    lotka_volterra_args,
    ode,
    parallel_steps,
    rounding,
    sequential_steps,
    slow,
    slow_rows,
    sqrt_eps,
)


#: Every solver whose steps are equations, with its order.
ORDERS = {
    "Obreshkov(1)": (Obreshkov(1), 2),
    "Obreshkov(2)": (Obreshkov(2), 4),
    "Obreshkov(3)": (Obreshkov(3), 6),
    "RadauIIA(1)": (RadauIIA(1), 1),
    "RadauIIA(2)": (RadauIIA(2), 3),
    "RadauIIA(3)": (RadauIIA(3), 5),
    "GaussLegendre(1)": (GaussLegendre(1), 2),
    "GaussLegendre(2)": (GaussLegendre(2), 4),
    "GaussLegendre(3)": (GaussLegendre(3), 6),
    "AveragedExponential": (AveragedExponential(), 2),
}


#: Neither windows nor chunks: fewer programs to compile.
ALL_AT_ONCE = Newton(guess=Constant(), window=None, chunk=1)

#: What does not converge fails.
WITHOUT_A_FINISH = Newton(guess=Constant(), window=None, chunk=1, fallback=False)

#: A regression over a few step sizes still sees the terms of higher order.
SLACK = 0.15


def slow_unless(fast, names):
    """Compilation takes most of the time: some of `names` stand for the others."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def stock(terms, solver, *args, **kwargs):
    """The sequential twin: each step solved by itself, one after the other."""
    return diffrax.diffeqsolve(terms, solver, *args, **kwargs)


def observed_order(counts, errors) -> float:
    return -np.polyfit(np.log(counts), np.log(np.asarray(errors, float)), 1)[0]


@eqx.filter_jit
def padded_steps(solver, term, ts, active, y0, args, times):
    """States after steps of the grid `ts`, of which only those `active` are made; one
    program for all numbers of steps. And the interpolated states at `times`.
    """
    problem = discretise(solver, term, Grid(ts[:-1], ts[1:], active), y0, args)
    ys = solve_trajectory(problem.recurrence, WITHOUT_A_FINISH).ys
    index = jnp.searchsorted(ts, times) - 1
    return problem.states(ys), problem.evaluate(
        ys, problem.take_steps(ys), times, index
    )


def padded_solve(solver, term, t1, num_steps, y0, args, max_steps, times=None):
    """The state at the end of even steps, and those at `times`."""
    ts = np.append(np.linspace(0.0, t1, num_steps + 1), [t1] * (max_steps - num_steps))
    active = np.arange(max_steps) < num_steps
    times = np.array([t1]) if times is None else times
    ys, at_times = padded_steps(
        solver, term, jnp.asarray(ts), jnp.asarray(active), y0, args, jnp.asarray(times)
    )
    np.testing.assert_array_equal(
        ys[num_steps - 1 :], np.asarray(ys[-1:]).repeat(max_steps - num_steps + 1, 0)
    )
    return ys[-1], at_times


def final_state(*args):
    return padded_solve(*args)[0]


# --- order --------------------------------------------------------------------------


def swing(t, y, args):
    """A pendulum that is driven: autonomous without the drive."""
    angle, speed = y
    return jnp.stack([speed, -args["g"] * jnp.sin(angle) + args["drive"] * jnp.cos(t)])


SWING = diffrax.ODETerm(swing)
SWING_Y0 = jnp.array([1.5, 0.0])
SWING_T1 = 4.0


def bent(t, y, args):
    """Of one number: there is half as much to compile."""
    return jnp.tanh(y) - args * y * jnp.cos(t)


BENT = diffrax.ODETerm(bent)


def number():
    return BENT, jnp.array([0.7]), jnp.array(1.3)


def swing_args(drive):
    return {"g": jnp.asarray(1.0), "drive": jnp.asarray(drive)}


def accurate(field, t1, y0, args):
    """By another method, of another library, to what double precision allows."""
    field = jax.jit(field)
    return scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(field(t, jnp.asarray(y), args)),
        (0.0, t1), np.asarray(y0), method="DOP853", rtol=1e-13, atol=1e-14,
    ).y[:, -1]  # fmt: skip


# Enough steps for the order to show, and few enough that rounding does not.
COUNTS = {1: (128, 256, 512), 2: (64, 128, 256), 3: (32, 64, 128), 4: (32, 64, 128),
          5: (16, 32, 64), 6: (16, 32, 64)}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    # That of Obreshkov(2) is seen below, where stiffness costs nothing.
    slow_unless(("RadauIIA(2)",), ORDERS),
)
def test_order(name):
    solver, order = ORDERS[name]
    assert solver.order(SWING) == order
    counts = COUNTS[order]
    for drive in (0.0, 0.7):
        args = swing_args(drive)
        exact = accurate(swing, SWING_T1, SWING_Y0, args)
        errors = [
            np.abs(
                final_state(
                    solver, SWING, SWING_T1, n, SWING_Y0, args, max(counts)
                ) - exact
            ).max()
            for n in counts
        ]  # fmt: skip
        assert errors[0] > 1e-9 > rounding() * 100
        assert abs(observed_order(counts, errors) - order) < SLACK, (drive, errors)


def robinson(t, y, lam):
    """Prothero and Robinson's: the solution is sin(3 t), whatever the stiffness."""
    return -lam * (y - jnp.sin(3 * t)) + 3 * jnp.cos(3 * t)


ROBINSON = diffrax.ODETerm(robinson)
STIFF = 1e6


def robinson_errors(solver, lam, counts, t1=1.0):
    y0 = jnp.zeros(1)
    return [
        float(
            jnp.abs(
                final_state(
                    solver, ROBINSON, t1, n, y0, jnp.asarray(lam), max(counts)
                )[0] - np.sin(3 * t1)
            )
        )
        for n in counts
    ]  # fmt: skip


@pytest.mark.parametrize("num_stages", slow((1, 2, 3), lambda n: n != 2))
def test_stiff_order_of_radau(num_stages):
    """Hairer, Wanner, table IV.15.1: the error is that of h^(s+1) / (lam h)."""
    solver = RadauIIA(num_stages)
    counts = (4, 8, 16) if num_stages > 1 else (32, 64, 128)
    errors = robinson_errors(solver, STIFF, counts)
    # For three stages a part of order 4 still shows.
    assert observed_order(counts, errors) > num_stages - SLACK, errors
    # The derivative of order s + 1 is 3^(s+1) at most.
    for n, error in zip(counts, errors, strict=True):
        assert error < 3 ** (num_stages + 1) * n**-num_stages / STIFF
    # A transient is damped in one step: the stability function at infinity is s^2 / z
    # at most.
    y1 = final_state(
        solver, ROBINSON, 0.1, 1, jnp.ones(1), jnp.asarray(STIFF), max(counts)
    )
    assert abs(float(y1[0]) - np.sin(0.3)) < 2 * num_stages**2 / (STIFF * 0.1)


@pytest.mark.parametrize("num_derivatives", slow((2, 3), lambda n: n == 3))
def test_stiffness_costs_obreshkov_nothing(num_derivatives):
    """What a step of order 2p leaves is divided by (lam h)^p."""
    solver, order = Obreshkov(num_derivatives), 2 * num_derivatives
    counts = (4, 8, 16)
    mild = robinson_errors(solver, 1.0, counts)
    assert abs(observed_order(counts, mild) - order) < SLACK, mild
    for error in robinson_errors(solver, STIFF, counts):
        # Below rounding, of each step.
        assert error < rounding()
    # A transient stays, and grows no more than the step itself is wrong.
    y1 = final_state(solver, ROBINSON, 0.1, 1, jnp.ones(1), jnp.asarray(STIFF), 16)
    assert 0.99 < abs(float(y1[0]) - np.sin(0.3)) < 1 + 1e-4


def rotation(t, y, args):
    del t
    decay, frequency = args
    x, v = y
    return jnp.stack([-decay * x - frequency * v, frequency * x - decay * v])


@pytest.mark.parametrize(
    "name",
    slow_unless(
        ("Obreshkov(1)",),
        ("Obreshkov(1)", "Obreshkov(2)", "Obreshkov(3)", "GaussLegendre(3)"),
    ),
)
def test_a_stability(name):
    """No growth in the left half plane, and none on the imaginary axis."""
    solver, _ = ORDERS[name]
    decays = jnp.array([0.0, 0.0, 0.0, 0.1, 1.0, 30.0, 1e3, 1e3])
    frequencies = jnp.array([0.3, 7.0, 1e3, 50.0, 3.0, 30.0, 0.0, 1e3])

    @jax.jit
    @jax.vmap
    def radii(decay, frequency):
        ys, _ = parallel_steps(
            solver, diffrax.ODETerm(rotation), jnp.linspace(0.0, 32.0, 33),
            jnp.array([1.0, 0.0]), (decay, frequency),
        )  # fmt: skip
        return jnp.concatenate([jnp.ones(1), jnp.sqrt(jnp.sum(ys**2, axis=-1))])

    r = np.asarray(radii(decays, frequencies))
    assert np.isfinite(r).all()
    # The field and its derivatives are of size 1e9 where they cancel.
    assert (np.diff(r, axis=1) <= 1e-9).all()
    np.testing.assert_allclose(r[:3], 1.0, rtol=1e-9)
    assert (r[4, -1] < 0.5) and (r[5, -1] < 0.99)


# --- the sequential twin ------------------------------------------------------------

NUM_STEPS = 24
NUM_SUBSTEPS = 4
SAVE_TS = np.array([0.0, 0.13, 0.5, 0.99, 1.0])


@pytest.mark.parametrize(
    "name, problem",
    # Obreshkov(1) is in `test_core.py`, RadauIIA(1) in `test_daes.py`; derivatives of
    # what exponentials of matrices are made of in `test_exponential.py`.
    [
        ("AveragedExponential", number),
        *slow_rows([(name, ode) for name in ORDERS], lambda row: True),
    ],
)
def test_values_and_gradients(name, problem):
    """Of every step, and of what lies between them."""
    ts, times = jnp.linspace(0.0, 1.0, 17), jnp.array([0.03, 0.5, 0.99])
    assert_steps_agree(ORDERS[name][0], problem, ts, times)


def value_and_grad(solve, solver, dt0, **kwargs):
    terms, y0, args = ode()

    def loss(inputs):
        y0, args = inputs
        saveat = diffrax.SaveAt(t0=True, ts=SAVE_TS, t1=True)
        sol = solve(terms, solver, 0.0, 1.0, dt0, y0, args, saveat=saveat, **kwargs)
        return jnp.sum(sol.ys**2), sol.ys

    fn = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))
    (_, ys), grads = fn((y0, args))
    return ys, grads


@pytest.mark.parametrize(
    "name, door",
    [
        pytest.param("RadauIIA(1)", "a", marks=pytest.mark.slow),
        ("Obreshkov(1)", "c"),
        pytest.param("Obreshkov(3)", "b", marks=pytest.mark.slow),
        pytest.param("RadauIIA(2)", "c", marks=pytest.mark.slow),
        pytest.param("GaussLegendre(2)", "b", marks=pytest.mark.slow),
        pytest.param("AveragedExponential", "b", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow(covered_by="test_core.py::test_values_and_gradients")
def test_doors(name, door):
    """The same through whole solves, with saves."""
    solver, _ = ORDERS[name]
    if door == "c":
        kwargs = dict(num_substeps=NUM_SUBSTEPS, dt0=NUM_SUBSTEPS / NUM_STEPS)
    else:
        kwargs = dict(dt0=1 / NUM_STEPS, max_steps=NUM_STEPS + 3)
    expected = value_and_grad(stock, solver, 1 / NUM_STEPS, max_steps=NUM_STEPS)
    assert_close(value_and_grad(DOORS[door], solver, **kwargs), expected, rounding())


def run(door, solver, t0=0.0, t1=2.0, dt0=0.1, y0=SWING_Y0, term=SWING, **kwargs):
    """`door` is a name, or None for the sequential twin."""
    solve = stock if door is None else DOORS[door]
    args = kwargs.pop("args", swing_args(0.7))
    return solve(term, solver, t0, t1, dt0, y0, args, **kwargs)


def assert_same(sol, expected, tol=rounding()):
    size = min(len(sol.ts), len(expected.ts))
    cut = lambda sol: jtu.tree_map(lambda x: x[:size], (sol.ts, sol.ys))
    assert_close(cut(sol), cut(expected), tol)
    assert sol.result == expected.result
    assert int(sol.stats["num_steps"]) == int(expected.stats["num_steps"])


TWO = ("Obreshkov(2)", "RadauIIA(2)")
#: The first has the same code as those of more derivatives, and less of it to compile.
AND_SMALLEST = ("Obreshkov(1)", *TWO)


@pytest.mark.parametrize(
    "name",
    slow_unless(
        ("Obreshkov(1)",), ("Obreshkov(1)", "Obreshkov(2)", "GaussLegendre(2)")
    ),
)
@pytest.mark.slow(covered_by="test_values_and_gradients")
def test_saves_and_dense_output(name):
    solver, _ = ORDERS[name]
    saveat = diffrax.SaveAt(t0=True, ts=[0.13, 0.5, 1.99], steps=3, t1=True, dense=True)
    sol, expected = run("a", solver, saveat=saveat), run(None, solver, saveat=saveat)
    assert_same(sol, expected)
    ts = jnp.linspace(0.0, 2.0, 33)
    assert_close(
        jax.vmap(sol.evaluate)(ts), jax.vmap(expected.evaluate)(ts), rounding()
    )
    assert_close(sol.evaluate(0.2, 1.1), expected.evaluate(0.2, 1.1), rounding())
    assert int(sol.stats["num_fallback_steps"]) == 0


def test_one_stage_of_radau_is_backward_euler():
    ts = jnp.linspace(0.0, 2.0, 21)
    euler = diffrax.ImplicitEuler(root_finder=ROOT_FINDER)
    both = jax.jit(
        lambda *on: (
            parallel_steps(RadauIIA(1), SWING, ts, *on)[0],
            sequential_steps(euler, SWING, ts, *on)[0],
        )
    )
    assert_close(*both(SWING_Y0, swing_args(0.7)), rounding())


@pytest.mark.parametrize("name", ("Obreshkov(1)", "GaussLegendre(1)"))
def test_formulas_by_hand(name):
    """The trapezoidal rule and the implicit midpoint rule."""
    f = lambda t, y: np.array([y[1], -np.sin(y[0]) + 0.7 * np.cos(t)])
    h, y, expected = 0.1, np.array([1.5, 0.0]), []
    for n in range(20):
        t, start = n * h, y
        # A contraction by h / 2 or so, until nothing moves.
        for _ in range(30):
            if name == "Obreshkov(1)":
                y = start + h / 2 * (f(t, start) + f(t + h, y))
            else:
                y = start + h * f(t + h / 2, (start + y) / 2)
        expected.append(y)
    ts, args = jnp.linspace(0.0, 2.0, 21), swing_args(0.7)
    solve = jax.jit(lambda y0: parallel_steps(ORDERS[name][0], SWING, ts, y0, args)[0])
    ys = solve(SWING_Y0)
    assert_close(ys, jnp.array(expected), rounding())


STATES = {
    "tree": (
        lambda t, y, a: {"x": -a * y["v"][0], "v": (jnp.sin(y["x"]), y["v"][1] * t)},
        {"x": jnp.ones((2, 1)), "v": (jnp.zeros((2, 1)), jnp.array(1.0))},
    ),
    "complex": (lambda t, y, a: 1j * a * y * jnp.conj(y) - y, jnp.array([1 + 0.5j])),
}  # fmt: skip


@pytest.mark.parametrize(
    "which, name",
    [
        pytest.param("tree", "Obreshkov(2)", marks=pytest.mark.slow),
        ("complex", "Obreshkov(1)"),
        pytest.param("complex", "RadauIIA(2)", marks=pytest.mark.slow),
        pytest.param("tree", "GaussLegendre(2)", marks=pytest.mark.slow),
        pytest.param("complex", "Obreshkov(3)", marks=pytest.mark.slow),
        pytest.param("tree", "AveragedExponential", marks=pytest.mark.slow),
    ],
)
def test_states(which, name):
    field, y0 = STATES[which]
    problem = lambda: (diffrax.ODETerm(field), y0, jnp.array(0.7))
    ts, times = jnp.linspace(0.0, 1.0, 11), jnp.array([0.33, 1.0])
    assert_steps_agree(ORDERS[name][0], problem, ts, times)


@pytest.mark.parametrize("name", slow_unless(("Obreshkov(1)",), AND_SMALLEST))
def test_float32(name):
    solver, _ = ORDERS[name]
    f32 = jnp.float32
    inputs = jtu.tree_map(
        lambda x: x.astype(f32),
        (jnp.linspace(0.0, 1.0, 17), *number()[1:], jnp.array([0.33, 1.0])),
    )
    solve = lambda steps: eqx.filter_jit(lambda x: steps(solver, BENT, *x))(inputs)
    expected = solve(sequential_steps)
    assert expected[0].dtype == expected[1].dtype == f32
    assert_close(solve(parallel_steps), expected, rounding(f32))


@pytest.mark.parametrize(
    "name, method",
    slow_rows(
        [(n, m) for n in AND_SMALLEST for m in (WITHOUT_A_FINISH, Newton())],
        lambda row: row != ("Obreshkov(1)", WITHOUT_A_FINISH),
    ),
    ids=str,
)
@pytest.mark.slow(covered_by="test_core.py::test_event")
def test_backward_in_time_on_a_graded_grid_with_an_event(name, method):
    solver, _ = ORDERS[name]
    ts = 2.0 - 2.0 * jnp.linspace(0.0, 1.0, 24) ** 2
    term, y0, args = number()
    event = diffrax.Event(lambda t, y, args, **kw: y[0] < 0.3)
    kwargs = dict(
        t0=2.0, t1=0.0, dt0=None, stepsize_controller=diffrax.StepTo(ts), event=event,
        saveat=diffrax.SaveAt(steps=True), term=term, y0=y0, args=args,
    )  # fmt: skip
    expected = run(None, solver, **kwargs)
    assert expected.result == diffrax.RESULTS.event_occurred
    assert_same(run("a", solver, method=method, **kwargs), expected)


@pytest.mark.slow(covered_by="test_core.py::test_event")
def test_rooted_event():
    import optimistix as optx

    event = diffrax.Event(lambda t, y, args, **kw: y[0], optx.Newton(1e-12, 1e-12))
    solver = Obreshkov(1)
    sol, expected = (run(door, solver, event=event) for door in ("a", None))
    # The root is found to the tolerance of the finder, on a cubic.
    assert_close((sol.ts, sol.ys), (expected.ts, expected.ys), 1e-10)


@pytest.mark.parametrize("name", slow_unless(("Obreshkov(1)",), AND_SMALLEST))
@pytest.mark.slow(covered_by="test_doors.py::test_warm_start")
def test_warm_start(name):
    solver, _ = ORDERS[name]
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    cold = run("a", solver, saveat=saveat)
    warm = run("a", solver, saveat=saveat, solver_state=cold.solver_state)
    assert int(warm.stats["num_newton_steps"]) < int(cold.stats["num_newton_steps"])
    assert_close(warm.ys, cold.ys, rounding())


@pytest.mark.parametrize("name", slow_unless(("Obreshkov(1)",), AND_SMALLEST))
def test_transformations(name):
    """vmap, jit, forward mode and second derivatives, against finite differences."""
    solver, _ = ORDERS[name]
    ts = jnp.linspace(0.0, 2.0, 9)

    def final(x):
        ys, _ = parallel_steps(solver, BENT, ts, x[:1], x[1])
        return jnp.sum(ys[-1])

    x, v = jnp.array([1.5, 1.1]), jnp.array([0.3, -0.7])
    # As few programs as differences to all sides allow.
    first = jax.jit(
        lambda x: (jax.jvp(final, (x,), (v,)), jax.value_and_grad(final)(x))
    )
    final_jit, grad = (lambda x: first(x)[1][0]), (lambda x: first(x)[1][1])
    value, tangent = first(x)[0]
    assert_close(value, final_jit(x), rounding())
    # Central differences leave h^2 / 6 of a third derivative, and rounding / h.
    assert_close(tangent, finite_difference(final_jit, x, v), 1e-8)
    hessian = jax.jit(jax.hessian(final))(x)
    assert_close(grad(x) @ v, tangent, rounding())
    assert_close(hessian, hessian.T, rounding())
    assert_close(hessian @ v, finite_difference(grad, x, v), 1e-8)
    batch = jnp.stack([x, x + 0.2, x - 0.1])
    assert_close(
        jax.jit(jax.vmap(final))(batch), jnp.stack([final_jit(x) for x in batch]),
        rounding(),
    )  # fmt: skip


# --- interpolation and controls -----------------------------------------------------


@pytest.mark.parametrize(
    "name, order",
    [
        ("Obreshkov(2)", 4),  # Hermite's cubic
        # Hermite's quintic
        pytest.param("Obreshkov(3)", 6, marks=pytest.mark.slow),
        # A polynomial through the start and three stages.
        pytest.param("RadauIIA(3)", 4, marks=pytest.mark.slow),
        pytest.param("GaussLegendre(2)", 3, marks=pytest.mark.slow),
    ],
)
def test_order_of_interpolation(name, order):
    solver, _ = ORDERS[name]
    counts = (8, 16, 32)
    ts = np.sort(np.random.default_rng(0).uniform(0.0, 2.0, 200))

    def error(n):
        _, ys = padded_solve(
            solver, ROBINSON, 2.0, n, jnp.zeros(1), jnp.asarray(1.0), max(counts), ts
        )
        return np.abs(np.asarray(ys)[:, 0] - np.sin(3 * ts)).max()

    errors = [error(n) for n in counts]
    assert abs(observed_order(counts, errors) - order) < 2 * SLACK, errors


KNOTS = np.linspace(0.0, 1.0, 9)


def controlled(t, y, args):
    x, v = y
    column = jnp.stack([jnp.sin(t) * v, jnp.cos(x)])
    return jnp.stack([jnp.stack([v, -jnp.sin(x)]), args * column], axis=-1)


def control_terms(kind):
    path = np.stack([KNOTS, np.sin(7 * KNOTS) + KNOTS**2], axis=-1)
    path = jnp.asarray(path)
    ts = jnp.asarray(KNOTS)
    linear = diffrax.LinearInterpolation(ts, path)
    if kind == "linear":
        return diffrax.ControlTerm(controlled, linear), linear
    cubic = diffrax.CubicInterpolation(
        ts, diffrax.backward_hermite_coefficients(ts, path)
    )
    return diffrax.ControlTerm(controlled, cubic).to_ode(), cubic


@pytest.mark.parametrize(
    "num_derivatives, kind",
    [
        (1, "linear"),
        pytest.param(2, "linear", marks=pytest.mark.slow),
        pytest.param(3, "cubic", marks=pytest.mark.slow),
        pytest.param(2, "cubic", marks=pytest.mark.slow),
        pytest.param(3, "linear", marks=pytest.mark.slow),
    ],
)
def test_controls_keep_the_order(num_derivatives, kind):
    """With knots on the grid, where the derivative of the control jumps."""
    term, path = control_terms(kind)
    args, y0 = jnp.array(1.3), np.array([1.0, 0.2])
    slope = jax.jit(
        lambda t, y, left: controlled(t, y, args) @ path.derivative(t, left=left),
        static_argnums=2,
    )
    exact = y0
    for t0, t1 in zip(KNOTS[:-1], KNOTS[1:], strict=True):
        # The derivative to the left of the end of a piece, to the right of its start.
        exact = scipy.integrate.solve_ivp(
            lambda t, y, t0=t0: np.asarray(slope(t, jnp.asarray(y), bool(t > t0))),
            (t0, t1), exact, method="DOP853", rtol=1e-13, atol=1e-14,
        ).y[:, -1]  # fmt: skip
    counts = (8, 16, 32)
    errors = [
        np.abs(
            final_state(
                Obreshkov(num_derivatives), term, 1.0, n, jnp.asarray(y0), args, 32
            ) - exact
        ).max()
        for n in counts
    ]  # fmt: skip
    assert observed_order(counts, errors) > 2 * num_derivatives - 2 * SLACK, errors


# --- what goes wrong ----------------------------------------------------------------


def test_refusals():
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="must be 1, 2 or 3"):
            Obreshkov(wrong)
    for cls in (RadauIIA, GaussLegendre):
        for wrong in (0, 9):
            with pytest.raises(ValueError, match="must be an integer from 1 to 8"):
                cls(wrong)
    for name in TWO:
        with pytest.raises(ValueError, match="whole Jacobians: use .*Dense"):
            run("a", ORDERS[name][0], method=Newton(Diagonal()))
    y0 = jnp.array([1.0, 0.0])
    # Traced, and not compiled.
    solve = lambda term, solver=RadauIIA(2): jax.eval_shape(
        lambda: diffeqsolve(term, DEER(solver, ALL_AT_ONCE), 0.0, 1.0, 0.1, y0).ys
    )
    good = DAETerm(lambda t, y, dy, args: dy + y)
    for solver in (diffrax.Tsit5(), Obreshkov()):
        with pytest.raises(ValueError, match=r"no vector field. Solve it with `DEER"):
            solve(good, solver)
    with pytest.raises(ValueError, match="as many equations as there are unknowns"):
        solve(DAETerm(lambda t, y, dy, args: dy[:1] + y[:1]))
    with pytest.raises(ValueError, match="flattened state of 2 numbers"):
        solve(MassMatrixTerm(lambda t, y, args: -y, jnp.eye(3)))
    for field, message in (
        (lambda t, y, args: jnp.append(-y, 0.0), "for broadcasting"),
        (lambda t, y, args: (-y[0], -y[1]), "same structure"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(MassMatrixTerm(field, jnp.eye(2)))


SINGULAR = {
    "pencil": MassMatrixTerm(
        lambda t, y, args: -jnp.stack([y[0], y[0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    ),
    "twice the same": DAETerm(
        lambda t, y, dy, args: jnp.stack([dy[0] - y[1], 3 * (dy[0] - y[1])])
    ),
}


@pytest.mark.parametrize(
    "which, name",
    [
        ("pencil", "RadauIIA(1)"),
        pytest.param("twice the same", "RadauIIA(3)", marks=pytest.mark.slow),
        pytest.param("twice the same", "GaussLegendre(2)", marks=pytest.mark.slow),
        pytest.param("pencil", "RadauIIA(3)", marks=pytest.mark.slow),
        pytest.param("pencil", "GaussLegendre(2)", marks=pytest.mark.slow),
        pytest.param("twice the same", "RadauIIA(1)", marks=pytest.mark.slow),
    ],
)
def test_singular_equations_fail(which, name):
    """Where the second component is free, no number passes for an answer."""
    solve = lambda y0: diffeqsolve(
        SINGULAR[which], DEER(ORDERS[name][0], ALL_AT_ONCE), 0.0, 1.0, 0.25, y0,
        throw=False,
    )  # fmt: skip
    result = eqx.filter_jit(lambda y0: solve(y0).result)(jnp.array([1.0, 0.3]))
    assert result != diffrax.RESULTS.successful


@pytest.mark.slow(covered_by="test_daes.py::test_pendulum")
def test_no_spurious_solution():
    """A guess of long steps leads Newton to solutions of the equations far off."""
    kwargs = dict(
        t1=1000.0, dt0=0.25, y0=jnp.array([10.0, 5.0]), args=lotka_volterra_args(),
        term=diffrax.ODETerm(lotka_volterra), saveat=diffrax.SaveAt(steps=40),
    )  # fmt: skip
    solver = Obreshkov()
    expected = run(None, solver, max_steps=4000, **kwargs)
    sol = run("a", solver, method=Newton(guess=Coarse(32)), **kwargs)
    # Conditioned like an orbit: rounding grows in proportion to the time.
    assert_same(sol, expected, sqrt_eps())
    assert float(jnp.min(sol.ys)) > 0


@pytest.mark.parametrize(
    "solver, window",
    slow_rows(
        [
            (solver, window)
            for solver in (Obreshkov(1), Obreshkov(2), RadauIIA(1), RadauIIA(2))
            for window in (None, Window())
        ],
        lambda row: row != (RadauIIA(1), Window()),
    ),
    ids=repr,
)
def test_guess_where_there_is_no_field(solver, window):
    """It is replaced by a state that is right, and only then says something."""
    num_steps = 20
    guess = Trajectory(jnp.full((num_steps, 1), -1.0))
    y0, t1 = jnp.array([0.5]), 2.0
    term = diffrax.ODETerm(lambda t, y, args: -jnp.log(y))
    method = Newton(guess=guess, fallback=False, window=window)
    actual = diffeqsolve(
        term, DEER(solver, method=method), 0.0, t1, t1 / num_steps, y0,
        max_steps=num_steps, saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    ts = jnp.linspace(0.0, t1, num_steps + 1)
    expected = jax.jit(lambda y0: sequential_steps(solver, term, ts, y0, None)[0])(y0)
    assert_close(actual.ys, expected, rounding())
    assert int(actual.stats["num_fallback_steps"]) == 0


@pytest.mark.parametrize("y0", [jnp.zeros(0), None], ids=["no numbers", "None"])
def test_nothing_to_solve(y0):
    term = diffrax.ODETerm(lambda t, y, args: y)
    sol = diffeqsolve(term, DEER(RadauIIA(2)), 0.0, 1.0, 0.1, y0)
    assert sol.result == diffrax.RESULTS.successful
    assert int(sol.stats["num_steps"]) == 10
    assert_close(sol.ys, None if y0 is None else jnp.zeros((1, 0)), 0.0)
