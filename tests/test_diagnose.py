"""What `diagnose` says, against what is known and what Newton's method does."""

import builtins
import functools
import io
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import deer_ode
from deer_ode import (
    DEER,
    Auto,
    BlockDiagonal,
    Coarse,
    Constant,
    Diagonal,
    GaussLegendre,
    Newton,
    RadauIIA,
    Sequential,
    Trajectory,
    Window,
    diffeqsolve,
    scan,
    solve_recurrence,
)
from deer_ode._diagnose import diagnose
from deer_ode._growth import largest_growth

from .helpers import (
    lotka_volterra,
    lotka_volterra_args,
    slow,
    slow_rows,
    sqrt_eps,
    van_der_pol,
)


LORENZ_EXPONENT = 0.9056
"""Of the classical parameters, to the digits that matter here."""


def lorenz(t, y, args):
    del t, args
    x, y, z = y
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


ON_THE_ATTRACTOR = (-3.3, -5.7, 14.0)


@functools.cache
def diagnose_lorenz(
    t1, dt0=0.01, solver=diffrax.Euler(), guess=Coarse(every=2), **kwargs
):
    method = Newton(guess=guess)
    return diagnose(
        diffeqsolve,
        diffrax.ODETerm(lorenz),
        DEER(solver, method),
        0.0,
        t1,
        dt0,
        jnp.array(ON_THE_ATTRACTOR),
        **kwargs,
    )


def logistic(y, rate):
    return rate * y * (1 - y), None


def linear(A):
    return lambda y, x: (jnp.tanh(x) + A @ y, None)


# --- Lyapunov exponents ---------------------------------------------------------------


@pytest.mark.slow(covered_by="test_logistic_map")
def test_lorenz():
    found = diagnose_lorenz(100.0, solver=diffrax.Tsit5(), max_iterations=1)
    # Over so long an interval exponents of different trajectories scatter by 0.02.
    assert abs(found.lyapunov_exponent - LORENZ_EXPONENT) < 0.05
    assert found.horizon == pytest.approx(100 * found.lyapunov_exponent)
    # All that is lost is lost exponentially, but for bounded fluctuations: what
    # perturbations grow by within one turn.
    assert abs(found.growth - found.horizon / math.log(10)) < 2


GROWING, DECAYING = (1.1, -0.5, 0.2), (-0.9, 0.3, 0.0)


@pytest.mark.parametrize(
    "spectrum, is_diagonal",
    slow_rows(
        [(s, diagonal) for s in (GROWING, DECAYING) for diagonal in (False, True)],
        lambda row: row[1] != (row[0] == DECAYING),
    ),
    ids=str,
)
def test_linear_map(spectrum, is_diagonal):
    basis = jnp.eye(3)
    if not is_diagonal:
        basis, _ = jnp.linalg.qr(jr.normal(jr.key(1), (3, 3)))
    A = basis @ jnp.diag(jnp.array(spectrum)) @ basis.T
    f = linear(A) if not is_diagonal else lambda y, x: (jnp.array(spectrum) * y, x)
    found = diagnose(scan, f, jnp.ones(3), jnp.ones((60, 3)))
    expected = math.log(max(abs(x) for x in spectrum))
    # The second eigenvalue is at most half the first: nothing of it is left of a
    # perturbation that went there and back.
    assert found.lyapunov_exponent == pytest.approx(expected, abs=sqrt_eps())
    assert found.growth == pytest.approx(max(0, 60 * expected / math.log(10)), abs=1e-3)
    assert found.unit == "step" and found.num_steps == 60


def test_logistic_map():
    found = diagnose(
        scan, logistic, jnp.array(0.3), jnp.full(4000, 4.0), max_iterations=1
    )
    # log |f'| = log 2 but for a difference of a function of neighbouring states, which
    # telescopes: the error is log |f'| of the ends over the number of steps.
    assert abs(found.lyapunov_exponent - math.log(2)) < 20 / 4000


