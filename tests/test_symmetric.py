"""Symmetric systems, in which entries of the state are zero but for rounding.

Rings and chains in normal modes, circular and radial orbits, synchronised oscillators,
equal compartments, chemistry at equilibrium. Such an entry is never right relative to
itself, and must not keep a solve from being accepted. All systems of one family share
their compiled programs.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import (
    DEER,
    AveragedExponential,
    Exprb32,
    Exprb43,
    GaussLegendre,
    Newton,
    Obreshkov,
    RadauIIA,
    Sequential,
    diffeqsolve,
)

from .helpers import ROOT_FINDER, slow, slow_rows


NUM_STEPS = 60


# --- families: a field, and systems (what it takes, where it starts, how long) --------


def linear(t, y, M):
    del t
    return M @ y


SIZE = 12


def _padded(M, y0, t1):
    """Entries of no system are zero and stay so."""
    M, y0 = np.asarray(M, float), np.asarray(y0, float)
    rest = SIZE - len(y0)
    return np.pad(M, ((0, rest), (0, rest))), np.pad(y0, (0, rest)), t1


def _second_order(K, q, t1=3.0):
    """Masses: `q'' = K q` from rest."""
    n = len(q)
    M = np.block([[np.zeros((n, n)), np.eye(n)], [K, np.zeros((n, n))]])
    return _padded(M, np.concatenate([q, np.zeros(n)]), t1)


def _ring(n, mode, t1=3.0):
    K = np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0) - 2 * np.eye(n)
    return _second_order(K, np.cos(2 * np.pi * mode * np.arange(n) / n), t1)


def _chain(n, mode):
    K = np.eye(n, k=1) + np.eye(n, k=-1) - 2 * np.eye(n)
    return _second_order(K, np.sin(np.pi * mode * np.arange(1, n + 1) / (n + 1)))


def _heat(n, mode, rate=1.0):
    """Insulated ends, from a cosine: zero at its nodes."""
    L = np.eye(n, k=1) + np.eye(n, k=-1) - 2 * np.eye(n)
    L[0, 1] = L[-1, -2] = 2
    return _padded(rate * L, np.cos(np.pi * mode * np.linspace(0, 1, n)), 1.0)


_TIGHT_BINDING = np.eye(3, k=1) + np.eye(3, k=-1)
_NOTHING = np.zeros((3, 3))

LINEAR = {
    "ring of 4": _ring(4, 1),
    "ring of 4, alternating": _ring(4, 2),
    "ring of 4, all alike": _ring(4, 0),
    "ring of 3": _ring(3, 1),
    "ring of 6, first mode": _ring(6, 1),
    "ring of 6, second mode": _ring(6, 2),
    "ring of 6, third mode": _ring(6, 3),
    "ring of 4, many periods": _ring(4, 1, 12.0),
    "chain of 3": _chain(3, 2),
    "chain of 5, second mode": _chain(5, 2),
    "chain of 5, third mode": _chain(5, 3),
    "heat from a cosine": _heat(9, 1),
    "heat from two periods": _heat(9, 4, 10.0),
    "net flow between equals": _padded(
        [[-0.4, 0.1, 0.0], [0.1, -0.4, 0.0], [1.0, -1.0, -1.0]], [1, 1, 0], 5.0
    ),
    "two flows that cancel": _padded(
        [[-1.0, 1.0, 1.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]], [0, 1 / 3, -1 / 3], 1.0
    ),
    "two flows that cancel, unstable": _padded(
        [[4.0, 1.0, 1.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0]], [0, 1 / 3, -1 / 3], 1.0
    ),
    "equal compartments": _padded(
        0.1 * (np.roll(np.eye(4), 1, 0) + np.roll(np.eye(4), -1, 0) - 2 * np.eye(4)),
        [1, 1, 1, 1],
        5.0,
    ),
    "alternating compartments": _padded(
        0.1 * (np.roll(np.eye(4), 1, 0) + np.roll(np.eye(4), -1, 0) - 2 * np.eye(4)),
        [1, -1, 1, -1],
        5.0,
    ),
    "cycle of reactions at equilibrium": _padded(
        np.roll(np.eye(3), 1, 0) - np.eye(3), [1, 1, 1], 3.0
    ),
    "spin along its field": _padded(
        np.cross(np.eye(3), np.ones(3) / 3**0.5).T, [1, 1, 1], 3.0
    ),
    "quantum walk, odd state": _padded(
        np.block([[_NOTHING, _TIGHT_BINDING], [-_TIGHT_BINDING, _NOTHING]]),
        [1, 0, -1, 0, 0, 0],
        3.0,
    ),
}


def quadratic(t, y, args):
    del t
    c, M, Q = args
    return c + M @ y + (Q @ y) @ y


def _quadratic(y0, t1, M=(), Q=(), c=()):
    full = (np.zeros(3), np.zeros((3, 3)), np.zeros((3, 3, 3)))
    for array, entries in zip(full, (c, M, Q), strict=True):
        for *index, value in entries:
            array[tuple(index)] = value
    return full, np.asarray(y0, float), t1


#: A + B <-> C: what it makes of A, B and C, there and back.
_REACTION = [(i, 0, 1, s) for i, s in enumerate((-1.0, -1.0, 1.0))]
_BACK = [(i, 2, s) for i, s in enumerate((2.0, 2.0, -2.0))]

QUADRATIC = {
    "reversible reaction at equilibrium": _quadratic([2, 1, 1], 3.0, _BACK, _REACTION),
    "reversible reaction, equal amounts": _quadratic([1, 1, 0], 3.0, _BACK, _REACTION),
    "Lotka-Volterra at rest": _quadratic(
        [1, 1, 0], 3.0, [(0, 0, 1), (1, 1, -1)], [(0, 0, 1, -1), (1, 0, 1, 1)]
    ),
    "rigid body about its middle axis": _quadratic(
        [0, 1, 0], 3.0, Q=[(0, 1, 2, 0.5), (1, 0, 2, -1), (2, 0, 1, 0.5)]
    ),
    "Lorenz on its axis": _quadratic(
        [0, 0, 1],
        2.0,
        [(0, 0, -10), (0, 1, 10), (1, 0, 28), (1, 1, -1), (2, 2, -8 / 3)],
        [(1, 0, 2, -1), (2, 0, 1, 1)],
    ),
    "one infected in ten million": _quadratic(
        [1, 1e-7, 0],
        40.0,
        [(1, 1, -0.1), (2, 1, 0.1)],
        [(0, 0, 1, -0.5), (1, 0, 1, 0.5)],
    ),
}


def gravity(t, y, masses):
    """Three bodies in a plane."""
    del t
    q, v = y.reshape(2, 3, 2)
    d = q[None] - q[:, None]
    r = jnp.sqrt(jnp.sum(d**2, axis=-1) + jnp.eye(3))
    force = jnp.sum(masses[None, :, None] * d / r[..., None] ** 3, axis=1)
    return jnp.concatenate([v.reshape(-1), force.reshape(-1)])


def _bodies(masses, q, v, t1):
    return np.asarray(masses, float), np.ravel([q, v]).astype(float), t1


_ANGLES = 2 * np.pi * np.arange(3) / 3
_TRIANGLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_TURNED = np.stack([-np.sin(_ANGLES), np.cos(_ANGLES)], axis=1)
_LINE = np.array([[-1.0, 0], [0, 0], [1, 0]])
_AWAY = [[0, 0], [1, 0], [0, 50]]

GRAVITY = {
    "circular orbit": _bodies([1, 0, 0], _AWAY, [[0, 0], [0, 1], [0, 0]], 3.0),
    "radial orbit": _bodies([1, 0, 0], _AWAY, np.zeros((3, 2)), 0.8),
    "radial orbit, oblique": _bodies(
        [1, 0, 0], [[0, 0], [0.5**0.5, 0.5**0.5], [0, 50]], np.zeros((3, 2)), 0.8
    ),
    "triangle of Lagrange": _bodies([1, 1, 1], _TRIANGLE, 3**-0.25 * _TURNED, 1.0),
    "triangle at rest": _bodies([1, 1, 1], _TRIANGLE, np.zeros((3, 2)), 0.6),
    "line of Euler": _bodies(
        [1, 1, 1], _LINE, 1.25**0.5 * np.array([[0, -1.0], [0, 0], [0, 1]]), 1.0
    ),
}


def oscillators(t, y, args):
    """Coupled phases, and a pair of Van der Pol's."""
    del t
    coupling, mu = args
    phases, x, v = y[:4], y[4:6], y[6:]
    pull = coupling * jnp.mean(jnp.sin(phases[None] - phases[:, None]), axis=1)
    return jnp.concatenate([1 + pull, v, mu * (1 - x**2) * v - x + 0.2 * (x[::-1] - x)])


