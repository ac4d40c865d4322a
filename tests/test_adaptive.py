"""The guess by an adaptive solve."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _hard
from deer_ode import DEER, Adaptive, Coarse, Newton, Obreshkov, RadauIIA, diffeqsolve
from deer_ode._discretisation import Grid, discretise
from deer_ode._foreign import body_of, inner_programs

from .helpers import ROOT_FINDER, slow_rows


van_der_pol = lambda t, y, args: _hard.van_der_pol(t, y, 5.0)


PROBLEMS = {
    "Van der Pol": (van_der_pol, [2.0, 0.0], 40.0),
    "FitzHugh-Nagumo": (_hard.fitzhugh_nagumo, [-1.0, 1.0], 200.0),
    "Kepler": (_hard.kepler, [0.1, 0.0, 0.0, 19**0.5], 12.56),
}


# With a guess on every eighth point of the grid: 54, 29 with 683 sequential steps, 16.
@pytest.mark.parametrize(
    "name, solver",
    slow_rows(
        [(name, s) for name in PROBLEMS for s in (diffrax.Tsit5(), Obreshkov())],
        lambda row: row[0] != "FitzHugh-Nagumo" or isinstance(row[1], Obreshkov),
    ),
)
def test_few_iterations(name, solver):
    field, y0, t1 = PROBLEMS[name]
    sol = diffeqsolve(
        diffrax.ODETerm(field), DEER(solver, Newton()), 0, t1, t1 / 1000, jnp.array(y0)
    )
    # Steps this long past the centre are off by more than the guess, and Obreshkov's
    # Jacobian is nearly exact only: each of the last three iterations gains 1e-3.
    is_coarse = name == "Kepler" and isinstance(solver, Obreshkov)
    assert int(sol.stats["num_newton_steps"]) <= (9 if is_coarse else 6)
    assert int(sol.stats["num_fallback_steps"]) == 0


def recurrence(solver, field=van_der_pol, y0=(2.0, 0.0), num_steps=1000, t1=40.0):
    grid = Grid.from_points(jnp.linspace(0.0, t1, num_steps + 1))
    term = diffrax.ODETerm(field)
    return discretise(solver, term, grid, jnp.asarray(y0), None).recurrence


@pytest.mark.parametrize(
    "rtol, most", [pytest.param(1e-3, 5e-2, marks=pytest.mark.slow), (1e-6, 1e-3)]
)
def test_it_is_as_near_as_asked(rtol, most):
    """Van der Pol's phase errors are some hundred times the tolerance."""
    guess = recurrence(diffrax.Tsit5()).adaptive_trajectory(rtol)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(van_der_pol),
        diffrax.Dopri8(),
        0.0,
        40.0,
        None,
        jnp.array([2.0, 0.0]),
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 40.0, 1001)[1:]),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-11),
    )
    error = float(jnp.max(jnp.abs(guess - sol.ys)[:, 0]))
    assert most / 1000 < error <= most


def test_what_is_not_reached_is_held():
    """Half of the interval is stiff, and takes too many explicit steps."""
    rate = lambda t: jnp.where(t < 5, 1.0, 1e6)
    decay = lambda t, y, args: -rate(t) * (y - jnp.cos(t))
    found = recurrence(diffrax.Tsit5(), decay, (1.0,), 100, 10.0)
    ys = np.asarray(found.adaptive_trajectory(None))[:, 0]
    num_held = int(np.sum(ys == ys[-1]))
    assert 49 <= num_held <= 52
    # The solution of y' = cos(t) - y from 1.
    ts = np.linspace(0.0, 10.0, 101)[1:49]
    expected = (np.cos(ts) + np.sin(ts) + np.exp(-ts)) / 2
    np.testing.assert_allclose(ys[:48], expected, atol=1e-4)


