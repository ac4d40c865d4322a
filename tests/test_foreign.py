"""What is private to other libraries is where it was, one test for each.

A test that fails here after an upgrade says what has moved. `deer_ode/_foreign.py` is
then the module to change, and for Diffrax the bound in `pyproject.toml` to raise.
"""

import ast
import inspect
import pathlib
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

from deer_ode import _foreign
from deer_ode._failure import error_if_failed
from deer_ode._programs import Program

from .helpers import assert_close, rounding


TERM = diffrax.ODETerm(lambda t, y, args: -y)


def test_every_name_has_a_test():
    """Each name that other modules may import from `_foreign` is used below."""
    tree = ast.parse(pathlib.Path(_foreign.__file__).read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets}
    names = {name for name in names if not name.startswith("_")}
    assert {"LoopState", "nextafter", "Literal", "pallas", "run_loop"} <= names
    used = {
        node.attr
        for node in ast.walk(ast.parse(pathlib.Path(__file__).read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "_foreign"
    }
    assert names == used & names, f"no test of {sorted(names - used)}"


def test_root_finders_without_tolerances_get_those_of_the_controller():
    pid = diffrax.PIDController(rtol=1e-3, atol=1e-5)
    finder = _foreign.with_tolerances(diffrax.Kvaerno3(), pid).root_finder
    assert (finder.rtol, finder.atol, finder.norm) == (1e-3, 1e-5, pid.norm)
    own = diffrax.Kvaerno3(root_finder=diffrax.VeryChord(rtol=1e-6, atol=1e-8))
    assert _foreign.with_tolerances(own, pid).root_finder.rtol == 1e-6
    assert _foreign.with_tolerances(diffrax.Tsit5(), pid) == diffrax.Tsit5()


# --- Traced programs ------------------------------------------------------------------


def equation_of(name: str, f, *args) -> Any:
    """The first equation of that name in the program of `f`."""

    def find(program):
        for equation in _foreign.body_of(program).eqns:
            if equation.primitive.name == name:
                yield equation
            for inner in _foreign.inner_programs(equation):
                yield from find(inner)

    found = list(find(jax.make_jaxpr(f)(*args)))
    assert found, f"JAX traces no equation `{name}` here any more"
    return found[0]


def test_programs():
    constant = np.arange(3.0)
    program = jax.make_jaxpr(lambda x: x + jnp.asarray(constant))(constant)
    body, constants = _foreign.body_of(program), _foreign.constants_of(program)
    assert _foreign.is_program(program) and _foreign.is_program(body)
    assert not _foreign.is_program(constant)
    for name in ("eqns", "invars", "outvars", "constvars"):
        assert hasattr(body, name), f"a program has no `{name}` any more"
    assert len(body.constvars) == len(constants), "`consts` of a program have moved"
    assert _foreign.is_program(_foreign.closed(body, constants))
    (out,) = _foreign.run_program(body, constants, constant)
    np.testing.assert_array_equal(out, 2 * constant)
    body = body.replace(eqns=list(body.eqns))
    (out,) = _foreign.run_program(body, constants, constant)
    np.testing.assert_array_equal(out, 2 * constant)


def test_literals():
    equation = equation_of("mul", lambda x: 2.0 * x, 1.0)
    literals = [x for x in equation.invars if isinstance(x, _foreign.Literal)]
    assert [x.val for x in literals] == [2.0], "`Literal` or its `val` has moved"


def test_parameters_of_scan():
    xs, scale = jnp.arange(3.0), jnp.array(2.0)

    def run(scale, xs):
        body = lambda carry, x: ((carry[0] * scale, carry[1] + x), x)
        return lax.scan(body, (scale, scale), xs)

    equation = equation_of("scan", run, scale, xs)
    body, num_consts, num_carry = _foreign.scan_parts(equation.params)
    assert (num_consts, num_carry) == (1, 2), "counts of a `scan` have moved"
    assert len(_foreign.body_of(body).invars) == 1 + 2 + 1
    assert equation.params["length"] == 3


def test_parameters_of_while():
    def run(most, scale):
        return lax.while_loop(lambda x: x < most, lambda x: x * scale * scale, scale)

    equation = equation_of("while", run, 9.0, 2.0)
    body, num_cond, num_body = _foreign.while_parts(equation.params)
    assert (num_cond, num_body) == (1, 1), "counts of a `while` have moved"
    assert len(_foreign.body_of(body).invars) == 1 + 1


def test_programs_that_are_called():
    for name, f in (("jit", jax.jit(jnp.sin)), ("checkpoint", jax.checkpoint(jnp.sin))):
        # `jit` was `pjit`, and `checkpoint` was `remat`.
        old = {"jit": "pjit", "checkpoint": "remat2"}[name]
        names = {e.primitive.name for e in jax.make_jaxpr(f)(1.0).eqns}
        assert names & {name, old}, f"`{name}` is now called one of {names}"
        equation = equation_of(*(names & {name, old}), f, 1.0)
        called = _foreign.called_program(equation.params)
        assert called is not None, f"the program that `{name}` calls has moved"
        assert len(_foreign.body_of(called).invars) == 1
    assert _foreign.called_program(equation_of("sin", jnp.sin, 1.0).params) is None


def test_arrays_that_are_changed_in_place():
    def run(x):
        ref = jax.new_ref(x)
        return ref[...]

    (equation,) = [
        e for e in jax.make_jaxpr(run)(1.0).eqns if e.primitive.name == "get"
    ]
    assert _foreign.is_ref(equation.invars[0]), "the type of a `Ref` has moved"
    assert not _foreign.is_ref(equation.outvars[0])


def check(y):
    return eqx.error_if(y, y > 1, "too large")


def test_checks_are_recognised():
    """By the module of what raises, in the last of two branches."""
    equation = equation_of("cond", jax.jit(check), 2.0)
    assert _foreign.is_check(equation), "`equinox.error_if` raises in another way"
    other = equation_of("cond", lambda y: lax.cond(y > 1, jnp.sin, jnp.cos, y), 2.0)
    assert not _foreign.is_check(other)
    passes, raises = equation.params["branches"]
    is_raise = lambda branch: [
        _foreign.is_raise(e) for e in _foreign.body_of(branch).eqns
    ]
    assert any(is_raise(raises)) and not any(is_raise(passes)), "branches have moved"
    index = _foreign.passed(equation).invars[0]
    assert isinstance(index, _foreign.Literal) and index.val == 0
    program = Program.of(check, jnp.array(2.0))
    assert program.has_checks
    assert float(program(jnp.array(2.0))) == 2
    with pytest.raises(RuntimeError, match="too large"):
        check(jnp.array(2.0))


# --- Pallas ---------------------------------------------------------------------------


def test_pallas():
    found = _foreign.pallas()
    assert isinstance(found, _foreign.Pallas)
    assert all(callable(x) for x in found)


# --- Equinox --------------------------------------------------------------------------


def test_next_numbers():
    one = jnp.array(1.0)
    assert float(_foreign.nextafter(one)) == np.nextafter(1.0, 2.0)
    assert float(_foreign.prevbefore(one)) == np.nextafter(1.0, 0.0)


def test_over_a_batch():
    xs = jnp.array([1, 3, 2])
    largest = jax.vmap(_foreign.unvmap_max, out_axes=None)(xs)
    is_any = jax.vmap(_foreign.unvmap_any, out_axes=None)(xs == 3)
    assert int(largest) == 3 and bool(is_any)


def test_loops_with_a_bound():
    def power(x):
        return _foreign.bounded_while_loop(
            lambda carry: carry[0] < 3,
            lambda carry: (carry[0] + 1, carry[1] * x),
            (jnp.array(0), jnp.array(1.0)),
            max_steps=16,
            base=4,
        )[1]

    x = jnp.array(2.0)
    assert float(power(x)) == 8
    assert float(jax.grad(power)(x)) == float(jax.jacfwd(power)(x)) == 12


def test_messages_are_read_when_they_are_raised():
    """`branched_error_if` takes any sequence of messages."""

    @eqx.filter_jit
    def fail(step):
        time = jnp.array(0.25)
        return error_if_failed(time, step > 0, step, time, jnp.array(0))

    assert float(fail(jnp.array(0))) == 0.25
    with pytest.raises(RuntimeError, match="Step 3, from t = 0.25"):
        fail(jnp.array(3)).block_until_ready()


# --- Diffrax's terms ------------------------------------------------------------------


class Spy(diffrax.Euler):
    """Tells what it is given."""

    seen: ClassVar[list] = []

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        self.seen.append((terms, _foreign.running_adjoint()))
        return super().step(terms, t0, t1, y0, args, solver_state, made_jump)


def watch_steps(terms, t0, t1, y0, **kwargs) -> list:
    """The terms, and the running adjoint, of each time that a step is traced."""
    Spy.seen.clear()
    jax.eval_shape(
        lambda: diffrax.diffeqsolve(terms, Spy(), t0, t1, None, y0, **kwargs).ys,
    )
    assert Spy.seen
    return list(Spy.seen)


@pytest.mark.parametrize("direction", (1, -1))
def test_terms_are_wrapped(direction):
    both = diffrax.MultiTerm(TERM, TERM)
    t0, t1 = (0.0, 1.0)[::direction]
    controller = diffrax.StepTo(np.linspace(t0, t1, 3))
    for terms in (TERM, both):
        (seen, _), *_ = watch_steps(
            terms, t0, t1, jnp.array(1.0), stepsize_controller=controller
        )
        ours = _foreign.wrap(terms, direction)
        assert jtu.tree_structure(seen) == jtu.tree_structure(ours), (
            "`diffeqsolve` wraps terms in another way"
        )
    assert _foreign.unwrap(both) is None and _foreign.unwrap(TERM) is None
    assert _foreign.unwrap(_foreign.wrap(TERM, direction)) == (TERM, direction)
    assert _foreign.direction_of(ours) == direction
    assert _foreign.direction_of(both) == 1


def test_the_direction_is_that_of_time():
    wrapped = _foreign.wrap(diffrax.ODETerm(lambda t, y, args: t), -1)
    assert float(wrapped.vf(0.25, 0.0, None)) == -0.25
    assert float(wrapped.contr(0.25, 0.75)) == -0.5


def test_terms_of_a_backward_solve():
    term = diffrax.ODETerm(lambda t, y, args: -args * y)

    def loss(args):
        Spy.seen.clear()
        adjoint = diffrax.BacksolveAdjoint(solver=Spy())
        y0 = jnp.array(1.0)
        return diffrax.diffeqsolve(
            term, diffrax.Euler(), 0.0, 1.0, 0.5, y0, args, adjoint=adjoint
        ).ys[0]

    jax.grad(loss)(jnp.array(1.0))
    (terms, _), *_ = Spy.seen
    assert _foreign.has_adjoint_term(terms), "`AdjointTerm` is no more used"
    assert not _foreign.has_adjoint_term(_foreign.wrap(TERM, -1))


def test_terms_of_a_control():
    control = diffrax.LinearInterpolation(jnp.arange(3.0), jnp.arange(3.0) ** 2)
    term = diffrax.ControlTerm(lambda t, y, args: -y, control).to_ode()
    has_one = lambda term: _foreign.has_control_derivative(_foreign.wrap(term, 1))
    assert has_one(term), "`ControlTerm.to_ode` makes another field"
    assert has_one(diffrax.MultiTerm(TERM, term))
    assert not has_one(TERM)


def test_terms_of_a_noise():
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), jax.random.key(0))
    noise = diffrax.ControlTerm(lambda t, y, args: y, path)
    has_one = lambda term: _foreign.has_noise(_foreign.wrap(term, 1))
    assert has_one(noise) and has_one(diffrax.MultiTerm(TERM, noise))
    control = diffrax.LinearInterpolation(jnp.arange(3.0), jnp.arange(3.0) ** 2)
    assert not has_one(diffrax.ControlTerm(lambda t, y, args: -y, control))