@pytest.mark.parametrize(
    "solver, direction",
    slow_rows(
        (
            (diffrax.Tsit5(), 1),
            (diffrax.Tsit5(), -1),
            (RadauIIA(2), 1),
            (GaussLegendre(1), 1),
            (deer_ode.Obreshkov(), -1),
        ),
        lambda row: row != (diffrax.Tsit5(), -1),
    ),
    ids=repr,
)
def test_exponent_is_per_unit_of_time(solver, direction):
    """Of the states alone, where stages are unknowns as well, and backwards."""
    term = diffrax.ODETerm(lambda t, y, args: args * y)
    rates = jnp.array([0.5, -3.0])
    found = diagnose(
        diffeqsolve,
        term,
        DEER(solver, Newton(guess=Constant())),
        1.0,
        1.0 + 4 * direction,
        0.1 * direction,
        jnp.ones(2),
        rates,
    )
    # In the direction of the solve what decayed grows.
    expected = 0.5 if direction == 1 else 3.0
    # The discretisation's error, of a step of 0.1 at the rate 3.
    assert found.lyapunov_exponent == pytest.approx(expected, abs=1e-3)
    assert found.start == 1.0 and found.times[-1] == 1.0 + 4 * direction
    assert found.converged


def test_a_map_that_forgets_everything():
    found = diagnose(scan, lambda y, x: (x, None), jnp.zeros(2), jnp.ones((9, 2)))
    assert found.lyapunov_exponent == found.horizon == -math.inf
    assert found.growth == 0
    assert found.converged and found.num_iterations == 2


def test_growth_between_resets():
    """Where a state is forgotten once, what grows before and after counts."""

    def step(y, keep):
        return keep * 10 * y + 1, None

    keep = jnp.ones(10).at[5].set(0)
    found = diagnose(scan, step, jnp.array(1.0), keep)
    assert found.lyapunov_exponent == -math.inf
    assert found.growth == pytest.approx(5)


def test_largest_growth():
    steps = np.log([10.0, 10.0, 0.01, 0.1, 10.0, 10.0, 10.0, 0.1])
    assert largest_growth(steps) == pytest.approx(3)
    assert largest_growth(np.log([0.5, 0.5])) == 0


# --- as Newton's method ---------------------------------------------------------------


@pytest.mark.parametrize(
    "guess, rate, rtol",
    slow_rows(
        ((None, 1.5, None), (0.3, 3.2, None), (0.62, 3.9, None), (0.3, 2.8, 1e-6)),
        lambda row: row[1] in (3.2, 3.9),
    ),
)
def test_iterations_are_those_of_newton(guess, rate, rtol):
    xs, init = jnp.full(12, rate), jnp.array(0.4)
    guess = None if guess is None else jnp.full(12, guess)
    method = Newton(rtol=rtol, fallback=False, window=None)
    sol = solve_recurrence(logistic, init, xs, method=method, guess=guess)
    found = diagnose(solve_recurrence, logistic, init, xs, method=method, guess=guess)
    assert found.converged and bool(jnp.all(jnp.isfinite(sol.carries)))
    assert found.num_iterations == int(sol.stats["num_newton_steps"])
    assert found.num_good_steps[-1] == 12 == found.num_steps


@pytest.mark.slow(covered_by="test_iterations_are_those_of_newton")
def test_iterations_of_a_differential_equation():
    term, y0 = diffrax.ODETerm(van_der_pol), jnp.array([2.0, 0.0])
    solver = DEER(diffrax.Heun(), Newton(fallback=False, window=None))
    call = (term, solver, 0, 8, 0.03, y0, 2.0)
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    sol = diffeqsolve(*call, saveat=saveat, max_steps=300)
    found = diagnose(diffeqsolve, *call)
    assert sol.stats is not None
    assert found.num_steps == int(sol.stats["num_steps"]) == 267
    assert found.num_iterations == int(sol.stats["num_newton_steps"])
    # From the last trajectory it is one; diagnosed as it would be solved.
    again = diagnose(diffeqsolve, *call, solver_state=sol.solver_state)
    assert again.num_iterations == 1 == again.predicted_iterations
    assert again.guess_error < sqrt_eps()


