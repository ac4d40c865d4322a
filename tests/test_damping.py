"""Damped corrections, against dense least squares; damped solves, against the loop."""

import functools as ft

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deer_ode import (
    BlockDiagonal,
    Constant,
    Dense,
    Diagonal,
    Exact,
    LevenbergMarquardt,
    Newton,
    Scaled,
    Undamped,
    Window,
    solve_recurrence,
)
from deer_ode._affine import BlockTransition, transition_of
from deer_ode._blocks import find_blocks
from deer_ode._damping import covariances_at_once, covariances_by_a_loop, smooth
from deer_ode._misc import leading_true
from deer_ode._scan import make_recurrence

from .helpers import (
    assert_close,
    both,
    quick,
    rounding,
    slow,
    slow_rows,
    tanh_cell,
    tanh_network,
)


# --- one correction -----------------------------------------------------------------


def least_squares(A, residual, lam, size):
    """The minimum, by assembling all of it. The first correction is its residual."""
    num_steps, n = residual.shape
    weight = 1 / size[0]
    rows, right = [], []
    for i in range(1, num_steps):
        row = np.zeros((n, num_steps, n))
        row[:, i], row[:, i - 1] = np.eye(n), -A[i]
        rows.append(weight[:, None] * row.reshape(n, -1))
        right.append(weight * residual[i])
        row = np.zeros((n, num_steps, n))
        row[:, i] = np.eye(n)
        rows.append(lam**0.5 * weight[:, None] * row.reshape(n, -1))
        right.append(np.zeros(n))
    if num_steps == 1:
        return residual
    rows, right = np.concatenate(rows), np.concatenate(right)
    right = right - rows[:, :n] @ residual[0]
    rest = np.linalg.lstsq(rows[:, n:], right, rcond=None)[0]
    return np.concatenate([residual[:1], rest.reshape(-1, n)])


def system(num_steps, *shape, seed=0):
    n = shape[0]
    # By NumPy: JAX compiles a program for each shape that it draws.
    normal = np.random.default_rng(seed).normal
    A = 1.2 * normal(size=(num_steps, *shape)) / n**0.5
    residual = normal(size=(num_steps, n))
    return (
        jnp.asarray(A),
        jnp.asarray(residual),
        jnp.asarray(np.logspace(-2, 3, n))[None],
    )


def ratios(rows, columns):
    """What makes a matrix of numbers a moderate one in these units."""
    return (rows[0][:, None] / columns)[None]


jitted_smooth = eqx.filter_jit(smooth)
jitted_in_turn, jitted_at_once = (
    jax.jit(covariances_by_a_loop),
    jax.jit(covariances_at_once),
)
LAMBDAS = (1e-3, 1e-2, 1.0, 300.0)

# Covariances are the inverse of the normal equations' matrix, whose condition is a norm
# of about ten over the smallest of `LAMBDAS`.
CONDITION = 1e4


def check_smooth(A, dense, residual, size):
    for lam in LAMBDAS:
        actual = jitted_smooth(A, residual, jnp.asarray(lam), size)
        expected = least_squares(
            *(np.asarray(x) for x in (dense, residual)), lam, np.asarray(size)
        )
        # In units of each entry: sizes differ by factors of 1e5.
        assert_close(np.asarray(actual / size), expected / size, CONDITION * rounding())


@pytest.mark.parametrize("num_steps", slow((1, 2, 30), lambda n: n == 2))
def test_dense_corrections_are_least_squares(num_steps):
    A, residual, size = system(num_steps, 3, 3)
    A = A * ratios(size, size)
    check_smooth(transition_of(A), A, residual * size, size)


@pytest.mark.parametrize("num_steps", slow((1, 2, 30), lambda n: n < 30))
def test_diagonal_corrections_are_least_squares(num_steps):
    A, residual, size = system(num_steps, 3)
    dense = A[:, :, None] * jnp.eye(3)[None]
    check_smooth(transition_of(A), dense, residual * size, size)


@pytest.mark.parametrize("num_steps", slow((1, 2, 30), lambda n: n != 2))
def test_tails_are_least_squares_and_heads_follow(num_steps):
    """Where only the last two of five entries pass on."""
    A, residual, size = system(num_steps, 5, 2)
    A = A * ratios(size, size[:, 3:])
    residual = residual * size
    for lam in LAMBDAS:
        delta = jitted_smooth(transition_of(A), residual, jnp.asarray(lam), size)
        tails = least_squares(
            *(np.asarray(x) for x in (A[:, 3:], residual[:, 3:])),
            lam,
            np.asarray(size[:, 3:]),
        )
        before = np.concatenate([np.zeros((1, 2)), tails[:-1]])
        heads = np.einsum("tij,tj->ti", A[:, :3], before) + residual[:, :3]
        expected = np.concatenate([heads, tails], axis=1) / size
        assert_close(np.asarray(delta / size), expected, CONDITION * rounding())


