"""Tolerances in place of step counts: the mesh, and solves on it."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
import scipy.integrate
from hypothesis import given, settings, strategies as st

from benchmarks import _hard
from deer_ode import (
    DEER,
    Auto,
    GaussLegendre,
    MeshRefinement,
    Newton,
    Obreshkov,
    ParallelAdjoint,
    RadauIIA,
    diffeqsolve,
)
from deer_ode._discretisation import Grid, discretise
from deer_ode._discretisation._collocation import radau_nodes
from deer_ode._mesh import Mesh, as_mesh_refinement, redistribute

from .helpers import assert_close, rounding, slow


def lotka_volterra(t, y, args):
    del t
    return jnp.stack([args * y[0] - y[0] * y[1], y[0] * y[1] - 3 * y[1]])


TERM = diffrax.ODETerm(lotka_volterra)
Y0 = jnp.array([1.0, 1.0])
# As arrays, so that solves to other tolerances are the same program.
PID = diffrax.PIDController(rtol=jnp.array(1e-6), atol=jnp.array(1e-8))
OKAY = diffrax.RESULTS.successful

METHODS = pytest.mark.parametrize(
    "method",
    [Auto(), pytest.param(Newton(), marks=pytest.mark.slow)],
    ids=["loop", "mesh"],
)


# Windows are not what is tested here, and cost compilation.
AT_ONCE = Newton(window=None, fallback=False)


def solve(
    solver=DEER(diffrax.Tsit5(), AT_ONCE),
    term=TERM,
    t1=10.0,
    y0=Y0,
    args=1.5,
    **kwargs,
):
    kwargs = dict(stepsize_controller=PID, saveat=diffrax.SaveAt(t1=True)) | kwargs
    return diffeqsolve(term, solver, 0.0, t1, None, y0, args, **kwargs)


# --- the mesh -------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 5), min_size=6, max_size=6), st.integers(0, 4))
def test_parts_add_up_and_kept_points_are_kept(parts, kept):
    points = jnp.array([0.0, 0.1, 0.7, 0.8, 2.0, 2.5, 3.0])
    fixed = jnp.array([points[kept + 1], points[-1]])
    parts = jnp.asarray(parts)
    mesh = redistribute(points, parts, fixed, 40)
    new = np.asarray(mesh.points)
    assert np.all(np.diff(new) >= 0)
    total = int(mesh.num_steps)
    assert total - 2 <= float(jnp.sum(parts)) <= total + 1e-9
    assert new[total] == points[-1] and points[kept + 1] in new[:total]
    assert np.all(np.diff(new[: total + 1]) > 0)


def test_whole_numbers_of_parts_keep_every_point():
    points = jnp.array([0.0, 0.3, 0.9, 1.0])
    mesh = redistribute(points, jnp.array([2.0, 1.0, 4.0]), points[-1:], 10)
    expected = np.concatenate([[0, 0.15, 0.3], np.linspace(0.9, 1.0, 5)])
    np.testing.assert_array_equal(mesh.points[jnp.array([0, 2, 3, 7])], points)
    np.testing.assert_allclose(mesh.points[:8], expected, rtol=1e-15)
    assert int(mesh.num_steps) == 7
    np.testing.assert_array_equal(mesh.active, np.arange(10) < 7)


def test_what_there_is_no_room_for_is_cut_off():
    points = jnp.array([0.0, 1.0, 2.0])
    mesh = redistribute(points, jnp.array([4.0, 4.0]), points[-1:], 5)
    assert int(mesh.num_steps) == 8
    np.testing.assert_allclose(mesh.points, [0, 0.25, 0.5, 0.75, 1, 1.25])


def test_the_field_is_taken_on_the_own_side_of_a_jump():
    mesh = Mesh(jnp.array([0.0, 1.0, 2.0]), jnp.asarray(2, jnp.int32))
    grid = mesh.grid(jnp.array([1.0]))
    assert grid.tnext[0] < 1 < grid.tprev[1]
    np.testing.assert_allclose(grid.tnext, [1, 2], rtol=1e-15)


def test_points_that_are_there_twice_are_kept():
    """The loose solve ends steps at them already."""
    points = jnp.array([0.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0, 6.0, 6.0])
    parts = jnp.where(jnp.diff(points) > 0, 2.0, 0.0)
    mesh = redistribute(points, parts, jnp.array([2.0, 4.0, 6.0]), 20)
    assert int(mesh.num_steps) == 12
    np.testing.assert_allclose(mesh.points[:13], np.linspace(0, 6, 13))


def test_controllers_are_translated():
    clipped = diffrax.ClipStepSizeController(PID, step_ts=[2.0, 1.0], jump_ts=[3.0])
    mesh = as_mesh_refinement(clipped)
    assert mesh is not None
    assert (mesh.rtol, mesh.atol) == (1e-6, 1e-8)
    assert mesh.step_ts.tolist() == [1, 2] and mesh.jump_ts.tolist() == [3]
    again = as_mesh_refinement(diffrax.ClipStepSizeController(clipped, [5.0]))
    assert again is not None
    assert again.step_ts.tolist() == [1, 2, 5] and again.jump_ts.tolist() == [3]
    assert as_mesh_refinement(mesh) is mesh
    assert as_mesh_refinement(diffrax.ConstantStepSize()) is None


# --- accuracy and cost ----------------------------------------------------------------


def stock(solver, term, t1, y0, controller, **kwargs):
    return diffrax.diffeqsolve(
        *(term, solver, 0.0, t1, None, y0, 1.5),
        stepsize_controller=controller,
        max_steps=20_000,
        **kwargs,
    )


TS = jnp.array([0.0, 0.1, 3.3, 10.0])


@ft.cache
def exact_states():
    """Of Lotka-Volterra, at `TS`."""
    tight = diffrax.PIDController(1e-12, 1e-12)
    saveat = diffrax.SaveAt(ts=TS)
    return stock(diffrax.Dopri8(), TERM, 10.0, Y0, tight, saveat=saveat).ys


@pytest.mark.parametrize(
    "term, y0, t1, solver, rtol",
    [
        (TERM, [1.0, 1.0], 10.0, diffrax.Tsit5(), 1e-6),
        pytest.param(TERM, [1.0, 1.0], 10.0, diffrax.Dopri8(), 1e-9,
                     marks=pytest.mark.slow),
        pytest.param(diffrax.ODETerm(_hard.kepler), [0.1, 0, 0, 19**0.5], 12.56,
                     diffrax.Tsit5(), 1e-8, marks=pytest.mark.slow),
        pytest.param(diffrax.ODETerm(lambda t, y, a: _hard.van_der_pol(t, y, 5.0)),
                     [2.0, 0.0], 40.0, diffrax.Tsit5(), 1e-6, marks=pytest.mark.slow),
        pytest.param(diffrax.ODETerm(_hard.fitzhugh_nagumo), [-1.0, 1.0], 200.0,
                     diffrax.Tsit5(), 1e-7, marks=pytest.mark.slow),
    ],
    ids=["Lotka-Volterra", "Dopri8", "Kepler", "Van der Pol", "FitzHugh-Nagumo"],
)  # fmt: skip
def test_as_accurate_as_stock_in_as_many_steps(term, y0, t1, solver, rtol):
    pid = diffrax.PIDController(rtol=rtol, atol=rtol * 1e-2)
    sol = solve(
        DEER(solver, Newton()), term, t1, jnp.array(y0), stepsize_controller=pid
    )
    ours = stock(solver, term, t1, jnp.array(y0), pid)
    tight = diffrax.PIDController(rtol=1e-13, atol=1e-13)
    exact = stock(diffrax.Dopri8(), term, t1, jnp.array(y0), tight).ys
    error = lambda ys: float(jnp.max(jnp.abs(ys - exact)))
    assert error(sol.ys) <= 10 * error(ours.ys)
    accepted = int(ours.stats["num_accepted_steps"])
    assert int(sol.stats["num_accepted_steps"]) <= 1.1 * accepted
    assert int(sol.stats["num_meshes"]) <= 2
    # A window of 256 steps and another of as many take a few each.
    assert int(sol.stats["num_newton_steps"]) <= 20
    assert int(sol.stats["num_fallback_steps"]) == 0


def test_the_first_mesh_is_stable():
    """The loose solve is smooth, so long steps look accurate from its states; but the
    fastest modes would grow. Entries far below the absolute tolerance, which the last
    ones are at first, take no iterations of their own.
    """
    rates = jnp.arange(1.0, 10.0)

    def chain(t, y, args):
        flow = rates * y[:-1]
        return jnp.append(0.0, flow) - jnp.append(flow, 0.0)

    sol = solve(
        DEER(diffrax.Bosh3(), AT_ONCE),
        diffrax.ODETerm(chain),
        20.0,
        jnp.eye(10)[0],
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6),
    )
    assert int(sol.stats["num_meshes"]) == 1
    # The equation is linear, so the second iteration only sees that.
    assert int(sol.stats["num_newton_steps"]) == 2


@pytest.mark.slow(covered_by="test_the_first_mesh_is_stable")
def test_a_field_of_positive_states_only():
    """Where perturbed states leave that side the unperturbed ones count."""
    sol = solve(
        term=diffrax.ODETerm(lambda t, y, args: -(y**1.5)),
        t1=1e3,
        y0=jnp.array([1.0, 1e-7]),
    )
    exact = (jnp.array([1.0, 1e-7]) ** -0.5 + 1e3 / 2) ** -2
    np.testing.assert_allclose(sol.ys[0], exact, rtol=0, atol=float(PID.atol))
    # Diffrax accepts 43.
    assert int(sol.stats["num_steps"]) <= 43


@pytest.mark.slow(covered_by="test_the_first_mesh_is_stable")
def test_entries_that_have_nothing_to_do_with_each_other():
    """One stays where its field is not defined on one side, one is very large: the mesh
    is that of the others.
    """

    def field(t, y, args):
        edge, large = -jnp.sqrt(-y[:1]), -0.01 * y[3:]
        return jnp.concatenate([edge, lotka_volterra(t, y[1:3], 1.5), large])

    y0 = jnp.array([0.0, *Y0, 1e10])
    sol = solve(term=diffrax.ODETerm(field), y0=y0)
    # The norm is the mean over four entries in place of two.
    assert_close(sol.ys[0, 1:3], exact_states()[-1], 1e-5)
    assert sol.ys[0, 0] == 0
    # Alone they take 89.
    assert int(sol.stats["num_steps"]) <= 89


@pytest.mark.slow(covered_by="test_as_accurate_as_stock_in_as_many_steps")
def test_a_tolerance_for_each_entry():
    atol = jnp.array([1e-8, 1e-9])
    sol = solve(
        term=diffrax.ODETerm(lambda t, y, args: {"a": -y["a"], "b": -2 * y["b"]}),
        y0={"a": jnp.ones(2), "b": jnp.ones(2)},
        stepsize_controller=diffrax.PIDController(1e-6, atol),
        t1=1.0,
    )
    np.testing.assert_allclose(sol.ys["a"][0], np.exp(-1), rtol=1e-6)
    np.testing.assert_allclose(sol.ys["b"][0], np.exp(-2), rtol=1e-6)


@pytest.mark.slow(covered_by="test_as_accurate_as_stock_in_as_many_steps")
def test_loose_tolerances():
    """A mesh for 1e-3 would miss the fast phases of the loose solve."""
    field = diffrax.ODETerm(lambda t, y, a: _hard.van_der_pol(t, y, 5.0))
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-5)
    sol = solve(term=field, t1=40.0, y0=jnp.array([2.0, 0.0]), stepsize_controller=pid)
    assert int(sol.stats["num_meshes"]) <= 2
    # Stock accepts 231 to 1e-4.
    assert int(sol.stats["num_steps"]) <= 1.1 * 231


def test_equations_are_estimated_from_solutions():
    """The steps of Obreshkov's formulas solve equations, so errors are those of a
    solution of these.
    """
    sol = solve(DEER(Obreshkov(2), AT_ONCE))
    assert_close(sol.ys[0], exact_states()[-1], 1e-5)
    assert int(sol.stats["num_meshes"]) <= 3
    assert sol.stats["path"] == "newton"


@pytest.mark.slow(covered_by="test_as_accurate_as_stock_in_as_many_steps")
def test_single_precision():
    pid = diffrax.PIDController(rtol=jnp.float32(1e-4), atol=jnp.float32(1e-6))
    sol = diffeqsolve(
        *(TERM, DEER(diffrax.Tsit5(), AT_ONCE), jnp.float32(0.0), jnp.float32(10.0)),
        *(None, Y0.astype(jnp.float32), jnp.float32(1.5)),
        stepsize_controller=pid,
    )
    np.testing.assert_allclose(sol.ys[0], exact_states()[-1], rtol=1e-3)
    assert sol.ys.dtype == jnp.float32


# --- derivatives ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [AT_ONCE, pytest.param(Auto(), marks=pytest.mark.slow)]
)
def test_gradients_are_those_on_the_mesh(method):
    ts = jnp.linspace(0.5, 10.0, 7)
    saveat = diffrax.SaveAt(ts=ts)
    with_mesh = diffrax.SaveAt(
        subs=[diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(steps=True, t0=True)]
    )

    def loss(y0, a):
        sol = solve(DEER(diffrax.Tsit5(), method), y0=y0, args=a, saveat=with_mesh)
        return jnp.sum(sol.ys[0] ** 2), (sol.ts[1], sol.stats["num_accepted_steps"])

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, (points, num_steps)), grad = value_and_grad(Y0, 1.5)
    points = points[: int(num_steps) + 1]

    def stock_loss(y0, a):
        sol = diffrax.diffeqsolve(
            *(TERM, diffrax.Tsit5(), 0.0, 10.0, None, y0, a),
            stepsize_controller=diffrax.StepTo(points),
            saveat=saveat,
            adjoint=diffrax.DirectAdjoint(),
            max_steps=len(points) - 1,
        )
        return jnp.sum(sol.ys**2)

    expected = jax.jit(jax.value_and_grad(stock_loss, (0, 1)))(Y0, 1.5)
    assert_close((value, grad), expected, 10 * rounding())


def test_members_of_a_batch_have_their_own_meshes():
    """Gradients in what the field closes over, too."""

    def loss(y0, a):
        term = diffrax.ODETerm(lambda t, y, args: lotka_volterra(t, y, a))
        sol = solve(term=term, y0=y0, max_steps=256, args=None)
        return jnp.sum(sol.ys**2), sol.stats["num_steps"]

    fn = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1), has_aux=True)))
    y0s, rates = jnp.array([[1.0, 1.0], [3.0, 3.0]]), jnp.array([1.5, 2.0])
    (values, counts), grads = fn(y0s, rates)
    assert counts[0] != counts[1]
    for i in range(2):
        # The same member beside itself.
        twice = jnp.array([i, i])
        (value, count), grad = fn(y0s[twice], rates[twice])
        assert counts[i] == count[0] == count[1]
        member = jax.tree.map(lambda x, i=i: x[i], (values, grads))
        # Rounding of an error estimate of 1e-8 moves the mesh by 1e-8 of a step, and
        # the solution by that part of its error.
        assert_close(member, jax.tree.map(lambda x: x[0], (value, grad)), 1e-9)


# --- everything a solution has --------------------------------------------------------


@METHODS
def test_saves_dense_output_and_events(method):
    saveat = diffrax.SaveAt(ts=TS, dense=True)
    solver = DEER(diffrax.Tsit5(), method)
    sol = solve(solver, saveat=saveat)
    assert_close(sol.ys, exact_states(), 1e-5)
    assert_close(sol.evaluate(3.3), sol.ys[2], rounding())
    event = diffrax.Event(lambda t, y, args, **kwargs: y[0] - 2.0)
    sol = solve(solver, event=event)
    assert sol.result == diffrax.RESULTS.event_occurred
    # Without a root finder the solve ends with the step in which it happens.
    assert sol.ys[0, 0] > 2 and 0.7 < sol.ts[0] < 0.95


@METHODS
def test_backwards_in_time(method):
    solver = DEER(diffrax.Tsit5(), method)
    forwards = solve(solver)
    sol = diffeqsolve(
        *(TERM, solver, 10.0, 0.0, None, forwards.ys[0], 1.5),
        stepsize_controller=PID,
    )
    assert_close(sol.ys[0], Y0, 1e-4)
    assert float(sol.ts[0]) == 0


@METHODS
def test_in_stock_diffrax(method):
    """With `ParallelAdjoint` the same; otherwise it is a `PIDController`."""
    controller = MeshRefinement(rtol=1e-6, atol=1e-8)
    solver = DEER(diffrax.Tsit5(), method)
    problem = (TERM, solver, 0.0, 10.0, None, Y0, 1.5)
    sol = diffrax.diffeqsolve(
        *problem,
        stepsize_controller=controller,
        adjoint=ParallelAdjoint(),
        max_steps=1024,
    )
    assert_close(sol.ys, solve(solver).ys, rounding())
    alone = diffrax.diffeqsolve(
        *(TERM, diffrax.Tsit5(), 0.0, 10.0, None, Y0, 1.5),
        stepsize_controller=controller,
    )
    assert_close(alone.ys, stock(diffrax.Tsit5(), TERM, 10.0, Y0, PID).ys, rounding())


def test_given_times_and_lengths():
    controller = MeshRefinement(
        1e-6, 1e-8, dtmax=0.2, dtmin=0.01, step_ts=[1 / 3, 2.0, 4.0, 7.1]
    )
    saveat = diffrax.SaveAt(steps=True)
    sol = solve(stepsize_controller=controller, saveat=saveat)
    ts = sol.ts[: int(sol.stats["num_steps"])]
    assert all(t in ts for t in (1 / 3, 2.0, 4.0, 7.1)) and ts[-1] == 10
    assert np.diff(ts).max() <= 0.2 * (1 + 1e-12)


@pytest.mark.parametrize(
    "jump_ts", [[1.23456], pytest.param(None, marks=pytest.mark.slow)]
)
def test_a_jump_of_the_field(jump_ts):
    jump = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 1.23456, 1.0, -5.0) * y)
    exact = np.exp(1.23456 - 5 * (2 - 1.23456))
    controller = MeshRefinement(1e-8, 1e-10, jump_ts=jump_ts)
    sol = solve(term=jump, t1=2.0, y0=jnp.ones(1), stepsize_controller=controller)
    np.testing.assert_allclose(sol.ys[0], exact, rtol=1e-6)
    assert int(sol.stats["num_steps"]) <= 150


def test_steps_that_are_equations_take_the_own_side_of_a_jump():
    """Where the field is evaluated once at each point, but not at those."""
    jump = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 0.5, 1.0, -5.0) * y)
    points = jnp.array([0.0, 0.25, 0.5, 0.75])
    mesh = Mesh(points, jnp.asarray(3, jnp.int32))
    even = Grid.from_points(points)
    found = discretise(Obreshkov(1), jump, even, jnp.array(1.0), None)
    found = found.on(mesh.grid(jnp.array([0.5]))).recurrence
    starts, ends = found.field_values(found.ends(jnp.ones((3, 1))))[..., 0]
    np.testing.assert_array_equal(starts, [1, 1, -5])
    np.testing.assert_array_equal(ends, [1, 1, -5])


@pytest.mark.slow(covered_by="test_a_jump_of_the_field")
def test_what_is_saved_at_a_jump():
    """The end of a step at a jump is saved, and looked up, as Diffrax has it."""
    jump = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 0.5, 1.0, -5.0) * y)
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-3, atol=1e-5), jump_ts=[0.5]
    )

    def saved(solve, solver):
        sol = solve(
            *(jump, solver, 0.0, 1.0, 0.1, 1.0),
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(steps=True, dense=True, made_jump=True),
        )
        assert not sol.made_jump
        return sol.ts, sol.derivative(0.5)

    ts, slope = saved(diffeqsolve, DEER(diffrax.Bosh3()))
    stock_ts, stock_slope = saved(diffrax.diffeqsolve, diffrax.Bosh3())
    assert 0.5 not in ts and np.nextafter(0.5, 1.0) in ts
    np.testing.assert_allclose(ts[: ts.size], stock_ts[: ts.size], rtol=1e-12)
    np.testing.assert_allclose(slope, stock_slope, rtol=1e-9)
    assert slope > 0
    # A solve that ends there made the jump.
    sol = diffeqsolve(
        *(jump, DEER(diffrax.Bosh3()), 0.0, 0.5, 0.1, 1.0),
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t1=True, made_jump=True),
    )
    assert sol.made_jump


@pytest.mark.slow(covered_by="test_given_times_and_lengths")
def test_controlled_equations():
    """Without a loose solve the first mesh is even."""
    ts = jnp.linspace(0, 3, 4)
    xs = jnp.stack([ts, jnp.array([0.0, 1.0, 0.0, 2.0])], axis=1)
    control = diffrax.LinearInterpolation(ts, xs)
    field = lambda t, y, args: jnp.stack([jnp.cos(y), jnp.sin(y)], axis=-1)
    term = diffrax.ControlTerm(field, control)
    controller = diffrax.ClipStepSizeController(PID, step_ts=ts)
    sol = solve(term=term, t1=3.0, y0=jnp.ones(1), stepsize_controller=controller)
    y = [1.0]
    for k, slope in enumerate(np.diff(xs[:, 1])):
        rate = lambda t, y, slope=slope: np.cos(y) + slope * np.sin(y)
        ends = scipy.integrate.solve_ivp(rate, (k, k + 1), y, rtol=1e-10, atol=1e-10)
        y = ends.y[:, -1]
    assert_close(sol.ys[0], y, 1e-5)
    assert int(sol.stats["num_guess_steps"]) == 0


# --- what does not work says so -------------------------------------------------------


@pytest.mark.parametrize(
    "method", [Auto(), pytest.param(Newton(), marks=pytest.mark.slow)]
)
def test_room_grows_with_what_is_wanted(method):
    """Outside of `jit`, where Diffrax's default is not enough."""
    pid = diffrax.PIDController(rtol=1e-9, atol=1e-11)
    sol = solve(DEER(diffrax.Tsit5(), method), t1=130.0, stepsize_controller=pid)
    assert sol.result == OKAY and sol.stats["max_steps"] > 4096
    assert int(sol.stats["num_steps"]) > 4096


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(PID, marks=pytest.mark.slow),
        diffrax.PIDController(rtol=1e-5, atol=1e-7, pcoeff=0.3, icoeff=0.4, dtmax=0.3),
        diffrax.ClipStepSizeController(PID, step_ts=[3.3], jump_ts=[5.0]),
    ],
)
def test_sequential_steps_are_those_of_diffrax(controller):
    """With its own controllers, whose coefficients count."""
    saveat = diffrax.SaveAt(steps=True)

    def run(solve, solver):
        sol = solve(
            *(TERM, solver, 0.0, 10.0, 0.1, Y0, 1.5),
            stepsize_controller=controller,
            saveat=saveat,
            max_steps=512,
        )
        return sol.ts, sol.ys

    actual = run(diffeqsolve, DEER())
    expected = run(diffrax.diffeqsolve, diffrax.Tsit5())
    assert_close(actual, expected, 1e-9)


