"""`deer_ode.scan` against `jax.lax.scan`: the same answers and the same derivatives."""

import functools

import equinox as eqx
import jax
import jax.extend.core as jexc
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
from hypothesis import given, settings, strategies as st

import deer_ode
from deer_ode import (
    BlockDiagonal,
    Constant,
    Dense,
    Diagonal,
    Exact,
    Newton,
    PairedDiagonal,
    Sequential,
    Trajectory,
    Window,
    solve_recurrence,
)
from deer_ode._predictor import AbstractPredictor
from deer_ode.nn import LEMCell

from .helpers import (
    assert_close,
    finite_difference,
    random_like,
    rounding,
    slow,
    slow_rows,
    sqrt_eps,
    tree_dot,
)


# --- problems: a step `(params, carry, x) -> (carry, y)`, and what it starts from -----


def _gru(key, dtype, num_steps):
    keys = jr.split(key, 3)
    cell = eqx.nn.GRUCell(2, 3, dtype=dtype, key=keys[0])

    def step(cell, h, x):
        h = cell(x, h)
        return h, h

    init = jr.normal(keys[1], (3,), dtype)
    return step, cell, init, _noise(keys[2], num_steps, 2, dtype=dtype)


def _noise(key, num_steps, *shape, dtype):
    return jr.normal(key, (num_steps, *shape), dtype)


def _lstm(key, dtype, num_steps):
    keys = jr.split(key, 3)
    cell = eqx.nn.LSTMCell(2, 3, dtype=dtype, key=keys[0])

    def step(cell, state, x):
        h, c = cell(x, state)
        return (h, c), (h, c * h)

    init = tuple(jr.normal(keys[1], (2, 3), dtype))
    return step, cell, init, _noise(keys[2], num_steps, 2, dtype=dtype)


def _lem(key, dtype, num_steps):
    keys = jr.split(key, 3)
    cell = LEMCell(2, 3, dt=0.7, dtype=dtype, key=keys[0])

    def step(cell, state, x):
        state = cell(state, x)
        return state, 2 * state[0]

    init = tuple(jr.normal(keys[1], (2, 3), dtype))
    return step, cell, init, _noise(keys[2], num_steps, 2, dtype=dtype)


def _tanh_step(params, y, x):
    y = jnp.tanh(params["W"] @ y + params["b"] + x)
    return y, {"state": y, "square": jnp.sum(y**2)}


def _tanh(key, dtype, num_steps, gain=0.9, size=3):
    keys = jr.split(key, 4)
    params = {
        "W": gain * jr.normal(keys[0], (size, size), dtype) / size**0.5,
        "b": 0.1 * jr.normal(keys[1], (size,), dtype),
    }
    y0 = jr.normal(keys[2], (size,), dtype)
    return _tanh_step, params, y0, _noise(keys[3], num_steps, size, dtype=dtype)


def _wild(key, dtype, num_steps):
    return _tanh(key, dtype, num_steps, gain=WILD)


def _relu(key, dtype, num_steps):
    """Slope one half where the answer is and `gain` where the guess is, so that the
    first iterates overflow: 32**60 is beyond the fourth root of the largest number.
    """
    del key, num_steps
    params = {"gain": jnp.asarray(32.0, dtype), "b": jnp.array([0.1, 0.2], dtype)}
    assert 32.0**60 > float(jnp.finfo(dtype).max) ** 0.25

    def step(params, y, x):
        y = 0.5 * y + params["b"] + params["gain"] * jax.nn.relu(y[::-1] - 1) + x
        return y, y

    # From the steep region to the other one, at once.
    xs = jnp.zeros((60, 2), dtype).at[0].set(-33.0)
    return step, params, jnp.array([2.0, 2.0], dtype), xs


def _heads(key, dtype, num_steps):
    keys = jr.split(key, 3)
    make = lambda key: eqx.nn.GRUCell(2, 2, dtype=dtype, key=key)
    cells = eqx.filter_vmap(make)(jr.split(keys[0], 4))

    def step(cells, h, x):
        h = eqx.filter_vmap(lambda cell, h: cell(x, h))(cells, h)
        return h, jnp.sum(h, axis=0)

    init = jr.normal(keys[1], (4, 2), dtype)
    return step, cells, init, _noise(keys[2], num_steps, 2, dtype=dtype)


def _leapfrog(key, dtype, num_steps):
    keys = jr.split(key, 3)
    params = {"k": jnp.asarray(1.3, dtype), "h": jnp.asarray(0.2, dtype)}

    def step(params, state, push):
        potential = lambda q: jnp.sum(params["k"] * q**2 / 2 - jnp.cos(q) + push * q)
        q, p, h = state["q"], state["p"], params["h"]
        p = p - h / 2 * jax.grad(potential)(q)
        q = q + h * p
        p = p - h / 2 * jax.grad(potential)(q)
        return {"q": q, "p": p}, potential(q) + jnp.sum(p**2) / 2

    q, p = jr.normal(keys[0], (2, 3), dtype)
    return step, params, {"q": q, "p": p}, _noise(keys[1], num_steps, 3, dtype=dtype)


