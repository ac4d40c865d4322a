"""What the package promises, once each and small: for the lowest versions supported.

`.ci/run` runs this file alone on the lowest Python and the lowest versions of all that
is depended on, where the whole would take too long; so it takes little from the other
tests. All is compared with `jax.lax.scan`, with stock Diffrax on the same grid or with
its steps written out, to rounding, and compiled once.
"""

import functools as ft

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

from deer_ode import (
    Constant,
    Exact,
    Exprb32,
    Newton,
    Obreshkov,
    RadauIIA,
    affine_scan,
    scan,
    solve_recurrence,
)

from .helpers import DOORS, ROOT_FINDER, assert_close, rounding, slow


pytestmark = pytest.mark.core

NUM_STEPS = 16
NUM_SUBSTEPS = 4

#: Neither windows nor chunks, of which there is one test, nor a sequential finish: less
#: to compile. What does not converge is infinite.
AT_ONCE = Newton(guess=Constant(), window=None, chunk=1, fallback=False)
#: For what counts the steps that it would take.
WITH_A_FINISH = Newton(guess=Constant(), window=None, chunk=1)

#: Compilation is what these tests wait for.
quick = ft.partial(
    jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True}
)


def sum_of_squares(tree):
    return sum(jnp.sum(x**2) for x in jtu.tree_leaves(tree))


def values_and_gradients(fn, inputs):
    """Of all that `fn` gives, in one program."""

    def loss(inputs):
        out = fn(inputs)
        return sum_of_squares(out), out

    gradients, values = quick(jax.grad(loss, has_aux=True))(inputs)
    return {"values": values, "gradients": gradients}


# --- recurrences ----------------------------------------------------------------------


NUM_HEADS, HEAD_SIZE = 3, 2


def gru():
    """Heads, side by side, that do not know of each other."""
    keys = jr.split(jr.key(0), 3)
    make = lambda key: eqx.nn.GRUCell(2, HEAD_SIZE, dtype=jnp.float64, key=key)
    cells, static = eqx.partition(
        eqx.filter_vmap(make)(jr.split(keys[0], NUM_HEADS)), eqx.is_array
    )
    heads = eqx.filter_vmap(lambda cell, h, x: cell(x, h), in_axes=(0, 0, None))

    def step(cells, h, x):
        h = heads(eqx.combine(cells, static), h, x)
        return h, jnp.sum(h, axis=0)

    h0 = jr.normal(keys[1], (NUM_HEADS, HEAD_SIZE))
    return step, (cells, h0, jr.normal(keys[2], (NUM_STEPS, 2)))


def run_scan(step, inputs, by=scan, **kwargs):
    weights, h0, xs = inputs
    kwargs = {} if by is lax.scan else dict(method=AT_ONCE) | kwargs
    return by(ft.partial(step, weights), h0, xs, **kwargs)


def test_affine_scan():
    keys = jr.split(jr.key(1), 3)
    A = 0.5 * jr.normal(keys[0], (NUM_STEPS, 3, 3))
    b, y0 = jr.normal(keys[1], (NUM_STEPS, 3)), jr.normal(keys[2], (3,))

    def loop(A, b, y0):
        def step(y, element):
            y = element[0] @ y + element[1]
            return y, y

        return lax.scan(step, y0, (A, b))[1]

    expected = values_and_gradients(lambda x: loop(*x), (A, b, y0))
    actual = values_and_gradients(lambda x: affine_scan(*x), (A, b, y0))
    assert_close(actual, expected, rounding())


def test_scan():
    step, inputs = gru()
    expected = values_and_gradients(ft.partial(run_scan, step, by=lax.scan), inputs)
    actual = values_and_gradients(ft.partial(run_scan, step), inputs)
    assert_close(actual, expected, rounding())