def _oscillators(coupling, phases, x):
    return (coupling, 1.0), np.array([*phases, *x, 0, 0], float), 2.0


OSCILLATORS = {
    "synchronised": _oscillators(1.0, [0.3] * 4, [1, 1]),
    "opposite": _oscillators(1.0, [0, np.pi, 0, np.pi], [1, -1]),
    "splayed": _oscillators(-1.0, 0.5 * np.pi * np.arange(4), [0, 0]),
}

FAMILIES = {
    "linear": (linear, LINEAR),
    "quadratic": (quadratic, QUADRATIC),
    "gravity": (gravity, GRAVITY),
    "oscillators": (oscillators, OSCILLATORS),
}

SOLVERS = {
    "Tsit5": diffrax.Tsit5(),
    "Obreshkov": Obreshkov(),
    "RadauIIA": RadauIIA(),
    "Euler": diffrax.Euler(),
    "trapezoid": Obreshkov(1),
    "backward Euler": RadauIIA(1),
    "GaussLegendre": GaussLegendre(),
    "AveragedExponential": AveragedExponential(),
    "Exprb32": Exprb32(),
    "Exprb43": Exprb43(),
    "Dopri8": diffrax.Dopri8(),
    "Kvaerno3": diffrax.Kvaerno3(root_finder=ROOT_FINDER),
    "ImplicitEuler": diffrax.ImplicitEuler(root_finder=ROOT_FINDER),
}