def _particles(key, dtype, num_steps):
    """Langevin steps with a smooth acceptance, each particle by itself."""
    keys = jr.split(key, 2)
    params = {"h": jnp.asarray(0.1, dtype), "at": jnp.array([0.5, -0.5], dtype)}

    def log_density(params, y):
        return -jnp.sum((y - params["at"]) ** 4) / 4 - jnp.sum(y[0] * y[1])

    def step(params, cloud, noise):
        def move(y, noise):
            drift = jax.grad(log_density, argnums=1)(params, y)
            new = y + params["h"] * drift + jnp.sqrt(2 * params["h"]) * noise
            gain = log_density(params, new) - log_density(params, y)
            return y + jax.nn.sigmoid(2 + gain) * (new - y)

        cloud = jax.vmap(move)(cloud, noise)
        return cloud, {"mean": jnp.mean(cloud, axis=0), "cloud": cloud}

    cloud = jr.normal(keys[0], (4, 2), dtype)
    return step, params, cloud, _noise(keys[1], num_steps, 4, 2, dtype=dtype)


def _kalman(key, dtype, num_steps):
    params = {
        "A": jnp.array([[0.9, 0.2], [-0.2, 0.8]], dtype),
        "h": jnp.array([1.0, 0.5], dtype),
        "noise": jnp.asarray(0.3, dtype),
    }

    def step(params, state, observed):
        (m, P), A, h = state, params["A"], params["h"]
        m, P = A @ m, A @ P @ A.T + 0.1 * jnp.eye(2, dtype=P.dtype)
        s = h @ P @ h + params["noise"]
        k, e = P @ h / s, observed - h @ m
        m, P = m + k * e, P - s * jnp.outer(k, k)
        return (m, P), -(jnp.log(2 * jnp.pi * s) + e**2 / s) / 2

    init = (jnp.zeros(2, dtype), jnp.eye(2, dtype=dtype))
    return step, params, init, jr.normal(key, (num_steps,), dtype)


def _mixed(key, dtype, num_steps):
    """Leaves of all sorts, and outputs that are no floating numbers."""
    keys = jr.split(key, 3)
    params = {"a": jnp.asarray(0.7, dtype), "b": jnp.array([0.3, -0.2], dtype)}

    def step(params, state, x):
        s = jnp.tanh(params["a"] * state["s"] + jnp.mean(state["v"]) + x["u"])
        v = 0.5 * state["v"] + s * params["b"] + 0.1 * state["z"].real
        M = jnp.tanh(0.3 * state["M"] @ state["M"].T + jnp.diag(v))
        z = 0.6j * state["z"] + lax.complex(s, x["u"])
        new = {"s": s, "v": v, "M": M, "z": z, "empty": 2 * state["empty"], "-": None}
        put_out = {
            "token": x["n"] + 1,
            "positive": s > 0,
            "largest": jnp.argmax(v).astype(jnp.int32),
            "nothing": None,
            "z": z,
            "trace": jnp.trace(M),
            "two": jnp.asarray(2.0, dtype),
            "x": x["u"],
        }
        return new, put_out

    init = {
        "s": jnp.asarray(0.4, dtype),
        "v": jnp.array([0.1, -0.6], dtype),
        "M": 0.3 * jr.normal(keys[0], (2, 2), dtype),
        "z": lax.complex(jnp.asarray(0.2, dtype), jnp.asarray(-0.3, dtype)),
        "empty": jnp.zeros((0, 2), dtype),
        "-": None,
    }
    xs = {
        "u": jr.normal(keys[1], (num_steps,), dtype),
        "n": jr.randint(keys[2], (num_steps,), 0, 9),
        "unused": jnp.zeros((num_steps, 2), dtype),
        "-": None,
    }
    return step, params, init, xs


def _tokens(key, dtype, num_steps):
    """Embedded tokens, and noise from a key for each step."""
    keys = jr.split(key, 4)
    params = {
        "embedding": jr.normal(keys[0], (5, 2), dtype),
        "W": 0.5 * jr.normal(keys[1], (2, 2), dtype),
    }

    def step(params, y, x):
        token, key = x
        noise = 0.1 * jr.normal(key, (2,), dtype)
        y = jnp.tanh(params["W"] @ y + params["embedding"][token] + noise)
        return y, None

    xs = (jr.randint(keys[2], (num_steps,), 0, 5), jr.split(keys[3], num_steps))
    return step, params, jnp.zeros(2, dtype), xs


PROBLEMS = {
    "gru": _gru,
    "lstm": _lstm,
    "lem": _lem,
    "tanh": _tanh,
    "wild tanh": _wild,
    "relu": _relu,
    "heads": _heads,
    "leapfrog": _leapfrog,
    "particles": _particles,
    "kalman": _kalman,
    "mixed": _mixed,
    "tokens": _tokens,
}


#: Errors of rounding grow by up to the gain in each step that is not saturated, of
#: which there are hardly two in a row.
WILD = 10.0
GROWTH = {"wild tanh": WILD**2}


def problem(name, dtype=jnp.float64, num_steps=12):
    step, *inputs = PROBLEMS[name](jr.key(0), dtype, num_steps)
    return step, tuple(inputs)


def solved(scan, step, inputs, **kwargs):
    """By the parallel method, unless another one is given."""
    params, init, xs = inputs
    if scan is not lax.scan:
        # Neither windows nor chunks, of which there are tests: less to compile.
        kwargs = dict(method=Newton(window=None, chunk=1)) | kwargs
    return scan(functools.partial(step, params), init, xs, **kwargs)


