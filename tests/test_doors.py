"""What a user of Diffrax writes, through all three doors, against stock Diffrax."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
import pytest
import scipy.integrate

from deer_ode import (
    DEER,
    Auto,
    Coarse,
    Constant,
    Dense,
    Diagonal,
    Newton,
    Obreshkov,
    ParallelAdjoint,
    Sequential,
    Trajectory,
    Window,
    diffeqsolve,
)
from deer_ode._counting import (
    count_even_steps,
    count_resumed_steps,
    count_steps,
)
from deer_ode._discretisation import Discretised, discretise

from .helpers import (
    DOORS,
    assert_close,
    lotka_volterra,
    lotka_volterra_args,
    one_door_each,
    parallel_steps,
    quick,
    rounding,
    sequential_steps,
    slow,
    slow_rows,
    sqrt_eps,
    unchecked,
    van_der_pol,
)


TERM = diffrax.ODETerm(lotka_volterra)
Y0 = jnp.array([10.0, 5.0])
#: Newton's with neither windows nor chunks nor a sequential finish: fewer programs to
#: compile, and what does not converge is infinite.
AUTO, NEWTON = Auto(), Newton(guess=Constant(), window=None, chunk=1, fallback=False)
EULER = DEER(diffrax.Euler(), NEWTON)
#: For what does not converge.
FINISHED = Newton(guess=Constant(), window=None, chunk=1)


#: Where whole intervals and windows have the same code to go through, or both of the
#: ways to whole intervals, one of them stands for the others.
IN_ONE = slow(DOORS, lambda door: door != "b")
A_OR_B = slow(("a", "b"), lambda door: door != "a")
#: Second derivatives of whole solves take long to compile.
HESSIANS = [
    (diffrax.Euler(), "b"),
    *slow_rows([(diffrax.Tsit5(), "a"), (diffrax.Tsit5(), "b")], lambda row: True),
]


#: What others of the same table stand for.
RARE = (
    "never",
    "rooted",
    "unrooted",
    "every fourth step, t1",
    "t1",
    "t0, t1",
    "scalar",
)


def by_method(names, by_newton, doors=tuple(DOORS)):
    """Rows of names, doors and methods. What is saved and what ends a solve is the same
    code for all methods, and compiles five times faster with the default one: the
    ordinary run has Newton's for some of the names only, and there in its place.
    """
    rows = []
    for row in one_door_each(names, doors):
        values, marks = getattr(row, "values", row), getattr(row, "marks", ())
        for what, method in (("auto", AUTO), ("newton", NEWTON)):
            is_other = (what == "newton") != (values[0] in by_newton)
            is_other = is_other or values[0] in RARE
            is_slow = pytest.mark.slow if marks or is_other else ()
            name = "-".join((*values, what))
            rows.append(pytest.param(*values, method, marks=is_slow, id=name))
    return rows


def run(door, solver=None, t0=0.0, t1=3.0, dt0=0.1, y0=Y0, args=None, term=TERM, **kw):
    """`door` is a name, or None for stock Diffrax. Of Euler's method, unless another is
    given, there is least to compile.
    """
    solver = diffrax.Euler() if solver is None else solver
    args = lotka_volterra_args() if args is None else args
    if door is None:
        return diffrax.diffeqsolve(term, solver, t0, t1, dt0, y0, args, **kw)
    kw = dict(method=NEWTON) | kw
    return DOORS[door](term, solver, t0, t1, dt0, y0, args, **kw)


def euler(field, y0, num_steps, t0=0.0, h=0.1):
    """The states of Euler's method after each step, by NumPy: nothing to compile."""
    ys = [np.asarray(y0)]
    for n in range(num_steps):
        ys.append(ys[-1] + h * field(t0 + n * h, ys[-1]))
    return np.stack(ys[1:])


def lotka_volterra_of(a, b, c, d):
    """The field of `TERM`, by NumPy."""
    return lambda t, y: np.array([a - b * y[1], d * y[0] - c]) * y


def slopes_of(fn, *args):
    """The derivatives of a function written in NumPy, to rounding: of a real analytic
    function they are the imaginary parts after steps that are imaginary.
    """
    args, h = np.array(args, complex), 1e-30
    slopes = [fn(*args + 1j * h * unit).imag / h for unit in np.eye(len(args))]
    return tuple(jnp.asarray(slope) for slope in slopes)


def solution_arrays(sol):
    """All that a `Solution` says, cut to the steps made."""
    ts, ys = sol.ts, sol.ys
    out = dict(ts=ts, ys=ys, t0=sol.t0, t1=sol.t1)
    counts = {k: int(sol.stats[k]) for k in ("num_steps", "num_accepted_steps")}
    return out, counts


def trimmed(tree, like):
    """Buffers have the length of `max_steps`: cut to the shorter, the rest is inf."""

    def trim(x, other):
        size = min(x.shape[0], other.shape[0])
        assert not np.isfinite(np.asarray(x[size:])).any()
        return x[:size]

    return jtu.tree_map(trim, tree, like)


def assert_same_solution(sol, expected, tol=rounding()):
    for name in ("ts", "ys"):
        ours, theirs = getattr(sol, name), getattr(expected, name)
        ours, theirs = trimmed(ours, theirs), trimmed(theirs, ours)
        assert_close(ours, theirs, tol, what=name)
    assert sol.result == expected.result
    assert int(sol.stats["num_steps"]) == int(expected.stats["num_steps"])
    assert float(sol.t1) == float(expected.t1)


SAVES = {
    "t1": lambda: diffrax.SaveAt(t1=True),
    "t0, t1": lambda: diffrax.SaveAt(t0=True, t1=True),
    "ts": lambda: diffrax.SaveAt(t0=True, ts=[0.0, 0.05, 0.1, 0.1, 1.7, 3.0], t1=True),
    "steps": lambda: diffrax.SaveAt(t0=True, steps=True),
    "every fourth step, t1": lambda: diffrax.SaveAt(steps=4, t1=True),
    "steps among ts": lambda: diffrax.SaveAt(
        ts=[0.15, 0.2, 0.2, 1.31], steps=3, t1=True
    ),
    "fn": lambda: diffrax.SaveAt(
        ts=[0.3, 2.0], fn=lambda t, y, args: {"sum": y[0] + y[1], "t": t * args[0]}
    ),
    "subs": lambda: diffrax.SaveAt(
        subs={
            "a": diffrax.SubSaveAt(t0=True, steps=2),
            "b": [diffrax.SubSaveAt(ts=[1.0], fn=lambda t, y, args: y[:1])],
        }
    ),
}


@pytest.mark.parametrize("what, door, method", by_method(SAVES, ("ts",)))
def test_saveat(what, door, method):
    saveat = SAVES[what]()
    # Curves between steps, and not straight lines.
    solver = diffrax.Heun() if "ts" in what else None
    expected = run(None, solver, saveat=saveat)
    sol = run(door, solver, method=method, saveat=saveat)
    if isinstance(expected.ts, dict):
        for ours, theirs in zip(
            jtu.tree_leaves((sol.ts, sol.ys)),
            jtu.tree_leaves((expected.ts, expected.ys)),
            strict=True,
        ):
            assert_close(trimmed(ours, theirs), trimmed(theirs, ours), rounding())
    else:
        assert_same_solution(sol, expected)


@pytest.mark.parametrize("door", slow(DOORS, lambda door: door != "c"))
def test_dense(door):
    kwargs = {"num_substeps": 3, "dt0": 0.3} if door == "c" else {}
    # Not only Hermite's cubics, which Diffrax has for Heun's method.
    solver = diffrax.Heun() if door == "c" else diffrax.Tsit5()

    @quick
    def curve(y0, door, **kwargs):
        saveat = diffrax.SaveAt(dense=True)
        sol = run(door, solver, y0=y0, saveat=saveat, **kwargs)
        ts = jnp.linspace(0.0, 3.0, 41)
        # The derivative off the grid points, where it jumps.
        derivative = jax.vmap(sol.derivative)(ts[:-1] + 0.01)
        return jax.vmap(sol.evaluate)(ts), sol.evaluate(0.25, 1.1), derivative

    *actual, slope = curve(Y0, door, **kwargs)
    *values, expected_slope = curve(Y0, None)
    assert_close(actual, values, rounding())
    assert_close(slope, expected_slope, rounding() * 10)