def test_padding_does_no_harm():
    """A step of the whole interval over the room for steps would overflow."""
    decay = diffrax.ODETerm(lambda t, y, args: -args * y**3)

    def end(solve, solver, a):
        sol = solve(
            *(decay, solver, 0.0, 1e6, None, jnp.ones(1), a), stepsize_controller=PID
        )
        return sol.ys[0, 0]

    actual = jax.grad(lambda a: end(diffeqsolve, DEER(), a))(1.0)
    expected = jax.grad(lambda a: end(diffrax.diffeqsolve, diffrax.Tsit5(), a))(1.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@METHODS
def test_a_jump_at_the_end(method):
    controller = diffrax.ClipStepSizeController(PID, jump_ts=[5.0, 10.0])
    solver = DEER(diffrax.Tsit5(), method)
    sol = solve(solver, stepsize_controller=controller)
    assert sol.result == OKAY and float(sol.ts[0]) == 10
    assert sol.stats["max_steps"] == 4096
    assert_close(sol.ys, solve(solver).ys, 1e-4)


@pytest.mark.slow(covered_by="test_members_of_a_batch_have_their_own_meshes")
def test_a_batch_of_events():
    """What only the event closes over is mapped."""

    def time(bound):
        event = diffrax.Event(lambda t, y, args, **kwargs: y[0] - bound)
        return solve(DEER(), event=event).ts[0]

    times = jax.vmap(time)(jnp.array([1.5, 2.0]))
    assert times[0] < times[1] < 1


def test_a_solve_that_goes_on():
    """The controller remembers its last errors; the counts are Diffrax's."""
    pid = diffrax.PIDController(rtol=1e-6, atol=1e-8, pcoeff=0.3, icoeff=0.4)
    saveat = diffrax.SaveAt(t1=True, controller_state=True)

    def twice(solve, solver):
        go = lambda t0, t1, y0, state: solve(
            *(TERM, solver, t0, t1, 0.1, y0, 1.5),
            stepsize_controller=pid,
            saveat=saveat,
            controller_state=state,
        )
        first = go(0.0, 4.0, Y0, None)
        second = go(4.0, 10.0, first.ys[0], first.controller_state)
        names = ("num_steps", "num_accepted_steps", "num_rejected_steps")
        return second.ys, [int(second.stats[name]) for name in names]

    (actual, counts), (expected, of_stock) = (
        twice(diffeqsolve, DEER()),
        twice(diffrax.diffeqsolve, diffrax.Tsit5()),
    )
    assert_close(actual, expected, 1e-9)
    assert counts == of_stock


def test_a_solve_that_an_event_ended_can_go_on():
    """The state of the controller is that of the event, which more steps follow."""
    term = diffrax.ODETerm(lambda t, y, args: y**2)
    run = lambda solve, solver: solve(
        *(term, solver, 0.0, 2.0, 0.05, jnp.array(1.1)),
        stepsize_controller=diffrax.PIDController(1e-5, 1e-7, pcoeff=0.3, icoeff=0.4),
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        event=diffrax.Event(lambda t, y, args, **kwargs: y > 10.0),
    )
    expected = run(diffrax.diffeqsolve, diffrax.Tsit5())
    found = run(diffeqsolve, DEER(diffrax.Tsit5()))
    assert int(expected.stats["num_rejected_steps"]) > 0
    for name in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        assert int(found.stats[name]) == int(expected.stats[name]), name
    for a, b in zip(found.controller_state, expected.controller_state, strict=True):
        assert_close(a, b, 1e-6)


def test_noise_with_sequential_steps():
    """Where steps are sequential, any controller may choose them."""
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-4, (2,), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: 0.1 * jnp.eye(2), path)
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-3, pcoeff=0.1, icoeff=0.3)
    run = lambda solve, solver: solve(
        # Longer, and rounding decides of other steps.
        *(diffrax.MultiTerm(TERM, noise), solver, 0.0, 0.3, 0.01, Y0, 1.5),
        stepsize_controller=pid,
    )
    actual = run(diffeqsolve, DEER(diffrax.Heun()))
    expected = run(diffrax.diffeqsolve, diffrax.Heun())
    assert_close(actual.ys, expected.ys, 1e-9)