def test_checks_of_the_user_are_of_no_iterate():
    """An iterate does not trip them; and padding of `solver_state` is left out."""

    def field(t, y, args):
        return -eqx.error_if(y, (t > 0.5) & (y > 0.9), "of a guess")

    term = diffrax.ODETerm(field)
    solver = DEER(diffrax.Euler(), Newton(guess=Constant(), window=None, chunk=1))
    call = (term, solver, 0.0, 1.0, 0.1, jnp.array(1.0))
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    in_turn = DEER(diffrax.Euler(), Sequential())
    sol = diffeqsolve(term, in_turn, *call[2:], saveat=saveat, max_steps=20)
    found = diagnose(diffeqsolve, *call)
    assert found.converged and found.num_steps == 10
    again = diagnose(diffeqsolve, *call, solver_state=sol.solver_state, max_steps=20)
    assert again.converged and again.num_iterations == 1


def test_residuals_of_the_guess():
    """In units of the tolerance, one by one, where each step has a bin of its own."""
    xs, init = jnp.full(6, 2.5), jnp.array(0.4)
    guess = jnp.array([0.6, 0.6, 0.6, 0.55, 0.5, jnp.nan])
    rtol = 1e-4
    found = diagnose(
        scan, logistic, init, xs, guess=guess, method=Newton(rtol=rtol, atol=0.0)
    )
    # What is not a number holds the last state.
    held = np.array([0.6, 0.6, 0.6, 0.55, 0.5, 0.5])
    before = np.concatenate([[0.4], held[:-1]])
    residual = np.abs(2.5 * before * (1 - before) - held)
    # This value, and what comes of the one before.
    size = np.abs(held) + np.abs(2.5 * (1 - 2 * before)) * before
    expected = residual / (rtol * size)
    np.testing.assert_allclose(found.residuals[0], expected, rtol=1e-9, atol=1e-9)
    assert found.num_good_steps[0] == 3
    np.testing.assert_array_equal(found.times, np.arange(6))
    assert found.start == -1


def test_bins_keep_what_is_worst():
    """A step in three thousand is off, and one is not a number."""
    num_steps = 3000
    guess = np.full(num_steps, 0.0)
    guess[1234] = 1.0

    def step(y, x):
        return 0.0 * y + jnp.log(x), None

    xs = jnp.ones(num_steps).at[2000].set(-1.0)
    found = diagnose(scan, step, jnp.array(0.0), xs, guess=jnp.asarray(guess))
    assert found.residuals.shape[1] == 1024 == len(found.times)
    first = found.residuals[0]
    (off,) = np.flatnonzero(first > 1)
    before = -1 if off == 0 else found.times[off - 1]
    assert before < 1234 <= found.times[off]
    (bad,) = np.flatnonzero(np.isnan(first))
    assert found.times[bad - 1] < 2000 <= found.times[bad]
    assert found.times[-1] == num_steps - 1


def test_reversed():
    """Solved from the last step to the first, and shown in the order of `xs`."""
    xs = jnp.linspace(1.0, 3.0, 20)
    forwards = diagnose(scan, logistic, jnp.array(0.4), xs[::-1])
    found = diagnose(scan, logistic, jnp.array(0.4), xs, reverse=True)
    np.testing.assert_array_equal(found.residuals, forwards.residuals)
    np.testing.assert_array_equal(found.times, np.arange(20)[::-1])
    assert found.start == 20


@pytest.mark.parametrize("steps", slow(("given", "even"), lambda x: x == "even"))
def test_steps_to_given_times_and_backwards(steps):
    """The grid and the terms are those of the solve: its own trajectory is right."""
    term, y0 = diffrax.ODETerm(lotka_volterra), jnp.array([10.0, 5.0])
    ts = jnp.linspace(1.0, 0.0, 31) ** 2
    call = dict(
        terms=term,
        t0=1.0,
        t1=0.0,
        y0=y0,
        args=lotka_volterra_args(),
    )
    call |= (
        dict(dt0=None, stepsize_controller=diffrax.StepTo(ts))
        if steps == "given"
        else dict(dt0=-0.03)
    )
    sol = diffeqsolve(
        solver=DEER(diffrax.Euler()), saveat=diffrax.SaveAt(steps=True), **call
    )
    assert sol.ts is not None and sol.ys is not None
    solver = DEER(diffrax.Euler(), Newton(guess=Trajectory(sol.ys)))
    found = diagnose(diffeqsolve, solver=solver, **call)
    assert found.num_iterations == 1
    np.testing.assert_allclose(found.times, sol.ts, rtol=1e-14, atol=1e-16)
    assert found.start == 1.0


