"""The functions of exponential integrators, and the solvers made of them."""

import functools as ft
import itertools as it
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
from hypothesis import given, settings, strategies as st

from deer_ode import (
    Constant,
    ExponentialRosenbrockEuler,
    Exprb32,
    Exprb43,
    Newton,
)
from deer_ode._discretisation._phi import phi_functions, phi_functions_half_and_full

from .helpers import (
    DOORS,
    assert_close,
    assert_steps_agree,
    cde,
    lotka_volterra,
    lotka_volterra_args,
    ode,
    rounding,
    slow,
    slow_rows,
    sqrt_eps,
    tree_dot,
    van_der_pol,
)


EPS = float(jnp.finfo(jnp.float64).eps)
#: Errors of the functions are a few roundings, each as large as the condition of the
#: problem makes it. At most 5.3 were seen in a thousand matrices of each kind.
UNITS = 20
MAX_ORDER = 4
SOLVERS = {
    "Euler": ExponentialRosenbrockEuler(),
    "Exprb32": Exprb32(),
    "Exprb43": Exprb43(),
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def _phi_up_to(order):
    return jax.vmap(lambda A: jnp.stack(phi_functions(A, order)))


_phi = jax.jit(_phi_up_to(MAX_ORDER))
#: Derivatives of these go through the same code as of those of higher order, and take
#: less time to compile.
LOW_ORDER = 2
_low_phi = _phi_up_to(LOW_ORDER)


# --- functions ----------------------------------------------------------------------


def exact_phi(z, k):
    """The function of numbers, real or complex, with more digits than float64."""
    z = np.asarray(z)
    is_complex = np.iscomplexobj(z)
    z = z.astype(np.clongdouble if is_complex else np.longdouble)
    small = np.abs(z) <= 3
    series = np.zeros_like(z)
    for j in range(40, -1, -1):
        series = series * np.where(small, z, 0) + 1 / np.longdouble(
            math.factorial(j + k)
        )
    large = np.where(small, 1, z)
    value = np.exp(large)
    for j in range(k):
        value = (value - 1 / np.longdouble(math.factorial(j))) / large
    return np.where(small, series, value)


def rotated(Q, blocks):
    """`Q blocks Q^T`, in as many digits as there are."""
    Q = Q.astype(np.longdouble)
    return np.einsum("...ij,...jk,...lk->...il", Q, blocks, Q)


def diagonal(x):
    return np.asarray(x)[..., None] * np.eye(np.shape(x)[-1], dtype=np.longdouble)


def check_phi(A, expected, condition, units=UNITS):
    """`expected(k)` against what there is; `condition` multiplies rounding."""
    actual = np.asarray(_phi(jnp.asarray(np.asarray(A, np.float64))))
    for k in range(MAX_ORDER + 1):
        reference = np.asarray(expected(k), np.float64)
        # That of the exponential may underflow: its error is relative to one.
        scale = np.abs(reference).max((-2, -1))
        scale = np.maximum(scale, 1.0) if k == 0 else scale
        error = np.abs(actual[:, k] - reference).max((-2, -1))
        assert np.all(error <= units * EPS * condition * scale), k


@pytest.mark.parametrize("size", slow((1, 2, 3, 6), lambda size: size == 3))
@pytest.mark.parametrize("scale", (1e-12, 1e-3, 1.0, 30.0))
def test_phi_of_full_matrices(size, scale):
    """Against the exponential of a larger matrix, which holds all of them."""
    A = np.array(jr.normal(jr.key(size), (4, size, size)))
    A *= scale / np.linalg.norm(A, axis=(1, 2), keepdims=True)
    shift = np.kron(np.eye(MAX_ORDER + 1, k=1), np.eye(size))
    shift = np.tile(shift, (4, 1, 1))
    shift[:, :size, :size] = A
    whole = scipy.linalg.expm(shift)
    # The reference has the roundings of its squarings as well.
    condition = max(scale, 1.0) * np.ones(4)
    for k in range(MAX_ORDER + 1):
        top = whole[:, :size, k * size : (k + 1) * size]
        actual = np.asarray(_phi(jnp.asarray(A)))[:, k]
        error = np.abs(actual - top).max((1, 2)) / np.abs(top).max((1, 2))
        assert np.all(error <= 5 * UNITS * EPS * condition), k


def _orthogonal(rng, size, count):
    return np.linalg.qr(rng.normal(size=(count, size, size)))[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from((1, 2, 3, 6)),
    exponents=st.tuples(st.floats(-12, 6), st.floats(-12, 6)),
    is_mixed=st.booleans(),
)
def test_phi_of_stiff_matrices(seed, size, exponents, is_mixed):
    """Norms from 1e-12 to 1e6, and both together."""
    rng = np.random.default_rng(seed)
    z = -(10.0 ** rng.uniform(min(exponents), max(exponents), (4, size)))
    z[0, 0] = 0.0
    Q = _orthogonal(rng, size, 4) if is_mixed else np.tile(np.eye(size), (4, 1, 1))
    A = rotated(Q, diagonal(z))
    # Rounding the entries of a matrix that mixes them moves all eigenvalues by that
    # much of the largest. Without mixing none of them suffers from another.
    condition = np.maximum(np.abs(z).max(1), 1.0) if is_mixed else 1.0
    check_phi(A, lambda k: rotated(Q, diagonal(exact_phi(z, k))), condition)


@pytest.mark.parametrize("frequency", (1e-8, 1.0, 1e3, 1e6))
def test_phi_of_rotations(frequency):
    decay = np.array([0.0, -1e-3, -1.0, -1e3])
    z = decay + 1j * frequency

    def block(x):
        x = np.asarray(x)
        return np.stack(
            [np.stack([x.real, x.imag], -1), np.stack([-x.imag, x.real], -1)], -2
        )

    check_phi(block(z), lambda k: block(exact_phi(z, k)), np.maximum(np.abs(z), 1.0))


@pytest.mark.parametrize("shear", (1.0, 1e3, 1e6))
@pytest.mark.parametrize("pair", ((-1e6, -1.0), (-1e6, 0.0), (-1e6, -1e-3), (-1, -1)))
def test_phi_of_shears(pair, shear):
    """Far from normal, and equal eigenvalues of one eigenvector."""
    a, b = (np.longdouble(x) for x in pair)

    def expected(k):
        if a == b:
            shorter = exact_phi(a, k - 1) if k > 0 else None
            slope = exact_phi(a, 0) if k == 0 else (shorter - k * exact_phi(a, k)) / a
        else:
            slope = (exact_phi(a, k) - exact_phi(b, k)) / (a - b)
        zero = np.longdouble(0)
        rows = [[exact_phi(a, k), shear * slope], [zero, exact_phi(b, k)]]
        return np.array(rows, np.longdouble)[None]

    # The eigenvalues stay apart, so nothing is lost to the norm of the matrix.
    check_phi(np.array([[[a, shear], [0, b]]]), expected, 1.0)


def test_phi_in_float32():
    A = np.array([[[-1e4, 1.0], [0.0, -1e-3]], [[-0.1, 1.0], [-1.0, -0.1]]])
    actual = _phi(jnp.asarray(A, jnp.float32))
    assert actual.dtype == jnp.float32
    expected = np.asarray(_phi(jnp.asarray(A, jnp.float32).astype(jnp.float64)))
    eps = float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=UNITS * eps)