def test_too_little_room():
    pid = diffrax.PIDController(rtol=jnp.array(1e-10), atol=jnp.array(1e-12))
    sol = solve(stepsize_controller=pid, max_steps=512, throw=False)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert int(sol.stats["num_steps"]) == 512 < int(sol.stats["num_mesh_steps"])


@pytest.mark.parametrize(
    "method", [pytest.param(AT_ONCE, marks=pytest.mark.slow), Auto()]
)
def test_a_solution_that_blows_up(method):
    square = diffrax.ODETerm(lambda t, y, args: y**2)
    run = lambda throw: solve(
        DEER(diffrax.Tsit5(), method), square, 2.0, jnp.ones(1), throw=throw
    )
    sol = run(False)
    assert sol.result == diffrax.RESULTS.dt_min_reached
    # Steps that rounding keeps from becoming shorter are not tried again.
    assert int(sol.stats["num_guess_steps"]) <= 400
    if isinstance(method, Auto):
        with pytest.raises(Exception, match="step"):
            run(True)


def test_below_rounding():
    pid = diffrax.PIDController(rtol=jnp.array(1e-17), atol=jnp.array(0.0))
    sol = solve(stepsize_controller=pid, max_steps=512, throw=False)
    assert sol.result == diffrax.RESULTS.max_steps_reached