@pytest.mark.parametrize("door", IN_ONE)
@pytest.mark.slow(covered_by="test_nothing_is_interpolated_where_steps_end")
def test_backward_in_time(door):
    saveat = diffrax.SaveAt(t0=True, ts=[2.9, 1.0, 0.05], steps=5, t1=True)
    kwargs = dict(t0=3.0, t1=0.0, dt0=-0.1, saveat=saveat)
    method = NEWTON if door == "b" else AUTO
    assert_same_solution(run(door, method=method, **kwargs), run(None, **kwargs))


@pytest.mark.parametrize(
    "dt0, door",
    slow_rows(
        [(dt0, door) for dt0 in (0.7, 0.3, 3.0, 5.0) for door in ("a", "b")],
        lambda row: row not in ((0.7, "a"), (5.0, "b")),
    ),
)
def test_the_steps_are_those_of_diffrax(dt0, door):
    """The first is dt0 long, the others divide the interval; the last is clipped."""
    saveat = diffrax.SaveAt(steps=True)
    kwargs = dict(solver=diffrax.Euler(), t1=1.0, dt0=dt0, saveat=saveat)
    method = NEWTON if dt0 == 0.7 else AUTO
    assert_same_solution(run(door, method=method, **kwargs), run(None, **kwargs))


@pytest.mark.parametrize("door", IN_ONE)
def test_step_to(door):
    ts = jnp.array([0.0, 0.1, 0.15, 0.4, 0.41, 0.9, 1.0])
    kwargs = dict(
        t1=1.0, dt0=None, stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(steps=True, ts=[0.2]),
    )  # fmt: skip
    expected = run(None, **kwargs)
    kwargs["method"] = AUTO
    assert_same_solution(run(door, **kwargs), expected)
    with pytest.raises(Exception, match="t0==ts"):
        run(door, **(kwargs | dict(t1=0.95)))
    with pytest.raises(Exception, match="strictly increasing"):
        run(door, **(kwargs | dict(stepsize_controller=diffrax.StepTo(ts[::-1]))))


EVEN = np.linspace(0.0, 3.0, 31)
GIVEN = np.array([0.0, 0.1, 0.15, 0.4, 0.41, 0.9, 1.0])
STEP_TO = dict(t1=1.0, dt0=None, stepsize_controller=diffrax.StepTo(jnp.array(GIVEN)))

#: Times that are those of steps, what makes the steps, and how many come before each.
SAVED = {
    "all": (EVEN, {}, range(31)),
    "every third": (EVEN[3::3], {}, range(3, 31, 3)),
    # Some of these are above the ends of steps by rounding.
    "and every fourth step": (EVEN[1:], {"steps": 4}, range(1, 31)),
    "backwards": (EVEN[-2::-1], dict(t0=3.0, t1=0.0, dt0=-0.1), range(1, 31)),
    "given": (GIVEN[2::2], STEP_TO, range(2, 7, 2)),
}


@pytest.mark.parametrize(
    "name", slow(SAVED, lambda name: name in ("all", "every third"))
)
def test_nothing_is_interpolated_where_steps_end(name, monkeypatch):
    ts, kwargs, _ = SAVED[name]
    kwargs = dict(kwargs)
    saveat = diffrax.SaveAt(ts=jnp.asarray(ts), steps=kwargs.pop("steps", 0))
    kwargs |= dict(saveat=saveat, solver=diffrax.Euler())
    expected = run(None, **kwargs)

    def evaluate(*args):
        raise AssertionError("interpolated")

    monkeypatch.setattr(Discretised, "evaluate", evaluate)
    # Without a finish it would be looked at where a solve that fails ends.
    method = FINISHED if name == "given" else AUTO
    assert_same_solution(run("a", method=method, **kwargs), expected)


@pytest.mark.parametrize("kwargs", ({}, STEP_TO), ids=("even", "given"))
def test_a_large_max_steps_is_padding_only(kwargs, monkeypatch):
    """Buffers are as long as Diffrax's, and no more steps are solved for."""
    saveat = diffrax.SaveAt(t0=True, steps=True, dense=True, solver_state=True)
    kwargs = dict(t0=0.0, t1=3.0, dt0=0.1, saveat=saveat, max_steps=100) | kwargs
    times = tuple(kwargs.pop(name) for name in ("t0", "t1", "dt0"))
    on = (*times, Y0, lotka_volterra_args())
    solved_for = []

    def record(solver, terms, grid, *args, **kwargs):
        solved_for.append(grid.num_steps)
        return discretise(solver, terms, grid, *args, **kwargs)

    monkeypatch.setattr("deer_ode._parallel_adjoint.discretise", record)
    expected = diffrax.diffeqsolve(TERM, diffrax.Euler(), *on, **kwargs)
    sol = diffeqsolve(TERM, DEER(diffrax.Euler()), *on, **kwargs)
    num_steps = int(expected.stats["num_steps"])
    assert solved_for == [num_steps]
    assert sol.ys.shape == expected.ys.shape == (101, 2)
    assert_close(sol.ys[: num_steps + 1], expected.ys[: num_steps + 1], rounding())
    assert bool(jnp.all(jnp.isinf(sol.ys[num_steps + 1 :])))
    assert_close(sol.evaluate(0.47), expected.evaluate(0.47), rounding())
    assert int(sol.stats["num_steps"]) == num_steps
    assert int(sol.stats["max_steps"]) == 100
    # What it ends with fits other solves of that `max_steps`, as it did.
    assert sol.solver_state.ys.shape == (100, 2)
    if not kwargs.keys() >= STEP_TO.keys() - {"t1", "dt0"}:
        more = diffeqsolve(
            TERM, DEER(diffrax.Euler(), NEWTON), 3.0, 7.0, 0.1, sol.ys[30], on[-1],
            **kwargs, solver_state=sol.solver_state,
        )  # fmt: skip
        field = lotka_volterra_of(*np.array(on[-1]))
        rest = euler(field, sol.ys[30], 40, 3.0)
        assert_close(more.ys[1:41], jnp.asarray(rest), rounding())
        assert_close(more.ys[0], sol.ys[30], 0.0)


def test_times_of_steps():
    def count(ts, max_steps=None, t0=0.0, t1=3.0, dt0=0.1, **kwargs):
        controller = kwargs.get("stepsize_controller", diffrax.ConstantStepSize())
        saveat = diffrax.SaveAt(ts=jnp.asarray(ts))
        return count_steps(controller, t0, t1, dt0, saveat, max_steps)

    def saved(ts, **kwargs):
        bound, known = count(ts, **kwargs)
        assert known.num_steps == bound == (30 if kwargs.get("dt0", 0.1) else 6)
        return known.saved[0]

    for ts, kwargs, counts in SAVED.values():
        if "steps" not in kwargs:
            assert saved(ts, **kwargs) == counts
    assert saved(EVEN[-1:]) == range(30, 31)
    # Worked out in another way, and rounded in another way.
    assert saved(np.minimum(np.cumsum(np.full(30, 0.1)), 3.0)) == range(1, 31)
    ends, near = EVEN[10::10], np.array([0.0, 1.0, 0.0])
    for units, counts in ((4, range(10, 31, 10)), (5, None), (-5, None)):
        assert saved(ends + units * near * np.spacing(2.0)) == counts
    for ts in ([0.05], EVEN[:-1], EVEN[[3, 7, 30]], EVEN[::-1], np.repeat(EVEN, 2)):
        assert saved(ts) is None
    assert saved(GIVEN[1:] + [0, 1e-16, 0, 0, 0, 0], **STEP_TO) is None
    # Nothing is worked out for steps that there is no room for.
    assert count(EVEN, t1=1e8, dt0=1e-1, max_steps=29) == (10**9, None)
    assert count(EVEN, t1=1e300, max_steps=29) == (None, None)
    # Times in arrays may be others in the next call of one program.
    assert count(EVEN, t1=jnp.asarray(3.0), max_steps=40) == (30, None)
    assert count(EVEN, t1=jnp.asarray(3.0))[1].num_steps == 30
    assert count(EVEN, t1=3.0, max_steps=40)[1].num_steps == 30