def test_phi_of_what_is_not_finite():
    A = np.array([[[np.nan, 0.0], [0.0, 1.0]], [[np.inf, 0.0], [0.0, -1.0]]])
    for size in (1, 2):
        out = np.asarray(_phi(jnp.asarray(A[:, :size, :size])))
        assert not np.all(np.isfinite(out[0]))
        assert not np.all(np.isfinite(out[1]))
    huge = _phi(jnp.full((1, 2, 2), 1e300))
    assert not np.any(np.isfinite(np.asarray(huge)))
    # One that is not finite does not disturb its neighbours.
    good = np.diag([-1e3, -1.0])
    both = np.asarray(_phi(jnp.asarray(np.stack([A[0], good]))))[1]
    np.testing.assert_array_equal(both, np.asarray(_phi(jnp.asarray(good[None])))[0])


def test_phi_refuses():
    with pytest.raises(ValueError, match="must not be negative"):
        phi_functions(jnp.eye(2), -1)
    assert [p.shape for p in phi_functions(jnp.zeros((0, 0)), 2)] == [(0, 0)] * 3
    assert len(phi_functions(jnp.eye(2), 0)) == 1


@pytest.mark.parametrize("size", slow((1, 2, 6), lambda size: size == 6))
def test_half_and_full(size):
    A = 3 * jr.normal(jr.key(0), (size, size))
    half, full = phi_functions_half_and_full(A, 3)
    assert_close(half, phi_functions(A / 2, 3), UNITS * EPS)
    # Norms of some ten.
    assert_close(full, phi_functions(A, 3), 10 * UNITS * EPS)


