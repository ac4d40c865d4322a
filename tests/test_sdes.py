"""Stochastic equations: the sample path, the order, and drawing once."""

import functools as ft
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.extend as jex
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest

from deer_ode import Constant, Newton

from .helpers import (
    DOORS,
    assert_close,
    assert_steps_agree,
    rounding,
    slow,
    slow_rows,
)


# Diffrax looks into one wrapper only for what a solver converges to.
pytestmark = pytest.mark.filterwarnings("ignore:`DEER` is not marked as converging")

NUM_STEPS = 16
AREA = diffrax.SpaceTimeLevyArea
AREAS = diffrax.SpaceTimeTimeLevyArea


def tree(
    levy_area: Any = diffrax.BrownianIncrement, dtype=jnp.float64, num_steps=NUM_STEPS
):
    """A path that is resolved between any two steps."""
    return diffrax.VirtualBrownianTree(
        jnp.asarray(0.0, dtype),
        jnp.asarray(1.0, dtype),
        tol=2.0**-3 / num_steps,
        shape=jax.ShapeDtypeStruct((2,), dtype),
        key=jr.key(3),
        levy_area=levy_area,
    )


def drift(t, y, args):
    return jnp.sin(y[::-1]) * args - y + jnp.cos(3 * t)


def multiplicative(t, y, args):
    del t
    return 0.3 * args * jnp.stack([jnp.stack([y[0], jnp.cos(y[1])]), jnp.sin(y)])


def additive(t, y, args):
    del y
    return 0.3 * args * jnp.stack([jnp.stack([1 + t, t]), jnp.stack([0 * t, 1 - t])])


def sde(path, diffusion=multiplicative):
    y0 = jnp.array([1.0, 0.5], path.shape.dtype)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
    )
    return terms, y0, jnp.asarray(0.8, y0.dtype)


def langevin(path):
    gamma, u = jnp.array([2.0, 0.5]), jnp.array([0.5, 1.0])
    terms = diffrax.MultiTerm(
        diffrax.UnderdampedLangevinDriftTerm(gamma, u, lambda x, args: args * x**3),
        diffrax.UnderdampedLangevinDiffusionTerm(gamma, u, path),
    )
    return terms, (jnp.array([1.0, 0.5]), jnp.array([0.0, -1.0])), jnp.asarray(0.8)


#: Solver and problem by name.
PROBLEMS = {
    "Euler": (diffrax.Euler(), lambda: sde(tree())),
    "ItoMilstein": (diffrax.ItoMilstein(), lambda: sde(tree())),
    "EulerHeun": (diffrax.EulerHeun(), lambda: sde(tree())),
    "Heun": (diffrax.Heun(), lambda: sde(tree())),
    "StratonovichMilstein": (diffrax.StratonovichMilstein(), lambda: sde(tree())),
    "SPaRK": (diffrax.SPaRK(), lambda: sde(tree(AREA))),
    "SlowRK": (diffrax.SlowRK(), lambda: sde(tree(AREA))),
    "ShARK": (diffrax.ShARK(), lambda: sde(tree(AREA), additive)),
    "ALIGN": (diffrax.ALIGN(), lambda: langevin(tree(AREA))),
    "ShOULD": (diffrax.ShOULD(), lambda: langevin(tree(AREAS))),
    "QUICSORT": (diffrax.QUICSORT(), lambda: langevin(tree(AREAS))),
    "half steps": (diffrax.HalfSolver(diffrax.Euler()), lambda: sde(tree())),
    "unsafe path of a Langevin equation": (
        diffrax.ALIGN(),
        lambda: langevin(diffrax.UnsafeBrownianPath((2,), jr.key(3), AREA)),
    ),
    "unsafe path": (
        diffrax.Heun(),
        lambda: sde(diffrax.UnsafeBrownianPath((2,), jr.key(3))),
    ),
}


#: Neither windows nor chunks nor a sequential finish: fewer programs to compile.
AT_ONCE = Newton(guess=Constant(), window=None, chunk=1, fallback=False)
in_parallel = ft.partial(DOORS["b"], method=AT_ONCE)


def stock(terms, solver, *args, **kwargs):
    return diffrax.diffeqsolve(terms, solver, *args, **kwargs)


