"""Problems, solvers and comparisons that the tests share."""

import functools as ft
import operator

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest


#: The converged answer agrees with the sequential one to so many units of rounding.
ROUNDING_UNITS = 1e3


def rounding(dtype=jnp.float64) -> float:
    """The tolerance that the package promises on well-conditioned problems."""
    return ROUNDING_UNITS * float(jnp.finfo(dtype).eps)


def sqrt_eps(dtype=jnp.float64) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.5


def unchecked(fn):
    """`fn` as users have it, without the types that the tests check at run time."""
    return getattr(fn, "__wrapped__", fn)


def scale_of(x) -> float:
    x = np.abs(np.asarray(x))
    finite = x[np.isfinite(x)]
    return float(finite.max()) if finite.size else 1.0


def assert_close(actual, expected, tol: float, *, what: str = "") -> None:
    """Same structure, dtypes and non-finite entries; the rest within `tol` times the
    largest entry of each array.
    """
    assert jtu.tree_structure(actual) == jtu.tree_structure(expected)
    for a, e in zip(jtu.tree_leaves(actual), jtu.tree_leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape, (what, a.shape, e.shape)
        assert a.dtype == e.dtype, (what, a.dtype, e.dtype)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e), err_msg=what)
        np.testing.assert_array_equal(np.isinf(a), np.isinf(e), err_msg=what)
        finite = np.isfinite(e)
        np.testing.assert_allclose(
            a[finite],
            e[finite],
            rtol=0,
            atol=tol * max(scale_of(e), 1e-300),
            err_msg=what,
        )


def finite_difference(fn, x, direction, eps=1e-6):
    """Central difference of a scalar function along `direction`."""
    shift = lambda s: jtu.tree_map(lambda a, d: a + s * d, x, direction)
    return (fn(shift(eps)) - fn(shift(-eps))) / (2 * eps)


def random_like(key, tree):
    leaves, structure = jtu.tree_flatten(tree)
    keys = jr.split(key, len(leaves))
    return jtu.tree_unflatten(
        structure,
        [
            jr.normal(k, jnp.shape(x), jnp.result_type(x))
            for k, x in zip(keys, leaves, strict=True)
        ],
    )


def tree_dot(a, b):
    return sum(
        jtu.tree_leaves(jtu.tree_map(lambda x, y: jnp.sum(x * y), a, b)), jnp.zeros(())
    )


def quick(fn):
    """Compiled, with less optimisation: compilation is what these tests wait for."""
    # Not `xla_backend_optimization_level=0`, which makes wrong programs on CPUs (NaN in
    # gradients of a classifier, with `lax.scan` as well; jaxlib 0.10.2).
    options = {"xla_llvm_disable_expensive_passes": True}

    programs = {}

    def run(*args, **kwargs):
        arrays, rest = eqx.partition((args, kwargs), eqx.is_array)

        def of_arrays(arrays):
            args, kwargs = eqx.combine(arrays, rest)
            return fn(*args, **kwargs)

        # One for all arguments that differ in the numbers of their arrays only.
        leaves, structure = jtu.tree_flatten(rest)
        program = programs.setdefault(
            (structure, *leaves), jax.jit(of_arrays, compiler_options=options)
        )
        return program(arrays)

    return run


# --- problems -----------------------------------------------------------------------


def lotka_volterra(t, y, args):
    del t
    a, b, c, d = args
    prey, predators = y
    return jnp.stack(
        [a * prey - b * prey * predators, -c * predators + d * prey * predators]
    )


def lotka_volterra_args(dtype=jnp.float64):
    return tuple(jnp.asarray(x, dtype) for x in (1.1, 0.4, 0.4, 0.1))


def van_der_pol(t, y, mu):
    del t
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def tanh_cell(weights, y, x):
    return jnp.tanh(weights @ y + x)


def tanh_network(num_steps, size=3, gain=1.0, seed=0):
    """Weights, where to start from, and inputs."""
    keys = jr.split(jr.key(seed), 3)
    weights = gain * jr.normal(keys[0], (size, size)) / size**0.5
    return weights, jr.normal(keys[1], (size,)), jr.normal(keys[2], (num_steps, size))


