"""What depends on what: found from programs, checked against derivatives."""

import functools as ft

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from deer_ode import Dense, Diagonal, Exact, PairedDiagonal
from deer_ode._blocks import connected
from deer_ode._dependence import dependence
from deer_ode._linearisation import Blockwise
from deer_ode._misc import StateFlattener

from .helpers import quick


#: The size of the state of all tables below: two rows of three, or three of two.
SIZE = 6


def found(step, *inputs, size=SIZE):
    return dependence(step, jax.ShapeDtypeStruct((size,), jnp.float64), *inputs)


@ft.cache
def values_and_jacobians(step):
    """Of a batch of points; compiled once for all tests of one process."""
    twice = lambda y: (step(y),) * 2
    both = quick(jax.vmap(jax.jacfwd(twice, has_aux=True)))

    def run(points):
        jacobians, values = both(points)
        return np.asarray(values), np.asarray(jacobians)

    return run


def points():
    return jr.normal(jr.key(0), (8, SIZE))


def there(jacobians):
    """Entries of a Jacobian that are not zero, at one of several points."""
    # What is not a number depends too.
    return np.any(jacobians != 0, axis=0)


def blocks(size, num_blocks, interleaved=False):
    full, one = np.ones((size, size), bool), np.eye(num_blocks, dtype=bool)
    return np.kron(full, one) if interleaved else np.kron(one, full)


DIAGONAL = np.eye(SIZE, dtype=bool)
ALL = np.ones((SIZE, SIZE), bool)
NONE = np.zeros((SIZE, SIZE), bool)
LOWER = np.tril(ALL)
ROWS = blocks(3, 2)
PAIRS = blocks(2, 3)
COLUMNS = blocks(2, 3, interleaved=True)

W = np.random.default_rng(0).normal(size=(SIZE, SIZE))
HEADS = W.reshape(-1)[:18].reshape(2, 3, 3)

#: For `take` and the like, on purpose in no order.
PLACES = np.array([4, 0, 0, 5, 2, 1])


@jax.custom_jvp
def _straight_through(y):
    return jnp.round(y)


@_straight_through.defjvp
def _(primals, tangents):
    return jnp.round(primals[0]), tangents[0]


def _entry(*places):
    """A mask of one entry in each row; -1 where there is none."""
    out = NONE.copy()
    for row, column in enumerate(places):
        if column >= 0:
            out[row, column] = True
    return out


def _scan_sum(y):
    """Prefix sums by a loop."""

    def step(total, x):
        return total + x, total + x

    return lax.scan(step, y[0] * 0, y)[1]


def _heads_in_a_scan(y):
    h = y.reshape(2, 3)
    mix = lambda h, _: (jnp.tanh(jnp.einsum("hij,hj->hi", jnp.asarray(HEADS), h)), None)
    return lax.scan(mix, h, None, length=3)[0].reshape(-1)


def _shift_while(y):
    """Three shifts by one, in a loop of unknown length."""
    shift = lambda c: (c[0] + 1, jnp.concatenate([c[1][:1] * 0, c[1][:-1]]))
    return lax.while_loop(lambda c: c[0] < 3, shift, (0, y))[1]


def _cond(y):
    both = (lambda y: jnp.sin(y), lambda y: jnp.roll(y, 1))
    return lax.cond(jnp.sum(y) > 0, *both, y)


def _fori(y):
    return lax.fori_loop(0, 2, lambda i, y: y.at[2 * i].set(jnp.sin(y[2 * i])), y)


def _unequal(y):
    return jnp.concatenate([jnp.cumsum(y[:3]), y[3:5] @ jnp.ones((2, 2)), y[5:] ** 2])


def _complex(y):
    z = lax.complex(y[:3], y[3:]) ** 2
    return jnp.concatenate([z.real, z.imag])


def _jax_array(y):
    return y[jnp.asarray(PLACES)]