def test_an_absolute_tolerance_alone():
    """Without a relative one every entry is below the threshold, and yet the steps are
    solved for to far below the tolerance.
    """
    pid = diffrax.PIDController(rtol=jnp.array(0.0), atol=jnp.array(1e-7))
    sol = solve(stepsize_controller=pid, max_steps=512, throw=False)
    # Diffrax's steps end with an error of 1.0e-7.
    assert float(jnp.max(jnp.abs(sol.ys[0] - exact_states()[-1]))) <= 2e-7


@METHODS
def test_steps_may_not_be_too_short(method):
    solver = DEER(diffrax.Tsit5(), method)
    controller = lambda force: MeshRefinement(1e-8, 1e-10, dtmin=0.1, force_dtmin=force)
    forced = solve(solver, stepsize_controller=controller(True), throw=False)
    assert forced.result == OKAY
    refused = solve(solver, stepsize_controller=controller(False), throw=False)
    assert refused.result == diffrax.RESULTS.dt_min_reached
    # What is not finite is not forced.
    square = diffrax.ODETerm(lambda t, y, args: y**2)
    refused = solve(
        *(solver, square, 2.0, jnp.ones(1)),
        stepsize_controller=controller(True),
        throw=False,
    )
    assert refused.result == diffrax.RESULTS.dt_min_reached


