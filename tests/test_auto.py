"""Which way `Auto` goes, what the progress meter shows, and wrong arguments."""

import re

import diffrax
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deer_ode import (
    DEER,
    Auto,
    Constant,
    Newton,
    Obreshkov,
    Window,
    diffeqsolve,
    scan,
    solve_recurrence,
)

from .helpers import (
    assert_close,
    pretend_accelerator,
    rounding,
    slow,
    slow_rows,
    unchecked,
)


def step(y, x):
    y = 0.5 * jnp.tanh(y[::-1]) + x
    return y, y


def inputs(num_steps, size=2):
    return jnp.zeros(size), jr.normal(jr.key(0), (num_steps, size))


# --- which way ----------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", (30, 200))
def test_maps_go_in_turn_here(num_steps):
    y0, xs = inputs(num_steps)
    sol = jax.jit(lambda: solve_recurrence(step, y0, xs)._replace(result=None))()
    np.testing.assert_array_equal(sol.ys, jax.jit(lambda: lax.scan(step, y0, xs)[1])())
    assert int(sol.stats["num_newton_steps"]) == 0
    assert int(sol.stats["num_fallback_steps"]) == num_steps


def test_equations_are_solved_together():
    term = diffrax.ODETerm(lambda t, y, args: -jnp.sin(y))
    solve = lambda method: diffeqsolve(
        term, DEER(Obreshkov(1), method), 0.0, 2.0, 0.001, jnp.array([1.0])
    )
    # Neither an adaptive guess nor windows: less to compile.
    method = Newton(guess=Constant(), window=None)
    auto, newton = solve(Auto(method)), solve(method)
    assert int(auto.stats["num_newton_steps"]) > 0
    assert int(auto.stats["num_fallback_steps"]) == 0
    np.testing.assert_array_equal(auto.ys, newton.ys)
    # tan(y / 2) decays like e^-t.
    exact = 2 * np.arctan(np.tan(0.5) * np.exp(-2.0))
    np.testing.assert_allclose(auto.ys[-1], exact, rtol=1e-6)


def lowered(platform, num_steps, size):
    y0, xs = inputs(num_steps, size)
    f = jax.jit(lambda y0, xs: scan(step, y0, xs, throw=False)[1])
    return f.trace(y0, xs).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def with_accelerator(monkeypatch):
    """Programs are traced as where there is one."""
    pretend_accelerator(monkeypatch)


@pytest.mark.usefixtures("with_accelerator")
@pytest.mark.parametrize(
    "num_steps, size, parallel",
    slow_rows(
        ((200, 3, True), (40, 3, False), (200, 64, True)), lambda row: row[1] == 64
    ),
)
def test_accelerators_get_all_steps_at_once(num_steps, size, parallel):
    """Seen by Jacobians of all steps, which a loop does not have.

    Reversed, three entries are a pair and one that is alone, and 64 are 32 pairs: of
    pairs all 64 are linearised.
    """
    jacobians = re.compile(rf"tensor<{num_steps}x\d+x\d+(x\d+)?xf64>")
    assert not jacobians.search(lowered("cpu", num_steps, size))
    assert bool(jacobians.search(lowered("cuda", num_steps, size))) == parallel


@pytest.mark.usefixtures("with_accelerator")
def test_large_jacobians_go_in_turn_everywhere():
    y0, xs = inputs(100, 64)
    mixed = lambda y, x: (jnp.tanh(jnp.mean(y) + x),) * 2
    f = jax.jit(lambda y0, xs: scan(mixed, y0, xs, throw=False)[1])
    traced = f.trace(y0, xs)
    for platform in ("cpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "tensor<100x64x64xf64>" not in text
    assert_close(f(y0, xs), jax.jit(lambda: lax.scan(mixed, y0, xs)[1])(), rounding())


# --- what is shown ------------------------------------------------------------------


def shown(capfd):
    jax.effects_barrier()
    out = capfd.readouterr().out
    return [float(x) for x in re.findall(r"(\d+\.\d+)%", out)]


def metered(y0, xs):
    meter = diffrax.TextProgressMeter(0.2)
    method = Newton(window=Window(16), progress_meter=meter)
    return scan(step, y0, xs, method=method)[1]


TRANSFORMED = {
    "value": metered,
    "grad": jax.grad(lambda y0, xs: jnp.sum(metered(y0, xs)), 1),
    "vmap": jax.vmap(metered, (None, 0)),
}


@pytest.mark.parametrize("name", slow(TRANSFORMED, lambda name: name != "vmap"))
def test_progress(name, capfd):
    y0, xs = inputs(300)
    xs = jnp.stack([xs, 2 * xs]) if name == "vmap" else xs
    actual = jax.block_until_ready(jax.jit(TRANSFORMED[name])(y0, xs))
    fractions = shown(capfd)
    assert fractions[-1] == 100
    assert fractions == sorted(fractions)
    # From nothing on, at least every fifth and what a window adds to it.
    assert fractions[0] == 0
    assert max(np.diff(fractions)) <= 20 + 100 * 2 * 16 / 300
    # It changes nothing.
    run = lambda y0, xs: lax.scan(step, y0, xs)[1]
    expected = {
        "value": run,
        "grad": jax.grad(lambda y0, xs: jnp.sum(run(y0, xs)), 1),
        "vmap": jax.vmap(run, (None, 0)),
    }[name]
    assert_close(actual, jax.jit(expected)(y0, xs), rounding())


# --- what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("length", (0, -3, True))
def test_windows_that_are_none(length):
    with pytest.raises(ValueError, match=re.escape("`Window(length)` must be")):
        Window(length)
    with pytest.raises(ValueError, match=re.escape(f"got {length!r}.")):
        Window(length)


class _Fake:
    pass


def _fake(method, **fields):
    """What `method` with these fields is without run-time types."""
    fake = _Fake()
    fake.__dict__ = vars(method) | fields
    return fake


@pytest.mark.parametrize("name", ("window", "damping"))
def test_methods_of_parts_that_are_none(name):
    with pytest.raises(ValueError, match=rf"Newton\({name}=...\).* must be .*got 3\."):
        unchecked(Newton.__check_init__)(_fake(Newton(), **{name: 3}))


def test_auto_of_what_is_no_method():
    with pytest.raises(ValueError, match=r"`Auto\(newton\)` must be .*got 3\."):
        unchecked(Auto.__check_init__)(_fake(Auto(), newton=3))


def test_a_loop_without_a_finish_tells_of_what_is_not_finite():
    """y' = y^2 from 1 is infinite at t = 1."""

    def final(args, method):
        return diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: args * y**2),
            DEER(diffrax.Heun(), method=method),
            0.0, 2.0, 0.05, jnp.array(1.0), args, throw=False,
        )  # fmt: skip

    honest = Auto(Newton(fallback=False))
    solution = final(jnp.array(1.0), honest)
    assert solution.result == diffrax.RESULTS.nonfinite
    step = int(solution.stats["first_nonfinite_step"])
    assert step > 10 and int(solution.stats["num_steps"]) == step
    # Under differentiation as well, whichever way that goes.
    one = jnp.array(1.0)
    state_and_result = lambda args: (
        (solution := final(args, honest)).ys, solution.result
    )  # fmt: skip
    _, _, result = jax.jvp(state_and_result, (one,), (one,), has_aux=True)
    assert result == diffrax.RESULTS.nonfinite
    # Diffrax's own loop goes on, and so does what promises the same.
    assert final(jnp.array(1.0), Auto()).result == diffrax.RESULTS.successful