def total(tree):
    """A number from all floating leaves, curved so that second derivatives count."""
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    parts = [jnp.sum(jnp.sin(x.real)) for x in leaves]
    parts += [jnp.sum(jnp.cos(x.imag)) for x in leaves if jnp.iscomplexobj(x)]
    return sum(parts[1:], parts[0])


def differentiable(inputs):
    return eqx.partition(inputs, eqx.is_inexact_array)


def quick(fn):
    """`jax.jit`, with less optimisation: compilation is what these tests wait for."""
    # Not `xla_backend_optimization_level=0`, which makes wrong programs on CPUs (NaN in
    # gradients of the classifier, with `lax.scan` as well; jaxlib 0.10.2).
    options = {"xla_llvm_disable_expensive_passes": True}
    return jax.jit(fn, compiler_options=options)


def value_and_grad(scan, step, inputs, **kwargs):
    free, fixed = differentiable(inputs)

    def loss(free):
        out = solved(scan, step, eqx.combine(free, fixed), **kwargs)
        return total(out), out

    return quick(jax.grad(loss, has_aux=True))(free)


def derivatives(scan, step, inputs, directions):
    """Values, gradients, tangents, and what the Hessian makes of the directions."""
    free, fixed = differentiable(inputs)

    def loss(free):
        out = solved(scan, step, eqx.combine(free, fixed))
        return total(out), out

    def first_order(free):
        slope, out = jax.grad(loss, has_aux=True)(free)
        return (slope, eqx.filter(out, eqx.is_inexact_array)), out

    (slope, _), (curvature, tangents), out = quick(
        lambda *args: jax.jvp(first_order, args[:1], args[1:], has_aux=True)
    )(free, directions)
    return out, tangents, slope, curvature


# --- the same answers -----------------------------------------------------------------


#: Compilation takes long: of problems alike, one each in the ordinary run, in one of
#: the precisions.
_IN_DOUBLE = ("relu",)
_IN_SINGLE = ("tanh",)


@pytest.mark.parametrize("name", slow(PROBLEMS, lambda name: name not in _IN_DOUBLE))
def test_is_lax_scan(name):
    """Values, and derivatives in both modes and of second order."""
    step, inputs = problem(name)
    directions = random_like(jr.key(1), differentiable(inputs)[0])
    expected = derivatives(lax.scan, step, inputs, directions)
    actual = derivatives(deer_ode.scan, step, inputs, directions)
    what = ("value", "jvp", "grad", "hvp")
    for a, e, w in zip(actual, expected, what, strict=True):
        # Second derivatives are sums of products of sensitivities of opposite signs.
        tol = rounding() * GROWTH.get(name, 1.0) * (10 if w == "hvp" else 1)
        assert_close(a, e, tol, what=f"{name}: {w}")


@pytest.mark.parametrize("name", slow(PROBLEMS, lambda name: name not in _IN_SINGLE))
def test_is_lax_scan_in_single_precision(name):
    step, inputs = problem(name, jnp.float32)
    expected = value_and_grad(lax.scan, step, inputs)
    actual = value_and_grad(deer_ode.scan, step, inputs)
    tol = rounding(jnp.float32) * GROWTH.get(name, 1.0)
    assert_close(actual, expected, tol, what=name)


@pytest.mark.parametrize("num_steps", slow((0, 1, 2), lambda n: n > 0))
def test_short_sequences(num_steps):
    step, inputs = problem("mixed", num_steps=num_steps)
    expected = value_and_grad(lax.scan, step, inputs)
    actual = value_and_grad(deer_ode.scan, step, inputs)
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "outer, inner",
    slow_rows(
        ((jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd)),
        lambda row: row[0] is jax.jacfwd,
    ),
    ids=("forward over reverse", "reverse over forward"),
)
@pytest.mark.slow(covered_by="test_newton.py::test_hessian")
def test_hessian(outer, inner):
    """All of it."""
    step, (params, init, xs) = problem("tanh", num_steps=5)

    def loss(scan):
        return lambda init, b: total(solved(scan, step, (params | {"b": b}, init, xs)))

    expected = quick(jax.hessian(loss(lax.scan), (0, 1)))(init, params["b"])
    hessian = outer(inner(loss(deer_ode.scan), (0, 1)), (0, 1))
    assert_close(quick(hessian)(init, params["b"]), expected, rounding())


@pytest.mark.slow(covered_by="test_newton.py::test_gradients_are_exact_in_every_mode")
def test_finite_differences():
    """Not only against another derivative."""
    step, inputs = problem("tanh")
    free, fixed = differentiable(inputs)
    run = quick(
        jax.value_and_grad(
            lambda free: total(solved(deer_ode.scan, step, eqx.combine(free, fixed)))
        )
    )
    direction = random_like(jr.key(2), free)
    slope = tree_dot(run(free)[1], direction)
    # Central differences are good to the square root of rounding and better.
    expected = finite_difference(lambda free: run(free)[0], free, direction)
    np.testing.assert_allclose(slope, expected, rtol=sqrt_eps(), atol=sqrt_eps())