# --- what is not finite ---------------------------------------------------------------


def root(y, x):
    return jnp.sqrt(y - 10) + x, None


@functools.cache
def diagnose_root():
    return diagnose(scan, root, jnp.array(0.0), jnp.zeros(20))


def test_not_a_number():
    found = diagnose_root()
    assert found.first_nonfinite == 0
    assert not found.converged and found.num_good_steps[-1] == 0
    assert math.isnan(found.lyapunov_exponent) and math.isnan(found.growth)
    assert found.predicted_iterations is None
    assert "not a number from step 0 on" in found.recommendation
    assert np.isnan(found.residuals[0, 0])
    assert "nan" in str(found)


def test_not_a_number_later():
    term = diffrax.ODETerm(lambda t, y, args: y**2)
    solver = DEER(diffrax.Heun(), Newton(guess=Constant()))
    found = diagnose(diffeqsolve, term, solver, 0, 3, 0.01, jnp.array(1.0))
    # It blows up at one; the discrete solution a few steps later.
    assert found.first_nonfinite is not None and 100 < found.first_nonfinite < 120
    assert f"step {found.first_nonfinite}" in found.recommendation


def test_too_large():
    found = diagnose(scan, lambda y, x: (y**2, x), jnp.array(10.0), None, 8)
    assert found.first_nonfinite is None and not found.converged
    # 10^128 is beyond the fourth root of the largest number.
    assert "at step 6" in found.recommendation
    assert "Sequential()" in found.recommendation


# --- recommendations ------------------------------------------------------------------


def test_nothing_to_do():
    found = diagnose_lorenz(1.0)
    assert found.recommendation == (
        f"Converges in {found.num_iterations} iterations; nothing to do."
    )
    assert found.predicted_iterations is not None
    assert abs(found.predicted_iterations - found.num_iterations) <= 1
    assert found.recommendation in str(found) and str(found) == repr(found)


def test_it_says_that_the_call_is_sequential():
    logistic = lambda y, rate: (rate * y * (1 - y), None)
    problem = logistic, jnp.array(0.3), jnp.full(8, 2.0)
    says = lambda method: (
        "sequential steps on this machine"
        in (diagnose(scan, *problem, method=method).recommendation)
    )
    assert says(Auto()) and not says(Newton())


def test_chaos():
    heun = diffrax.Heun()
    found = diagnose_lorenz(40.0, solver=heun, guess=Constant(), max_iterations=6)
    assert not found.converged and found.predicted_iterations is None
    text = found.recommendation
    assert f"Chaotic over {found.horizon:.3g} Lyapunov times" in text
    assert "window=" in text and "Sequential()" in text
    assert f"at most {found.num_good_steps.max():,} of 4,000 steps" in text
    assert "no convergence" in str(found)
    # A window of that length is nothing to worry about.
    window = int(text.split("Window(")[1].split(")")[0])
    assert diagnose_lorenz(0.01 * window, solver=heun).converged


@pytest.mark.slow(covered_by="test_chaos")
def test_the_recommended_window_converges():
    """No step is left to be taken on its own; nor with a round number nearby."""
    term, interval = diffrax.ODETerm(lorenz), (0.0, 30.0, 0.005)

    @eqx.filter_jit
    def run(window, y0):
        solver = DEER(diffrax.Tsit5(), Newton(window=window))
        return diffeqsolve(term, solver, *interval, y0).stats

    solver, y0 = DEER(diffrax.Tsit5(), Newton()), jnp.ones(3)
    text = diagnose(diffeqsolve, term, solver, *interval, y0).recommendation
    advised = int(text.split("Window(")[1].split(")")[0])
    for length in (advised, 1000):
        stats = run(Window(length), y0)
        assert int(stats["num_steps"]) == 6000
        assert int(stats["num_fallback_steps"]) == 0