#: Functions, and what is to be found; `None` where sound is enough.
TABLE = {
    "identity": (lambda y: y, DIAGONAL),
    "constant": (lambda y: jnp.arange(6.0), NONE),
    "zero times": (lambda y: jnp.zeros(6) + lax.stop_gradient(y), NONE),
    "elementwise": (lambda y: jnp.tanh(y) * jnp.exp(-(y**2)) / (1 + y**2), DIAGONAL),
    "with the mean": (lambda y: y - jnp.mean(y), ALL),
    "with one of them": (lambda y: y * y[2], _entry(*range(6)) | _entry(*[2] * 6)),
    "where": (lambda y: jnp.where(y > 0, y, jnp.sin(y)), DIAGONAL),
    "relu": (lambda y: jax.nn.relu(y) + jnp.abs(y) + jnp.maximum(y, 0.5), DIAGONAL),
    "chosen by another": (lambda y: jnp.where(y[::-1] > 0, y, 0.0), DIAGONAL),
    "clip": (lambda y: jnp.clip(y, -0.5, 0.5), DIAGONAL),
    "max": (
        lambda y: y + jnp.max(y[:2]),
        DIAGONAL | _entry(*[0] * 6) | _entry(*[1] * 6),
    ),
    "product": (lambda y: jnp.prod(y.reshape(2, 3), axis=1).repeat(3), ROWS),
    "round": (jnp.round, NONE),
    "straight through": (_straight_through, DIAGONAL),
    "index": (lambda y: y[PLACES], _entry(*PLACES)),
    "index by a JAX array": (_jax_array, _entry(*PLACES)),
    "slices": (
        lambda y: jnp.concatenate([y[4:], y[:4:2], y[::-3]]),
        _entry(4, 5, 0, 2, 5, 2),
    ),
    "take out of bounds": (
        lambda y: y.at[jnp.array([0, 7, 1, 9, 2, 3])].get(mode="fill", fill_value=0),
        _entry(0, -1, 1, -1, 2, 3),
    ),
    "set one": (lambda y: y.at[1].set(y[4] ** 2), _entry(0, 4, 2, 3, 4, 5)),
    "set some": (lambda y: y.at[jnp.array([0, 3])].set(y[4:]), None),
    "set some, unique": (
        lambda y: y.at[np.array([0, 3])].set(y[4:], unique_indices=True),
        _entry(4, 1, 2, 5, 4, 5),
    ),
    "set a slice": (lambda y: y.at[2:4].set(y[:2]), _entry(0, 1, 0, 1, 4, 5)),
    "add to one": (lambda y: y.at[1].add(y[4]), None),
    "roll": (lambda y: jnp.roll(y, 2), _entry(4, 5, 0, 1, 2, 3)),
    "reverse": (lambda y: y[::-1], _entry(5, 4, 3, 2, 1, 0)),
    "pad": (lambda y: jnp.pad(y[1:4], (2, 1)), _entry(-1, -1, 1, 2, 3, -1)),
    "pad inside": (
        lambda y: lax.pad(y[:3], 0.0, [(0, 1, 1)]),
        _entry(0, -1, 1, -1, 2, -1),
    ),
    "transpose": (lambda y: y.reshape(2, 3).T.reshape(-1), _entry(0, 3, 1, 4, 2, 5)),
    "heads": (lambda y: jnp.einsum("hij,hj->hi", HEADS, y.reshape(2, 3)).ravel(), ROWS),
    "heads, strided": (
        lambda y: jnp.einsum(
            "hij,jh->ih", HEADS[:, :2, :2].repeat(2, 0)[:3], y.reshape(2, 3)
        ).ravel(),
        COLUMNS,
    ),
    "heads by vmap": (
        lambda y: jax.vmap(lambda h: jnp.outer(h, h) @ h)(y.reshape(3, 2)).ravel(),
        PAIRS,
    ),
    "softmax": (lambda y: jax.nn.softmax(y.reshape(3, 2), axis=1).ravel(), PAIRS),
    "reshape of a transpose": (
        lambda y: lax.reshape(y.reshape(2, 3), (6,), dimensions=(1, 0)),
        _entry(0, 3, 1, 4, 2, 5),
    ),
    "split": (
        lambda y: jnp.concatenate(
            [a * b for a, b in zip(jnp.split(y, 2), jnp.split(y, 2)[::-1], strict=True)]
        ),
        COLUMNS,
    ),
    "stack": (
        lambda y: jnp.stack([y[:3], y[3:] ** 2], axis=1).ravel(),
        _entry(0, 3, 1, 4, 2, 5),
    ),
    "tile": (lambda y: jnp.tile(y[:2], 3), _entry(0, 1, 0, 1, 0, 1)),
    "cumsum": (jnp.cumsum, LOWER),
    "cumsum backwards": (lambda y: lax.cumsum(y, reverse=True), LOWER.T),
    "cumsum of rows": (
        lambda y: jnp.cumsum(y.reshape(2, 3), axis=1).ravel(),
        ROWS & LOWER,
    ),
    "cumprod": (jnp.cumprod, None),
    "cummax": (lambda y: lax.cummax(y), None),
    "cumlogsumexp": (lambda y: lax.cumlogsumexp(y), None),
    "sort": (jnp.sort, ALL),
    "sort rows": (lambda y: jnp.sort(y.reshape(2, 3), axis=1).ravel(), None),
    "top": (lambda y: lax.top_k(y, 3)[0].repeat(2), ALL),
    "matmul": (lambda y: W @ y, ALL),
    "one-sided product": (lambda y: (y.reshape(2, 3) @ W[:3, :3]).ravel(), ROWS),
    "product of both": (
        lambda y: (y.reshape(2, 3) @ y.reshape(3, 2)).ravel()[:3].repeat(2),
        None,
    ),
    "convolution": (
        lambda y: jnp.convolve(y, jnp.array([1.0, 2.0]), mode="same"),
        None,
    ),
    # Nobody knows at which turn something is read.
    "scan": (_scan_sum, ALL),
    "heads in a scan": (_heads_in_a_scan, ROWS),
    "backwards in a scan": (lambda y: _scan_sum(y[::-1])[::-1], None),
    "while": (_shift_while, None),
    "for": (_fori, None),
    "associative scan": (lambda y: lax.associative_scan(jnp.multiply, y), None),
    "cond": (_cond, _entry(5, 0, 1, 2, 3, 4) | DIAGONAL),
    "switch": (
        lambda y: lax.switch(jnp.int32(y[0] > 0), [jnp.sin, lambda y: y[::-1]], y),
        DIAGONAL | DIAGONAL[::-1],
    ),
    "remat": (jax.checkpoint(lambda y: jnp.sin(y.reshape(2, 3)).ravel()), DIAGONAL),
    "jit": (jax.jit(lambda y: jnp.roll(jnp.sin(y), 1)), _entry(5, 0, 1, 2, 3, 4)),
    "gather by what is traced": (lambda y: y[jnp.argsort(y)], ALL),
    "slice by what is traced": (
        lambda y: lax.dynamic_slice(y, (jnp.int32(y[0] > 0),), (3,)).repeat(2),
        ALL,
    ),
    "fft": (lambda y: jnp.fft.fft(y).real, ALL),
    "solve": (lambda y: jnp.linalg.solve(W, y), ALL),
    "solve each": (
        lambda y: jax.vmap(
            lambda h: jnp.linalg.solve(jnp.outer(h, h) + 2 * jnp.eye(2), h)
        )(y.reshape(3, 2)).ravel(),
        None,
    ),
    "cholesky": (
        lambda y: jnp.linalg.cholesky(jnp.outer(y, y) + jnp.eye(6))[:, 0],
        None,
    ),
    "gradient": (jax.grad(lambda y: jnp.sum(jnp.sin(y) ** 2)), DIAGONAL),
    "gradient of heads": (
        jax.grad(lambda y: jnp.sum(jnp.prod(y.reshape(3, 2) ** 2, 1))),
        PAIRS,
    ),
    "unequal groups": (_unequal, None),
    "complex": (_complex, COLUMNS),
    "single precision": (lambda y: y.astype(jnp.float32).astype(jnp.float64), DIAGONAL),
    "symmetric part": (lambda y: (W @ y) * 0 + y, ALL),
    "norm": (lambda y: y / jnp.linalg.norm(y), ALL),
    "layer norm of heads": (
        lambda y: jax.vmap(eqx.nn.LayerNorm(2))(y.reshape(3, 2)).ravel(),
        PAIRS,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_is_found(name):
    """All of what there is, and where a pattern is expected exactly that."""
    step, expected = TABLE[name]
    mask = found(step)
    assert mask.shape == (SIZE, SIZE)
    _, jacobians = values_and_jacobians(step)(points())
    assert not np.any(there(jacobians) & ~mask), mask.astype(int)
    if expected is not None:
        np.testing.assert_array_equal(mask.astype(int), expected.astype(int))


def test_patterns_that_need_not_be_exact_are_not_lost():
    """Structure that a solver would miss, although only soundness is promised."""
    np.testing.assert_array_equal(found(_unequal)[:3, 3:], False)
    np.testing.assert_array_equal(found(_unequal)[5], DIAGONAL[5])


def test_a_rule_without_forward_mode_is_an_error_of_jax():
    """`jax.custom_vjp` has no tangents: neither here nor in any Jacobian."""

    @jax.custom_vjp
    def double(y):
        return 2 * y

    double.defvjp(lambda y: (2 * y, None), lambda _, g: (2 * g,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(double)(jnp.ones(SIZE))
    try:
        mask = found(double)
    except TypeError:
        return
    assert not np.any(DIAGONAL & ~mask)


def test_traced_parameters():
    """Under `jit` and `vmap`, where only shapes are known of what is closed over."""
    y, seen = jnp.arange(6.0), []

    def look(w, places, k):
        seen.append(found(lambda y: w * y))
        seen.append(
            found(
                lambda y: jnp.einsum(
                    "hij,hj->hi", w[:3].reshape(1, 1, 3) * HEADS, y.reshape(2, 3)
                ).ravel()
            )
        )
        seen.append(found(lambda y: y[places]))
        seen.append(found(lambda y: jnp.roll(y, k)))
        # What is known outside is known inside.
        seen.append(found(lambda y: w * y[PLACES]))
        seen.append(found(lambda y: w * y[known]))
        return w

    known = jnp.asarray(PLACES)
    places, k = known + 0, jnp.asarray(2)
    jax.jit(look)(y, places, k)
    jax.vmap(look)(y[None], places[None], k[None])
    jax.jit(jax.vmap(jax.grad(lambda *a: jnp.sum(look(*a)))))(
        y[None], places[None], k[None]
    )
    assert len(seen) == 18
    exact = _entry(*PLACES)
    for n, mask in enumerate(seen):
        # Places that are not known may be any.
        expected = (DIAGONAL, ROWS, ALL, ALL, exact, exact)[n % 6]
        np.testing.assert_array_equal(mask, expected)


def test_inputs():
    """What is handed over beside the state is known by its shape only."""
    step = lambda y, x: y * x["rate"] + jnp.where(x["on"], y[x["place"]], 0.0)
    inputs = {
        "rate": jax.ShapeDtypeStruct((), jnp.float64),
        "on": jax.ShapeDtypeStruct((), jnp.bool_),
        "place": jax.ShapeDtypeStruct((), jnp.int64),
    }
    np.testing.assert_array_equal(found(step, inputs), ALL)
    still = lambda y, x: y * x["rate"] + jr.normal(x["key"], (6,))
    inputs["key"] = jax.eval_shape(lambda: jr.key(0))
    np.testing.assert_array_equal(found(still, inputs), DIAGONAL)


# --- by property ----------------------------------------------------------------------

PARTS = {
    name: TABLE[name][0]
    for name in (
        "elementwise",
        "where",
        "index",
        "set one",
        "set some",
        "roll",
        "pad",
        "heads",
        "heads by vmap",
        "cumsum",
        "sort rows",
        "scan",
        "heads in a scan",
        "cond",
        "slice by what is traced",
        "stack",
        "straight through",
        "add to one",
        "while",
        "for",
    )
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=4),
    branch=st.sampled_from(sorted(PARTS)),
    how=st.sampled_from(("after", "plus", "times", "half")),
)
def test_compositions_are_sound(names, branch, how):
    def step(y):
        out = y
        for name in names:
            out = PARTS[name](out)
        other = PARTS[branch](y)
        if how == "plus":
            return out + other
        if how == "times":
            return out * other
        if how == "half":
            return jnp.concatenate([out[:3], other[3:]])
        return PARTS[branch](out)

    # The chain rule, so that only the parts are compiled.
    y = points()
    out, jacobians = y, np.eye(SIZE)
    for name in names:
        out, after = values_and_jacobians(PARTS[name])(jnp.asarray(out))
        jacobians = after @ jacobians
    of = out if how == "after" else y
    other, also = values_and_jacobians(PARTS[branch])(jnp.asarray(of))
    if how == "after":
        jacobians = also @ jacobians
    elif how == "plus":
        jacobians = jacobians + also
    elif how == "times":
        jacobians = other[..., None] * jacobians + out[..., None] * also
    else:
        jacobians = np.concatenate([jacobians[:, :3], also[:, 3:]], axis=1)
    assert not np.any(there(jacobians) & ~found(step))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    pattern=st.lists(
        st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4
    )
)
def test_any_pattern_is_found(pattern):
    """Written entry by entry, so that there is nothing to be careful about."""

    def step(y):
        row = lambda uses: sum((jnp.sin(y[k]) for k in range(4) if uses[k]), 0 * y[0])
        return jnp.concatenate([row(uses)[None] for uses in pattern])

    mask = found(step, size=4)
    expected = np.array(pattern)
    # `0 * y[0]` counts as a dependence, since zeros by chance do.
    expected[:, 0] = True
    np.testing.assert_array_equal(mask, expected)


# --- what is made of it ---------------------------------------------------------------


def chosen(step, state, linearisation=Exact()):
    flattener = StateFlattener(state)
    flat = lambda y: flattener.flatten(step(flattener.unflatten(y)))
    y = jax.ShapeDtypeStruct((flattener.size,), flattener.dtype)
    groups = lambda: connected(dependence(flat, y))
    return linearisation.for_map(groups, flattener.size), flat


def check_jacobian(linearisation, flat, size):
    """It has every entry of the true one in its place."""
    y = jr.normal(jr.key(3), (size,))

    @jax.jit
    def both(y):
        value, A = linearisation(flat, y)
        columns = jax.vmap(A.apply, in_axes=1, out_axes=1)(jnp.eye(size))
        return (value, columns), (flat(y), jax.jacfwd(flat)(y))

    (value, columns), (expected, jacobian) = both(y)
    np.testing.assert_allclose(columns, jacobian, atol=1e-14)  # a few eps
    np.testing.assert_allclose(value, expected, atol=1e-14)


def heads(num_heads, size, cell=eqx.nn.GRUCell):
    make = lambda key: cell(2, size, key=key)
    cells = eqx.filter_vmap(make)(jr.split(jr.key(0), num_heads))
    x = jnp.ones(2)
    return lambda h: eqx.filter_vmap(lambda cell, h: cell(x, h))(cells, h)


def _lstm_state(num_heads, size):
    return jnp.zeros((num_heads, size)), jnp.zeros((num_heads, size))


#: Steps, their states, and the size and number of blocks; `None` where there are none.
CHOICES = {
    "one head": (heads(1, 4), jnp.zeros((1, 4)), None),
    "GRU heads": (heads(4, 2), jnp.zeros((4, 2)), (2, 4)),
    "LSTM heads": (heads(4, 2, eqx.nn.LSTMCell), _lstm_state(4, 2), (4, 4)),
    "LSTM": (heads(1, 3, eqx.nn.LSTMCell), _lstm_state(1, 3), None),
    "oscillators": (
        lambda s: {"q": s["q"] + 0.1 * s["p"], "p": s["p"] - jnp.sin(s["q"])},
        {"q": jnp.zeros(5), "p": jnp.zeros(5)},
        (2, 5),
    ),
    "diagonal": (
        lambda s: [jnp.tanh(s[0]), s[1] ** 2],
        [jnp.zeros((2, 3)), jnp.zeros(())],
        (1, 7),
    ),
    "complex": (lambda z: 1j * z**2, jnp.zeros(4, complex), (2, 4)),
    "unequal": (
        lambda s: (jnp.cumsum(s[0]), jnp.roll(s[1], 1), jnp.sin(s[2])),
        (jnp.zeros(4), jnp.zeros(3), jnp.zeros(5)),
        (4, 3),
    ),
    "one large, some small": (
        lambda s: (jnp.cumsum(s[0]), jnp.sin(s[1])),
        (jnp.zeros(6), jnp.zeros(2)),
        None,
    ),
    "coupled": (lambda y: y - jnp.mean(y), jnp.zeros(5), None),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses(name):
    step, state, expected = CHOICES[name]
    linearisation, flat = chosen(step, state)
    if expected is None:
        assert isinstance(linearisation, Dense)
        return
    assert isinstance(linearisation, Blockwise)
    order = linearisation.order
    assert (order.size, order.num_blocks) == expected
    check_jacobian(linearisation, flat, order.state_size)


def test_declared_structure_is_recognised():
    """Few tangents where the structure is there, all of them where it is not."""
    step, state, _ = CHOICES["diagonal"]
    linearisation, flat = chosen(step, state, Diagonal())
    assert isinstance(linearisation, Blockwise) and linearisation.order.size == 1
    check_jacobian(linearisation, flat, 7)
    step, state, _ = CHOICES["oscillators"]
    # By the order of keys: momenta first, which makes no difference.
    linearisation, flat = chosen(step, state, PairedDiagonal())
    assert isinstance(linearisation, Blockwise) and linearisation.order.size == 2
    check_jacobian(linearisation, flat, 10)
    for declared in (Diagonal(), PairedDiagonal()):
        assert chosen(lambda y: y - jnp.mean(y), jnp.zeros(6), declared)[0] is declared


def test_too_large_a_mask_is_not_made():
    """Then nothing is known, and that is said."""
    step = lambda y: jnp.sum(jnp.outer(y, y), axis=0)
    # 600 * 600 * 600 entries are more than 2**27.
    assert found(step, size=600) is None
    assert isinstance(Exact().for_map(lambda: None, 600), Dense)


def test_limit_on_bytes_is_handed_on():
    linearisation, _ = chosen(
        lambda y: y - jnp.mean(y), jnp.zeros(5), Exact(max_bytes=7)
    )
    assert linearisation.max_bytes == 7


def test_a_state_that_is_too_large():
    """A mask of a million by a million entries is not even begun."""
    assert found(lambda y: 2 * y, size=1_000_000) is None


def test_blocks_take_memory_too():
    groups = lambda: (0,) * 3 + (1,) * 3
    chosen = Exact(max_bytes=10 * 18 * 8).for_map(groups, 6)
    assert isinstance(chosen, Blockwise)
    assert chosen.fits(10, 6, np.dtype(float)) and not chosen.fits(
        11, 6, np.dtype(float)
    )
    with pytest.raises(ValueError, match="blocks of the Jacobians of 11 steps"):
        chosen.check_size(11, 6, np.dtype(float))