@pytest.mark.parametrize(
    "name, dtype, num_steps",
    [
        ("almost affine", jnp.float64, 20_000),
        *slow_rows(
            [
                (name, dtype, 100_000)
                for name in ("gru", "almost affine")
                for dtype in (jnp.float32, jnp.float64)
            ],
            lambda row: True,
        ),
    ],
)
def test_long_sequences(name, dtype, num_steps):
    if name == "gru":
        step, inputs = problem("gru", dtype, num_steps)
    else:

        def step(params, y, x):
            y = params["A"] @ y + jnp.asarray(0.01, dtype) * jnp.sin(y) + x
            return y, y

        A = jnp.array([[0.9, 0.3], [-0.3, 0.9]], dtype)
        xs = jr.normal(jr.key(0), (num_steps, 2), dtype)
        inputs = ({"A": A}, jnp.zeros(2, dtype), xs)

    def loss(inputs):
        sol = solved(solve_recurrence, step, inputs)
        out = sol.carry, sol.ys
        return total(out), (out, sol.stats["num_fallback_steps"])

    free, fixed = differentiable(inputs)
    of_free = lambda free: loss(eqx.combine(free, fixed))
    slope, (out, num_fallback_steps) = quick(jax.grad(of_free, has_aux=True))(free)
    expected = value_and_grad(lax.scan, step, inputs)
    # Gradients of parameters are sums over all steps, in another order.
    tol = rounding(dtype) * (10 if dtype == jnp.float32 else 1)
    assert_close((slope, out), expected, tol)
    assert int(num_fallback_steps) == 0


@functools.cache
def _of_tanh(scan, reverse):
    """Compiled once for each shape of what it takes."""
    return quick(lambda *inputs: solved(scan, _tanh_step, inputs, reverse=reverse))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    gain=st.floats(0.0, 1.5),
    reverse=st.booleans(),
)
def test_random_recurrences(seed, gain, reverse):
    _, *inputs = _tanh(jr.key(seed), jnp.float64, 7, gain)
    run = lambda scan: _of_tanh(scan, reverse)(*inputs)
    # Seven steps of gain 1.5, not one of them saturated.
    tol = rounding() * 1.5**7
    assert_close(run(deer_ode.scan), run(lax.scan), tol)


def test_not_a_number_is_not_hidden():
    """sqrt(y - 10) + x from 12: where the answer is not a number, ours is not."""

    def step(y, x):
        y = jnp.sqrt(y - 10) + x
        return y, y

    xs = jnp.full((9, 1), 10.2).at[4].set(5.0)
    expected = lax.scan(step, jnp.array([12.0]), xs)
    assert bool(jnp.any(jnp.isnan(expected[1])))
    run = quick(lambda xs: deer_ode.scan(step, jnp.array([12.0]), xs, method=Newton()))
    assert_close(run(xs), expected, rounding())
    # From the first step on.
    start = jnp.array([0.0])
    assert_close(
        quick(lambda xs: deer_ode.scan(step, start, xs, method=Newton()))(xs),
        lax.scan(step, start, xs),
        rounding(),
    )


@pytest.mark.parametrize(
    "method, reverse",
    slow_rows(
        [(m, r) for m in (None, Newton(), Sequential()) for r in (False, True)],
        lambda row: row[1] != isinstance(row[0], Newton),
    ),
    ids=repr,
)
def test_the_step_that_is_not_finite_is_named_by_its_place(method, reverse):
    xs = jnp.ones(10).at[6].set(jnp.inf)
    step = lambda y, x: (y * x, None)
    kwargs = {} if method is None else dict(method=method)
    sol = solve_recurrence(step, jnp.array(0.5), xs, reverse=reverse, **kwargs)
    assert int(sol.stats["first_nonfinite_step"]) == 6


@pytest.mark.parametrize(
    "outer, inner",
    slow_rows(
        ((jax.grad, jax.grad), (jax.jacrev, jax.jacfwd)),
        lambda row: row[1] is jax.jacfwd,
    ),
    ids=("reverse over reverse", "reverse over forward"),
)
def test_second_derivatives_where_the_first_input_means_nothing_at_the_end(
    outer, inner
):
    """Windows of 64 steps are filled up with the first input: not from the last state,
    where the map of the first step is not a number.
    """
    xs = jnp.linspace(1.0, 3.0, 65)
    method = Newton(window=Window(64))

    def end(p, scan, **kwargs):
        def step(y, x):
            return 0.9 * y + 0.1 * p * x + 0.01 * p * jnp.sqrt(x + 0.5 - y), None

        return scan(step, jnp.array(0.5), xs, **kwargs)[0]

    last = end(1.0, lax.scan)
    assert float(xs[0] + 0.5 - last) < 0
    second = lambda f: quick(outer(inner(f)))(jnp.array(1.0))
    ours = second(lambda p: end(p, deer_ode.scan, method=method))
    assert_close(ours, second(lambda p: end(p, lax.scan)), rounding())