def test_gradients_at_the_times_of_steps():
    """The same whether or not it is known while tracing that steps end there."""

    def loss(args, ts):
        saveat = diffrax.SaveAt(ts=ts)
        sol = run("a", t1=1.0, args=args, saveat=saveat, method=AUTO)
        return jnp.sum(jnp.sin(sol.ys[1:]))

    def total(*args):
        return np.sum(np.sin(euler(lotka_volterra_of(*args), Y0, 10)[1::2]))

    args, ts = lotka_volterra_args(), jnp.linspace(0.0, 1.0, 6)
    expected = jnp.asarray(total(*np.array(args))), slopes_of(total, *args)
    # One program for both.
    known_or_not = quick(
        lambda args, traced: [jax.value_and_grad(loss)(args, x) for x in (ts, traced)]
    )
    for actual in known_or_not(args, ts):
        assert_close(actual, expected, rounding())


@pytest.mark.parametrize("num_substeps", slow((1, 6), lambda n: n == 1))
def test_windows_under_pid_control(num_substeps):
    """Steps are rejected, a tolerance is kept, and the answer is the equation's."""
    solver = DEER(diffrax.Tsit5(), NEWTON, num_substeps)
    mu = jnp.asarray(5.0)
    y0 = jnp.array([2.0, 0.0])

    def solve(solver, tol=1e-8):
        # As an array: one program for both tolerances.
        tol = jnp.asarray(tol)
        return diffrax.diffeqsolve(
            diffrax.ODETerm(van_der_pol), solver, 0.0, 6.0, 0.5, y0, mu,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 6.0, 13)),
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=4096,
        )  # fmt: skip

    sol, base = solve(solver), solve(diffrax.Tsit5())
    fine = solve(diffrax.Tsit5(), 1e-12)
    error = lambda sol: float(jnp.max(jnp.abs(sol.ys - fine.ys)))
    assert int(sol.stats["num_rejected_steps"]) > 0
    if num_substeps == 1:
        assert_same_solution(sol, base, 1e-7)
    assert int(sol.stats["num_steps"]) < int(base.stats["num_steps"]) / num_substeps * 2
    # The tolerance means the same as for the base solver.
    assert error(sol) < 2 * error(base)


def ball(t, y, args):
    del t
    _, velocity = y
    return velocity, -args


EVENTS = {
    "rooted": lambda: diffrax.Event(
        lambda t, y, args, **kw: y[0], optx.Newton(1e-10, 1e-10)
    ),
    "unrooted": lambda: diffrax.Event(lambda t, y, args, **kw: y[0]),
    "boolean": lambda: diffrax.Event(lambda t, y, args, **kw: y[0] < 2.0),
    "two, by direction": lambda: diffrax.Event(
        [lambda t, y, args, **kw: y[0] - 8.0, lambda t, y, args, **kw: y[0]],
        optx.Newton(1e-10, 1e-10),
        direction=[True, False],
    ),
    "never": lambda: diffrax.Event(
        lambda t, y, args, **kw: y[0] + 1e6, optx.Newton(1e-10, 1e-10)
    ),
    "at once": lambda: diffrax.Event(lambda t, y, args, **kw: t >= 0.0),
}


@pytest.mark.parametrize(
    "which, door, method", by_method(EVENTS, ("boolean",), ("b", "c", "a"))
)
def test_events(which, door, method):
    """The bouncing ball's first bounce, with saves around it."""
    kwargs = dict(
        term=diffrax.ODETerm(ball), y0=(jnp.array(10.0), jnp.array(0.0)),
        args=jnp.array(9.8), dt0=0.07, t1=2.5, event=EVENTS[which](),
        saveat=diffrax.SaveAt(t0=True, ts=[0.2, 1.0, 2.4], steps=5, t1=True),
    )  # fmt: skip
    sol, expected = run(door, method=method, **kwargs), run(None, **kwargs)
    assert_same_solution(sol, expected, sqrt_eps() if "rooted" in which else rounding())
    assert_close(sol.event_mask, expected.event_mask, 0.0)


@pytest.mark.parametrize("door", IN_ONE)
@pytest.mark.slow(covered_by="test_situations.py::test_situation")
def test_gradient_of_an_event_time(door):
    """d(sqrt(2 h / g)) / dh, known in closed form."""

    def fall_time(height):
        return run(
            door, diffrax.Heun(), term=diffrax.ODETerm(ball),
            y0=(height, jnp.array(0.0)),
            args=jnp.array(9.8), t1=2.5, event=EVENTS["rooted"](),
            method=NEWTON if door == "b" else AUTO,
        ).ts[-1]  # fmt: skip

    height = jnp.array(10.0)
    value, slope = eqx.filter_jit(jax.value_and_grad(fall_time))(height)
    exact = float(jnp.sqrt(2 * height / 9.8))
    # A quadratic motion is exact for a method of order two; what is left is the
    # tolerance of the root finder.
    np.testing.assert_allclose(float(value), exact, rtol=1e-9)
    np.testing.assert_allclose(float(slope), exact / 20, rtol=1e-9)


def test_what_is_saved_after_steps_ends_with_the_event():
    """A function of `SaveAt` does not see what comes after it, derivatives and all."""
    event = diffrax.Event(lambda t, y, args, **kw: y - 0.5)
    save = lambda t, y, args: y * jnp.log(3.0 - t)
    saveat = diffrax.SaveAt(steps=True, fn=save)
    term = diffrax.ODETerm(lambda t, y, args: -y)

    def total(y0):
        ys = run("a", term=term, y0=y0, event=event, saveat=saveat).ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0)), jnp.sum(jnp.isfinite(ys))

    slope, count = quick(jax.grad(total, has_aux=True))(jnp.array(1.0))
    # The seventh step is the first to end below one half.
    n = np.arange(1, 8)
    assert int(count) == len(n)
    expected = np.sum(0.9**n * np.log(3.0 - 0.1 * n))
    assert_close(slope, jnp.asarray(expected), rounding())


def test_an_event_before_a_step_that_fails():
    """An event takes precedence: at the start, and in the step that fails."""
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y))

    @eqx.filter_jit
    def solve(start):
        sol = diffeqsolve(
            *(term, DEER(Obreshkov(1), FINISHED), 0.0, 1.0, 0.2, jnp.array(1.0)),
            event=diffrax.Event(lambda t, y, args, **kw: t >= start),
        )
        return sol.result == diffrax.RESULTS.event_occurred, sol.ts[0]

    for start, end in ((0.0, 0.0), (0.55, 0.6)):
        is_event, t = solve(jnp.array(start))
        assert is_event
        np.testing.assert_allclose(t, end)
    with pytest.raises(RuntimeError):
        solve(jnp.array(2.0))