def test_a_bad_guess():
    term, y0 = diffrax.ODETerm(van_der_pol), jnp.array([2.0, 0.0])
    solver = DEER(diffrax.Euler(), Newton(guess=Constant()))
    call = (term, solver, 0, 10, 0.05, y0, 1.0)
    found = diagnose(diffeqsolve, *call, max_iterations=5)
    assert not found.converged and found.guess_error > 0.5
    assert "Adaptive(rtol=1e-8)" in found.recommendation
    slow = diagnose(diffeqsolve, *call)
    assert slow.converged and slow.num_iterations > 10
    assert f"in {slow.num_iterations} iterations" in slow.recommendation
    assert "guess is off" in slow.recommendation


def test_a_bad_guess_of_a_recurrence():
    found = diagnose(
        scan, logistic, jnp.array(0.3), jnp.full(100, 2.5), max_iterations=5
    )
    assert found.horizon < 0 and not found.converged
    assert "`guess=`" in found.recommendation
    assert "Adaptive" not in found.recommendation


def test_linearisation_that_leaves_much_out():
    A = jnp.array([[0.0, 0.9], [-0.9, 0.0]])
    method = Newton(linearisation=Diagonal())
    xs = jnp.ones((300, 2))
    found = diagnose(scan, linear(A), jnp.ones(2), xs, method=method, max_iterations=12)
    assert not found.converged
    assert "Exact()" in found.recommendation
    # The exponent is that of the exact Jacobian, whatever the iteration used.
    assert found.lyapunov_exponent == pytest.approx(math.log(0.9))


def test_tolerance_below_rounding():
    method = Newton(rtol=0.0, atol=0.0)
    xs = jnp.linspace(0.1, 0.9, 50)
    step = lambda y, x: (jnp.sin(1.3 * y + x) / 3, None)
    found = diagnose(scan, step, jnp.array(0.3), xs, method=method, max_iterations=12)
    assert not found.converged
    assert "`rtol`" in found.recommendation


def test_large_numbers_that_are_no_trouble():
    step = lambda y, x: (jnp.float32(0.5) * y + jnp.float32(1e10), None)
    found = diagnose(scan, step, jnp.float32(1e10), jnp.zeros(50))
    assert found.converged and "nothing to do" in found.recommendation


def test_reversed_guess():
    """That of the method as that of the call: each step where it is."""
    xs = jnp.linspace(1.0, 3.0, 20)
    carries = solve_recurrence(
        logistic, jnp.array(0.4), xs, reverse=True, method=Sequential()
    ).carries
    found = [
        diagnose(scan, logistic, jnp.array(0.4), xs, reverse=True, **kwargs)
        for kwargs in (
            {"guess": carries},
            {"method": Newton(guess=Trajectory(carries))},
        )
    ]
    for one in found:
        assert one.num_iterations == 1
        assert one.guess_error < sqrt_eps()


def test_jacobians_too_large():
    """Known only through a cheaper linearisation: no exponent, and no failure."""
    A = jnp.full((400, 400), 1e-3, jnp.float32)
    method = Newton(linearisation=BlockDiagonal(1))
    # 5 GB of dense Jacobians, where 4 GiB are allowed.
    xs = jnp.ones((8000, 400), jnp.float32)
    found = diagnose(scan, linear(A), xs[0], xs, method=method, max_iterations=1)
    assert math.isnan(found.lyapunov_exponent)
    assert found.first_nonfinite is None


# --- the picture ----------------------------------------------------------------------


def test_plot():
    found = diagnose_lorenz(1.0)
    figure = found.plot()
    axes, bar = figure.axes
    (image,) = axes.collections
    # Where a residual is zero: the end of the scale.
    expected = np.log10(np.where(found.residuals == 0, 1e-2, found.residuals))
    np.testing.assert_allclose(np.asarray(image.get_array()), expected, rtol=1e-12)
    (line,) = axes.lines
    # From the top down, one level for each iteration, ending where all is right.
    np.testing.assert_allclose(
        np.asarray(line.get_xdata())[::2], 0.01 * found.num_good_steps, atol=1e-12
    )
    assert line.get_ydata()[0] == 0.5
    assert line.get_ydata()[-1] == found.num_iterations + 0.5
    assert axes.get_ylim() == (found.num_iterations + 0.5, 0.5)
    assert "time" in axes.get_xlabel() and "iteration" in axes.get_ylabel()
    assert "tolerance" in bar.get_ylabel()
    figure.savefig(io.BytesIO(), format="png")