#: In the ordinary run every family, by a map or by equations, of each kind one.
ORDINARY = {
    "linear": ("Euler",),
    "quadratic": ("trapezoid",),
    "gravity": ("Tsit5",),
    "oscillators": ("Euler",),
}
ROWS = slow_rows(
    [(family, solver) for family in FAMILIES for solver in SOLVERS],
    lambda row: row[1] not in ORDINARY[row[0]],
)


@eqx.filter_jit
def solve(field, solver, method, args, y0, t1):
    ts = jnp.linspace(jnp.zeros_like(t1), t1, NUM_STEPS + 1)
    sol = diffeqsolve(
        diffrax.ODETerm(field),
        DEER(solver, method),
        ts[0],
        ts[-1],
        None,
        y0,
        args,
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(steps=True),
        throw=False,
    )
    counts = ("num_newton_steps", "num_fallback_steps")
    return sol.ys, [sol.stats[name] for name in counts]


#: Without a sequential finish: half as much to compile, and what does not converge is
#: infinite.
NEWTON = Newton(fallback=False)


def compare(family, solver, dtype, tol):
    field, systems = FAMILIES[family]
    for name, system in systems.items():
        args, y0, t1 = jax.tree_util.tree_map(lambda x: jnp.asarray(x, dtype), system)
        ys, (num_newton, num_fallback) = solve(
            field, SOLVERS[solver], NEWTON, args, y0, t1
        )
        expected, _ = solve(field, SOLVERS[solver], Sequential(), args, y0, t1)
        error = np.abs(ys - expected) / (1 + np.abs(expected))
        assert np.all(error <= tol), (name, error.max())
        assert int(num_fallback) == 0, name
        assert int(num_newton) <= 8, (name, int(num_newton))


@pytest.mark.parametrize("family, solver", ROWS)
def test_the_answer_is_the_sequential_one(family, solver):
    # A thousandth of what the problem asks for, which is 1e-9.
    compare(family, solver, jnp.float64, 1e-12)


@pytest.mark.parametrize(
    "solver", slow(("Tsit5", "trapezoid", "RadauIIA"), lambda s: s != "Tsit5")
)
def test_single_precision(solver):
    compare("linear", solver, jnp.float32, 1e3 * float(jnp.finfo(jnp.float32).eps))


def test_small_components_that_matter():
    """Components of 1e-7 are right to rounding of their own, not of the largest."""
    field, systems = FAMILIES["quadratic"]
    args, y0, t1 = jax.tree_util.tree_map(
        lambda x: jnp.asarray(x, jnp.float64), systems["one infected in ten million"]
    )
    # Of the same program as in the table above.
    solver = SOLVERS["trapezoid"]
    ys, _ = solve(field, solver, NEWTON, args, y0, t1)
    expected, _ = solve(field, solver, Sequential(), args, y0, t1)
    np.testing.assert_allclose(ys[:, :2], expected[:, :2], rtol=1e-12)