def _forward(fn):
    """The value of `fn`, and its derivative."""
    return lambda x: jax.jvp(fn, (x,), (jnp.ones_like(x),))


MODES = {"forward": _forward, "reverse": jax.value_and_grad}


# The ordinary run has what gradients of a solve are made of.
@pytest.mark.parametrize(
    "size, outer, inner",
    slow_rows(
        [(size, *modes) for size in (1, 2, 6) for modes in it.product(MODES, repeat=2)],
        lambda row: row != (2, "reverse", "forward"),
    ),
)
def test_derivatives_of_phi(size, outer, inner):
    """Against finite differences, in every order of the modes, over a grid."""
    keys = jr.split(jr.key(size), 3)
    A, E = (jr.normal(key, (2, size, size)) / size for key in keys[:2])
    W = jr.normal(keys[2], (2, LOW_ORDER + 1, size, size))
    # Squared by different numbers of times.
    A = (A - jnp.eye(size)[None]) * jnp.array([0.3, 20.0])[:, None, None]
    along = lambda x: jnp.sum(W * _low_phi(A + x * E))
    first_of = lambda x: MODES[inner](along)(x)[::-1]

    @jax.jit
    def derivatives(x):
        """The first and the second, and the value."""
        if outer == "forward":
            (first, value), (second, _) = _forward(first_of)(x)
        else:
            (first, value), second = jax.value_and_grad(first_of, has_aux=True)(x)
        return first, second, value

    h = 1e-5
    (first_above, _, above), (first_below, _, below) = map(derivatives, (h, -h))
    first, second, _ = derivatives(0.0)
    # Differences of this length keep two thirds of the digits of what is subtracted.
    tol = EPS ** (2 / 3) * 100
    for slope, after, before in (
        (first, above, below),
        (second, first_above, first_below),
    ):
        error = abs(slope - (after - before) / (2 * h))
        assert error <= tol * max(abs(after), abs(slope))


@pytest.mark.parametrize("size", slow((1, 2, 3), lambda size: size != 2))
def test_derivatives_of_phi_exactly(size):
    r"""$\varphi$ of $((A, E), (0, A))$ holds the derivative in its corner."""
    rng = np.random.default_rng(size)
    E = rng.normal(size=(size, size))
    W = jnp.asarray(rng.normal(size=(LOW_ORDER + 1, size, size)))
    phi = lambda A: _low_phi(A[None])[0]
    both = jax.jit(
        lambda A: (jax.jvp(phi, (A,), (jnp.asarray(E),))[1], jax.vjp(phi, A)[1](W)[0])
    )
    for scale in (0.0, 1e-12, 1.0, 1e3, 1e6):
        A = -scale * np.diag(np.linspace(1.0, 1e-6, size))
        forward, reverse = both(jnp.asarray(A))
        whole = jnp.asarray(np.block([[A, E], [np.zeros_like(A), A]]))
        expected = _phi(whole[None])[0, : LOW_ORDER + 1, :size, size:]
        # What is stiff decays, and its derivative with it: small beside the rest.
        assert_close(forward, expected, rounding(), what=f"{scale}")
        a, b = float(tree_dot(W, forward)), float(tree_dot(reverse, jnp.asarray(E)))
        assert abs(a - b) <= rounding() * max(abs(a), 1.0)


