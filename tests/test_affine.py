"""The affine scan against its loop, and its derivatives of every order."""

import itertools as it

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from deer_ode import affine_scan
from deer_ode._affine import (
    BlockTransition,
    affine_solve,
    scan_steps,
    scan_steps_transposed,
    transition_of,
)
from deer_ode._affine._scans import (
    AssociativeScan,
    KernelScan,
    SequentialScan,
    choose_scan,
)
from deer_ode._affine._transitions import LaneTransition
from deer_ode._blocks import BlockOrder, contiguous

from .helpers import (
    assert_close,
    rounding,
    slow_rows,
    unchecked,
)


def reference(A, b, y0, reverse=False):
    """The recurrence as it is written down."""

    def step(y, element):
        A_i, b_i = element
        y = (A_i @ y if A_i.ndim == 2 else A_i * y) + b_i
        return y, y

    return lax.scan(step, y0, (A, b), reverse=reverse)[1]


def elements(key, num_steps, size, dense, dtype=jnp.float64):
    key_A, key_b, key_y = jr.split(key, 3)
    shape = (num_steps, size, size) if dense else (num_steps, size)
    # Products of these stay of order one.
    A = 0.9 * jr.normal(key_A, shape, dtype) / (size**0.5 if dense else 1.0)
    return (
        A,
        jr.normal(key_b, (num_steps, size), dtype),
        jr.normal(key_y, (size,), dtype),
    )


#: Of each size, in both directions, of either kind of matrices and precision.
ONE_EACH = (
    (1, jnp.float64, False, True),
    (12, jnp.float64, True, True),
    (3, jnp.float64, False, True),
    (3, jnp.float64, True, False),
    (3, jnp.float32, False, True),
    (3, jnp.float32, True, False),
)


@pytest.mark.parametrize(
    "size, dtype, reverse, dense",
    slow_rows(
        it.product(
            (1, 3, 12), (jnp.float32, jnp.float64), (False, True), (True, False)
        ),
        lambda row: row not in ONE_EACH,
    ),
)
def test_agrees_with_the_loop(size, dtype, reverse, dense):
    inputs = elements(jr.key(size), 50, size, dense, dtype)

    @jax.jit
    def every(A, b, y0):
        scans = [by.scan(transition_of(A), b, y0, reverse) for by in SCANS]
        ours = affine_scan(A, b, y0, reverse=reverse)
        return reference(A, b, y0, reverse), ours, scans

    expected, actual, scans = every(*inputs)
    assert_close(actual, expected, rounding(dtype))
    for by, actual in zip(SCANS, scans, strict=True):
        assert_close(actual, expected, rounding(dtype), what=str(by))


SCANS = (SequentialScan(), AssociativeScan())

# What scans run over.
CORES = ("dense", "diagonal", "lanes")

KINDS = ("dense", "diagonal", "blocks", "trailing")


def stack_of(kind, num_steps, dtype=jnp.float64):
    """Matrices and biases of five numbers, or of twelve: four blocks of three."""
    size = 12 if kind in ("lanes", "blocks") else 5
    A, b, _ = elements(jr.key(num_steps), num_steps, size, kind != "diagonal", dtype)
    entries = 0.5 * jr.normal(jr.key(1), (num_steps, 3, 3, 4), dtype)
    if kind == "lanes":
        return LaneTransition(entries), b.reshape(num_steps, 3, 4)
    if kind == "blocks":
        return BlockTransition(entries, BlockOrder(contiguous(3, 4), 12)), b
    return transition_of(A[..., -2:] if kind == "trailing" else A), b