def pretend_accelerator(monkeypatch):
    """Programs for any platform are traced, as where there is one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def both(f):
    """A step as `lax.scan` has it, from what makes a state of a state."""
    return lambda y, x: (f(y, x),) * 2


@eqx.filter_jit
def solve_tanh_network(weights, y0, xs, method, reverse=False, guess=None, throw=True):
    """The recurrence of `tanh_cell`, by `method`."""
    # Not before the import hook that checks annotations.
    from deer_ode import solve_recurrence

    f = both(ft.partial(tanh_cell, weights))
    return solve_recurrence(
        f, y0, xs, reverse=reverse, method=method, guess=guess, throw=throw
    )


# A root finder that goes on to rounding, so that solvers agree beyond its tolerance.
ROOT_FINDER = optx.Newton(rtol=1e-12, atol=1e-12, norm=optx.max_norm)

_y0 = lambda: jnp.array([1.0, 0.5])
_args = lambda: {"a": jnp.asarray(0.8), "w": jnp.array([[-0.1, 1.0], [-1.0, -0.2]])}


def _drift(t, y, args):
    return jnp.tanh(args["w"] @ y) + args["a"] * jnp.sin(t)


def _stiff(t, y, args):
    del t
    return -args["a"] * 5.0 * y


def _diffusion(t, y, args):
    del t
    return 0.1 * jnp.diag(jnp.cos(y)) * args["a"]


def _additive(t, y, args):
    del t, y
    return 0.1 * args["a"] * jnp.eye(2)


def _brownian(levy_area=diffrax.BrownianIncrement):
    # The tolerance is below every step, so that all steps see the same path.
    return diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=2**-9, shape=(2,), key=jr.key(1), levy_area=levy_area
    )


def ode():
    return diffrax.ODETerm(_drift), _y0(), _args()


def imex():
    return (
        diffrax.MultiTerm(diffrax.ODETerm(_drift), diffrax.ODETerm(_stiff)),
        _y0(),
        _args(),
    )


def partitioned():
    terms = (
        diffrax.ODETerm(lambda t, y, args: args["a"] * y),
        diffrax.ODETerm(lambda t, y, args: -jnp.sin(y)),
    )
    return terms, (jnp.array([1.0]), jnp.array([0.2])), _args()


def sde(diffusion=_diffusion, levy_area=diffrax.BrownianIncrement):
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(_drift), diffrax.ControlTerm(diffusion, _brownian(levy_area))
    )
    return terms, _y0(), _args()


def cde():
    ts = jnp.linspace(0.0, 1.0, 9)
    xs = jnp.stack([ts, jnp.sin(5 * ts)], axis=-1)
    control = diffrax.CubicInterpolation(
        ts, diffrax.backward_hermite_coefficients(ts, xs)
    )

    def field(t, y, args):
        del t
        return jnp.tanh(jnp.stack([args["w"] @ y, args["a"] * y], axis=-1))

    return diffrax.ControlTerm(field, control).to_ode(), _y0(), _args()


_space_time = diffrax.SpaceTimeLevyArea

#: Every solver that the package promises, with a problem that it is for.
SOLVERS = {
    "Euler": (diffrax.Euler(), ode),
    "Heun": (diffrax.Heun(), ode),
    "Midpoint": (diffrax.Midpoint(), ode),
    "Ralston": (diffrax.Ralston(), ode),
    "Bosh3": (diffrax.Bosh3(), ode),
    "Tsit5": (diffrax.Tsit5(), ode),
    "Dopri5": (diffrax.Dopri5(), ode),
    "Dopri8": (diffrax.Dopri8(), ode),
    "ImplicitEuler": (diffrax.ImplicitEuler(root_finder=ROOT_FINDER), ode),
    "Kvaerno3": (diffrax.Kvaerno3(root_finder=ROOT_FINDER), ode),
    "Kvaerno5": (diffrax.Kvaerno5(root_finder=ROOT_FINDER), ode),
    "KenCarp4": (diffrax.KenCarp4(root_finder=ROOT_FINDER), imex),
    "Sil3": (diffrax.Sil3(root_finder=ROOT_FINDER), imex),
    "SemiImplicitEuler": (diffrax.SemiImplicitEuler(), partitioned),
    "EulerHeun": (diffrax.EulerHeun(), sde),
    "ItoMilstein": (diffrax.ItoMilstein(), sde),
    "SPaRK": (diffrax.SPaRK(), lambda: sde(levy_area=_space_time)),
    "ShARK": (diffrax.ShARK(), lambda: sde(_additive, _space_time)),
    "HalfSolver": (diffrax.HalfSolver(diffrax.Euler()), ode),
    "Tsit5 on a CDE": (diffrax.Tsit5(), cde),
    "Heun on an SDE": (diffrax.Heun(), sde),
}


# --- steps, without a loop of Diffrax around them -----------------------------------


def sequential_steps(solver, terms, ts, y0, args, times=None):
    """Steps of Diffrax's own code over the grid `ts`, one after the other. The states
    after all of them, and the interpolated ones at `times`.
    """

    def step(y, t):
        state = solver.init(terms, *t, y, args)
        y1, _, info, _, _ = solver.step(terms, *t, y, args, state, made_jump=False)
        return y1, (y1, info)

    _, (ys, infos) = lax.scan(step, y0, (ts[:-1], ts[1:]))
    if times is None:
        return ys, None

    def at(index, t):
        info = jtu.tree_map(lambda x: x[index], infos)
        t0, t1 = ts[index], ts[index + 1]
        return solver.interpolation_cls(t0=t0, t1=t1, **info).evaluate(t)

    return ys, jax.vmap(at)(_steps_at(ts, times), times)


def parallel_steps(solver, terms, ts, y0, args, times=None, method=None):
    """The same, all steps solved for at once."""
    from deer_ode import Constant, Newton
    from deer_ode._discretisation import Grid, discretise
    from deer_ode._implicit import solve_trajectory

    if method is None:
        # Neither windows nor chunks nor a sequential finish: fewer programs to compile,
        # and what is found is found in parallel.
        method = Newton(guess=Constant(), window=None, chunk=1, fallback=False)
    problem = discretise(solver, terms, Grid.from_points(ts), y0, args)
    ys = solve_trajectory(problem.recurrence, method).ys
    if times is None:
        return problem.states(ys), None
    steps = problem.take_steps(ys)
    return problem.states(ys), problem.evaluate(ys, steps, times, _steps_at(ts, times))


def _steps_at(ts, times):
    """In which step each of `times` lies, of a grid that goes either way."""
    sign = jnp.sign(ts[-1] - ts[0])
    return jnp.searchsorted(sign * ts, sign * times) - 1


def step_values_and_gradients(steps, solver, problem, ts, times=None):
    """What `steps` returns for `problem`, and gradients of a sum of its squares with
    respect to arguments and, if it is real, the initial state.
    """
    terms, y0, args = problem()
    is_real = not any(jnp.iscomplexobj(y) for y in jtu.tree_leaves(y0))

    def loss(inputs):
        out = steps(solver, terms, ts, inputs.get("y0", y0), inputs["args"], times)
        # A turn changes no absolute value, so its gradient would be rounding alone.
        square = lambda y: jnp.sum(jnp.real(y) ** 2 + jnp.real(y) + jnp.imag(y))
        squares = jtu.tree_map(square, out)
        return sum(jtu.tree_leaves(squares), jnp.zeros(())), out

    inputs = {"args": args} | ({"y0": y0} if is_real else {})
    (_, out), grads = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return out, grads


def assert_steps_agree(solver, problem, ts, times=None, *, tol=None):
    """Values and gradients of the parallel solve are those of Diffrax's steps."""
    actual, expected = (
        step_values_and_gradients(steps, solver, problem, ts, times)
        for steps in (parallel_steps, sequential_steps)
    )
    tol = rounding() if tol is None else tol
    assert_close(actual[0], expected[0], tol, what="values")
    assert_close(actual[1], expected[1], tol, what="gradients")