def test_structure_is_found():
    """Nothing is kept for the zeros between heads, and no step taken by the loop."""
    method = Newton(linearisation=Exact())
    step, inputs = gru()

    def joined(cells, h, x):
        h, y = step(cells, h, x)
        return h + 0.1 * jnp.mean(h), y

    def shapes(step):
        program = jax.make_jaxpr(
            lambda *inputs: run_scan(step, inputs, solve_recurrence, method=method).ys
        )(*inputs)
        return str(program)

    size = NUM_HEADS * HEAD_SIZE
    dense = f"f64[{NUM_STEPS},{size},{size}]"
    assert dense in shapes(joined)
    assert dense not in shapes(step)
    solve = lambda *x: run_scan(step, x, solve_recurrence, method=method).stats
    stats = quick(solve)(*inputs)
    assert int(stats["num_fallback_steps"]) == 0
    assert 0 < int(stats["num_newton_steps"]) < NUM_STEPS


def test_second_derivatives():
    """Reverse over reverse, of so many steps that there are two windows."""
    xs = jnp.linspace(1.0, 3.0, 520)

    def end(p, by):
        step = lambda y, x: (0.9 * y + 0.1 * p * jnp.sin(x + y), None)
        kwargs = {} if by is lax.scan else dict(method=Newton())
        return by(step, jnp.array(0.5), xs, **kwargs)[0]

    twice = lambda by: quick(jax.grad(jax.grad(lambda p: end(p, by))))(jnp.array(1.0))
    assert_close(twice(scan), twice(lax.scan), rounding())


# --- differential equations -----------------------------------------------------------


def drift(t, y, args):
    return jnp.tanh(args["w"] @ y) + args["a"] * jnp.sin(t)


def diffusion(t, y, args):
    del t
    return 0.1 * args["a"] * jnp.diag(jnp.cos(y))


ODE = diffrax.ODETerm(drift)
# All steps see the same path: the tolerance is below each of them.
PATH = diffrax.VirtualBrownianTree(0.0, 1.0, 2**-6, (2,), jr.key(1))
SDE = diffrax.MultiTerm(ODE, diffrax.ControlTerm(diffusion, PATH))
INPUTS = (
    jnp.array([1.0, 0.5]),
    {"a": jnp.asarray(0.8), "w": jnp.array([[-0.1, 1.0], [-1.0, -0.2]])},
)

#: What is solved, by what, and through which doors.
SOLVERS = {
    "Bosh3": (diffrax.Bosh3(), ODE, "b"),
    "ImplicitEuler": (diffrax.ImplicitEuler(root_finder=ROOT_FINDER), ODE, "b"),
    "trapezoid": (Obreshkov(1), ODE, "c"),
    "Exprb32": (Exprb32(), ODE, "b"),
    "EulerHeun": (diffrax.EulerHeun(), SDE, "a"),
    # Of the same kinds, and most of them much more to compile.
    "Heun": (diffrax.Heun(), ODE, "c"),
    "Tsit5": (diffrax.Tsit5(), ODE, "b"),
    "Tsit5 as a drop-in": (diffrax.Tsit5(), ODE, "c"),
    "Kvaerno3": (diffrax.Kvaerno3(root_finder=ROOT_FINDER), ODE, "b"),
    "Obreshkov": (Obreshkov(2), ODE, "a"),
    "RadauIIA": (RadauIIA(2), ODE, "b"),
}
ORDINARY = ("Bosh3", "ImplicitEuler", "trapezoid", "EulerHeun")
#: Also between steps, once in the ordinary run: it takes longest to compile.
BETWEEN = ("Bosh3", "Tsit5", "Tsit5 as a drop-in")


def solve(door, solver, term, inputs, **kwargs):
    """`door` is a name, or `None` for stock Diffrax."""
    num_substeps = NUM_SUBSTEPS if door == "c" else 1
    kwargs = dict(max_steps=NUM_STEPS + 1) | kwargs
    if door == "c":
        kwargs |= dict(num_substeps=num_substeps)
    how = diffrax.diffeqsolve if door is None else DOORS[door]
    if door is not None:
        kwargs = dict(method=AT_ONCE) | kwargs
    y0, args = inputs
    dt0 = num_substeps / NUM_STEPS
    return how(term, solver, 0.0, 1.0, dt0, y0, args, **kwargs)


