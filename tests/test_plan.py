"""The plan of a solve: every decision about performance, for any platform."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import pytest

from deer_ode import Auto, Dense, Diagonal, Newton, Sequential, Window
from deer_ode._misc import StateFlattener
from deer_ode._plan import Plan, by_platform, default_platform, tracing_for
from deer_ode._recurrence import Recurrence

from .helpers import assert_close, pretend_accelerator, rounding


def coupled(y, x):
    return jnp.tanh(jnp.mean(y) + x + 0.1 * y)


def separate(y, x):
    return jnp.tanh(y + x)


def recurrence(num_steps, size=3, f=coupled):
    y0 = jnp.zeros(size)
    return Recurrence(f, y0, jnp.ones((num_steps, size)), StateFlattener(y0))


#: Method, platform, steps, size, step; path, whether the whole interval is first,
#: window, steps in one.
PLANS = {
    "CPU": (Auto(), "cpu", (5000, 3, coupled), ("sequential", True, None, 1)),
    "no choice": (
        Sequential(), "accelerator", (5000, 3, coupled), ("sequential", True, None, 1)
    ),
    "accelerator": (
        Auto(), "accelerator", (5000, 3, coupled), ("newton", True, 256, 1)
    ),
    "one window's worth": (
        Auto(), "accelerator", (256, 3, coupled), ("newton", False, 256, 1)
    ),
    "short": (Auto(), "accelerator", (63, 3, coupled), ("sequential", True, None, 1)),
    "large": (
        Auto(), "accelerator", (5000, 64, coupled), ("sequential", True, None, 1)
    ),
    "large, structured": (
        Auto(), "accelerator", (5000, 64, separate), ("newton", True, 256, 1)
    ),
    "Newton, CPU": (Newton(), "cpu", (5000, 3, coupled), ("newton", False, 256, 1)),
    "Newton, CPU, short": (
        Newton(), "cpu", (1024, 3, coupled), ("newton", False, 1024, 1)
    ),
    "whole": (
        Newton(window=None), "cpu", (5000, 3, coupled), ("newton", True, None, 1)
    ),
    "a window": (
        Newton(window=Window(100)), "accelerator", (5000, 3, coupled),
        ("newton", False, 100, 1),
    ),
    "chunks": (
        Newton(window=100, chunk=8), "cpu", (5000, 3, coupled), ("newton", False, 12, 8)
    ),
    "little memory": (
        Newton(Dense(9 * 8 * 100)), "accelerator", (5000, 3, coupled),
        ("newton", False, 64, 1),
    ),
    "little memory, whole": (
        Newton(Dense(9 * 8 * 100), window=None), "accelerator", (5000, 3, coupled),
        ("newton", True, None, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_plan(name):
    method, platform, problem, expected = PLANS[name]
    plan = method.plan(recurrence(*problem), platform)
    found = (plan.path, plan.whole_first, plan.window, plan.chunk)
    assert found == expected
    assert plan.platform == platform
    assert f"window={plan.window}" in repr(plan)


def test_the_chosen_jacobian_is_part_of_it():
    plan = Newton().plan(recurrence(100, 4, separate), "cpu")
    assert not plan.linearisation.is_dense
    assert Newton(Diagonal()).plan(recurrence(100), "cpu").linearisation == Diagonal()
    assert Newton().plan(recurrence(100), "cpu").linearisation.is_dense


@pytest.mark.parametrize(
    "plan",
    (
        Plan("newton"),
        Plan("newton", whole_first=True, window=16),
        pytest.param(
            Plan("newton", whole_first=False, window=16), marks=pytest.mark.slow
        ),
        Plan("newton", whole_first=False, window=5, chunk=4),
        pytest.param(Plan("newton", is_batch_sequential=True), marks=pytest.mark.slow),
        pytest.param(
            Plan("newton", "accelerator", whole_first=True, window=16),
            marks=pytest.mark.slow,
        ),
    ),
    ids=str,
)
def test_the_answer_is_the_same_by_any_plan(plan):
    problem = recurrence(100)
    with tracing_for(plan.platform):
        found = jax.jit(lambda: Newton().solve(problem, plan).ys)()
    assert_close(found, problem.loop(), rounding())


def evaluations(plan, xs):
    """How often a batch evaluates its step."""
    calls = []

    def f(y, x):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.tanh(jnp.mean(y) + x)

    @jax.jit
    @jax.vmap
    def run(xs):
        y0 = jnp.zeros(3)
        problem = Recurrence(f, y0, xs, StateFlattener(y0))
        return Newton(Dense()).solve(problem, plan)

    solution = jax.block_until_ready(run(xs))
    jax.effects_barrier()
    return len(calls), solution


def test_a_batch_that_converges_runs_no_window():
    """The second loop is for what the first leaves over, and is not entered without."""
    xs = jr.normal(jr.key(0), (2, 64, 3))
    alone = Plan("newton", whole_first=True, linearisation=Dense())
    followed = Plan("newton", whole_first=True, window=16, linearisation=Dense())
    count, solution = evaluations(alone, xs)
    assert evaluations(followed, xs)[0] == count > 0
    assert not jnp.any(solution.is_sequential)


def test_the_platform_is_known_while_tracing():
    seen = lambda: by_platform(lambda platform: jnp.asarray(platform == "cpu"))
    assert default_platform() == "cpu" and bool(seen())
    with tracing_for("accelerator"):
        assert default_platform() == "accelerator" and not bool(seen())
        with tracing_for("cpu"):
            assert bool(seen())
    assert default_platform() == "cpu"


def test_where_there_is_an_accelerator_both_programs_are_traced(monkeypatch):
    pretend_accelerator(monkeypatch)
    traced = []

    def run(platform):
        # Whatever asks again within is told the same.
        assert by_platform(lambda inner: inner) == default_platform() == platform
        traced.append(platform)
        return jnp.asarray(platform == "cpu")

    assert bool(jax.jit(lambda: by_platform(run))())
    assert sorted(set(traced)) == ["accelerator", "cpu"]


def test_a_plan_is_a_value():
    plan = Newton().plan(recurrence(100), "cpu")
    assert plan == Newton().plan(recurrence(100), "cpu")
    assert hash(plan) == hash(Newton().plan(recurrence(100), "cpu"))
    assert not [x for x in jtu.tree_leaves(plan) if isinstance(x, jax.Array)]