@pytest.mark.parametrize("door", A_OR_B)
def test_what_comes_after_an_event_does_no_harm(door):
    """The field is not a number where the event has stopped the solve before."""
    term = diffrax.ODETerm(lambda t, y, args: -jnp.sqrt(y) - args)
    event = diffrax.Event(lambda t, y, args, **kw: y < 0.2)
    kwargs = dict(
        term=term, y0=jnp.array(1.0), args=jnp.array(1.0), t1=3.0, event=event,
        saveat=diffrax.SaveAt(steps=True),
    )  # fmt: skip
    expected = run(None, **kwargs)
    at_once = Newton(guess=Constant(), window=None, chunk=1, fallback=False)
    for method in (Newton(), at_once):
        assert_same_solution(run(door, method=method, **kwargs), expected)


@pytest.mark.parametrize(
    "root_finder, method",
    [
        (optx.Newton(1e-9, 1e-9), Auto()),
        pytest.param(None, Auto(), marks=pytest.mark.slow),
        pytest.param(optx.Newton(1e-9, 1e-9), Newton(), marks=pytest.mark.slow),
        pytest.param(None, Newton(fallback=False), marks=pytest.mark.slow),
        pytest.param(None, Newton(), marks=pytest.mark.slow),
        pytest.param(
            optx.Newton(1e-9, 1e-9), Newton(fallback=False), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_derivatives_with_an_event_before_what_is_not_a_number(root_finder, method):
    """After the event the field is NaN, and at zero its derivative is infinite."""
    cond_fn = lambda t, y, args, **kw: y - 0.2 if root_finder else y < 0.2
    kwargs = dict(
        term=diffrax.ODETerm(lambda t, y, args: -jnp.sqrt(y) - args),
        y0=jnp.array(1.0), t1=3.0, event=diffrax.Event(cond_fn, root_finder),
        saveat=diffrax.SaveAt(ts=[0.3, 0.6, 2.0], t1=True),
    )  # fmt: skip

    def total(args):
        ys = run("b", args=args, method=method, **kwargs).ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0))

    def by_steps(args):
        """The same of Euler's method, up to the step that the event is in."""
        ys = euler(lambda t, y: -np.sqrt(y) - args, 1.0, 8)
        last = int(np.argmax(ys.real < 0.2))
        assert 0.6 < 0.1 * (last + 1) < 0.9
        # Where the event is placed within its step the state is what it is.
        return ys[2] + ys[5] + (0.2 if root_finder else ys[last])

    args = jnp.array(0.3)
    (expected,) = slopes_of(by_steps, args)
    reverse, forward = quick(
        lambda args: (jax.grad(total)(args), jax.jacfwd(total)(args))
    )(args)
    assert abs(expected) > 0.1
    # Beside rounding, the tolerance of the root finder.
    np.testing.assert_allclose(reverse, expected, rtol=1e-8)
    np.testing.assert_allclose(forward, expected, rtol=1e-8)


@pytest.mark.parametrize(
    "solver, door",
    [
        (diffrax.Midpoint(), "b"),
        pytest.param(Obreshkov(), "b", marks=pytest.mark.slow),
        pytest.param(diffrax.Tsit5(), "a", marks=pytest.mark.slow),
        pytest.param(diffrax.Tsit5(), "b", marks=pytest.mark.slow),
        pytest.param(Obreshkov(), "a", marks=pytest.mark.slow),
    ],
    ids=repr,
)
@pytest.mark.slow(
    covered_by="test_derivatives_with_an_event_before_what_is_not_a_number"
)
def test_derivatives_with_an_event_before_times_without_a_field(solver, door):
    """The field is not a number from t = 1 on, whatever the state."""
    kwargs = dict(
        term=diffrax.ODETerm(lambda t, y, args: -args * y * jnp.sqrt(1 - t)),
        y0=jnp.array(1.0), t1=2.0,
        event=diffrax.Event(lambda t, y, args, **kw: y < 0.7),
        saveat=diffrax.SaveAt(ts=[0.15, 0.33, 1.5], t1=True), solver=solver,
    )  # fmt: skip

    def total(args, door):
        ys = run(door, args=args, **kwargs).ys
        return jnp.sum(jnp.where(jnp.isfinite(ys), ys, 0))

    args = jnp.array(1.0)
    expected = jax.jit(jax.grad(lambda args: total(args, None)))(args)
    assert abs(expected) > 0.1
    modes = (jax.grad, jax.jacfwd)
    both = jax.jit(
        lambda args: [mode(lambda x: total(x, door))(args) for mode in modes]
    )
    for actual in both(args):
        np.testing.assert_allclose(actual, expected, rtol=rounding())


def test_steady_state_without_an_end():
    """t1 = inf: only an event ends it."""
    event = diffrax.Event(diffrax.steady_state_event(1e-3, 1e-3, optx.rms_norm))
    kwargs = dict(
        term=diffrax.ODETerm(lambda t, y, args: -args * (y - 1)),
        y0=jnp.array(3.0), args=jnp.array(2.0), t1=jnp.inf, event=event,
    )  # fmt: skip
    expected = run(None, **kwargs)
    assert 0 < int(expected.stats["num_steps"]) < 64
    for door, method in (("b", NEWTON), ("c", AUTO)):
        assert_same_solution(run(door, method=method, **kwargs), expected)
    # Nor is the start known while tracing.
    traced = quick(lambda t0: run("a", t0=t0, method=AUTO, **kwargs).ts)(jnp.array(0.0))
    assert_close(traced, expected.ts, rounding())


STATES = {
    "scalar": (lambda t, y, a: -a * y, jnp.array(1.0)),
    "tree": (
        lambda t, y, a: {"x": -a * y["v"][0], "v": (jnp.sin(y["x"]), y["v"][1] * t)},
        {"x": jnp.ones((2, 1)), "v": (jnp.zeros((2, 1)), jnp.ones(3))},
    ),
    "complex": (
        lambda t, y, a: 1j * a * y * jnp.conj(y) - y, jnp.array([1 + 0.5j, 2j])
    ),
    "mixed precision": (
        lambda t, y, a: (
            -y[0] * a, (-y[1] + y[0].astype(jnp.complex128)[0]) * a.astype(complex)
        ),
        (jnp.ones(2), jnp.array([1 + 1j])),
    ),
    "none": (lambda t, y, a: None, None),
    "no entries": (lambda t, y, a: -y, jnp.zeros((0,))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.parametrize(
    "which, door, method", by_method(STATES, ("none",), ("b", "c", "a"))
)
def test_states(which, door, method):
    field, y0 = STATES[which]
    kwargs = dict(
        term=diffrax.ODETerm(field), y0=y0, args=jnp.array(0.7), t1=1.0,
        saveat=diffrax.SaveAt(ts=[0.3, 1.0], t1=True),
    )  # fmt: skip
    # Diffrax's Runge--Kutta methods do not take leaves of different precision.
    solver = diffrax.Euler() if which == "mixed precision" else diffrax.Heun()
    sol = run(door, solver, method=method, **kwargs)
    assert_same_solution(sol, run(None, solver, **kwargs))


@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Euler(),
        pytest.param(
            diffrax.ImplicitEuler(root_finder=diffrax.VeryChord(1e-6, 1e-6)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_numbers_and_much_padding(solver):
    """More steps than a loop takes at a time, of a state without entries."""
    term = diffrax.ODETerm(lambda t, y, args: -y)
    sol = run("b", solver, y0=jnp.zeros(0), term=term, max_steps=300, method=AUTO)
    assert sol.ys.shape == (1, 0) and sol.result == diffrax.RESULTS.successful
    assert int(sol.stats["num_steps"]) == 30


@pytest.mark.parametrize("door", IN_ONE)
def test_no_time_at_all(door):
    saveat = diffrax.SaveAt(t0=True, ts=[1.0, 1.0], t1=True)
    kwargs = dict(t0=1.0, t1=1.0, saveat=saveat)

    @eqx.filter_jit
    def gradient(y0):
        def loss(y0):
            sol = run(door, y0=y0, method=AUTO, **kwargs)
            return jnp.sum(sol.ys**2), sol

        return jax.grad(loss, has_aux=True)(y0)

    slope, sol = gradient(Y0)
    assert_same_solution(sol, run(None, **kwargs))
    # It is saved four times.
    assert_close(slope, 4 * 2 * Y0, rounding())


@pytest.mark.parametrize("door", IN_ONE)
def test_too_few_steps(door):
    kwargs = dict(max_steps=7, saveat=diffrax.SaveAt(ts=[0.3, 0.69, 0.75], steps=2))
    if door == "a":  # this helper of the tests leaves `max_steps` out for it
        solve = lambda **kw: diffeqsolve(
            TERM, EULER, 0.0, 3.0, 0.1, Y0, lotka_volterra_args(), **kw
        )
    else:
        solve = lambda **kw: run(door, method=AUTO, **kw)
    expected = run(None, throw=False, **kwargs)
    sol = solve(throw=False, **kwargs)
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert_same_solution(sol, expected)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        jax.block_until_ready(solve(**kwargs).ys)


def test_sequential_steps_are_counted_wherever_they_are():
    """Windows begin again after them; padding does not count."""
    term = diffrax.ODETerm(lambda t, y, args: 4 * y * (1 - y) - y)
    solver = DEER(diffrax.Euler(), Newton(guess=Coarse(), window=Window(32)))
    counts = []
    for max_steps in (400, 1000):
        sol = diffeqsolve(
            term, solver, 0.0, 400.0, 1.0, jnp.array(0.3), max_steps=max_steps,
            saveat=diffrax.SaveAt(steps=True), adjoint=ParallelAdjoint(),
        )  # fmt: skip
        before = jnp.concatenate([jnp.array([0.3]), sol.ys[:399]])
        np.testing.assert_allclose(sol.ys[:400], 4 * before * (1 - before), atol=1e-13)
        counts.append(int(sol.stats["num_fallback_steps"]))
    # Chaos in each step, of which some windows fail.
    assert 32 <= counts[0] == counts[1] < 400


@pytest.mark.parametrize("fallback", (True, False))
def test_first_nonfinite_step(fallback):
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t == 20, jnp.inf, -y))
    method = Newton(guess=Constant(), window=None, chunk=1, fallback=fallback)
    sol = diffeqsolve(
        term, DEER(diffrax.Euler(), method), 0.0, 50.0, 1.0, jnp.array(0.3),
        throw=False, max_steps=60, adjoint=ParallelAdjoint(),
    )  # fmt: skip
    assert int(sol.stats["first_nonfinite_step"]) == 20
    failed = diffrax.RESULTS.successful if fallback else diffrax.RESULTS.nonfinite
    assert sol.result == failed


@pytest.mark.parametrize("door", IN_ONE)
def test_closed_over_parameters(door):
    """Gradients reach what the vector field closes over, forward and reverse."""
    kwargs = dict(saveat=diffrax.SaveAt(ts=[0.5, 2.0]), max_steps=64)

    def loss(a):
        field = lambda t, y, args: jnp.tanh(a * y) - args * y * t
        term = diffrax.ODETerm(field)
        ys = run(door, term=term, y0=0.1 * Y0, args=jnp.array(0.3), **kwargs).ys
        return jnp.sum(ys)

    def total(a):
        ys = euler(lambda t, y: np.tanh(a * y) - 0.3 * y * t, 0.1 * Y0, 20)
        return np.sum(ys[[4, 19]])

    a = jnp.array(0.8)
    (expected,) = slopes_of(total, a)
    # Diffrax's default adjoint has no forward mode.
    modes = (jax.grad,) if door == "c" else (jax.grad, jax.jacfwd)
    for slope in quick(lambda a: [mode(loss)(a) for mode in modes])(a):
        assert_close(slope, expected, rounding())


ADJOINTS = {"forward": diffrax.ForwardMode(), "direct": diffrax.DirectAdjoint()}


@pytest.mark.parametrize("name", slow(ADJOINTS, lambda name: name == "direct"))
def test_forward_mode_and_direct_adjoint_in_windows(name):
    a, *rest = lotka_volterra_args()

    def loss(a):
        kw = dict(num_substeps=3, dt0=0.3, max_steps=40)
        if name == "forward":
            kw["method"] = AUTO
        return jnp.sum(run("c", args=(a, *rest), adjoint=ADJOINTS[name], **kw).ys)

    def total(a):
        return np.sum(euler(lotka_volterra_of(a, *np.array(rest)), Y0, 30)[-1])

    (expected,) = slopes_of(total, a)
    slope = jax.jacfwd if name == "forward" else jax.grad
    assert_close(quick(slope(loss))(a), expected, rounding())


@pytest.mark.slow(covered_by="test_hessian")
def test_hessian_of_steps():
    ts = jnp.linspace(0.0, 1.0, 6)

    def hessian(steps):
        of = lambda args: steps(diffrax.Heun(), TERM, ts, Y0, args)[0]
        loss = lambda args: jnp.sum(of(args)[-1] ** 2)
        return jax.jit(jax.hessian(loss))(lotka_volterra_args())

    assert_close(hessian(parallel_steps), hessian(sequential_steps), rounding())


@pytest.mark.parametrize("solver, door", HESSIANS)
def test_hessian(solver, door):
    """With respect to where it starts as well."""

    def loss(y0, args):
        kwargs = dict(t1=1.0, y0=y0, args=args, max_steps=12)
        return jnp.sum(run(door, solver, **kwargs).ys ** 2)

    def by_steps(y0, args):
        ts = jnp.linspace(0.0, 1.0, 11)
        ys, _ = sequential_steps(solver, TERM, ts, y0, args)
        return jnp.sum(ys[-1] ** 2)

    actual, expected = (
        quick(jax.hessian(fn, argnums=(0, 1)))(Y0, lotka_volterra_args())
        for fn in (loss, by_steps)
    )
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "over, door",
    slow_rows(
        [(over, door) for over in ("y0", "args", "t1", "saveat") for door in "bc"],
        lambda row: row != ("t1", "b"),
    ),
)
def test_vmap(over, door):
    y0s = jnp.stack([Y0, 0.5 * Y0, 2.0 * Y0])
    scales = jnp.array([1.0, 0.7, 1.3])
    t1s = jnp.array([0.35, 1.0, 0.5])

    def solve(door, y0, scale, t1, ts):
        args = tuple(scale * x for x in lotka_volterra_args())
        saveat = diffrax.SaveAt(ts=ts) if over == "saveat" else diffrax.SaveAt(t1=True)
        kwargs = {} if door is None else {"method": NEWTON if over == "t1" else AUTO}
        sol = run(door, y0=y0, args=args, t1=t1, saveat=saveat, max_steps=16, **kwargs)
        return sol.ts, sol.ys, sol.stats["num_steps"]

    inputs = dict(
        y0=(y0s, scales[0], t1s[1], jnp.array([0.2, 0.9])),
        args=(Y0, scales, t1s[1], jnp.array([0.2, 0.9])),
        t1=(Y0, scales[0], t1s, jnp.array([0.2, 0.9])),
        saveat=(Y0, scales[0], t1s[1], jnp.array([[0.2, 0.9], [0.0, 1.0], [0.5, 0.6]])),
    )[over]  # fmt: skip
    axes = [None] * 4
    axes[("y0", "args", "t1", "saveat").index(over)] = 0
    batched = lambda door: jax.jit(
        jax.vmap(lambda *x: solve(door, *x), in_axes=tuple(axes))
    )(*inputs)
    ts, ys, counts = batched(door)
    expected_ts, expected_ys, expected_counts = batched(None)
    assert_close((ts, ys), (expected_ts, expected_ys), rounding())
    np.testing.assert_array_equal(np.asarray(counts), np.asarray(expected_counts))


@pytest.mark.parametrize("max_steps", slow((10, 24), lambda n: n == 10))
def test_padding_is_exact_in_gradients(max_steps):
    """Past t1 the field is infinite: the padded steps must not look there."""
    field = lambda t, y, args: -args * y / jnp.sqrt(1.0 + 1e-3 - t)

    def loss(args):
        return jnp.sum(
            run(
                "b", term=diffrax.ODETerm(field), y0=jnp.array([1.0]), args=args,
                t1=1.0, saveat=diffrax.SaveAt(steps=2, t1=True), max_steps=max_steps,
                throw=False,
            ).ys[:5]
        )  # fmt: skip

    def total(args):
        ys = euler(lambda t, y: -args * y / np.sqrt(1.0 + 1e-3 - t), 1.0, 10)
        return np.sum(ys[1::2])

    args = jnp.array(0.9)
    (expected,) = slopes_of(total, args)
    assert_close(quick(jax.grad(loss))(args), expected, rounding())


@pytest.mark.parametrize("door", A_OR_B)
def test_warm_start(door):
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    cold = run(door, saveat=saveat)
    warm = run(door, saveat=saveat, solver_state=cold.solver_state)
    assert int(warm.stats["num_newton_steps"]) == 1
    assert int(cold.stats["num_newton_steps"]) > 1
    assert_close(warm.ys, cold.ys, rounding())
    # As in training: parameters a little on.
    args = tuple(1.001 * x for x in lotka_volterra_args())
    after = run(door, args=args, saveat=saveat, solver_state=cold.solver_state)
    assert_close(after.ys, run(None, args=args).ys, rounding())
    with pytest.raises(ValueError, match="each of the .* steps of the grid"):
        short = eqx.tree_at(
            lambda s: s.ys, cold.solver_state, cold.solver_state.ys[:-1]
        )
        run(door, solver_state=short)


def test_solver_state_in_windows():
    """Counts the iterations, and goes on where it stopped."""
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    first = run("c", t1=1.5, num_substeps=5, dt0=0.5, saveat=saveat)
    assert int(first.solver_state.num_newton_steps) >= 3
    second = run(
        "c", t0=1.5, num_substeps=5, dt0=0.5, y0=first.ys[-1], saveat=saveat,
        solver_state=first.solver_state,
    )  # fmt: skip
    assert_close(second.ys, run(None).ys, rounding())
    counts = [s.solver_state.num_newton_steps for s in (first, second)]
    assert int(counts[1]) > int(counts[0])


@pytest.mark.parametrize("door", A_OR_B)
@pytest.mark.slow(covered_by="test_a_resumed_solve")
def test_controller_state_goes_on(door):
    """Stop after some steps and go on from the controller's state, which keeps the size
    that steps had.
    """
    steps = diffrax.SaveAt(steps=True, controller_state=True, made_jump=True)

    def halves(door):
        first = run(door, t1=1.5, dt0=0.2, saveat=steps)
        kept = dict(controller_state=first.controller_state, made_jump=first.made_jump)
        y1 = first.ys[8 - 1]
        return first, run(door, t0=1.5, dt0=0.1, y0=y1, saveat=steps, **kept)

    for ours, stock in zip(halves(door), halves(None), strict=True):
        assert_same_solution(ours, stock)
        assert_close(
            ours.controller_state,
            jtu.tree_map(jnp.asarray, stock.controller_state),
            rounding(),
        )
        assert bool(ours.made_jump) == bool(stock.made_jump)


RESUMED = (
    # Steps of 0.1875 after one of 0.5: the second ends where that grid has its end.
    (dict(t1=1.5, dt0=0.2), dict(t0=1.5, t1=3.5, dt0=0.5)),
    (dict(t1=1.5, dt0=0.1), dict(t0=1.5, t1=3.0, dt0=0.1)),
    (dict(t1=1.5, dt0=0.1), dict(t0=1.5, t1=3.0, dt0=0.3)),
    (dict(t0=3.0, t1=1.5, dt0=-0.2), dict(t0=1.5, t1=0.0, dt0=-0.4)),
    # Past the end at once; no time at all; a first step that is short of the end, from
    # where the grid of the solve before is past it.
    (dict(t1=1.5, dt0=0.2), dict(t0=1.5, t1=1.75, dt0=0.5)),
    (dict(t1=1.5, dt0=0.2), dict(t0=1.5, t1=1.5, dt0=0.5)),
    (dict(t1=1.5, dt0=0.1), dict(t0=1.43, t1=1.5, dt0=0.05)),
    (dict(t1=1.5, dt0=0.1), dict(t0=0.0, t1=1.0, dt0=0.1)),
    (dict(t1=1.5, dt0=0.1), dict(t0=1.5, t1=0.0, dt0=-0.1)),
)


def as_diffrax_steps(state, t0, t1, dt0):
    """How many steps `ConstantStepSize` makes from such a state: Diffrax's own loop."""
    direction = 1 if t0 < t1 else -1
    end, tprev, tnext = direction * t1, direction * t0, direction * (t0 + dt0)
    controller, count = diffrax.ConstantStepSize(), 0
    snapped = lambda t: end if t > end - 100 * np.spacing(abs(end)) else t
    tnext = min(tnext, end)
    while tprev < end:
        _, tprev, after, _, state, _ = controller.adapt_step_size(
            tprev, tnext, 0.0, 0.0, None, None, None, state
        )
        tnext, count = snapped(float(after)), count + 1
    return max(count, 1)


@pytest.mark.parametrize("first, second", RESUMED)
def test_steps_of_a_resumed_solve(first, second):
    """They are not `dt0` long, but the first."""
    t0, t1, dt0 = first.get("t0", 0.0), first["t1"], first["dt0"]
    direction = 1 if t0 < t1 else -1
    _, state = diffrax.ConstantStepSize().init(
        None, direction * t0, direction * t1, None, abs(dt0), None, None, None
    )
    for _ in range(int(state[1])):
        state = diffrax.ConstantStepSize().adapt_step_size(
            0.0, 0.0, 0.0, 0.0, None, None, None, state
        )[4]
    times = second["t0"], second["t1"], second["dt0"]
    counted = count_resumed_steps(state, *times, diffrax.SaveAt(t1=True))
    assert counted == as_diffrax_steps(state, *times)


@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param(*row, marks=() if i in (0, 6) else pytest.mark.slow)
        for i, row in enumerate(RESUMED)
    ],
)
def test_a_resumed_solve(first, second):
    kept = diffrax.SaveAt(steps=True, controller_state=True)
    state = run("a", method=AUTO, saveat=kept, **first).controller_state
    kwargs = dict(controller_state=state, saveat=kept)
    sol = run("a", method=AUTO, **second, **kwargs)
    stock = run(None, **second, **kwargs, max_steps=30)
    assert_same_solution(sol, stock)
    assert sol.stats["max_steps"] == max(int(stock.stats["num_steps"]), 1)