# --- the ways in --------------------------------------------------------------------


def door_a(terms, solver, *args, method=None, **kwargs):
    import deer_ode

    kwargs.pop("max_steps", None)
    return deer_ode.diffeqsolve(terms, _deer(solver, method), *args, **kwargs)


def door_b(terms, solver, *args, method=None, **kwargs):
    import deer_ode

    adjoint = deer_ode.ParallelAdjoint()
    kwargs.setdefault("max_steps", 64)
    return diffrax.diffeqsolve(
        terms, _deer(solver, method), *args, adjoint=adjoint, **kwargs
    )


def door_c(terms, solver, *args, method=None, num_substeps=1, **kwargs):
    deer = _deer(solver, method, num_substeps)
    return diffrax.diffeqsolve(terms, deer, *args, **kwargs)


def _deer(solver, method, num_substeps=None):
    import deer_ode

    if method is None:
        # Neither windows nor chunks, of which there are tests: less to compile.
        method = deer_ode.Newton(guess=deer_ode.Constant(), window=None, chunk=1)
    return deer_ode.DEER(solver, method, num_substeps)


DOORS = {"a": door_a, "b": door_b, "c": door_c}


def slow(values, which):
    """The same as parameters, of which some are run only with `--runslow`."""
    return [pytest.param(v, marks=pytest.mark.slow) if which(v) else v for v in values]


def slow_rows(rows, which):
    """The same for rows of several parameters each."""
    mark = lambda row: pytest.param(*row, marks=pytest.mark.slow)
    return [mark(row) if which(row) else row for row in rows]


# The drop-in only counts steps before it goes the second way.
BY_DOOR = slow(DOORS, lambda door: door == "a")


def one_door_each(names, doors=tuple(DOORS)):
    """Rows of a table of `names` and doors. The ordinary run has each name once, and
    the doors in rotation; the other rows are slow.
    """
    names = list(names)
    rows = [(name, door) for name in names for door in doors]
    is_slow = lambda row: doors[names.index(row[0]) % len(doors)] != row[1]
    return slow_rows(rows, is_slow)


def tree_sub(a, b):
    return jtu.tree_map(operator.sub, a, b)


filter_grad_jit = lambda fn: eqx.filter_jit(jax.grad(fn))