class _Doubled(diffrax.AbstractAdaptiveStepSizeController):
    """Tries a step that is too short once more, twice as long."""

    rtol: float = 1e-3
    atol: float = 1e-3
    norm: object = None

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + 0.01, None

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        h, no = t1 - t0, jnp.array(False)
        keep = h >= 0.1
        t0, t1 = jnp.where(keep, t1, t0), jnp.where(keep, t1 + h, t0 + 2 * h)
        return keep, t0, t1, no, None, diffrax.RESULTS.successful


def test_a_rejected_step_may_become_longer():
    decay = diffrax.ODETerm(lambda t, y, args: -y)
    sol = solve(DEER(), decay, 1.7, jnp.ones(1), stepsize_controller=_Doubled())
    np.testing.assert_allclose(sol.ys[0], np.exp(-1.7), rtol=1e-5)
    counts = [int(sol.stats[f"num_{k}_steps"]) for k in ("accepted", "rejected")]
    assert counts == [11, 4]


def test_implicit_steps():
    """Stiff: Diffrax chooses the steps, which may all be solved for together."""
    stiff = diffrax.ODETerm(lambda t, y, args: -1e4 * (y - jnp.cos(t)))
    pid = diffrax.PIDController(rtol=1e-5, atol=1e-7)
    run = lambda solve, solver, **kwargs: solve(
        *(stiff, solver, 0.0, 3.0, None, jnp.zeros(1)),
        stepsize_controller=pid,
        **kwargs,
    )
    kvaerno = diffrax.Kvaerno3()
    expected = run(diffrax.diffeqsolve, kvaerno)
    sol = run(diffeqsolve, DEER(kvaerno))
    assert_close(sol.ys, expected.ys, 1e-6)
    mesh = run(diffeqsolve, DEER(kvaerno, AT_ONCE), max_steps=1024)
    assert_close(mesh.ys, expected.ys, 1e-4)
    steps = lambda sol: int(sol.stats["num_accepted_steps"])
    assert steps(mesh) == steps(expected)
    assert mesh.stats["path"] == "newton"