@pytest.mark.slow(covered_by="test_a_resumed_solve")
def test_a_resumed_solve_with_its_trajectory():
    """Of as many steps where these are counted; by `dt0` where the state is traced."""
    kept = diffrax.SaveAt(t1=True, controller_state=True, solver_state=True)
    first = run("a", t1=1.5, saveat=kept)

    def second(state):
        return run(
            "a", t0=1.5, y0=first.ys[-1], controller_state=state,
            solver_state=first.solver_state,
        ).ys  # fmt: skip

    expected = run(None).ys
    assert_close(second(first.controller_state), expected, rounding())
    assert_close(jax.jit(second)(first.controller_state), expected, rounding())


def test_without_a_bound_on_steps():
    """`None` is no bound, in what Diffrax solves as well; its default is one."""

    def solve(solver, **kwargs):
        return diffeqsolve(
            TERM, solver, 0.0, 0.5, 1e-4, Y0, lotka_volterra_args(), **kwargs
        )

    stock = solve(diffrax.Euler(), max_steps=None)
    assert int(stock.stats["num_steps"]) == 5000
    assert_close(solve(DEER(diffrax.Euler()), max_steps=None).ys, stock.ys, rounding())
    refused = solve(diffrax.Euler(), throw=False)
    assert refused.result == diffrax.RESULTS.max_steps_reached
    with pytest.raises(ValueError, match="number of steps.*'all'"):
        unchecked(diffeqsolve)(
            TERM, diffrax.Euler(), 0.0, 0.5, 1e-4, Y0, max_steps="all"
        )