@pytest.mark.parametrize("num_steps", slow((1, 2, 20), lambda n: n != 2))
def test_corrections_in_blocks_are_least_squares(num_steps):
    """Blocks of two and of one, the latter padded or put together."""
    order = find_blocks((0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5))
    assert order.size == 2
    assert np.any(order.entries == order.state_size)  # there is padding
    A, residual, _ = system(num_steps, 11, 11)
    size = jnp.logspace(-1, 2, 11)[None]
    A = np.asarray(A * (11 / 2) ** 0.5 * ratios(size, size))
    mask = np.zeros((11, 11), bool)
    entries = np.zeros((num_steps, 2, 2, order.num_blocks))
    for block, members in enumerate(order.entries.T):
        for row, i in enumerate(members):
            for column, j in enumerate(members):
                if max(i, j) < 11:
                    mask[i, j] = True
                    entries[:, row, column, block] = A[:, i, j]
    blocks = BlockTransition(jnp.asarray(entries), order)
    check_smooth(blocks, jnp.where(mask[None], A, 0), residual * size, size)


@pytest.mark.parametrize("batch", slow(((), (3,)), lambda batch: batch == ()))
def test_covariances_at_once_are_those_in_turn(batch):
    # Of eleven the scan halves an odd number twice.
    A = jnp.asarray(np.random.default_rng(0).normal(size=(11, *batch, 3, 3)))
    A = 1.2 * A / 3**0.5
    for lam in LAMBDAS:
        in_turn = jitted_in_turn(A, jnp.asarray(lam))
        at_once = jitted_at_once(A, jnp.asarray(lam))
        # The scan passes by products of many matrices, whose condition is theirs.
        assert_close(at_once, in_turn, CONDITION * rounding())
        assert not np.any(in_turn[0])


# --- whole solves -------------------------------------------------------------------


# As many steps as the hard one, so that both are one program.
problem = ft.partial(tanh_network, 100)


def all_at_once(damping):
    """One window and no sequential finish: the smallest program."""
    return Newton(damping=damping, window=None, chunk=1, fallback=False)


@quick
def solve(weights, y0, xs, method):
    return solve_recurrence(both(ft.partial(tanh_cell, weights)), y0, xs, method=method)


@jax.jit
def loop(weights, y0, xs):
    return lax.scan(both(ft.partial(tanh_cell, weights)), y0, xs)[1]


def test_nothing_is_damped_where_newton_converges():
    inputs = problem(gain=0.5)
    plain, damped = (
        solve(*inputs, all_at_once(damping))
        for damping in (Undamped(), LevenbergMarquardt())
    )
    for sol in (plain, damped):
        assert float(sol.stats["newton_damping"]) == 0
    count = lambda sol: int(sol.stats["num_newton_steps"])
    assert count(plain) == count(damped)
    np.testing.assert_array_equal(plain.carries, damped.carries)


HARD = problem(gain=2.5, seed=3)


def test_a_hard_recurrence_is_damped_and_solved():
    sol = solve(*HARD, all_at_once(LevenbergMarquardt()))
    assert float(sol.stats["newton_damping"]) > 0
    # The recurrence forgets; what it makes of rounding before that it may multiply.
    assert_close(sol.carries, loop(*HARD), 100 * rounding())


def make(weights, y0, xs):
    f = both(ft.partial(tanh_cell, weights))
    return make_recurrence(f, y0, xs, xs.shape[0])


@quick
def update(inputs, ys, damping, num_known, at_rounding, method):
    recurrence = make(*inputs)
    linearisation = recurrence.choose(Exact())
    largest = jnp.full(3, 8.0)
    return method.step(
        linearisation, recurrence, ys, largest, damping, num_known, at_rounding
    )


def test_many_matrices_at_once():
    """Of a size for which products and inverses once waited for each other."""
    inputs = tanh_network(1000, size=8, gain=2.5, seed=3)
    sol = solve(*inputs, Newton(window=None, damping=LevenbergMarquardt()))
    assert float(sol.stats["newton_damping"]) > 0
    # What chaos makes of rounding; each state is what the one before it leads to.
    before = jnp.concatenate([inputs[1][None], sol.carries[:-1]])
    again = jax.vmap(ft.partial(tanh_cell, inputs[0]))(before, inputs[2])
    assert_close(sol.carries, again, rounding())


def test_squares_never_rise():
    """All entries in the same units: more than any state is."""
    method = Newton(damping=LevenbergMarquardt())
    ys = jnp.broadcast_to(HARD[1], HARD[2].shape)
    damping, num_known = jnp.zeros(()), jnp.asarray(0, jnp.int32)
    at_rounding = jnp.zeros(len(ys), bool)
    sums, dampings = [], []
    for _ in range(64):
        updated = update(HARD, ys, damping, num_known, at_rounding, method)
        sums.append(float(jnp.linalg.norm(updated.residual)))
        ys, damping, at_rounding = updated.ys, updated.damping, updated.at_rounding
        dampings.append(float(damping))
        assert np.abs(ys).max() < 8
        if bool(jnp.all(updated.good)):
            break
    assert bool(jnp.all(updated.good))
    assert max(dampings) > 0
    # 64 units of rounding for each of 300 numbers, in units of eight.
    noise = 8 * 64 * 300**0.5 * float(jnp.finfo(ys.dtype).eps)
    for before, after in zip(sums, sums[1:], strict=False):
        assert after <= before or after <= noise
    assert_close(ys, loop(*HARD), 100 * rounding())