def test_plot_of_what_is_not_a_number():
    found = diagnose_root()
    figure = found.plot()
    (image,) = figure.axes[0].collections
    shown = np.ma.getmaskarray(image.get_array())
    np.testing.assert_array_equal(shown, ~np.isfinite(found.residuals))
    assert figure.axes[0].get_xlabel() == "step"
    figure.savefig(io.BytesIO(), format="png")


def test_plot_without_matplotlib(monkeypatch):
    found = diagnose_root()
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install deer_ode\[plot\]"):
        found.plot()


# --- errors ---------------------------------------------------------------------------


TERM = diffrax.ODETerm(lambda t, y, args: -y)
ONE = jnp.array(1.0)


def test_tolerances():
    """The steps are those of the mesh, which is found first."""
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    found = diagnose(
        *(diffeqsolve, TERM, DEER(diffrax.Bosh3()), 0, 1, None, ONE),
        stepsize_controller=pid,
    )
    assert found.converged and 1 < found.num_steps < 32
    assert found.mesh_stats is not None and found.mesh_stats["num_meshes"] == 1
    assert found.mesh_stats["num_guess_steps"] > 0
    assert "1 mesh solved" in str(found)


@pytest.mark.parametrize(
    "args, kwargs, message",
    (
        ((jax.lax.scan, logistic, ONE, ONE[None]), {}, "`deer_ode.scan`"),
        ((diffrax.diffeqsolve, TERM), {}, "`deer_ode.diffeqsolve`"),
        (
            (diffeqsolve, TERM, diffrax.Tsit5(), 0, 1, 0.1, ONE),
            {},
            r"`DEER\(Tsit5\(\)\)` in place of `Tsit5\(\)`",
        ),
        (
            (diffeqsolve, TERM, DEER(diffrax.Tsit5(), num_substeps=7), 0, 1, 0.1, ONE),
            {},
            "num_substeps=7.*Leave `num_substeps` out",
        ),
        (
            (diffeqsolve, TERM, DEER(diffrax.Tsit5()), 2, 2, 0.1, ONE),
            {},
            "nothing to diagnose.*t0=2, t1=2",
        ),
        ((diffeqsolve, TERM, DEER(), 0, 1, None, ONE), {}, "`dt0` is the size"),
        ((scan, logistic, ONE, jnp.zeros(0)), {}, "nothing to diagnose: 0 steps"),
        (
            (scan, logistic, ONE, ONE[None]),
            dict(max_iterations=0),
            "positive integer; got 0",
        ),
        ((scan, logistic, ONE, ONE[None]), dict(guess=jnp.ones(3)), r"\(1,\)"),
    ),
)
def test_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        diagnose(*args, **kwargs)


@pytest.mark.parametrize(
    "ts, message",
    (([0.0, 0.6, 0.9], "t1==ts"), ([0.0, 0.6, 0.5, 1.0], "strictly increasing")),
)
def test_given_times_are_the_errors_of_the_call(ts, message):
    to = diffrax.StepTo(jnp.array(ts))
    with pytest.raises(RuntimeError, match=message):
        diagnose(
            *(diffeqsolve, TERM, DEER(diffrax.Tsit5()), 0, 1, None, ONE),
            stepsize_controller=to,
        )


def test_integers_are_the_errors_of_the_call():
    with pytest.raises(TypeError, match="`init` is int"):
        diagnose(scan, lambda y, x: (y, None), jnp.array(1), jnp.ones(3))


def test_traced():
    @jax.jit
    def inside(y0):
        return diagnose(scan, logistic, y0, jnp.ones(3)).growth

    with pytest.raises(ValueError, match="`init` is traced: call it outside"):
        inside(ONE)


def test_the_plan_of_the_method_that_was_given():
    """Which is looked at plainly, and yet goes about it in its own way."""
    step = lambda y, x: (jnp.cos(y) + x, None)
    arguments = (scan, step, jnp.array(0.1), jnp.zeros(50))
    assert diagnose(*arguments).plan.path == "sequential"
    plan = diagnose(*arguments, method=Newton(window=Window(16))).plan
    assert plan.path == "newton" and plan.window == 16