@pytest.mark.slow(covered_by="test_implicit_steps")
def test_implicit_steps_that_only_just_succeed():
    """Their root finder stops by rounding: once more, some would fail."""

    def rober(t, y, args):
        flows = jnp.stack([0.04 * y[0], 3e7 * y[1] ** 2, 1e4 * y[1] * y[2]])
        first, second, third = flows
        return jnp.stack([third - first, first - second - third, second])

    term = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: jnp.zeros(3)), diffrax.ODETerm(rober)
    )
    pid = diffrax.PIDController(rtol=1e-10, atol=1e-10)
    kencarp = diffrax.KenCarp4()
    run = lambda solve, solver: solve(
        *(term, solver, 0.0, 3e-4, 2e-4, jnp.array([1.0, 0.0, 0.0])),
        stepsize_controller=pid,
    )
    sol = run(diffeqsolve, DEER(kencarp))
    assert_close(sol.ys, run(diffrax.diffeqsolve, kencarp).ys, 1e-9)


def test_checks_count_on_the_answer_only():
    """The first guess steps beyond the bound; no state of the answer does."""

    def field(t, y, latest):
        y = eqx.error_if(y, t > latest, "late")
        y = eqx.error_if(y, jnp.any(y < 0), "negative")
        return lotka_volterra(t, y, 1.5)

    term = diffrax.ODETerm(field)
    assert solve(term=term, args=jnp.array(10.0)).result == OKAY
    with pytest.raises(Exception, match="late"):
        solve(term=term, args=jnp.array(5.0))


