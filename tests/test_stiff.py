"""Stiff problems, each with the solver that is for it, and what the others do there."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

import deer_ode
from benchmarks._references import robertson
from deer_ode import (
    DEER,
    AveragedExponential,
    Coarse,
    Constant,
    Exprb43,
    Newton,
    Obreshkov,
    RadauIIA,
)

from .helpers import rounding, van_der_pol
from .test_references import graded


def solve(field, solver, ts, y0, *, method=None, args=None, throw=True):
    ts = jnp.asarray(ts)
    return deer_ode.diffeqsolve(
        diffrax.ODETerm(field),
        DEER(solver, Newton() if method is None else method),
        ts[0],
        ts[-1],
        None,
        jnp.asarray(y0),
        args,
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(t0=True, steps=True),
        throw=throw,
    )


def final(sol, num_steps):
    return np.asarray(sol.ys)[num_steps]


# --- the test of the DEER paper's first implementation --------------------------------

# Its field: cubic damping, a forcing, and a small network. There it is solved on
# 10,000 points, for want of the matrix exponential on fewer.


def _forced_network(t, y, args):
    inner, outer = args
    hidden = jax.nn.relu(inner @ y)
    return 3 + 30 * jnp.sin(6 * t) - 10 * y**3 - 6 * jnp.tanh(outer @ hidden)


@ft.cache
def _forced_network_problem():
    inner, outer, start = jr.split(jr.key(0), 3)
    args = (
        jr.uniform(inner, (4, 4), jnp.float64, -1.0, 1.0) / 2,
        jr.uniform(outer, (4, 4), jnp.float64) / 2,
    )
    return args, jr.uniform(start, (4,), jnp.float64)


# Measured: 8.7e-5, 1.7e-5 (the field has kinks), 4.9e-3 and 5.6e-4.
@pytest.mark.parametrize(
    "solver, num_points, tol",
    [
        pytest.param(None, 100, 2e-4, marks=pytest.mark.slow),
        pytest.param(None, 300, 5e-5, marks=pytest.mark.slow),
        (AveragedExponential(), 100, 1e-2),
        pytest.param(AveragedExponential(), 300, 1.5e-3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow(covered_by="test_equations.py::test_values_and_gradients")
def test_the_papers_field_on_few_points(solver, num_points, tol):
    args, y0 = _forced_network_problem()
    term = diffrax.ODETerm(_forced_network)
    ts = jnp.linspace(0.0, 1.0, num_points)
    kwargs = dict(
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(steps=True),
    )
    # It fails where it does not converge.
    method = Newton(fallback=False, window=None, chunk=1)
    deer = DEER(Obreshkov(), method) if solver is None else DEER(solver, method)
    sol = deer_ode.diffeqsolve(term, deer, 0.0, 1.0, None, y0, args, **kwargs)
    ys = sol.ys[: num_points - 1]
    assert bool(jnp.all(jnp.isfinite(ys)))
    assert int(sol.stats["num_newton_steps"]) <= 8

    twin = diffrax.diffeqsolve(
        term, deer.solver, 0.0, 1.0, None, y0, args, max_steps=num_points - 1, **kwargs
    )
    np.testing.assert_allclose(ys, twin.ys, rtol=0, atol=rounding())

    field = jax.jit(_forced_network)
    fine = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(field(t, jnp.asarray(y), args)), (0.0, 1.0),
        np.asarray(y0), t_eval=np.asarray(ts[1:]), rtol=1e-10, atol=1e-10,
        max_step=1e-3, method="DOP853",
    ).y.T  # fmt: skip
    np.testing.assert_allclose(ys, fine, rtol=0, atol=tol)


# --- a linear system with eigenvalues -1 and -1e6 -------------------------------------

_MODES = np.array([[1.0, 1.0], [1.0, 2.0]])
_LINEAR = _MODES @ np.diag([-1.0, -1e6]) @ np.linalg.inv(_MODES)


def _linear(t, y, args):
    del t, args
    return jnp.asarray(_LINEAR) @ y


# Of both modes only solvers that damp what is stiff get rid; the slow one is for all.
@pytest.mark.parametrize(
    "solver, modes",
    [
        pytest.param(Obreshkov(), (1.0, 0.0), marks=pytest.mark.slow),
        pytest.param(RadauIIA(), (1.0, 0.0), marks=pytest.mark.slow),
        (RadauIIA(), (1.0, 1.0)),
        pytest.param(Exprb43(), (1.0, 0.0), marks=pytest.mark.slow),
        pytest.param(Exprb43(), (1.0, 1.0), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow(covered_by="test_problems_of_the_test_sets")
def test_linear_system(solver, modes):
    # All at once, from the explicit guess, which is of no use here.
    plain = Newton(window=None)
    grid, start = np.linspace(0.0, 1.0, 65), _MODES @ np.array(modes)
    sol = solve(_linear, solver, grid, start, method=plain)
    np.testing.assert_allclose(
        final(sol, 64), _MODES @ np.array([np.exp(-1.0), 0.0]), rtol=1e-8
    )
    # The matrix exponential of a stiff step is not exact to the last digits.
    assert int(sol.stats["num_fallback_steps"]) <= (2 if solver == Exprb43() else 0)


@pytest.mark.slow(covered_by="test_problems_of_the_test_sets")
def test_obreshkov_does_not_damp():
    """It is stable, and no more: what is infinitely stiff alternates."""
    start = _MODES @ np.array([0.0, 1.0])
    plain = Newton(guess=Constant(), window=None, chunk=1, fallback=False)
    sol = solve(_linear, Obreshkov(1), np.linspace(0.0, 1.0, 65), start, method=plain)
    size = np.max(np.abs(final(sol, 64))) / np.max(np.abs(start))
    assert 0.9 < size <= 1.001


# --- Robertson to 40 and Van der Pol in the usual scaling -----------------------------


# The value is that of Hairer and Wanner, to all of its digits.
_ROBERTSON_40 = np.array([0.7158270688, 9.185534765e-6, 0.2841637457])


def check_robertson():
    ts = graded(1e-6, 40.0, 200)
    sol = solve(
        robertson,
        RadauIIA(),
        ts,
        [1.0, 0.0, 0.0],
        method=Newton(guess=Coarse(2), window=None, chunk=1, fallback=False),
    )
    np.testing.assert_allclose(final(sol, len(ts) - 1), _ROBERTSON_40, rtol=2e-9)
    total = jnp.sum(sol.ys[: len(ts)], axis=1)
    np.testing.assert_allclose(total, 1.0, rtol=0, atol=rounding())


def check_van_der_pol():
    """The problem of the test sets with its time a thousand times longer."""
    from .test_references import radau_grid

    mu = 1000.0
    field = lambda t, y, args: van_der_pol(t, y, mu)
    ts = radau_grid(field, 2 * mu, [2.0, 0.0])
    sol = solve(field, RadauIIA(), ts, [2.0, 0.0], method=Newton(guess=Coarse(2)))
    assert int(sol.stats["num_fallback_steps"]) == 0
    np.testing.assert_allclose(
        final(sol, len(ts) - 1), [1.706167732170483, -0.8928097010247975e-3], rtol=1e-8
    )


@pytest.mark.parametrize(
    "check",
    [check_robertson, pytest.param(check_van_der_pol, marks=pytest.mark.slow)],
    ids=("Robertson to 40", "Van der Pol with mu = 1000"),
)
def test_problems_of_the_test_sets(check):
    check()