@pytest.mark.parametrize("size", slow((1, 2), lambda size: size == 2))
def test_derivatives_of_phi_at_zero(size):
    E = jr.normal(jr.key(0), (size, size))
    phi = lambda A: _low_phi(A[None])[0]

    @jax.jit
    def derivatives(A):
        first = lambda A: jax.jvp(phi, (A,), (E,))[1]
        reverse = jax.grad(lambda A: jnp.sum(jax.grad(lambda A: jnp.sum(phi(A)))(A)))
        return *jax.jvp(first, (A,), (E,)), reverse(A)

    d1, d2, reverse = derivatives(jnp.zeros_like(E))
    for k in range(LOW_ORDER + 1):
        assert_close(d1[k], E / math.factorial(k + 1), UNITS * EPS)
        assert_close(d2[k], 2 * E @ E / math.factorial(k + 2), UNITS * EPS)
    assert np.all(np.isfinite(np.asarray(reverse)))


# --- solvers ------------------------------------------------------------------------


@ft.partial(eqx.filter_jit, donate="none")
def solve(term, solver, t1, dt0, y0, args):
    """Stock Diffrax, one program for all step sizes."""
    return diffrax.diffeqsolve(
        term, solver, 0.0, t1, dt0, y0, args, max_steps=2**16
    ).ys[-1]  # fmt: skip


def test_what_diffrax_asks():
    for order, solver in zip((2, 3, 4), SOLVERS.values(), strict=True):
        term = diffrax.ODETerm(lambda t, y, args: -y)
        assert solver.order(term) == solver.error_order(term) == order
        assert isinstance(solver, diffrax.AbstractAdaptiveSolver) == (order > 2)
        y1, error, info, state, _ = solver.step(
            term, 0.0, 0.1, jnp.ones(1), None, None, False
        )
        assert (error is None) == (order == 2)
        assert state is None
        assert_close(solver.func(term, 0.0, jnp.ones(1), None), -jnp.ones(1), 0.0)
        curve = solver.interpolation_cls(t0=0.0, t1=0.1, **info)
        assert_close(curve.evaluate(jnp.asarray(0.1)), y1, UNITS * EPS)
        # The next term of a cubic: h**4 y'''' / 384.
        assert_close(
            curve.evaluate(jnp.asarray(0.05)), jnp.exp(-jnp.full(1, 0.05)), 1e-6
        )


def _affine_field(t, y, args):
    A, b, c = args
    return A @ y + b + c * t


@each_solver
@pytest.mark.parametrize("stiffness", (1.0, 1e6))
@pytest.mark.parametrize("is_mixed", (False, True))
def test_one_giant_step_of_a_linear_problem(name, stiffness, is_mixed):
    """Exact, whatever the step: stiffness costs nothing."""
    z = np.array([-stiffness, -1.0, 0.0])
    rng = np.random.default_rng(0)
    Q = _orthogonal(rng, 3, 1)[0] if is_mixed else np.eye(3)
    A = rotated(Q, diagonal(z))
    b, c, y0 = rng.normal(size=(3, 3))
    if stiffness > 1:
        # A forcing as stiff as the rest, so that the answer is of order one.
        b, c = (np.asarray(A @ x, np.float64) for x in (b, c))
    h = 2.0
    phi = [rotated(Q, diagonal(exact_phi(h * z, k))) for k in range(3)]
    expected = y0 + h * phi[1] @ (A @ y0 + b) + h**2 * phi[2] @ c
    args = tuple(jnp.asarray(np.asarray(x, np.float64)) for x in (A, b, c))
    y1 = solve(
        diffrax.ODETerm(_affine_field), SOLVERS[name], h, h, jnp.asarray(y0), args
    )
    # Where it is mixed into the others, rounding the matrix itself moves the slow
    # components by so much.
    condition = h * stiffness if is_mixed else 1.0
    tol = rounding() if condition <= 10 else UNITS * EPS * condition
    assert_close(y1, jnp.asarray(np.asarray(expected, np.float64)), tol)


# A rotation that mixes stiff and slow.
_Q = np.array([[math.cos(0.6), math.sin(0.6)], [-math.sin(0.6), math.cos(0.6)]])
_RATE = 1e5
"""Stiff for every step used: |hJ| is some 200 or more."""
_STIFF = jnp.asarray(_Q @ np.diag([-_RATE, -1.0]) @ _Q.T)


