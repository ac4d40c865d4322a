"""Every solver: its steps solved in parallel and one by one, and through the doors."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import DEER, Constant, Newton

from .helpers import (
    DOORS,
    SOLVERS,
    assert_close,
    assert_steps_agree,
    parallel_steps,
    rounding,
    sequential_steps,
    slow,
    slow_rows,
    sqrt_eps,
)


NUM_STEPS = 24
NUM_SUBSTEPS = 4
SAVE_TS = np.array([0.0, 0.13, 0.5, 0.99, 1.0])


def stock(terms, solver, *args, **kwargs):
    # Stochastic Runge--Kutta methods and the like differentiate either way.
    return diffrax.diffeqsolve(terms, solver, *args, **kwargs)


def value_and_grad(solve, solver, problem, dt0, **kwargs):
    terms, y0, args = problem()

    def loss(inputs):
        y0, args = inputs
        sol = solve(
            terms, solver, 0.0, 1.0, dt0, y0, args,
            saveat=diffrax.SaveAt(ts=SAVE_TS, t1=True), **kwargs,
        )  # fmt: skip
        squares = jax.tree_util.tree_map(lambda y: jnp.sum(y**2), sol.ys)
        return sum(jax.tree_util.tree_leaves(squares), jnp.zeros(())), sol.ys

    fn = eqx.filter_jit(jax.value_and_grad(loss, has_aux=True))
    (_, ys), grads = fn((y0, args))
    return ys, grads


@pytest.fixture(scope="module")
def sequential():
    """Answers of stock Diffrax, worked out once for the doors of one solver."""
    known = {}

    def get(name):
        if name not in known:
            known.clear()
            known[name] = value_and_grad(
                stock, *SOLVERS[name], 1 / NUM_STEPS, max_steps=NUM_STEPS
            )
        return known[name]

    return get


#: One of each kind: the others share its code, and are compiled longer. The core has an
#: explicit, an implicit and a stochastic one.
ORDINARY = ("SemiImplicitEuler", "HalfSolver")


@pytest.mark.parametrize("name", slow(SOLVERS, lambda name: name not in ORDINARY))
def test_values_and_gradients(name):
    """Of every step, and of what lies between them."""
    ts, times = jnp.linspace(0.0, 1.0, 17), jnp.array([0.03, 0.5, 0.99])
    assert_steps_agree(*SOLVERS[name], ts, times)


#: One of each kind goes through windows.
IN_WINDOWS = ("Tsit5", "Kvaerno5", "KenCarp4", "SemiImplicitEuler", "ShARK")
DOOR_ROWS = [
    *slow_rows([("Heun", door) for door in DOORS], lambda row: row[1] != "b"),
    *slow_rows([(name, "b") for name in SOLVERS if name != "Heun"], lambda row: True),
    *slow_rows([(name, "c") for name in IN_WINDOWS], lambda row: True),
]


@pytest.mark.parametrize("name, door", DOOR_ROWS)
@pytest.mark.slow(covered_by="test_core.py::test_values_and_gradients")
def test_doors(name, door, sequential):
    """The same through whole solves, with saves."""
    solver, problem = SOLVERS[name]
    if door == "c":
        kwargs = dict(num_substeps=NUM_SUBSTEPS, dt0=NUM_SUBSTEPS / NUM_STEPS)
    else:
        kwargs = dict(dt0=1 / NUM_STEPS, max_steps=NUM_STEPS + 3)
    ys, grads = value_and_grad(DOORS[door], solver, problem, **kwargs)
    expected_ys, expected_grads = sequential(name)
    assert_close(ys, expected_ys, rounding(), what="values")
    assert_close(grads, expected_grads, rounding(), what="gradients")


def to_float32(tree):
    return jax.tree_util.tree_map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize(
    "name", slow(("Tsit5", "Heun", "Kvaerno3"), lambda name: name != "Heun")
)
def test_float32(name):
    solver, problem = SOLVERS[name]
    if name == "Kvaerno3":
        solver = diffrax.Kvaerno3(root_finder=_float32_root_finder())
    terms, *inputs = problem()
    ts, times = jnp.linspace(0.0, 1.0, NUM_STEPS + 1), jnp.asarray(SAVE_TS[1:])
    inputs = to_float32((ts, *inputs, times))
    solve = lambda steps: eqx.filter_jit(lambda x: steps(solver, terms, *x))(inputs)
    expected = solve(sequential_steps)
    assert expected[0].dtype == expected[1].dtype == jnp.float32
    assert_close(solve(parallel_steps), expected, rounding(jnp.float32))


@pytest.mark.parametrize("door", slow(("a", "b"), lambda door: door == "b"))
@pytest.mark.slow(covered_by="test_float32")
def test_float32_through_doors(door):
    terms, y0, args = SOLVERS["Heun"][1]()
    f32 = jnp.float32

    def run(solve):
        return solve(
            terms, diffrax.Heun(), f32(0), f32(1), f32(1 / NUM_STEPS),
            *to_float32((y0, args)),
            saveat=diffrax.SaveAt(ts=jnp.asarray(SAVE_TS, f32)), max_steps=NUM_STEPS,
        ).ys  # fmt: skip

    expected = run(stock)
    assert expected.dtype == f32
    assert_close(run(DOORS[door]), expected, rounding(f32))


def _float32_root_finder():
    import optimistix as optx

    return optx.Newton(rtol=1e-5, atol=1e-5, norm=optx.max_norm)


@pytest.mark.parametrize(
    "solver", (diffrax.LeapfrogMidpoint(), diffrax.ReversibleHeun())
)
def test_memory_between_steps_is_refused(solver):
    with pytest.raises(ValueError, match=f"`{type(solver).__name__}` carries memory"):
        DEER(solver)
    with pytest.raises(ValueError, match="carries memory.*Use a one-step solver"):
        DEER(diffrax.HalfSolver(solver))


class _Multistep(diffrax.AbstractSolver):
    """A solver that Diffrax does not know, with a state of its own."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return y0

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1 = solver_state + y0
        info = dict(y0=y0, y1=y1)
        return y1, None, info, y0, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