def test_after_an_overflow_it_goes_on():
    """The first attempt is a step of 1, whose stages overflow."""
    found = recurrence(diffrax.Tsit5(), lambda t, y, args: -(y**3), (30.0,), 10, 10.0)
    ys = np.asarray(found.adaptive_trajectory(None))[:, 0]
    expected = 1 / np.sqrt(2 * np.linspace(0.0, 10.0, 11)[1:] + 1 / 900)
    np.testing.assert_allclose(ys, expected, rtol=1e-4)


def test_nothing_but_padding():
    term = diffrax.ODETerm(van_der_pol)
    ends = jnp.full(8, 3.0)
    grid = Grid(ends, ends, jnp.zeros(8, bool))
    found = discretise(diffrax.Tsit5(), term, grid, jnp.array([2.0, 1.0]), None)
    ys = found.recurrence.adaptive_trajectory(None)
    np.testing.assert_array_equal(ys, jnp.tile(jnp.array([2.0, 1.0]), (8, 1)))


def test_a_batch_is_guessed_member_by_member():
    """Members that end early stay as they are."""

    @jax.jit
    def guess(y0):
        return recurrence(diffrax.Tsit5(), y0=y0).adaptive_trajectory(1e-4)

    y0 = jnp.array([[2.0, 0.0], [0.0, 0.0], [1.0, -1.0]])
    together = jax.vmap(guess)(y0)
    for one, ys in zip(y0, together, strict=True):
        # Steps of other lengths by rounding: a thousandth of the tolerance.
        np.testing.assert_allclose(ys, guess(one), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "solver",
    [
        RadauIIA(2),
        pytest.param(diffrax.Kvaerno3(root_finder=ROOT_FINDER), marks=pytest.mark.slow),
    ],
)
def test_stiff_equations_are_guessed_by_implicit_steps(solver):
    decay = lambda t, y, args: -1e4 * (y - jnp.cos(t))
    found = recurrence(solver, decay, (1.0,), 100, 10.0)
    ys = found.states(found.adaptive_trajectory(None))
    expected = jnp.cos(jnp.linspace(0.0, 10.0, 101)[1:])
    # Measured: 2.7e-4, by a guess to 1e-4.
    np.testing.assert_allclose(ys[:, 0], expected, rtol=0, atol=1e-3)


def loops(program) -> int:
    """How many loops of unknown length there are, at any depth."""
    equations = body_of(program).eqns
    here = sum(equation.primitive.name == "while" for equation in equations)
    return here + sum(loops(p) for e in equations for p in inner_programs(e))


def test_stages_are_written_out():
    """There is one loop, over steps. Implicit stages have loops within it."""
    found = recurrence(diffrax.Tsit5())
    program = jax.make_jaxpr(lambda: found.adaptive_trajectory(None))()
    assert loops(program) == 1
    stiff = recurrence(diffrax.Kvaerno3(root_finder=ROOT_FINDER))
    program = jax.make_jaxpr(lambda: stiff.adaptive_trajectory(None))()
    assert loops(program) > 1


def test_the_guess_does_not_follow_the_grid():
    """The same guess, at the same points, on a grid sixteen times as fine."""
    coarse, fine = (
        recurrence(diffrax.Tsit5(), num_steps=n).adaptive_trajectory(None)
        for n in (500, 8000)
    )
    np.testing.assert_allclose(fine[15::16], coarse, atol=1e-3)


def test_a_control_has_strides():
    path = diffrax.LinearInterpolation(jnp.linspace(0.0, 1.0, 9), jnp.arange(9.0))
    term = diffrax.ControlTerm(lambda t, y, args: -y, path)
    grid = Grid.from_points(jnp.linspace(0.0, 1.0, 17))
    found = discretise(diffrax.Heun(), term, grid, jnp.array([1.0]), None).recurrence
    assert found.adaptive_trajectory(None) is None
    np.testing.assert_array_equal(Adaptive()(found), Coarse()(found))


def test_bad_input():
    with pytest.raises(ValueError, match="Adaptive.rtol.*positive.*got 0"):
        Adaptive(rtol=0.0)
    assert isinstance(Adaptive().for_window(), Adaptive)
    assert isinstance(Coarse().for_window(), Coarse)