def _swinging(t):
    return jnp.stack([jnp.cos(2 * t), jnp.sin(3 * t)])


def _nearly_slow(t):
    """Far from zero in the slow direction only."""
    slow, fast = _swinging(t)
    return jnp.asarray(_Q) @ jnp.stack([fast / _RATE, slow])


def _stiff_about(solution):
    """A stiff field with that solution; what is not linear in the state is mild."""

    def field(t, y, args):
        del args
        x, slope = jax.jvp(solution, (t,), (jnp.ones_like(t),))
        mild = lambda y: jnp.stack([y[0] * y[1], jnp.sin(y[0])])
        return _STIFF @ (y - x) + slope + mild(y) - mild(x)

    return field


def _oscillating(t, y, args):
    del args
    return jnp.stack([jnp.sin(2 * t) * y[1], -y[0] * jnp.cos(y[1]) + jnp.cos(3 * t)])


def _accurate(field, y0, args):
    compiled = jax.jit(field)
    found = scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(compiled(t, y, args)), (0.0, 1.0), y0, "DOP853",
        rtol=1e-13, atol=1e-13,
    )  # fmt: skip
    return jnp.asarray(found.y[:, -1])


def _slope(solver, field, y0, args, expected, num_steps):
    term = diffrax.ODETerm(field)
    errors = [
        float(jnp.max(jnp.abs(solve(term, solver, 1.0, 1 / n, y0, args) - expected)))
        for n in num_steps
    ]
    return -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]


_MILD = {
    "autonomous": (lotka_volterra, jnp.array([2.0, 1.0]), lotka_volterra_args()),
    "in time": (_oscillating, jnp.array([1.0, 0.5]), None),
}


@pytest.mark.parametrize(
    "name, problem",
    slow_rows(
        [(name, problem) for name in SOLVERS for problem in _MILD],
        lambda row: row != ("Exprb43", "in time"),
    ),
)
def test_order(name, problem):
    solver = SOLVERS[name]
    # Fine enough for the leading term, coarse enough for it to be above rounding.
    num_steps = (128, 256, 512) if solver.order(None) == 2 else (16, 32, 64)
    slope = _slope(solver, *_MILD[problem], _accurate(*_MILD[problem]), num_steps)
    assert abs(slope - solver.order(None)) < 0.15


each_of_order = slow(SOLVERS, lambda name: name != "Exprb43")


@pytest.mark.parametrize("name", each_of_order)
def test_order_where_only_the_linear_part_is_stiff(name):
    """Which is what the theory of these methods promises: none of it is lost."""
    y0, y1 = _nearly_slow(jnp.asarray(0.0)), _nearly_slow(jnp.asarray(1.0))
    field = _stiff_about(_nearly_slow)
    # Rounding is multiplied by the stiffness here.
    slope = _slope(SOLVERS[name], field, y0, None, y1, (16, 32, 64))
    assert abs(slope - SOLVERS[name].order(None)) < 0.15


@pytest.mark.parametrize(
    "name, order",
    slow_rows(
        (("Euler", 2), ("Exprb32", 3), ("Exprb43", 3)), lambda row: row[0] != "Exprb43"
    ),
)
@pytest.mark.slow(covered_by="test_order_where_only_the_linear_part_is_stiff")
def test_order_where_the_forcing_is_stiff_too(name, order):
    """Prothero and Robinson's problem: beyond that theory, and the last loses one."""
    y0, y1 = _swinging(jnp.asarray(0.0)), _swinging(jnp.asarray(1.0))
    field = _stiff_about(_swinging)
    slope = _slope(SOLVERS[name], field, y0, None, y1, (128, 256, 512))
    assert abs(slope - order) < 0.15