def solve(how, name, t0=0.0, t1=1.0, **kwargs):
    solver, problem = PROBLEMS[name]
    terms, y0, args = problem()
    dtype = jtu.tree_leaves(y0)[0].dtype
    t0, t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
    return how(terms, solver, t0, t1, (t1 - t0) / NUM_STEPS, y0, args, **kwargs)


# --- the sample path ----------------------------------------------------------------


# The others are in the table of all solvers, or take far longer to compile than this
# one of their kind.
ORDINARY = ("unsafe path of a Langevin equation",)


@pytest.mark.parametrize(
    "name",
    slow(
        [name for name in PROBLEMS if name != "unsafe path"],
        lambda name: name not in ORDINARY,
    ),
)
def test_values_and_gradients(name):
    """Of every step on the same path, and of what lies between steps."""
    solver, problem = PROBLEMS[name]
    ts, times = jnp.linspace(0.0, 1.0, NUM_STEPS + 1), jnp.array([0.1, 0.5, 0.77])
    assert_steps_agree(solver, problem, ts, times)


@pytest.mark.parametrize("name", slow(PROBLEMS, lambda name: name != "unsafe path"))
def test_same_path_as_diffrax(name):
    saveat = diffrax.SaveAt(subs=[
        diffrax.SubSaveAt(steps=True),
        diffrax.SubSaveAt(ts=jnp.array([0.0, 0.1, 0.77, 1.0])),
    ])  # fmt: skip
    run = lambda how, **kw: eqx.filter_jit(
        lambda: solve(how, name, saveat=saveat, max_steps=NUM_STEPS + 2, **kw).ys
    )()
    # Diffrax's other adjoints refuse unsafe paths.
    sequential = run(stock, adjoint=diffrax.ForwardMode())
    parallel = run(in_parallel)
    assert_close(parallel, sequential, rounding(), what=name)


def test_backward_in_time():
    run = lambda how: solve(how, "Euler", 1.0, 0.0, max_steps=40).ys
    assert_close(run(in_parallel), run(stock), rounding())


@pytest.mark.slow(covered_by="test_solvers.py::test_float32")
def test_float32():
    f32 = jnp.float32
    terms, y0, args = sde(tree(dtype=f32))
    run = lambda how: how(
        terms, diffrax.Euler(), f32(0), f32(1), f32(1 / NUM_STEPS), y0, args
    ).ys  # fmt: skip
    sequential = run(stock)
    assert sequential.dtype == f32
    assert_close(run(DOORS["a"]), sequential, rounding(f32))


GRADIENTS = ("Euler", "StratonovichMilstein", "ShARK", "ShOULD", "half steps")


@pytest.mark.parametrize("name", slow(GRADIENTS, lambda name: name != "Euler"))
@pytest.mark.slow(covered_by="test_values_and_gradients")
def test_gradients_equal_those_of_diffrax(name):
    solver, problem = PROBLEMS[name]
    terms, y0, args = problem()

    def gradient(how):
        def loss(inputs):
            y0, args = inputs
            ys = how(
                terms, solver, 0.0, 1.0, 1 / NUM_STEPS, y0, args, max_steps=NUM_STEPS,
                saveat=diffrax.SaveAt(ts=jnp.array([0.3, 1.0])),
            ).ys  # fmt: skip
            return sum(jnp.sum(y**2) for y in jtu.tree_leaves(ys))

        return eqx.filter_jit(jax.grad(loss))((y0, args))

    assert_close(gradient(in_parallel), gradient(stock), rounding(), what=name)


# --- order of convergence -----------------------------------------------------------

NUM_PATHS = 400
MAX_STEPS = 64


def final_states(solver, make_terms, levy_area, counts, max_steps):
    """The solution at 1 with so many steps each, for many paths."""

    @jax.jit
    def run(dt0, keys):
        def one(key):
            path = diffrax.VirtualBrownianTree(0.0, 1.0, 2**-11, (), key, levy_area)
            solution = in_parallel(
                make_terms(path), solver, 0.0, 1.0, dt0, jnp.array(1.0),
                max_steps=max_steps,
            )  # fmt: skip
            return solution.ys[-1], path.evaluate(0.0, 1.0)

        return jax.vmap(one)(keys)

    keys = jr.split(jr.key(7), NUM_PATHS)
    return [run(1 / count, keys) for count in counts]


