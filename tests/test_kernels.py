"""GPU kernels, interpreted on a CPU, against the loop; and what they compile from."""

import functools
import pathlib
import re
import sys
import warnings

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
import pytest

from deer_ode import affine_scan
from deer_ode._affine import _kernels
from deer_ode._affine._kernels import are_right, can_run, compose, run

from .helpers import assert_close, pretend_accelerator, rounding, slow


#: More than one tile of any kernel, and the last one in part.
LANES = 69

DTYPES = (np.float32, np.float64)


def elements(num_steps, n, lanes=LANES, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    # Near the identity, so that products of all stay of order one.
    A = rng.uniform(-1, 1, (num_steps, n, n, lanes)) / (2 * n) + np.eye(n)[:, :, None]
    b, y0 = rng.normal(size=(num_steps, n, lanes)), rng.normal(size=(n, lanes))
    return A.astype(dtype), b.astype(dtype), y0.astype(dtype)


def loop(A, b, y0, reverse=False):
    """P, d and all states of each lane, as they are written down."""
    n, lanes = y0.shape
    P, d = np.zeros((n, n, lanes), A.dtype), np.zeros((n, lanes), A.dtype)
    P[np.arange(n), np.arange(n)] = 1
    ys = np.zeros_like(b)
    order = range(len(b))
    for i in reversed(order) if reverse else order:
        P = np.einsum("ijl,jkl->ikl", A[i], P)
        d = np.einsum("ijl,jl->il", A[i], d) + b[i]
        ys[i] = y0 = np.einsum("ijl,jl->il", A[i], y0) + b[i]
    return P, d, ys


@functools.partial(jax.jit, static_argnums=3)
def kernels(A, b, y0, reverse=False):
    return *compose(A, b, reverse, interpret=True), run(
        A, b, y0, reverse, interpret=True
    )


# --- values ---------------------------------------------------------------------------


#: Interpreted kernels take seconds to compile: two of two numbers, one each of three to
#: five, and some of a single number, which compile quickly.
ORDINARY = (
    (1, 1, False, np.float64),
    (1, 2, True, np.float64),
    (1, 37, False, np.float64),
    (1, 37, True, np.float32),
    (2, 2, False, np.float64),
    (2, 37, False, np.float64),
    (3, 1, True, np.float64),
    (4, 1, True, np.float64),
    (5, 37, True, np.float32),
)


CASES = [
    (n, num_steps, reverse, dtype)
    for n in (1, 2, 3, 4, 5, 8, 16)
    for num_steps in (1, 2, 37)
    for reverse in (False, True)
    for dtype in DTYPES
]


@pytest.mark.parametrize(
    "case", slow(CASES, lambda case: case not in ORDINARY), ids=str
)
def test_agrees_with_the_loop(case):
    n, num_steps, reverse, dtype = case
    inputs = elements(num_steps, n, dtype=dtype)
    actual = kernels(*inputs, reverse)
    assert_close(actual, loop(*inputs, reverse), rounding(dtype))


@pytest.mark.parametrize("n", slow((2, 5), lambda n: n == 5))
def test_whole_tiles(n):
    """Where no lane has to be masked."""
    inputs = elements(3, n, lanes=64)
    assert_close(kernels(*inputs), loop(*inputs), rounding())


def test_nothing_to_do():
    A, b, y0 = (jnp.asarray(x) for x in elements(3, 2, lanes=0))
    P, d = compose(A, b)
    assert P.shape == (2, 2, 0) and d.shape == run(A, b, y0)[0].shape == (2, 0)
    A, b, y0 = (jnp.asarray(x) for x in elements(0, 2))
    assert run(A, b, y0).shape == (0, 2, LANES)


@pytest.mark.parametrize("n", slow((2, 5), lambda n: n == 5))
def test_lanes_keep_to_themselves(n):
    """What overflows or is not a number stays in its lane."""
    A, b, y0 = elements(5, n)
    expected = loop(A, b, y0)
    bad = [3, 64, 68]
    b[2, 0, bad[0]] = np.nan
    A[1, :, :, bad[1]] = np.inf
    A[:, :, :, bad[2]] = 1e200
    actual = kernels(A, b, y0)
    for x in actual[1:]:
        assert not np.any(np.all(np.isfinite(x), axis=tuple(range(x.ndim - 1)))[bad])
    others = np.delete(np.arange(LANES), bad)
    others_only = lambda xs: tuple(np.asarray(x)[..., others] for x in xs)
    assert_close(others_only(actual), others_only(expected), rounding())
    # Up to there the lane is right.
    np.testing.assert_allclose(
        np.asarray(actual[2])[:2, :, bad[0]],
        expected[2][:2, :, bad[0]],
        rtol=rounding(),
    )


@pytest.mark.parametrize("axes", ((0, 0, 0), (None, 0, None)), ids=str)
def test_vmap(axes):
    inputs = [elements(3, 2, seed=seed) for seed in range(2)]
    batch = [
        inputs[0][i] if axis is None else np.stack([x[i] for x in inputs])
        for i, axis in enumerate(axes)
    ]
    each = [
        loop(*(inputs[k if axis == 0 else 0][i] for i, axis in enumerate(axes)))
        for k in range(2)
    ]
    actual = jax.vmap(kernels, axes)(*batch)
    assert_close(
        actual, tuple(np.stack(x) for x in zip(*each, strict=True)), rounding()
    )


# --- compilation ----------------------------------------------------------------------


def lowered(fn, *args):
    """What is compiled for a GPU, as far as that can be seen without one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton", DeprecationWarning)
            traced = jax.jit(fn).trace(*args)
            return traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as e:
        # JAX 0.11 does not lower for a GPU where there is none.
        if "No supported GPU devices" not in str(e):
            raise
        pytest.skip(str(e))


def shapes(num_steps, n, dtype, lanes=1000):
    of = lambda *shape: jax.ShapeDtypeStruct((*shape, lanes), dtype)
    return of(num_steps, n, n), of(num_steps, n), of(n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (1, 2, 3, 4, 5, 8, 16))
def test_is_lowered_for_a_gpu(n, dtype):
    both = lambda A, b, y0: (compose(A, b), run(A, b, y0, True))
    text = lowered(both, *shapes(37, n, dtype))
    # Of the kernels only what is around them; the rest is bytes.
    text = re.sub(r'ir = "[^"]*"', "", text)
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    tiles = _kernels._compose_tile(n, dtype)[1], _kernels._TILE
    letter = {np.float32: "f32", np.float64: "f64"}[dtype]
    names = "compose_steps", "run_steps"
    for call, name, tile in zip(calls, names, tiles, strict=True):
        assert f'name = "{name}"' in call
        assert f"grid_x = {-(-1000 // tile)} : i32" in call
        assert f"tensor<37x{n}x{n}x1000x{letter}>" in call
    # Nothing but kernels, and a cut where columns are padded.
    others = set(re.findall(r"stablehlo\.\w+", text)) - {"stablehlo.custom_call"}
    assert others <= ({"stablehlo.slice"} if n == 5 else set())


def test_programs_do_not_grow_with_steps():
    for n in (1, 2, 5):
        sizes = [
            len(lowered(lambda *a: run(*a), *shapes(num_steps, n, np.float32)))
            for num_steps in (37, 8 * 2**10 + 37)
        ]
        assert sizes[1] < 1.1 * sizes[0]


def test_only_other_platforms_need_it():
    """Traced on a CPU for a GPU, and compiled without it."""
    A, b, y0 = (jnp.asarray(x) for x in elements(2, 2))

    @jax.jit
    def either(A, b, y0):
        return lax.platform_dependent(A, b, y0, cuda=run, default=lambda A, b, y0: b)

    assert_close(either(A, b, y0), b, rounding())


# --- whether they are right -----------------------------------------------------------


@pytest.fixture(autouse=True)
def _ask_again():
    asked_once = _kernels._are_right, _kernels._has_pallas
    for fn in asked_once:
        fn.cache_clear()
    yield
    for fn in asked_once:
        fn.cache_clear()


def test_sizes_and_dtypes():
    assert all(can_run(n, dtype) for n in (1, 16) for dtype in DTYPES)
    assert not any(can_run(n, np.float32) for n in (0, 17))
    assert not any(can_run(2, dtype) for dtype in (np.float16, np.int32, jnp.bfloat16))
    assert not are_right(17, np.float32, interpret=True)


class FakeDevice:
    def __init__(self, compute_capability):
        self.compute_capability = compute_capability


@pytest.mark.parametrize("device", (None, FakeDevice("7.5")))
def test_no_gpu_no_kernels(device, monkeypatch):
    """Silently; warnings are errors."""

    def devices(backend):
        assert backend == "cuda"
        if device is None:
            raise RuntimeError("Unknown backend cuda")
        return [device]

    monkeypatch.setattr(jax, "local_devices", devices)
    assert not are_right(2, np.float32)


@pytest.mark.slow(covered_by="test_asked_once_while_tracing")
def test_right_kernels_are_right():
    assert are_right(1, np.float32, interpret=True)
    assert _kernels._error(1, np.dtype(np.float32), None) < 16


def test_asked_once_while_tracing(monkeypatch):
    """Inside of `jit`, `vmap` and a loop, for a value that is known there."""
    asked = []
    error = _kernels._error
    monkeypatch.setattr(_kernels, "_error", lambda *a: asked.append(a) or error(*a))

    def step(x, _):
        return (2 * x if are_right(1, np.float32, interpret=True) else x), None

    @jax.jit
    @jax.vmap
    def fn(x):
        return lax.scan(step, x, length=3)[0]

    assert fn(jnp.ones(2)).tolist() == [8.0, 8.0]
    assert are_right(1, "float32", interpret=True)
    assert len(asked) == 1


def test_wrong_kernels_are_not_taken(monkeypatch):
    true = _kernels.run

    def run(*args, **kwargs):
        return true(*args, **kwargs).at[-1, 0, 40].add(1e-2)

    monkeypatch.setattr(_kernels, "run", run)
    with pytest.warns(UserWarning, match="1 entries of float32 are wrong by .* units"):
        assert not are_right(1, np.float32, interpret=True)
    # Said once.
    assert not are_right(1, np.float32, interpret=True)


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(_kernels, "_error", lambda *_: float("nan"))
    with pytest.warns(UserWarning, match="are wrong by nan units"):
        assert not are_right(1, np.float32, interpret=True)


def test_broken_kernels_are_not_taken():
    """Here: no GPU, and no interpreter."""
    device = jax.devices()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernels, "_gpu", lambda: device)
        with pytest.warns(
            UserWarning, match="could not be run .*ordinary scan is taken"
        ):
            assert not are_right(2, np.float32)


# --- where Pallas is gone -------------------------------------------------------------

PALLAS = "jax.experimental.pallas"
TRITON = "jax.experimental.pallas.triton"


#: What a later JAX may take away.
TAKEN_AWAY = {
    "Pallas": lambda patch: patch.setitem(sys.modules, PALLAS, None),
    "Triton": lambda patch: patch.setitem(sys.modules, TRITON, None),
    "its loads": lambda patch: patch.delattr(f"{TRITON}.load"),
}


@pytest.mark.parametrize("what", TAKEN_AWAY)
def test_a_jax_without_pallas(what, monkeypatch):
    """Said once, with the reason; everything works as where there is no kernel."""
    TAKEN_AWAY[what](monkeypatch)
    monkeypatch.setattr(_kernels, "_gpu", lambda: jax.devices()[0])
    pretend_accelerator(monkeypatch)
    A, b, y0 = (jnp.asarray(x) for x in elements(9, 2, lanes=1))
    solve = jax.jit(lambda: affine_scan(A[..., 0], b[..., 0], y0[..., 0]))
    with pytest.warns(UserWarning) as said:
        actual = solve()
    (warning,) = said
    reason = f"Triton .*JAX {re.escape(jax.__version__)} does not have .*ordinary scan"
    assert re.search(reason, str(warning.message))
    assert_close(np.asarray(actual), loop(A, b, y0)[2][..., 0], rounding())
    # From here on warnings are errors.
    assert not are_right(3, np.float32)
    with pytest.raises(ImportError, match="written in Pallas for Triton"):
        run(A, b, y0)


def test_a_jax_without_pallas_and_without_a_gpu(monkeypatch):
    """Nothing asks for it, so nothing is said."""
    for name in (PALLAS, TRITON):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(_kernels, "_gpu", lambda: None)
    pretend_accelerator(monkeypatch)
    A, b, y0 = (jnp.asarray(x) for x in elements(9, 2, lanes=1))
    actual = jax.jit(lambda: affine_scan(A[..., 0], b[..., 0], y0[..., 0]))()
    assert_close(np.asarray(actual), loop(A, b, y0)[2][..., 0], rounding())


def test_pallas_is_imported_in_one_place():
    package = pathlib.Path(_kernels.__file__).parents[1]
    imports = re.compile(rf"^ *(?:import|from) {PALLAS}\b.*$", re.MULTILINE)
    found = [
        (path.name, line.strip())
        for path in package.rglob("*.py")
        for line in imports.findall(path.read_text())
    ]
    assert found == [
        ("_foreign.py", f"import {PALLAS} as pallas"),
        ("_foreign.py", f"import {TRITON} as triton"),
    ]