@pytest.mark.parametrize("method", (None, Newton(window=None, chunk=1)), ids=repr)
def test_derivatives_in_python_numbers_without_jit(method):
    kwargs = {} if method is None else dict(method=method)

    def end(p, scan, **kwargs):
        step = lambda y, x: (0.5 * jnp.tanh(y) + p * x, None)
        return scan(step, jnp.array(0.5), jnp.linspace(0.0, 1.0, 9), **kwargs)[0]

    for differentiate in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        ours = differentiate(lambda p: end(p, deer_ode.scan, **kwargs))(1.0)
        theirs = differentiate(lambda p: end(p, lax.scan))(1.0)
        # Of Python's numbers JAX makes derivatives in single precision.
        assert_close(ours, theirs, rounding(jnp.float32))


@pytest.mark.parametrize(
    "window", slow((None, Window()), lambda w: w is None), ids=("all", "windows")
)
def test_what_an_inexact_jacobian_leaves_is_rounding(window):
    """A slow rotation, whose diagonal says little: many small corrections follow."""
    num_steps, angle = 2000, 1e-3
    c, s = np.cos(angle), np.sin(angle)
    turn = lambda y, x: (jnp.array([[c, -s], [s, c]]) @ y, None)
    solve = lambda method: solve_recurrence(
        turn, jnp.array([1.0, 0.0]), None, num_steps, method=method
    )
    sol = quick(lambda: solve(Newton(Diagonal(), window=window)))()
    assert int(sol.stats["num_fallback_steps"]) == 0
    # Corrections are accepted up to what eight units of rounding of each step add up
    # to, if they have signs of their own.
    bound = 8 * num_steps**0.5 * float(jnp.finfo(jnp.float64).eps)
    assert_close(sol.carries, solve(Sequential()).carries, bound)


def test_leaves_of_two_precisions():
    """Each leaf is as good as its own dtype allows."""

    def step(state, x):
        fine, rough = state
        fine = jnp.tanh(0.8 * fine + x)
        rough = jnp.cos(0.5 * rough) + 0.1 * fine.astype(jnp.float32)
        return (fine, rough), (rough, fine)

    init = (jnp.ones(2), jnp.zeros(2, jnp.float32))
    xs = jr.normal(jr.key(0), (20, 2))
    sol = quick(lambda xs: solve_recurrence(step, init, xs, method=Newton()))(xs)
    expected = lax.scan(step, init, xs)
    assert_close(sol.ys[1], expected[1][1], rounding())
    assert_close(sol.ys[0], expected[1][0], rounding(jnp.float32))
    assert int(sol.stats["num_fallback_steps"]) == 0


# --- what JAX does with functions -----------------------------------------------------


def test_vmap():
    """Over the start, over the inputs, over both, and over what is closed over."""
    step, (params, init, xs) = problem("tanh")
    inits, many = jnp.stack([init, -2 * init]), jnp.stack([xs, 2 * xs])
    gains = jnp.array([0.2, 1.3])

    def all_ways(scan):
        def run(init, xs, gain):
            scaled = params | {"W": gain * params["W"]}
            return solved(scan, step, (scaled, init, xs))

        def with_total(*args):
            out = run(*args)
            return total(out), out

        def every(inits, many, gains):
            one = gains[0]
            return [
                jax.vmap(run, (0, None, None))(inits, xs, one),
                jax.vmap(run, (None, 0, None))(init, many, one),
                jax.vmap(jax.grad(with_total, (0, 1, 2), has_aux=True))(
                    inits, many, gains
                ),
            ]

        return quick(every)(inits, many, gains)

    assert_close(all_ways(deer_ode.scan), all_ways(lax.scan), rounding())


@pytest.mark.parametrize(
    "outer",
    slow((lax.scan, deer_ode.scan), lambda outer: outer is lax.scan),
    ids=("lax", "deer"),
)
def test_inside_another_scan(outer):
    step, (params, init, xs) = problem("tanh", num_steps=8)

    def loss(scan, outer):
        def run(params, init):
            def sweep(y, scale):
                y, ys = solved(scan, step, (params, y, scale * xs))
                return y, jnp.sum(ys["state"])

            return total(outer(sweep, init, jnp.array([1.0, 0.5, -1.0])))

        return quick(jax.value_and_grad(run, (0, 1)))(params, init)

    expected = loss(lax.scan, lax.scan)
    assert_close(loss(deer_ode.scan, outer), expected, rounding())


@pytest.mark.parametrize("what", slow(("solve", "step"), lambda what: what == "step"))
def test_checkpoint(what):
    step, inputs = problem("tanh")
    expected = value_and_grad(lax.scan, step, inputs)[0]
    if what == "step":
        actual = value_and_grad(deer_ode.scan, jax.checkpoint(step), inputs)[0]
    else:
        run = jax.checkpoint(lambda inputs: solved(deer_ode.scan, step, inputs))
        actual = quick(jax.grad(lambda inputs: total(run(inputs))))(inputs)
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "name", slow(("mixed", "tokens", "leapfrog"), lambda name: name != "tokens")
)
@pytest.mark.slow(covered_by="test_guess")
def test_reverse(name):
    step, inputs = problem(name)
    expected = value_and_grad(lax.scan, step, inputs, reverse=True)
    actual = value_and_grad(deer_ode.scan, step, inputs, reverse=True)
    assert_close(actual, expected, rounding())