def implicit(theta):
    """Steps that weigh the field at their ends by `theta`. Eight iterations of Newton's
    method leave nothing of their equations.
    """
    h = 1 / NUM_STEPS

    def step(args, y, t):
        known = y + (1 - theta) * h * drift(t, y, args)

        def improve(z, _):
            e, f = z - theta * h * drift(t + h, z, args) - known
            slope = jax.jacfwd(drift, 1)(t + h, z, args)
            (a, b), (c, d) = jnp.eye(2) - theta * h * slope
            return z - jnp.stack([d * e - b * f, a * f - c * e]) / (a * d - b * c), None

        return lax.scan(improve, y, None, length=8)[0], None

    ts = h * jnp.arange(1.0 * NUM_STEPS)
    return lambda y0, args: lax.scan(ft.partial(step, args), y0, ts)[0][None]


def euler_heun():
    """On the same path, which is not part of what is differentiated."""
    ts = jnp.linspace(0.0, 1.0, NUM_STEPS + 1)
    ws = quick(jax.vmap(PATH.evaluate))(ts[:-1], ts[1:])

    def step(args, y, inputs):
        t, w = inputs
        g = lambda y: diffusion(t, y, args) @ w
        return y + drift(t, y, args) / NUM_STEPS + (g(y) + g(y + g(y))) / 2, None

    return lambda y0, args: lax.scan(ft.partial(step, args), y0, (ts[:-1], ws))[0][None]


#: In place of stock Diffrax, which takes far longer to compile for these.
WRITTEN_OUT = {
    "trapezoid": ft.partial(implicit, 0.5),
    "ImplicitEuler": ft.partial(implicit, 1.0),
    "EulerHeun": euler_heun,
}


@pytest.mark.parametrize("name", slow(SOLVERS, lambda name: name not in ORDINARY))
def test_values_and_gradients(name):
    solver, term, doors = SOLVERS[name]
    ts = np.array([0.0, 0.13, 0.5, 0.99]) if name in BETWEEN else None
    saveat = diffrax.SaveAt(ts=ts, t1=True)

    def answer(door):
        fn = lambda inputs: solve(door, solver, term, inputs, saveat=saveat).ys
        return values_and_gradients(fn, INPUTS)

    if name in WRITTEN_OUT:
        steps = WRITTEN_OUT[name]()
        expected = values_and_gradients(lambda inputs: steps(*inputs), INPUTS)
    else:
        expected = answer(None)
    for door in doors:
        assert_close(answer(door), expected, rounding(), what=f"door {door}")


def test_all_steps():
    """Times, states and counts as Diffrax's own; by iterations, fewer than steps."""

    def answer(door):
        saveat = diffrax.SaveAt(t0=True, steps=True)
        method = {} if door is None else {"method": WITH_A_FINISH}
        sol = solve(door, diffrax.Bosh3(), ODE, INPUTS, saveat=saveat, **method)
        return (sol.ts[: NUM_STEPS + 1], sol.ys[: NUM_STEPS + 1]), sol.stats

    (steps, stats), (expected, counts) = answer("b"), answer(None)
    assert_close(steps, expected, rounding())
    assert int(stats["num_steps"]) == int(counts["num_steps"]) == NUM_STEPS
    assert int(stats["num_fallback_steps"]) == 0
    assert 0 < int(stats["num_newton_steps"]) < NUM_STEPS


def test_vmap():
    y0, args = INPUTS
    y0s = jnp.stack([y0, 0.5 * y0, -2.0 * y0])

    def answer(door):
        fn = lambda y0: solve(door, diffrax.Heun(), ODE, (y0, args)).ys
        return quick(jax.vmap(fn))(y0s)

    assert_close(answer("b"), answer(None), rounding())


@pytest.mark.parametrize("door", slow(("b", "c"), lambda door: door == "b"))
def test_event(door):
    """The solve ends where the event is, which a root finder places within a step."""
    event = diffrax.Event(
        lambda t, y, args, **kwargs: y[0] - 1.25, optx.Newton(1e-12, 1e-12)
    )

    def answer(door):
        sol = solve(door, diffrax.Heun(), ODE, INPUTS, event=event)
        return sol.ts, sol.ys

    actual, expected = answer(door), answer(None)
    assert 0.1 < float(expected[0][-1]) < 0.9
    assert_close(actual, expected, rounding())