def test_the_adjoint_whose_loop_is_running():
    adjoint = diffrax.DirectAdjoint()
    kwargs = dict(stepsize_controller=diffrax.StepTo([0.0, 1.0]), adjoint=adjoint)
    running = [a for _, a in watch_steps(TERM, 0.0, 1.0, jnp.array(1.0), **kwargs)]
    # Traced before the loop as well.
    assert running[-1] == adjoint, "no method `loop` of an adjoint is running"
    assert _foreign.running_adjoint() is None


# --- Diffrax's steps ------------------------------------------------------------------


def begin(controller, t0, t1, dt0):
    return controller.init(None, t0, t1, None, dt0, None, None, None)


def go_on(controller, tprev, tnext, state):
    out = controller.adapt_step_size(tprev, tnext, 0.0, 0.0, None, None, None, state)
    return out[2], out[4]


def test_layout_of_constant_steps():
    controller = diffrax.ConstantStepSize()
    layout = "the `controller_state` of `ConstantStepSize` has another layout"
    for t1, expected in (
        (1.0, _foreign.EvenSteps(count=1, total=4, start=0.0, end=1.0)),
        (jnp.inf, _foreign.EvenSteps(count=1, total=-1, start=0.0, end=0.3)),
        (0.0, _foreign.EvenSteps(count=1, total=0, start=0.0, end=0.0)),
    ):
        tnext, state = begin(controller, 0.0, t1, 0.3)
        assert float(tnext) == 0.3
        assert tuple(map(float, state)) == tuple(expected), layout
        _, after = go_on(controller, 0.0, tnext, state)
        assert tuple(map(float, after)) == (2, *expected[1:]), layout
        assert _foreign.advance(controller, state, 1) == after