def observed_order(errors, counts):
    return -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]


@pytest.mark.parametrize(
    "solver,is_ito,expected",
    (
        (diffrax.Euler(), True, 0.5),
        pytest.param(diffrax.ItoMilstein(), True, 1.0, marks=pytest.mark.slow),
        pytest.param(diffrax.Heun(), False, 1.0, marks=pytest.mark.slow),
    ),
    ids=("Euler", "ItoMilstein", "Heun"),
)
def test_strong_order_against_the_exact_solution(solver, is_ito, expected):
    """Geometric Brownian motion, a function of the path's end alone."""
    a, b = 0.5, 0.8
    make_terms = lambda path: diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: a * y),
        diffrax.ControlTerm(lambda t, y, args: b * y, path),
    )
    counts = np.array([8, 16, 32, 64])
    levy_area = diffrax.BrownianIncrement
    errors = []
    for y, w in final_states(solver, make_terms, levy_area, counts, MAX_STEPS):
        exact = jnp.exp(a - is_ito * b**2 / 2 + b * w)
        errors.append(float(jnp.sqrt(jnp.mean((y - exact) ** 2))))
    assert abs(observed_order(errors, counts) - expected) < 0.15, errors


@pytest.mark.slow(covered_by="test_strong_order_against_the_exact_solution")
def test_strong_order_of_additive_noise():
    """ShARK's 1.5, against many more of its own steps on the same paths."""
    make_terms = lambda path: diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: jnp.sin(2 * y) - y),
        diffrax.ControlTerm(lambda t, y, args: jnp.ones(()), path),
    )
    counts = np.array([8, 16, 32, 64])
    solver = diffrax.ShARK()
    ((fine, _),) = final_states(solver, make_terms, AREA, [512], 512)
    coarse = final_states(solver, make_terms, AREA, counts, MAX_STEPS)
    errors = [float(jnp.sqrt(jnp.mean((y - fine) ** 2))) for y, _ in coarse]
    assert abs(observed_order(errors, counts) - 1.5) < 0.15, errors


# --- drawing once -------------------------------------------------------------------


def count_normals(jaxpr) -> int:
    """How many equations of a program draw normal variables."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "erf_inv"
        for inner in jtu.tree_leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, jex.core.Jaxpr | jex.core.ClosedJaxpr),
        ):
            if isinstance(inner, jex.core.ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, jex.core.Jaxpr):
                count += count_normals(inner)
    return count


@pytest.mark.parametrize(
    "name", slow(("Heun", "half steps"), lambda name: name != "Heun")
)
def test_the_path_is_in_the_program_once(name):
    """Apart from saves, guesses, iterations, the sequential finish and derivatives."""
    solver, problem = PROBLEMS[name]
    terms, y0, args = problem()

    def loss(args):
        saveat = diffrax.SaveAt(ts=jnp.array([0.3, 1.0]), dense=True)
        # With a guess, and windows.
        run = ft.partial(DOORS["b"], method=Newton())
        sol = run(terms, solver, 0.0, 1.0, 1 / 16, y0, args, saveat=saveat)
        return jnp.sum(sol.ys)

    one_call = count_normals(jax.make_jaxpr(lambda: tree().evaluate(0.0, 0.1))().jaxpr)
    assert one_call > 0
    # Half steps ask three times a step; their coarse guess draws for itself.
    calls = {"Heun": 1, "half steps": 6}[name]
    program = jax.make_jaxpr(eqx.filter_value_and_grad(loss))(args)
    assert count_normals(program.jaxpr) == calls * one_call


@pytest.mark.parametrize(
    "levy_area,use_levy",
    slow_rows(
        (
            (AREA, False),
            (diffrax.BrownianIncrement, False),
            (diffrax.BrownianIncrement, True),
            (AREA, True),
            (AREAS, True),
        ),
        # The last has all that these have.
        lambda row: row != (AREAS, True),
    ),
)
def test_increments_add_up(levy_area, use_levy):
    """Blocks of three steps: what the path says from their start to each point."""
    from deer_ode._discretisation._increments import _accumulate

    @jax.jit
    def both(ts):
        starts = jnp.concatenate([ts[:-1], jnp.repeat(ts[:-1:3], 3)])
        ends = jnp.concatenate([ts[1:], ts[1:]])
        path = tree(levy_area)
        evaluate = lambda t0, t1: path.evaluate(t0, t1, use_levy=use_levy)
        # In one call: the path takes long to compile.
        found = jax.vmap(evaluate)(starts, ends)
        blocks = jtu.tree_map(lambda x: x.reshape(2, 2, 3, *x.shape[1:]), found)
        increments, expected = (
            jtu.tree_map(lambda x, i=i: x[i], blocks) for i in (0, 1)
        )
        return _accumulate(increments), expected

    # A grid that is not even; as an argument, since XLA works out what it makes of
    # constants, and takes long.
    ts = jnp.array([0.0, 0.1, 0.15, 0.4, 0.45, 0.7, 1.0])
    assert_close(*both(ts), 1e-12)


class _AsksInALoop(diffrax.AbstractItoSolver):
    """Euler's method, which asks for its increments from within a loop."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        zero = jtu.tree_map(jnp.zeros_like, terms.contr(t0, t0))
        control = lax.fori_loop(0, 2, lambda _, c: terms.contr(t0, t1), zero)
        y1 = y0 + terms.vf_prod(t0, y0, args, control)
        return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def test_solvers_that_ask_in_loops_ask_the_path_itself():
    terms, y0, args = sde(diffrax.UnsafeBrownianPath((2,), jr.key(3)))
    run = lambda how, **kwargs: (
        how(terms, _AsksInALoop(), 0.0, 1.0, 0.25, y0, args, max_steps=4, **kwargs).ys
    )
    sequential = run(stock, adjoint=diffrax.ForwardMode())
    assert_close(run(in_parallel), sequential, rounding())