@METHODS
def test_an_interval_that_only_an_event_ends(method):
    event = diffrax.Event(
        lambda t, y, args, **kwargs: y[0] - 2.0,
        optx.Newton(1e-10, 1e-10),
    )

    def end(run, solver):
        def found(args):
            sol = run(
                *(TERM, solver, 0.0, jnp.inf, None, Y0, args),
                stepsize_controller=PID,
                event=event,
                throw=False,
            )
            return sol.ts[0], (sol.ys, sol.result)

        (t, (ys, result)), slope = jax.value_and_grad(found, has_aux=True)(1.5)
        assert result == diffrax.RESULTS.event_occurred
        return t, ys, slope

    expected = end(diffrax.diffeqsolve, diffrax.Tsit5())
    found = end(diffeqsolve, DEER(diffrax.Tsit5(), method))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-9)


@METHODS
@pytest.mark.parametrize("name", slow(["step_ts", "jump_ts"], lambda x: x == "jump_ts"))
def test_derivatives_in_the_time_of_a_jump(method, name):
    r"""$y' = -y$, and from $t$ on $1 - y$: $y(1) = e^{-1} + 1 - e^{t - 1}$."""

    def end(t):
        field = lambda s, y, args: jnp.where(s < t, 0.0, 1.0) - y
        pid = diffrax.PIDController(rtol=1e-9, atol=1e-9)
        return solve(
            DEER(diffrax.Tsit5(), method),
            diffrax.ODETerm(field),
            1.0,
            jnp.array(1.0),
            stepsize_controller=diffrax.ClipStepSizeController(pid, **{name: t[None]}),
        ).ys[0]

    value, slope = jax.value_and_grad(end)(jnp.array(0.5))
    assert abs(value - (np.exp(-1) + 1 - np.exp(-0.5))) < 1e-7
    assert abs(slope + np.exp(-0.5)) < 1e-7