@pytest.mark.parametrize(
    "guess",
    (
        Constant(),
        pytest.param(Trajectory(jnp.full((30, 2), 3.0)), marks=pytest.mark.slow),
    ),
    ids=("constant", "own"),
)
@pytest.mark.slow(covered_by="test_saveat")
def test_guesses(guess):
    sol = run("a", method=Newton(guess=guess))
    assert_close(sol.ys, run(None).ys, rounding())
    assert int(sol.stats["num_fallback_steps"]) == 0


@pytest.mark.slow(covered_by="test_newton.py::test_agrees_with_the_loop")
def test_diagonal_linearisation_finds_the_same_answer():
    method = Newton(
        Diagonal(), guess=Constant(), newton_max_steps=200, window=None, chunk=1
    )
    sol = run("a", method=method)
    assert_close(sol.ys, run(None).ys, rounding())


@pytest.mark.parametrize("door", A_OR_B)
def test_fallback_is_reported(door):
    """Few iterations: finished sequentially, or a failure that says so."""
    saveat = diffrax.SaveAt(steps=True)
    expected = run(None, saveat=saveat)
    few = ft.partial(Newton, guess=Constant(), newton_max_steps=3, window=None, chunk=1)
    sol = run(door, method=few(), saveat=saveat)
    assert_same_solution(sol, expected)
    assert 0 < int(sol.stats["num_fallback_steps"]) < 30
    strict = few(fallback=False)
    sol = run(door, method=strict, saveat=saveat, throw=False)
    assert sol.result == diffrax.RESULTS.nonlinear_max_steps_reached
    good = int(sol.stats["num_steps"])
    assert 0 < good < 30
    assert_close(sol.ys[:good], expected.ys[:good], rounding())
    assert not np.isfinite(np.asarray(sol.ys[good:])).any()
    with pytest.raises(Exception, match=rf"Step {good}, .*did not converge from there"):
        jax.block_until_ready(run(door, method=strict).ys)