def test_without_inputs():
    """`xs=None`: only a number of steps, and what is closed over has gradients."""

    def run(scan, rate, **kwargs):
        def logistic(y, x):
            assert x is None
            y = rate * y * (1 - y)
            return y, y

        return scan(logistic, 0.3, **kwargs)

    for kwargs in (dict(length=9), dict(xs=None, length=9, reverse=True)):
        slope = lambda scan, kwargs=kwargs: quick(
            jax.value_and_grad(lambda r: total(run(scan, r, **kwargs)))
        )(jnp.asarray(2.7))
        assert_close(slope(deer_ode.scan), slope(lax.scan), rounding())


@pytest.mark.parametrize("init", (1, 0.5, np.float64(0.5), 1 + 1j), ids=repr)
def test_python_numbers_to_start_from(init):
    def step(y, x):
        y = 0.5 * y + x
        return y, 2 * y

    xs = jnp.arange(3.0).astype(complex if isinstance(init, complex) else float)
    # `lax.scan` takes the step's dtype for a number that has none of its own.
    assert_close(deer_ode.scan(step, init, xs), lax.scan(step, init, xs), rounding())


@pytest.mark.parametrize("init", (None, (), jnp.zeros(0)), ids=("none", "no", "empty"))
def test_nothing_to_carry(init):
    step = lambda carry, x: (carry, jnp.sin(x))
    xs = jnp.arange(4.0)
    assert_close(deer_ode.scan(step, init, xs), lax.scan(step, init, xs), rounding())


def test_the_step_does_not_look_at_the_carry():
    step = lambda carry, x: (x, (carry, x))
    inputs = (jnp.zeros(2), jnp.arange(8.0).reshape(4, 2))
    assert_close(deer_ode.scan(step, *inputs), lax.scan(step, *inputs), rounding())


def test_carries_that_are_put_out_in_any_order():
    def step(state, x):
        a, b = state
        a, b = jnp.tanh(b + x), 0.5 * a
        return (a, b), (b, a, state, a + b, jnp.sin(x))

    inputs = ((jnp.ones(2), jnp.zeros(2)), jr.normal(jr.key(0), (7, 2)))
    assert_close(deer_ode.scan(step, *inputs), lax.scan(step, *inputs), rounding())


def test_traced_once():
    """A second call of a compiled function does not look at the step again."""
    step, inputs = problem("tanh")
    calls = []

    def counted(params, y, x):
        calls.append(None)
        return step(params, y, x)

    run = eqx.debug.assert_max_traces(
        lambda inputs: solved(deer_ode.scan, counted, inputs), max_traces=1
    )
    run = quick(run)
    run(inputs)
    num_calls = len(calls)
    run(jtu.tree_map(lambda x: 2 * x, inputs))
    assert len(calls) == num_calls


# --- options --------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow(("mixed", "tokens"), lambda s: s == "mixed"))
def test_sequential_is_lax_scan_itself(name):
    """Bit for bit."""
    step, inputs = problem(name)
    for reverse in (False, True):
        run = lambda scan, r=reverse, **kw: value_and_grad(
            scan, step, inputs, reverse=r, **kw
        )
        assert_close(run(deer_ode.scan, method=Sequential()), run(lax.scan), 0.0)
    sol = solved(solve_recurrence, step, inputs, method=Sequential())
    assert int(sol.stats["num_newton_steps"]) == 0
    assert int(sol.stats["num_fallback_steps"]) == sol.stats["num_steps"] == 12
    assert sol.result == optx.RESULTS.successful


@pytest.mark.parametrize("reverse", slow((False, True), lambda reverse: not reverse))
def test_guess(reverse):
    """The answer as a guess takes one iteration, in the order of `xs`."""
    step, inputs = problem("tanh", num_steps=20)

    @quick
    def cold(inputs):
        return solved(solve_recurrence, step, inputs, reverse=reverse)

    @quick
    def warm(inputs, guess):
        def loss(inputs, guess):
            sol = solved(solve_recurrence, step, inputs, reverse=reverse, guess=guess)
            return total((sol.carry, sol.ys)), sol

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(inputs, guess)

    first = cold(inputs)
    slopes, again = warm(inputs, first.carries)
    assert int(first.stats["num_newton_steps"]) > 1
    assert int(again.stats["num_newton_steps"]) == 1
    assert_close(again.ys, first.ys, rounding())
    assert_close(again.carries, first.carries, rounding())
    plain = solved(lax.scan, lambda *a: (step(*a)[0],) * 2, inputs, reverse=reverse)[1]
    assert_close(first.carries, plain, rounding())
    # A guess has no influence, on derivatives neither.
    assert_close(slopes[1], jtu.tree_map(jnp.zeros_like, slopes[1]), 0.0)
    bad = jtu.tree_map(lambda x: x + 3, first.carries)
    other_slopes, other = warm(inputs, bad)
    assert int(other.stats["num_newton_steps"]) > 1
    assert_close(other.ys, first.ys, rounding())
    assert_close(other_slopes[0], slopes[0], rounding())
    whole = value_and_grad(lax.scan, step, inputs, reverse=reverse)
    assert_close((slopes[0], (again.carry, again.ys)), whole, rounding())