def dense(A, size):
    """All entries of the matrices, one column after the other."""
    columns = [A.apply(jnp.broadcast_to(e, (7, size))) for e in jnp.eye(size)]
    return jnp.stack(columns, axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_are_matrices(kind):
    A, b = stack_of(kind, 7)
    size = b.shape[1]
    scale = jnp.linspace(1.0, 2.0, size)[None]
    keep = jnp.array([False, True, True, False, True, True, True])
    # Zero also in derivatives, whatever is there.
    bad = jtu.tree_map(lambda a: a.at[jnp.array([0, 3])].set(jnp.nan), A)

    @jax.jit
    def both(A, bad):
        M = dense(A, size)
        kept = jnp.where(keep[:, None, None], M, 0)
        pairs = [
            (A.compose(A.abs()), M @ jnp.abs(M)),
            (A.scaled(0.3), 0.3 * M),
            (A.rescaled(scale), M * scale[:, None] / scale[..., None]),
            (A.zero_first(), M.at[0].set(0)),
            (bad.where_finite(), kept),
            (bad.masked(keep), kept),
        ]
        if kind != "trailing":
            pairs.append((A.transpose(), jnp.swapaxes(M, 1, 2)))
        of = lambda A: A.where_finite().apply(b) + A.masked(keep).apply(b)
        slopes = jax.grad(lambda A: jnp.sum(of(A) ** 2))(bad)
        one = A.at(3).apply(b[3]), M[3] @ b[3]
        return M, [one, *((dense(B, size), N) for B, N in pairs)], slopes

    M, pairs, slopes = both(A, bad)
    for actual, expected in pairs:
        assert_close(actual, expected, rounding())
    assert all(np.all(np.isfinite(x)) for x in jtu.tree_leaves(slopes))
    passed_on = b.at[:, :3].set(0) if kind == "trailing" else b
    np.testing.assert_array_equal(A.passed_on(b), passed_on)
    np.testing.assert_array_equal(np.any(M, axis=(0, 1)), np.any(passed_on, axis=0))


@pytest.mark.parametrize(
    "kind, reverse",
    slow_rows(
        it.product(KINDS, (False, True)),
        lambda row: row[1] != (row[0] in ("diagonal", "blocks")),
    ),
)
def test_scans_of_every_transition(kind, reverse):
    """From any state, their transposes and their derivatives, against dense ones."""
    A, b = stack_of(kind, 7)
    y0, after = jr.normal(jr.key(2), (2, b.shape[1]))

    @jax.jit
    def answers(A, after):
        loss = lambda b, y0: jnp.sum(jnp.sin(affine_solve(A, b, y0, reverse)))
        return (
            [scan_steps(A, b, start, reverse) for start in (None, y0)],
            [scan_steps_transposed(A, b, end, reverse) for end in (None, after)],
            jax.value_and_grad(loss, (0, 1))(b, y0),
        )

    M = transition_of(dense(A, b.shape[1]))
    # What a following step makes of a state.
    after = M.transpose().at(0).apply(after)
    assert_close(answers(A, after), answers(M, after), rounding())


# In one piece; in chunks with a rest; and without one.
NUM_STEPS = (5, 50, 64)


@pytest.mark.parametrize(
    "kind, reverse, num_steps",
    slow_rows(
        it.product(CORES, (False, True), NUM_STEPS),
        # Each kind in chunks, and one of a single chunk.
        lambda row: row[1:] != (True, 50) and row != ("dense", False, 5),
    ),
)
def test_long_ones_in_chunks(kind, reverse, num_steps):
    A, b = stack_of(kind, num_steps)

    @jax.jit
    def both(A, b):
        scans = (SequentialScan(), AssociativeScan(max_elements=8))
        return [by.scan(A, b, None, reverse) for by in scans]

    expected, actual = both(A, b)
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize(
    "kind, reverse",
    slow_rows(
        it.product(CORES, (False, True)),
        lambda row: row[1] != (row[0] != "diagonal"),
    ),
)
def test_beginnings_and_transposes_of_both_platforms(kind, reverse):
    """What an accelerator does, against the loops of a CPU, and these against JAX."""
    A, b = stack_of(kind, 7)
    y0 = jr.normal(jr.key(2), b.shape[1:])
    weights = jnp.cos(jnp.arange(b.size, dtype=b.dtype)).reshape(b.shape)
    after = jr.normal(jr.key(3), y0.shape)
    last = 0 if reverse else -1
    by_each = SCANS

    @jax.jit
    def every(A, b, y0, after):
        of = lambda b, y0: SequentialScan().scan(A, b, y0, reverse)
        ys, pull_back = jax.vjp(of, b, y0)
        more = pull_back(jnp.zeros_like(b).at[last].set(after))
        transposed = [
            [by.scan_transposed(A, weights, end, reverse) for end in (None, after)]
            for by in by_each
        ]
        associative = AssociativeScan().scan(A, b, y0, reverse)
        return (ys, pull_back(weights), more), associative, transposed

    (ys, slopes, more), associative, transposed = every(A, b, y0, after)
    assert_close(associative, ys, rounding())
    (b_bar, y0_bar), (more_b, more_y0) = slopes, more
    for by, (actual, with_after) in zip(by_each, transposed, strict=True):
        assert_close(actual, (y0_bar, b_bar), rounding(), what=str(by))
        expected = (y0_bar + more_y0, b_bar + more_b)
        assert_close(with_after, expected, rounding(), what=str(by))


def test_what_decides(monkeypatch):
    """Platform, size and dtype; here no GPU is asked for."""
    has_kernels = lambda size, dtype: (size, dtype) == (2, jnp.float32)
    A = transition_of(jnp.zeros((3, 2, 2), jnp.float32))
    large = transition_of(jnp.zeros((3, 5, 5), jnp.float32))
    monkeypatch.setattr("deer_ode._affine._kernels.are_right", has_kernels)
    assert choose_scan(A, "cpu") == SequentialScan()
    assert choose_scan(A, "accelerator") == KernelScan()
    assert choose_scan(large, "accelerator") == AssociativeScan()


def test_mixed_dtypes():
    A, b, y0 = elements(jr.key(8), 4, 2, True)
    expected = reference(A, b, y0)
    with jax.numpy_dtype_promotion("standard"):
        single = tuple(x.astype(jnp.float32) for x in (A, b, y0))
        for inputs in ((single[0], b, y0), (A, single[1], y0), (A, b, single[2])):
            ys = affine_scan(*inputs)
            assert ys.dtype == jnp.float64
            assert_close(ys, expected, rounding(jnp.float32))


#: Each kind once, in pieces and in one; kernels take long to interpret.
BY_KERNELS = (("dense", True, 5), ("diagonal", False, 50), ("lanes", False, 5))


@pytest.mark.parametrize(
    "kind, reverse, num_steps",
    slow_rows(
        [
            (k, reverse, n)
            for k in CORES
            for reverse in (False, True)
            for n in NUM_STEPS
        ],
        lambda row: row not in BY_KERNELS,
    ),
)
def test_by_kernels(kind, reverse, num_steps):
    """Interpreted, in chunks of four and of up to three levels."""
    A, b = stack_of(kind, num_steps)
    by_kernels = KernelScan(chunk=4, max_in_one=8, interpret=True)
    scans = (SequentialScan(), by_kernels)
    both = jax.jit(lambda A, b: [by.scan(A, b, None, reverse) for by in scans])
    expected, actual = both(A, b)
    assert_close(actual, expected, rounding())


@pytest.mark.parametrize("by", (AssociativeScan(), KernelScan()), ids=str)
def test_programs_do_not_grow_with_the_number_of_steps(by):
    def size(num_steps):
        A, b = jnp.zeros((num_steps, 2, 2)), jnp.zeros((num_steps, 2))
        text = str(jax.make_jaxpr(lambda A, b: by.scan(transition_of(A), b))(A, b))
        return text.count("\n")

    # Programs differ by what is over where a number is not even.
    assert size(100) < size(20_000)
    assert abs(size(200_000) / size(20_000) - 1) < 0.2


@pytest.mark.parametrize("num_steps", (0, 1, 2))
def test_short(num_steps):
    A, b, y0 = elements(jr.key(0), num_steps, 2, True)
    assert_close(affine_scan(A, b, y0), reference(A, b, y0), rounding())


jitted_scan = jax.jit(affine_scan)


@settings(max_examples=15, deadline=None)
@given(
    # Compiled once for each pair.
    shape=st.sampled_from(((1, 2), (7, 5), (32, 1))),
    seed=st.integers(0, 2**31 - 1),
    dense=st.booleans(),
)
def test_solves_the_recurrence(shape, seed, dense):
    """Put into the recurrence, the answer leaves rounding only, whatever A and b."""
    num_steps, size = shape
    A, b, y0 = elements(jr.key(seed), num_steps, size, dense)
    A, b = np.asarray(A) * 1.5, np.asarray(b) * 10.0
    ys = np.asarray(jitted_scan(jnp.asarray(A), jnp.asarray(b), y0))
    before = np.concatenate([np.asarray(y0)[None], ys[:-1]])
    product = np.einsum("tij,tj->ti", A, before) if dense else A * before
    size_of = np.abs(ys).max() + np.abs(product).max() + np.abs(b).max()
    np.testing.assert_allclose(ys, product + b, rtol=0, atol=rounding() * size_of)


@pytest.mark.parametrize(
    "dense, reverse",
    slow_rows(
        ((True, True), (False, False), (True, False), (False, True)),
        lambda row: row != (True, True),
    ),
)
def test_derivatives(dense, reverse):
    """First and second derivatives in A, b and y0 are those of the loop."""
    inputs = elements(jr.key(3), 9, 2, dense)

    def loss(scan):
        return lambda A, b, y0: jnp.sum(jnp.sin(scan(A, b, y0, reverse=reverse)))

    ours, loop = loss(affine_scan), loss(reference)
    argnums = (0, 1, 2)

    def grad_in_each_alone(of, argnums):
        return lambda *x: [jax.grad(of, argnum)(*x) for argnum in argnums]

    transforms = (jax.grad, grad_in_each_alone, jax.jacfwd, jax.hessian)
    # All in one program.
    every = lambda of: jax.jit(lambda *x: [by(of, argnums)(*x) for by in transforms])
    found = zip(every(ours)(*inputs), every(loop)(*inputs), transforms, strict=True)
    for actual, expected, transform in found:
        assert_close(actual, expected, rounding(), what=transform.__name__)
    if dense and reverse:
        check_grads(jax.jit(ours), inputs, order=1, modes=("fwd", "rev"))


def test_vmap():
    """Batched over all inputs, and over A alone, under a gradient."""
    keys = jr.split(jr.key(5), 4)
    A, b, y0 = jax.vmap(lambda key: elements(key, 9, 2, True))(keys)
    all_axes = ((0, 0, 0), (0, None, None), (None, 0, None))

    def slopes(scan, axes, inputs):
        loss = lambda *a: jnp.sum(jax.vmap(scan, axes)(*a) ** 2)
        of = [x if ax == 0 else x[0] for x, ax in zip(inputs, axes, strict=True)]
        return jax.grad(loss, (0, 1, 2))(*of)

    @jax.jit
    def both(*inputs):
        scans = (affine_scan, reference)
        return [[slopes(scan, axes, inputs) for axes in all_axes] for scan in scans]

    assert_close(*both(A, b, y0), rounding())


def test_non_finite_stays_where_it_is():
    A, b, y0 = elements(jr.key(6), 10, 2, True)
    b = b.at[6, 0].set(jnp.nan)
    ys = affine_scan(A, b, y0)
    assert_close(ys[:6], reference(A, b, y0)[:6], rounding())
    assert bool(jnp.all(jnp.isnan(ys[6:, 0])))


def test_shapes_are_checked():
    A, b, y0 = elements(jr.key(7), 4, 2, True)
    with pytest.raises(ValueError, match=r"\(steps, state, state\).*A \(4, 2, 3\)"):
        unchecked(affine_scan)(jnp.zeros((4, 2, 3)), b, y0)
    with pytest.raises(ValueError, match=r"`y0` of shape \(state,\)"):
        unchecked(affine_scan)(A, b, jnp.zeros(3))