def test_increments_that_depend_on_the_state_are_not_stored():
    from deer_ode._discretisation._increments import record_draw

    terms = diffrax.ControlTerm(multiplicative, tree())
    step = lambda terms, y, x: y + terms.contr(0.1, 0.2 + y[0] ** 2)
    draw = record_draw(step, terms, jnp.array([0.5, 0.0]), (jnp.array(0.25),))
    assert draw((jnp.array(0.25),)) == []
    assert draw.use(terms, []) is terms


def test_nothing_stored_is_given_for_something_else():
    from deer_ode._discretisation._increments import record_draw

    terms = diffrax.ControlTerm(multiplicative, tree())
    step = lambda terms, y, x: y + terms.contr(*x)
    x = (jnp.array(0.25), jnp.array(0.5))
    draw = record_draw(step, terms, jnp.zeros(2), x)
    increments = jtu.tree_map(lambda w: w + 100.0, draw(x))
    expected = terms.contr(*x)
    assert_close(draw.use(terms, increments).contr(*x), expected + 100.0, rounding())
    # With other options, at a point, or once more, the path is asked.
    other = draw.use(terms, increments)
    assert_close(other.contr(*x, use_levy=True), terms.contr(*x, use_levy=True), 0)
    assert_close(other.contr(*x), expected, 0)
    other = draw.use(terms, increments)
    at_point = terms.control.evaluate(x[1])
    assert_close(other.control.evaluate(x[1]), at_point, 0)
    assert_close(other.contr(*x), expected + 100.0, rounding())
    assert_close(other.contr(*x), expected, 0)
    # Whatever else a field may want of its path.
    path: Any = other.control
    assert path.tol == tree().tol
    assert path.levy_area is diffrax.BrownianIncrement


def test_the_recorded_program_holds_nothing_but_the_path():
    from deer_ode._discretisation._increments import record_draw

    terms, y0, args = sde(tree())
    step = lambda terms, y, x: terms.vf_prod(x[0], y, args, terms.contr(*x))
    draw = record_draw(step, terms, y0, (jnp.array(0.25), jnp.array(0.5)))
    names = {equation.primitive.name for equation in draw._jaxpr.eqns}
    assert names.isdisjoint({"sin", "cos", "dot_general"})
    assert isinstance(draw._jaxpr, jex.core.Jaxpr)