@pytest.mark.parametrize("reverse", slow((False, True), lambda reverse: reverse))
@pytest.mark.slow(covered_by="test_guess")
def test_guess_by_a_predictor(reverse):
    """As an argument, and as an option of the method."""
    step, inputs = problem("tanh")
    expected = solved(lax.scan, step, inputs, reverse=reverse)

    @quick
    def run(inputs, guess):
        by_hand = dict(guess=guess), dict(method=Newton(guess=guess))
        sols = [
            solved(solve_recurrence, step, inputs, reverse=reverse, **kwargs)
            for kwargs in by_hand
        ]
        return [((s.carry, s.ys), s.stats["num_newton_steps"]) for s in sols]

    for guess in (Constant(), Trajectory(expected[1]["state"])):
        for actual, num_newton_steps in run(inputs, guess):
            assert_close(actual, expected, rounding())
            # A predictor sees the steps in the order in which they are made.
            if isinstance(guess, Trajectory) and not reverse:
                assert int(num_newton_steps) == 1


class _Network(AbstractPredictor):
    """A predictor of the user's, of which some leaves are functions."""

    layer: eqx.nn.MLP

    def __call__(self, recurrence):
        steps = jnp.linspace(0.0, 1.0, recurrence.num_steps)
        return jax.vmap(self.layer)(steps[:, None])


def test_a_predictor_that_holds_functions():
    guess = _Network(eqx.nn.MLP(1, 2, 4, 1, key=jr.key(0)))
    step = lambda y, x: (jnp.tanh(0.5 * y + x), y)
    xs = jnp.ones((10, 2))
    method = Newton(guess=guess, window=None, chunk=1, fallback=False)
    actual = deer_ode.scan(step, jnp.zeros(2), xs, method=method)
    assert_close(actual, lax.scan(step, jnp.zeros(2), xs), rounding())


def test_bad_guess():
    step, inputs = problem("leapfrog")
    carries = solved(solve_recurrence, step, inputs, method=Sequential()).carries
    bad = (
        carries["q"],
        {"q": carries["q"]},
        jtu.tree_map(lambda x: x[:-1], carries),
        jtu.tree_map(lambda x: x[..., :1], carries),
        inputs[1],
    )
    for guess in bad:
        for reverse in (False, True):
            with pytest.raises(ValueError, match="`guess` must hold the carry after"):
                solved(deer_ode.scan, step, inputs, guess=guess, reverse=reverse)


def test_what_cannot_be_carried():
    """No derivative, no Newton's method: said with the name of the leaf."""
    leaves = {
        "count": jnp.asarray(0),
        "flag": jnp.asarray(True),
        "key": jr.key(0),
    }
    for name, leaf in leaves.items():
        step = lambda state, x: (state, x)
        init = {"y": (jnp.zeros(2), {name: leaf})}
        lax.scan(step, init, jnp.zeros(3))
        with pytest.raises(TypeError, match=rf"init\['y'\]\[1\]\['{name}'\]. is "):
            deer_ode.scan(step, init, jnp.zeros(3))


def _wider(y, x):
    return jnp.concatenate([y, x]), None