@pytest.mark.parametrize(
    "name", slow(("Exprb32", "Exprb43"), lambda name: name == "Exprb32")
)
def test_order_of_the_estimate(name):
    """The local error of the embedded method, one order below."""
    solver = SOLVERS[name]
    term = diffrax.ODETerm(_oscillating)
    y0 = jnp.array([1.0, 0.5])
    step = jax.jit(
        lambda h: solver.step(term, jnp.asarray(0.3), 0.3 + h, y0, None, None, False)[1]
    )
    hs = np.array([0.04, 0.02, 0.01])
    errors = [float(jnp.linalg.norm(step(h))) for h in hs]
    slope = np.polyfit(np.log(hs), np.log(errors), 1)[0]
    assert abs(slope - solver.order(term)) < 0.15, errors


def stiff():
    """Relaxation onto a moving, curved equilibrium; |hJ| is some 40 here."""

    def field(t, y, args):
        linear = args["w"] @ y - 1e3 * jnp.stack([y[0] - jnp.sin(t), 0 * y[1]])
        return linear + args["a"] * jnp.stack([y[1] ** 2, -y[0] * y[1]])

    return diffrax.ODETerm(field), *ode()[1:]


def pytree():
    """Complex and real leaves."""

    def field(t, y, args):
        z, x = y["z"], y["x"]
        growth = jax.lax.complex(-x, args["a"] * jnp.ones_like(x))
        return {"z": growth * z, "x": jnp.cos(t) - jnp.abs(z) ** 2 * x}

    y0 = {"z": jnp.array([1.0 + 0.5j]), "x": jnp.array([0.3])}
    return diffrax.ODETerm(field), y0, ode()[2]


def neural_cde():
    """The control itself, not turned into an ordinary differential equation."""
    ts = jnp.linspace(0.0, 1.0, 9)
    path = diffrax.LinearInterpolation(ts, jnp.stack([ts, jnp.sin(5 * ts)], axis=-1))

    def field(t, y, args):
        y = jnp.tanh((1 + args["w"][:1, :1]) @ y)
        return jnp.stack([y, args["a"] * (1 + 0.5 * t) * jnp.cos(y)], axis=-1)

    # One number: the functions of one are compiled faster than those of matrices.
    _, y0, args = ode()
    return diffrax.ControlTerm(field, path), y0[:1], args


PROBLEMS = {
    "ode": ode,
    "stiff": stiff,
    "pytree": pytree,
    "cde": cde,
    "neural cde": neural_cde,
}
NUM_STEPS = 24


# In the ordinary run a number: derivatives of what exponentials of matrices are made of
# are above.
@pytest.mark.parametrize(
    "name, problem",
    slow_rows(
        [(name, problem) for name in SOLVERS for problem in PROBLEMS],
        lambda row: row != ("Euler", "neural cde"),
    ),
)
def test_parallel_is_sequential(name, problem):
    ts, times = jnp.linspace(0.0, 1.0, 17), jnp.array([0.13, 0.5, 0.99])
    assert_steps_agree(SOLVERS[name], PROBLEMS[problem], ts, times)


def value_and_grad(solve, solver, problem, num_steps=NUM_STEPS, **kwargs):
    terms, y0, args = PROBLEMS[problem]()

    def loss(inputs):
        ys = solve(
            terms, solver, 0.0, 1.0, 1 / num_steps, *inputs, max_steps=num_steps,
            saveat=diffrax.SaveAt(t1=True), **kwargs,
        ).ys  # fmt: skip
        return jnp.sum(ys**2), ys

    fn = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))
    (_, ys), grads = fn((y0, args))
    return ys, grads


DOOR_ROWS = slow_rows(
    [
        ("Exprb32", "b", "neural cde"),
        *((name, door, "stiff") for name in SOLVERS for door in DOORS),
    ],
    # Of a number: gradients of a matrix are above, and whole solves of one below.
    lambda row: row[2] == "stiff",
)


@pytest.mark.parametrize("name, door, problem", DOOR_ROWS)
@pytest.mark.slow(covered_by="test_parallel_is_sequential")
def test_doors(name, door, problem):
    kwargs = dict(num_substeps=4, num_steps=6) if door == "c" else {}
    kwargs["method"] = Newton(guess=Constant(), window=None, chunk=1)
    ys, grads = value_and_grad(DOORS[door], SOLVERS[name], problem, **kwargs)
    expected = value_and_grad(diffrax.diffeqsolve, SOLVERS[name], problem)
    assert_close((ys, grads), expected, rounding())