def test_scaled_by_nothing_is_the_fixed_point_iteration():
    inputs = problem()
    zero = jnp.asarray(0, jnp.int32)
    ys = jnp.asarray(np.random.default_rng(9).normal(size=inputs[2].shape))
    none = jnp.zeros(len(ys), bool)
    method = Newton(damping=Scaled(0.0))
    updated = update(inputs, ys, jnp.zeros(()), zero, none, method)
    before = jnp.concatenate([inputs[1][None], ys[:-1]])
    expected = jax.vmap(ft.partial(tanh_cell, inputs[0]))(before, inputs[2])
    assert_close(updated.ys, expected, rounding())
    assert int(leading_true(updated.good)) == 0


def test_scaled_by_one_is_no_damping():
    inputs = problem()
    one, plain = (
        solve(*inputs, all_at_once(damping)) for damping in (Scaled(1.0), Undamped())
    )
    np.testing.assert_array_equal(one.carries, plain.carries)
    assert int(one.stats["num_newton_steps"]) == int(plain.stats["num_newton_steps"])


@pytest.mark.parametrize("factor", (-0.1, 1.5, float("nan")))
def test_scaled_by_what_makes_no_sense(factor):
    with pytest.raises(ValueError, match=f"between 0 and 1; got {factor}"):
        Scaled(factor)


@pytest.mark.parametrize(
    "num_steps, method",
    (
        (20_000, Newton(damping=Scaled(0.0))),
        (1000, Newton(Exact(), Constant(), window=None, newton_max_steps=1000)),
    ),
    ids=("windows", "at once"),
)
def test_small_residuals_that_add_up_do_not_pass_for_converged(num_steps, method):
    """Every residual of the constant is below the tolerance."""
    method = eqx.tree_at(
        lambda m: m.damping, method, Scaled(0.0), is_leaf=lambda x: x is method.damping
    )
    f = both(lambda y, x: y + jnp.float32(1e-5) * jnp.sin(3 * y))
    y0, xs = jnp.float32(0.9), jnp.zeros(num_steps, jnp.float32)
    sol = jax.jit(lambda: solve_recurrence(f, y0, xs, method=method))()
    expected = jax.jit(lambda: lax.scan(f, y0, xs)[1])()
    # Each step rounds by half a unit of about one: a random walk of so many.
    error = np.abs(np.asarray(sol.carries, float) - np.asarray(expected, float))
    assert error.max() <= num_steps**0.5 * 2.0**-22


def in_pairs(weights, y, x):
    """Entries `2 k` and `2 k + 1` belong together."""
    pairs = y.reshape(-1, 2)
    return jnp.tanh(jnp.einsum("kij,kj->ki", weights, pairs)).reshape(-1) + x


@pytest.mark.parametrize(
    "linearisation, damping",
    slow_rows(
        (
            (Dense(), LevenbergMarquardt()),
            (Diagonal(), LevenbergMarquardt()),
            (BlockDiagonal(2), LevenbergMarquardt()),
            (Exact(), Scaled(0.5)),
        ),
        lambda row: not isinstance(row[0], BlockDiagonal),
    ),
    ids=str,
)
@pytest.mark.slow(covered_by="test_tangent.py::test_windows_of_any_length")
def test_gradients_after_damped_solves_are_exact(linearisation, damping):
    keys = jr.split(jr.key(0), 3)
    # Rows of at most 0.8, so that the recurrence forgets.
    weights = 0.4 * jr.uniform(keys[0], (2, 2, 2), minval=-1.0)
    y0, xs = jr.normal(keys[1], (4,)), jr.normal(keys[2], (24, 4))
    method = Newton(linearisation, damping=damping, window=Window(12))

    def loss(run, weights, y0, xs):
        return jnp.sum(jnp.sin(run(both(ft.partial(in_pairs, weights)), y0, xs)))

    ours = lambda f, y0, xs: solve_recurrence(f, y0, xs, method=method).ys
    in_turn = lambda f, y0, xs: lax.scan(f, y0, xs)[1]
    argnums, inputs = (0, 1, 2), (weights, y0, xs)
    expected = jax.jit(jax.grad(ft.partial(loss, in_turn), argnums))(*inputs)
    of_ours = ft.partial(loss, ours)
    actual, forward = jax.jit(
        lambda *x: (jax.grad(of_ours, argnums)(*x), jax.jvp(of_ours, x, x)[1])
    )(*inputs)
    assert_close(actual, expected, rounding())
    wanted = sum(jnp.sum(g * x) for g, x in zip(expected, inputs, strict=True))
    assert_close(forward, wanted, rounding())