def test_a_window_that_fails_is_rejected():
    """Without fallback and with too few iterations, the controller shortens windows."""
    method = Newton(guess=Constant(), newton_max_steps=4, fallback=False)
    solver = DEER(diffrax.Bosh3(), method, num_substeps=8)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)

    def solve(solver, **kw):
        return diffrax.diffeqsolve(
            TERM, solver, 0.0, 3.0, 3.0, Y0, lotka_volterra_args(), max_steps=500, **kw
        )

    sol = solve(solver, stepsize_controller=controller)
    assert int(sol.stats["num_rejected_steps"]) > 0
    fine = scipy.integrate.solve_ivp(
        lotka_volterra_of(*np.array(lotka_volterra_args())), (0.0, 3.0), Y0, "DOP853",
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    # Far below the tolerance: the windows are short for another reason.
    assert_close(sol.ys[0], jnp.asarray(fine.y[:, -1]), 1e-4)
    fixed = solve(solver, throw=False)
    assert fixed.result == diffrax.RESULTS.nonlinear_max_steps_reached


@pytest.mark.parametrize("door", IN_ONE)
@pytest.mark.slow(covered_by="test_newton.py::test_non_finite_answers")
def test_non_finite_where_the_sequential_answer_is(door):
    """y' = y^2 blows up at t = 1."""
    kwargs = dict(
        term=diffrax.ODETerm(lambda t, y, args: y**2), y0=jnp.array([1.0]), t1=2.0,
        dt0=0.05, saveat=diffrax.SaveAt(steps=True), max_steps=40,
        solver=diffrax.Tsit5(),
    )  # fmt: skip
    sol, expected = run(door, method=FINISHED, **kwargs), run(None, **kwargs)
    assert not bool(jnp.all(jnp.isfinite(expected.ys)))
    finite = np.isfinite(np.asarray(expected.ys))
    np.testing.assert_array_equal(np.isfinite(np.asarray(sol.ys)), finite)
    # Just before the blow-up the numbers are of size 1e100 and conditioned as badly.
    tame = finite & (np.abs(np.asarray(expected.ys)) < 1e3)
    np.testing.assert_allclose(
        np.asarray(sol.ys)[tame], np.asarray(expected.ys)[tame], rtol=sqrt_eps()
    )
    if door != "c":
        strict = run(door, method=Newton(fallback=False), throw=False, **kwargs)
        assert strict.result == diffrax.RESULTS.nonfinite


def test_progress_meters(capfd):
    for door in DOORS:
        meter = diffrax.TextProgressMeter(minimum_increase=0.1)
        sol = run(door, method=NEWTON if door == "b" else AUTO, progress_meter=meter)
        jax.block_until_ready(sol.ys)
        jax.effects_barrier()
        assert "100.00%" in capfd.readouterr().out, door


def test_no_retrace():
    """A second solve of the same shape compiles nothing, with another start or time."""
    traces = []

    def field(t, y, args):
        traces.append(None)
        return lotka_volterra(t, y, args)

    term = diffrax.ODETerm(field)
    run("a", term=term, saveat=diffrax.SaveAt(dense=True))
    run("c", term=term, num_substeps=3, saveat=diffrax.SaveAt(dense=True))
    count = len(traces)
    run("a", term=term, y0=2 * Y0, saveat=diffrax.SaveAt(dense=True))
    run("c", term=term, y0=2 * Y0, num_substeps=3, saveat=diffrax.SaveAt(dense=True))
    assert len(traces) == count > 0


def test_other_solvers_go_to_diffrax():
    args = lotka_volterra_args()
    expected = run(None)
    sol = diffeqsolve(TERM, diffrax.Euler(), 0.0, 3.0, 0.1, Y0, args)
    assert_same_solution(sol, expected, 0.0)
    windows = diffeqsolve(
        TERM, DEER(diffrax.Euler(), NEWTON, 5), 0.0, 3.0, 0.5, Y0, args
    )
    assert_close(windows.ys, expected.ys, rounding())
    # Without num_substeps and without ParallelAdjoint: the base solver, step by step,
    # and no word where that is what was asked for.
    plain = DEER(diffrax.Euler(), Sequential())
    sol = diffrax.diffeqsolve(TERM, plain, 0.0, 3.0, 0.1, Y0, args)
    assert_same_solution(sol, expected)
    with pytest.warns(UserWarning, match="nothing is parallel"):
        sol = diffrax.diffeqsolve(TERM, EULER, 0.0, 3.0, 0.1, Y0, args)
    assert_same_solution(sol, expected)


def test_traced_times_have_room_for_as_many_steps_as_in_diffrax():
    args = lotka_volterra_args()
    solver = DEER(diffrax.Euler(), FINISHED)
    solve = lambda t1, **kw: diffeqsolve(TERM, solver, 0.0, t1, 0.1, Y0, args, **kw)
    expected = run(None).ys
    bounded = quick(lambda t1: solve(t1, max_steps=32).ys)(jnp.array(3.0))
    assert_close(bounded, expected, rounding())

    @quick
    def unbounded(t1):
        sol = solve(t1, throw=False)
        return sol.ys, sol.result

    ys, result = unbounded(jnp.array(3.0))
    assert_close(ys, expected, rounding())
    assert result == diffrax.RESULTS.successful
    # Twice as many as there is room for.
    _, too_many = unbounded(jnp.array(819.2))
    assert too_many == diffrax.RESULTS.max_steps_reached
    with pytest.raises(ValueError, match="cannot be counted.*dt0=0.0"):
        diffeqsolve(TERM, EULER, 0.0, 3.0, 0.0, Y0, args)


@pytest.mark.parametrize(
    "t0, t1, dt0, num_steps",
    slow_rows(
        (
            # Two steps by division, of which rounding leaves one.
            (1e8, 1e8 + 1, 1 - 1e-9, 1),
            (0.0, 1.0, 0.3, 4),
            (1.0, 0.0, -0.3, 4),
            (0.0, 1.0, 1.0, 1),
            (0.0, 1.0, 0.1, 10),
            (-3.0, 4.0, 0.7, 10),
            # Of the last step 2e-7 of the interval would be left.
            (0.0, 1.0, (1 - 2e-7) / 3, 4),
            (0.0, 1.0, 0.75, 2),
            (1e7, 1e7 + 3, 0.11, 28),
            # One step that rounding leaves short of the end, so that there are two.
            (-0.3, 0.9, 1.2, 2),
            (0.0, 0.1 * 3, 0.3, 2),
            (0.3, -0.9, -1.2, 2),
        ),
        lambda row: row[2] not in (1 - 1e-9, 0.3, -1.2),
    ),
)
def test_the_steps_are_diffraxs(t0, t1, dt0, num_steps):
    term, times = diffrax.ODETerm(lambda t, y, args: -y), (t0, t1, dt0)
    y0, steps = jnp.array([1.0]), diffrax.SaveAt(t0=True, steps=True)
    stock = diffrax.diffeqsolve(
        term, diffrax.Euler(), *times, y0, saveat=steps, max_steps=num_steps + 1
    )
    ours = diffeqsolve(term, DEER(diffrax.Euler()), *times, y0, saveat=steps)
    assert int(stock.stats["num_steps"]) == int(ours.stats["num_steps"]) == num_steps
    made = slice(num_steps + 1)
    assert_close(ours.ts[made], stock.ts[made], rounding())
    assert_close(ours.ys[made], stock.ys[made], rounding())


@pytest.mark.parametrize(
    "t0, t1, dt0, expected",
    (
        (0.0, 1.0, 0.3, (4, True)),
        (1.0, 0.0, -0.3, (4, True)),
        (0.0, 1.0, 1.0, (1, True)),
        (0.0, 1.0, 2.0, (1, True)),
        (-0.3, 0.9, 1.2, (2, False)),
        (1e8, 1e8 + 1, 1 - 1e-9, (2, False)),
        (0.0, 0.0, 0.1, (1, False)),
        (0.0, np.inf, 0.1, (None, False)),
        # Steps of 160 units of rounding of the last time, and of 80.
        (*np.float32([0, 10, 10 / 2**16]), (2**16, True)),
        (*np.float32([0, 10, 10 / 2**17]), (2**17, False)),
    ),
)
def test_which_steps_are_counted(t0, t1, dt0, expected):
    assert count_even_steps(t0, t1, dt0, diffrax.SaveAt(t1=True)) == expected


def test_short_steps_that_are_counted_are_diffraxs():
    """Of 90 to 150 units of rounding of the larger time, where Diffrax takes what it
    makes to be the last one, or the one before it, by how long it is.
    """
    count = jax.jit(
        lambda t0, t1, dt0: diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Euler(),
            *(t0, t1, dt0, jnp.float32(1)),
            max_steps=2**19,
        ).stats["num_steps"]
    )
    random = np.random.default_rng(0)
    are_counted = []
    for _ in range(40):
        t1 = np.float32(10 ** random.uniform(-2, 2))
        t0 = np.float32(random.choice([0, -1, 0.6, 0.9]) * t1)
        unit = np.spacing(np.maximum(abs(t0), abs(t1)))
        dt0 = np.float32(random.uniform(90, 150) * unit)
        num_steps, is_counted = count_even_steps(t0, t1, dt0, diffrax.SaveAt(t1=True))
        are_counted.append(is_counted)
        if is_counted:
            assert int(count(t0, t1, dt0)) == num_steps
    assert 10 < sum(are_counted) < 35