def test_only_the_end_moves_with_the_end():
    """Other steps stay where they are, as in Diffrax; nor is there a state to move."""
    term = diffrax.ODETerm(lambda t, y, args: -y)
    event = diffrax.Event(lambda t, y, args, **kwargs: y < 1.0)

    def found(t1, event):
        sol = diffeqsolve(
            *(term, DEER(), 0.0, t1, None, jnp.array(1.5)),
            stepsize_controller=PID,
            saveat=diffrax.SaveAt(steps=True),
            event=event,
            max_steps=32,
        )
        return sol.ts, sol.ys

    slopes = jax.jacfwd(lambda t1: found(t1, event))(2.0)
    assert not any(np.any(np.asarray(s) != 0) for s in slopes)
    ts, ys = jax.jacfwd(lambda t1: found(t1, None))(2.0)
    assert np.count_nonzero(ts) == 1 and float(jnp.sum(ts)) == 1
    assert np.count_nonzero(ys) == 1
    assert_close(jnp.sum(ys), -1.5 * np.exp(-2.0), 1e-4)
    still = diffrax.ODETerm(lambda t, y, args: y)
    sol = diffeqsolve(still, DEER(), 0.0, 1.0, 0.1, {}, stepsize_controller=PID)
    assert sol.ys == {}


def test_the_error_estimate_of_radau():
    """The weights of RADAU5 (Hairer, Wanner 1996, equation 8.19), and the order."""
    gamma, weights = radau_nodes(3).error
    root = 6**0.5
    expected = np.array([-13 - 7 * root, -13 + 7 * root, -1]) / 3
    np.testing.assert_allclose(weights / gamma, expected, rtol=1e-13)

    @jax.jit
    def error(h):
        field = diffrax.ODETerm(lambda t, y, args: -jnp.sin(y))
        _, error, *_ = RadauIIA(2).step(field, 0.0, h, jnp.ones(1), None, None, False)
        return jnp.abs(error[0])

    slope = jnp.log2(error(0.02) / error(0.01))
    assert abs(slope - 3) < 0.1


def test_radau_meets_a_tolerance():
    r"""Stiff, with a fast transient: $y' = -k (y - \cos t)$ from zero."""
    k, t1, rtol = 1e4, 3.0, 1e-5
    sol = solve(
        DEER(RadauIIA()),
        diffrax.ODETerm(lambda t, y, args: -k * (y - jnp.cos(t))),
        t1,
        jnp.zeros(1),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
    )
    exact = (k**2 * np.cos(t1) + k * np.sin(t1)) / (k**2 + 1)
    assert abs(float(sol.ys[0, 0]) - exact) < 10 * rtol
    assert int(sol.stats["num_accepted_steps"]) < 40


def test_refusals():
    # Diffrax says it before we do.
    for solver in (diffrax.Euler(), GaussLegendre()):
        with pytest.raises(RuntimeError, match="does not provide error estimates"):
            solve(DEER(solver, Newton()), max_steps=64)
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: jnp.eye(2), path)
    with pytest.raises(ValueError, match="stochastic differential equation cannot"):
        solve(DEER(diffrax.Heun(), Newton()), diffrax.MultiTerm(TERM, noise), t1=1.0)