def test_layout_of_given_steps():
    controller = diffrax.StepTo(jnp.array([0.0, 0.2, 0.7, 1.0]))
    tnext, state = begin(controller, 0.0, 1.0, None)
    for expected in (0.7, 1.0):
        assert isinstance(state, int), "`StepTo` no longer counts its steps"
        advanced = _foreign.advance(controller, state, 1)
        tnext, state = go_on(controller, 0.0, tnext, state)
        assert float(tnext) == expected and state == advanced


class Watch(diffrax.AbstractAdjoint):
    """Makes no steps, and gives those that the controller would make."""

    num_steps: int = eqx.field(static=True)

    def loop(
        self, *, init_state, passed_solver_state, passed_controller_state, throw, **kw
    ):
        def make_all_steps(state):
            assert isinstance(state, _foreign.LoopState)
            steps = _foreign.constant_steps(state, kw["t1"], self.num_steps)
            return state, dict(steps=steps)

        return _foreign.run_loop(self, make_all_steps, init_state=init_state, **kw)


U = 2.0**-53
"""Half the unit of rounding of 1: the distance of numbers below it."""


@pytest.mark.parametrize(
    "t0, t1, dt0, num_steps",
    (
        (0.0, 1.0, 0.3, 4),
        (1.0, 0.0, -0.3, 4),
        (0.0, 1.0, 2.0, 1),
        (-3.0, 4.0, 0.7, 10),
        (0.0, 0.1 * 3, 0.3, 2),
        (0.0, 0.0, 0.3, 0),
        # Ends 110 and 75 units of rounding before the end: the second is too close.
        (1 - 150 * U, 1.0, 40 * U, 2),
        (1 - 210 * U, 1.0, 53 * U, 3),
    ),
)
def test_the_rule_for_even_steps(t0, t1, dt0, num_steps):
    assert _foreign.SNAPPED_UNITS == 100
    # Arrays, so that all rows are one program.
    times = (jnp.asarray(t) for t in (t0, t1, dt0))
    on = (TERM, diffrax.Euler(), *times, jnp.array(1.0))
    kwargs = dict(saveat=diffrax.SaveAt(steps=True, t1=True), max_steps=12)
    stock = diffrax.diffeqsolve(*on, **kwargs)
    assert int(stock.stats["num_steps"]) == num_steps
    watched = diffrax.diffeqsolve(*on, **kwargs, adjoint=Watch(12), throw=False)
    direction = 1 if t0 < t1 else -1
    tprev, tnext = (direction * np.asarray(t) for t in watched.stats["steps"])
    moved = "Diffrax's steps end elsewhere than they did"
    assert_close(tnext[:num_steps], np.asarray(stock.ts[:num_steps]), rounding())
    assert num_steps == 0 or (tprev[num_steps:] == t1).all(), moved
    if num_steps > 2 and abs(dt0) > 1e-3:
        counted = _foreign.num_even_steps(*map(np.float64, (t0, t1, dt0)))
        assert counted == num_steps, moved
        for xp in (np, jnp):
            even = _foreign.even_steps(t0, t0 + dt0, np.float64(t1), num_steps, xp)
            assert_close(np.asarray(even[0]), tprev[:num_steps], rounding())
            assert_close(np.asarray(even[1]), tnext[:num_steps], rounding())