class OtherController(diffrax.PIDController):
    """One of the user's own, of which nothing is known."""


def test_refusals():
    args = lotka_volterra_args()
    parallel = dict(adjoint=ParallelAdjoint())
    unknown = OtherController(rtol=1e-3, atol=1e-3)
    for door in "ab":
        with pytest.raises(ValueError, match="`OtherController` use `DEER.solver, num"):
            run(door, diffrax.Heun(), stepsize_controller=unknown)
    with pytest.raises(ValueError, match=r"`DEER\(Tsit5\(...\)\)` in place of"):
        diffrax.diffeqsolve(TERM, diffrax.Tsit5(), 0.0, 1.0, 0.1, Y0, args, **parallel)
    with pytest.raises(ValueError, match="Leave out `num_substeps`"):
        solver = DEER(Obreshkov(), num_substeps=3)
        diffrax.diffeqsolve(TERM, solver, 0.0, 1.0, 0.1, Y0, args, **parallel)
    with pytest.raises(ValueError, match="at most how many steps"):
        run("b", max_steps=None)
    with pytest.raises(ValueError, match="`BacksolveAdjoint` solves for the gradients"):
        backsolve = diffrax.BacksolveAdjoint()
        loss = lambda y0: jnp.sum(run("c", y0=y0, adjoint=backsolve).ys)
        jax.grad(loss)(Y0)
    with pytest.raises(ValueError, match="need 240 bytes.*Diagonal"):
        method = Newton(Dense(max_bytes=100), window=None, chunk=1)
        run("a", y0=Y0[:1], dt0=0.1, term=diffrax.ODETerm(lambda t, y, a: -y),
            method=method)  # fmt: skip
    with pytest.raises(ValueError, match="positive integer or `None`; got 0"):
        DEER(Obreshkov(), num_substeps=0)
    with pytest.raises(ValueError, match="give the base solver"):
        DEER(DEER(Obreshkov()))
    with pytest.raises(ValueError, match="`dt0` is the size of the steps"):
        run("a", dt0=None)


@pytest.mark.slow(
    covered_by="test_sdes.py::test_strong_order_against_the_exact_solution"
)
def test_random_key_for_each_sample():
    """An ensemble of SDE paths: the same paths as stock Diffrax."""

    def sample(door, key):
        path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-3, shape=(), key=key)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(lambda t, y, args: 0.3 * y, path),
        )
        kwargs = dict(term=terms, y0=jnp.array(1.0), t1=1.0, max_steps=16)
        return run(door, diffrax.EulerHeun(), **kwargs).ys

    keys = jr.split(jr.key(3), 4)
    batch = lambda door: jax.jit(jax.vmap(lambda key: sample(door, key)))(keys)
    assert_close(batch("b"), batch(None), rounding())


def test_the_default_solver_is_tsit5():
    assert DEER() == DEER(diffrax.Tsit5())
    args = lotka_volterra_args()
    sol = diffeqsolve(TERM, DEER(), 0.0, 3.0, 0.1, Y0, args)
    assert_close(sol.ys, run(None, diffrax.Tsit5()).ys, rounding())


def test_a_batch_of_long_solves():
    """Its members are solved sequentially: what the guess closes over goes along."""
    method = Newton(window=None)
    solve = lambda y0: diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -args * y),
        DEER(diffrax.Euler(), method),
        0.0, 1.0, 0.1, y0, y0,
        max_steps=1024, adjoint=ParallelAdjoint(),
    ).ys  # fmt: skip
    y0 = jnp.array([1.0, 0.5])
    ys = quick(jax.vmap(solve))(y0)
    assert_close(ys[:, 0], y0 * (1 - 0.1 * y0) ** 10, rounding())