BAD_CALLS = {
    "shape of the carry": (_wider, jnp.zeros(2), jnp.zeros((3, 1))),
    "dtype of the carry": (
        lambda y, x: (y.astype(jnp.float32), None),
        jnp.zeros(2),
        jnp.zeros(3),
    ),
    "structure of the carry": (lambda y, x: ((y, y), None), jnp.zeros(2), jnp.zeros(3)),
    "not a pair": (lambda y, x: y, jnp.zeros(3), jnp.zeros(3)),
    "lengths": (lambda y, x: (y, x), jnp.zeros(2), (jnp.zeros(3), jnp.zeros(4))),
    "length": (lambda y, x: (y, x), jnp.zeros(2), jnp.zeros(3), 4),
    "no length": (lambda y, x: (y, x), jnp.zeros(2)),
    "scalar inputs": (lambda y, x: (y, x), jnp.zeros(2), 1.0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_told_as_lax_scan_tells_them(name):
    with pytest.raises((TypeError, ValueError)) as expected:
        lax.scan(*BAD_CALLS[name])
    with pytest.raises(expected.type) as actual:
        deer_ode.scan(*BAD_CALLS[name])
    assert str(actual.value) == str(expected.value)


def test_how_it_went():
    step, inputs = problem("wild tanh", num_steps=30)
    params, init, xs = inputs
    expected = solved(lax.scan, step, inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, inputs):
        sol = solved(solve_recurrence, step, inputs, method=method, throw=False)
        return sol._replace(result=sol.result == optx.RESULTS.successful), sol.result

    at_once = functools.partial(Newton, window=None, chunk=1)
    sol, _ = run(at_once(newton_max_steps=2), inputs)
    # Two iterations make two steps right; the second one has not been looked at.
    assert 1 <= 30 - int(sol.stats["num_fallback_steps"]) < 30
    assert int(sol.stats["num_newton_steps"]) == 2
    assert sol.stats["num_steps"] == 30
    assert bool(sol.result)
    # The good prefix may be off by rounding, which grows until the cells saturate.
    assert_close((sol.carry, sol.ys), expected, rounding() * GROWTH["wild tanh"])

    sol, result = run(at_once(newton_max_steps=1, fallback=False), inputs)
    assert not bool(sol.result)
    assert result == optx.RESULTS.nonlinear_max_steps_reached
    assert int(sol.stats["num_newton_steps"]) == 1
    assert int(sol.stats["num_fallback_steps"]) == 0

    fail = at_once(newton_max_steps=1, fallback=False)
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        run = quick(lambda inputs: solved(deer_ode.scan, step, inputs, method=fail))
        jax.block_until_ready(run(inputs))
    # Not even where only the derivative is asked for.
    with pytest.raises(RuntimeError, match="maximum number of steps"):
        jax.block_until_ready(
            value_and_grad(deer_ode.scan, step, inputs, method=fail)[0]
        )


def test_failure_is_not_a_number():
    step = lambda y, x: (jnp.sqrt(y - 10) + x, None)
    sol = solve_recurrence(
        step,
        jnp.array([12.0]),
        jnp.zeros((5, 1)),
        method=Newton(fallback=False),
        throw=False,
    )
    assert sol.result == optx.RESULTS.nonfinite


@pytest.mark.parametrize(
    "linearisation",
    (BlockDiagonal(2), Diagonal(), PairedDiagonal(), Dense(), Exact()),
    ids=lambda x: type(x).__name__,
)
@pytest.mark.slow(covered_by="test_newton.py::test_gradients_are_exact_in_every_mode")
def test_structure_that_the_map_lacks(linearisation):
    """A wrong Jacobian costs iterations and nothing else."""
    step, *inputs = _tanh(jr.key(0), jnp.float64, 12, 0.7, size=4)
    expected = value_and_grad(lax.scan, step, inputs)
    for newton_max_steps in (64, 1):
        method = Newton(
            linearisation, newton_max_steps=newton_max_steps, window=None, chunk=1
        )
        actual = value_and_grad(deer_ode.scan, step, inputs, method=method)
        assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "linearisation",
    slow(
        (BlockDiagonal(2), PairedDiagonal(), Exact()),
        lambda x: not isinstance(x, PairedDiagonal),
    ),
    ids=lambda x: type(x).__name__,
)
def test_structure_that_the_map_has(linearisation):
    """As few iterations as with the whole Jacobian."""
    paired = isinstance(linearisation, PairedDiagonal)
    step, inputs = problem("leapfrog" if paired else "particles")

    @functools.partial(jax.jit, static_argnums=0)
    def count(method):
        return solved(solve_recurrence, step, inputs, method=method).stats

    at_once = functools.partial(Newton, window=None, chunk=1, fallback=False)
    dense, ours = count(at_once(Dense())), count(at_once(linearisation))
    # Rounding may decide about the last one.
    assert abs(int(ours["num_newton_steps"]) - int(dense["num_newton_steps"])) <= 1
    assert int(ours["num_fallback_steps"]) == 0


def test_a_structure_that_does_not_fit():
    step, inputs = problem("tanh")  # three states
    for linearisation in (BlockDiagonal(2), PairedDiagonal()):
        with pytest.raises(ValueError, match="needs a state of"):
            solved(deer_ode.scan, step, inputs, method=Newton(linearisation))


# --- memory ---------------------------------------------------------------------------


def arrays_of(jaxpr):
    """The sizes of all arrays that a program makes, in inner programs too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for value in jtu.tree_leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, jexc.Jaxpr | jexc.ClosedJaxpr),
        ):
            if isinstance(value, jexc.ClosedJaxpr):
                yield from arrays_of(value.jaxpr)
            elif isinstance(value, jexc.Jaxpr):
                yield from arrays_of(value)


@pytest.mark.parametrize(
    "linearisation",
    slow((Exact(), Dense()), lambda x: isinstance(x, Dense)),
    ids=lambda x: type(x).__name__,
)
@pytest.mark.slow(covered_by="test_core.py::test_structure_is_found")
def test_many_heads_need_little_memory(linearisation):
    """Nothing of the size of dense Jacobians is made, and with `Dense()` it is."""
    num_steps, num_heads, size = 1_000, 32, 8
    keys = jr.split(jr.key(0), 3)
    cells = eqx.filter_vmap(
        lambda key: eqx.nn.GRUCell(2, size, dtype=jnp.float32, key=key)
    )(jr.split(keys[0], num_heads))
    inputs = (
        cells,
        jnp.zeros((num_heads, size), jnp.float32),
        jr.normal(keys[1], (num_steps, 2), jnp.float32),
    )
    step = problem("heads", num_steps=1)[0]
    free, fixed = differentiable(inputs)

    def loss(free):
        combined = eqx.combine(free, fixed)
        method = Newton(linearisation, window=None, chunk=1)
        return total(solved(deer_ode.scan, step, combined, method=method))

    traced = jax.jit(jax.value_and_grad(loss)).trace(free)
    largest = max(arrays_of(traced.jaxpr.jaxpr))
    num_bytes = traced.lower().compile().memory_analysis().temp_size_in_bytes
    dense = num_steps * (num_heads * size) ** 2
    blocks = num_steps * num_heads * size**2
    if isinstance(linearisation, Dense):
        # So the measures measure.
        assert largest >= dense
        assert num_bytes >= dense * 4
        return
    assert largest < dense
    # At most the tangents of the three gates and of the state at once.
    assert largest <= 4 * blocks
    # Those, the Jacobians from them, and these again transposed.
    assert num_bytes <= 8 * blocks * 4
    assert num_bytes <= dense * 4 / 3