# --- Diffrax's loop -------------------------------------------------------------------


def fields(cls: type) -> list[str]:
    return list(cls.__dataclass_fields__)


def test_fields_of_the_loop_state():
    assert set(fields(_foreign.LoopState)) == {
        "y", "tprev", "tnext", "made_jump", "solver_state", "controller_state",
        "progress_meter_state", "result", "num_steps", "num_accepted_steps",
        "num_rejected_steps", "save_state", "dense_ts", "dense_infos",
        "dense_save_index", "event_tprev", "event_tnext", "event_dense_info",
        "event_values", "event_mask",
    }, "the fields of `diffrax._integrate.State` are others"  # fmt: skip
    assert fields(_foreign.SaveState) == [
        "saveat_ts_index", "ts", "ys", "save_index",
    ], "the fields of `diffrax._integrate.SaveState` are others"  # fmt: skip


def test_arguments_of_the_loop():
    loop = diffrax.DirectAdjoint()._loop
    assert set(inspect.signature(loop).parameters) == {
        "solver", "stepsize_controller", "event", "saveat", "t0", "t1", "dt0",
        "max_steps", "terms", "args", "init_state", "inner_while_loop",
        "outer_while_loop", "progress_meter",
    }, "`AbstractAdjoint._loop` has other arguments"  # fmt: skip


def test_progress():
    assert float(_foreign.linear_rescale(1.0, 1.5, 3.0)) == 0.25
    assert float(_foreign.linear_rescale(1.0, 1.0, 1.0)) == 0