@pytest.mark.slow(covered_by="test_phi_in_float32")
def test_float32():
    solver = ExponentialRosenbrockEuler()
    terms, y0, args = stiff()
    f32 = jnp.float32
    y0, args = jax.tree_util.tree_map(lambda x: x.astype(f32), (y0, args))

    def run(solve):
        return solve(
            terms, solver, f32(0), f32(1), f32(1 / NUM_STEPS), y0, args,
            max_steps=NUM_STEPS + 1,
        ).ys  # fmt: skip

    expected = run(diffrax.diffeqsolve)
    assert expected.dtype == f32
    assert_close(run(DOORS["b"]), expected, rounding(f32))
    exact = solve(terms, solver, 1.0, 1 / NUM_STEPS, *stiff()[1:])
    assert_close(expected[-1].astype(jnp.float64), exact, rounding(f32))


def test_control_is_in_the_linearisation():
    """On a path of straight pieces it is the same as the equation in time."""
    terms, y0, args = neural_cde()
    control = diffrax.diffeqsolve(terms, Exprb43(), 0.0, 1.0, 1 / 8, y0, args).ys
    # The path's slope jumps where steps meet, so it must come from within the step.
    values = terms.control.evaluate
    slope = lambda t: 8 * values(jnp.floor(8 * t) / 8, jnp.floor(8 * t) / 8 + 1 / 8)
    y = y0

    @jax.jit
    def step(t0, y):
        x = slope(t0 + 1 / 16)
        term = diffrax.ODETerm(lambda t, y, args: terms.vf(t, y, args) @ x)
        return Exprb43().step(term, t0, t0 + 1 / 8, y, args, None, False)[0]

    for i in range(8):
        y = step(jnp.asarray(i / 8), y)
    assert_close(control[0], y, rounding())


@pytest.mark.parametrize(
    "name", slow(("Exprb32", "Exprb43"), lambda name: name == "Exprb32")
)
def test_adaptive_steps(name):
    """The tolerance is met on a stiff problem, in few steps."""
    term = diffrax.ODETerm(van_der_pol)
    y0, mu = jnp.array([2.0, 0.0]), jnp.asarray(200.0)

    def run(solver, tol):
        return diffrax.diffeqsolve(
            term, solver, 0.0, 100.0, 1e-3, y0, mu, max_steps=2**16,
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
        )  # fmt: skip

    sol = run(SOLVERS[name], 1e-6)
    explicit = run(diffrax.Tsit5(), 1e-6)
    expected = scipy.integrate.solve_ivp(
        lambda t, y: [y[1], 200.0 * (1 - y[0] ** 2) * y[1] - y[0]],
        (0.0, 100.0), y0, "Radau", rtol=1e-10, atol=1e-10,
    ).y[:1, -1]  # fmt: skip
    # A solver meets its tolerance up to the number of its steps.
    assert_close(sol.ys[:, 0], jnp.asarray(expected), 1e-4)
    assert int(sol.stats["num_steps"]) < int(explicit.stats["num_steps"]) / 20


def test_half_solver_estimates_for_the_first():
    term = diffrax.ODETerm(lambda t, y, args: -(y**2))
    sol = diffrax.diffeqsolve(
        term, diffrax.HalfSolver(ExponentialRosenbrockEuler()), 0.0, 1.0, 0.1,
        jnp.ones(1), stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
    )  # fmt: skip
    # Some tens of steps, of which each has the tolerance for itself.
    assert_close(sol.ys[0], jnp.full((1,), jnp.asarray(0.5)), 1e-4)


def test_no_step_is_long_enough_to_hurt():
    """The steps of a grid that is far too coarse, in parallel."""
    term = diffrax.ODETerm(lambda t, y, args: -1e6 * (y - jnp.sin(t)))
    sol = DOORS["b"](
        term, Exprb32(), 0.0, 10.0, 0.1, jnp.ones(1), max_steps=128,
        saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    ts, ys = sol.ts[:100], sol.ys[:100, 0]
    # The first step falls onto the slow solution; what forces it is resolved to h**3.
    assert_close(ys, jnp.sin(ts), max(1e-3 / 6, sqrt_eps()))