@pytest.mark.parametrize("door", DOORS)
def test_unknown_solver_state_is_refused(door):
    terms, y0, args = SOLVERS["Heun"][1]()
    with pytest.raises(ValueError, match="`_Multistep` has a solver state"):
        DOORS[door](terms, _Multistep(), 0.0, 1.0, 0.1, y0, args)


@pytest.mark.parametrize(
    "method",
    slow(
        (
            Newton(guess=Constant(), window=None, chunk=1),
            Newton(),
            Newton(guess=Constant()),
        ),
        lambda method: method.window is not None,
    ),
    ids=("at once", "default", "constant guess"),
)
def test_a_step_that_fails_stops_the_solve(method):
    """A root finder that gives up on one step: the same result at the same step."""
    import optimistix as optx

    finder = optx.Newton(rtol=1e-9, atol=1e-9, norm=optx.max_norm)
    solver = diffrax.ImplicitEuler(root_finder=finder, root_find_max_steps=4)
    # Gets harder with time, until four iterations are not enough.
    term = diffrax.ODETerm(lambda t, y, args: -jnp.exp(args * t) * y**3)

    def run(solve, **kwargs):
        return solve(
            term, solver, 0.0, 4.0, 0.1, jnp.array([2.0]), jnp.array(2.0), throw=False,
            saveat=diffrax.SaveAt(steps=True), max_steps=50, **kwargs,
        )  # fmt: skip

    expected = run(stock)
    assert expected.result != diffrax.RESULTS.successful
    assert 0 < int(expected.stats["num_steps"]) < 40
    sol = run(DOORS["b"], method=method)
    assert sol.result == expected.result
    assert int(sol.stats["num_steps"]) == int(expected.stats["num_steps"])
    assert_close((sol.ts, sol.ys), (expected.ts, expected.ys), sqrt_eps())
