r"""Many short affine recurrences side by side, on a GPU.

`lanes` of them, each $y_i = A_i y_{i-1} + b_i$ with a state of $n$ entries, take their
`steps` at the same time and know nothing of each other. XLA's scans carry every state
and every partial product to memory and back; here one kernel takes all steps, with
states in registers, and reads $A$ and $b$ once.

Lanes come last in arrays, so that what the threads of a warp read lies side by side. A
program takes a tile of lanes from the first step to the last, by loads, products, sums
and stores alone: programs tell each other nothing, so there is nothing to wait for.

Products are of numbers in the dtype of the arrays. Matrix units would round those of
single precision to TF32, and the residual would stop falling long before rounding.

Nothing here is differentiable by itself; `lax.custom_linear_solve` is what asks for it.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .._foreign import pallas


# At this size 238 of the 255 registers of a thread are taken, in double precision.
_MAX_SIZE = 16

# Up to this size a thread holds the whole of P and d: 20 numbers, before a step and
# after it, are 80 of its 255 registers in double precision.
_MAX_SIZE_PER_THREAD = 4

# A thread asks for at most so many numbers of A and b before it uses the first: all
# these are under way at once, and in double precision take less than 100 registers.
_MAX_LOADS = 48

# A longer program is one that takes longer to compile.
_MAX_UNROLL = 8

# So many rows of A at a time where a thread does not hold all. The compiler takes time
# that grows with the cube of the number of loads (two rows of 16 take it 4 s, four take
# 10 s), and a row that is not known before run time costs a choice between all entries.
_NUM_ROWS = 2

_WARP = 32

# What is read from memory in one piece.
_BYTES_PER_LINE = 128

# For a lane to each thread. With two warps the number of programs on a multiprocessor,
# at most 32, does not bound the number of warps, at most 64.
_NUM_WARPS = 2
_TILE = _NUM_WARPS * _WARP

# Kernels and loop were at most 12 units of rounding apart on the problem that they are
# compared on, whose values are of order one; an error would be of order one as well.
_ROUNDING_UNITS = 1024


def can_run(n: int, dtype: DTypeLike) -> bool:
    """Whether there are kernels for states of `n` entries."""
    return 1 <= n <= _MAX_SIZE and np.dtype(dtype) in (np.float32, np.float64)


def compose(
    A: Float[Array, "steps n n lanes"],
    b: Float[Array, "steps n lanes"],
    reverse: bool = False,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "n n lanes"], Float[Array, "n lanes"]]:
    r"""All steps of a lane as one, $y \mapsto P y + d$.

    The first step is taken first, or last if `reverse`. With `interpret` XLA takes the
    place of the GPU, slowly: for tests.
    """
    num_steps, n, lanes = b.shape
    if num_steps == 1 or lanes == 0:
        return A[0], b[0]
    is_spread = n > _MAX_SIZE_PER_THREAD
    num_columns, tile, num_warps = _compose_tile(n, b.dtype)

    def compose_steps(A_ref, b_ref, P_ref, d_ref):
        mask = _mask(lanes, tile)

        def take(start, count, parts):
            steps = [start + k for k in range(count)]
            steps = [num_steps - 1 - i if reverse else i for i in steps]
            for rows in [_rows(A_ref, b_ref, i, mask) for i in steps]:
                parts = _step(rows, parts)
            return parts

        number = lambda x: jnp.full((1, tile), x, b_ref.dtype)
        if is_spread:
            column = lax.broadcasted_iota(jnp.int32, (num_columns, tile), 0)
            P = [[jnp.where(column == i, number(1), number(0)) for i in range(n)]]
        else:
            P = [[number(i == j) for i in range(n)] for j in range(n)]
        d = [number(0)] * n
        *P, d = _in_rounds(take, num_steps, _unroll(n), [*P, d])
        for i in range(n):
            for j, part in enumerate(P):
                _store(_at(P_ref, i, None if is_spread else j), part[i], mask)
            _store(_at(d_ref, i), d[i], mask)

    shapes = (n, num_columns, lanes), (n, lanes)
    P, d = _call(compose_steps, (A, b), shapes, tile, num_warps, interpret)
    return P[:, :n], d


def run(
    A: Float[Array, "steps n n lanes"],
    b: Float[Array, "steps n lanes"],
    y0: Float[Array, "n lanes"],
    reverse: bool = False,
    *,
    interpret: bool = False,
) -> Float[Array, "steps n lanes"]:
    """The states after each step, from `y0` before the first one.

    If `reverse`, from `y0` after the last one back to the first. `interpret` is as for
    `compose`.
    """
    num_steps, n, lanes = b.shape
    if b.size == 0:
        return b

    def run_steps(A_ref, b_ref, y0_ref, ys_ref):
        mask = _mask(lanes, _TILE)

        def take(start, count, y):
            steps = [start + k for k in range(count)]
            steps = [num_steps - 1 - i if reverse else i for i in steps]
            # Loads come first: as far as a compiler knows, none may pass a store.
            loaded = [_rows(A_ref, b_ref, i, mask) for i in steps]
            for i, rows in zip(steps, loaded, strict=True):
                (y,) = _step(rows, [y])
                for k, y_k in enumerate(y):
                    _store(_at(ys_ref, i, k), y_k, mask)
            return y

        y = [_load(_at(y0_ref, i), mask) for i in range(n)]
        _in_rounds(take, num_steps, _unroll(n), y)

    (ys,) = _call(run_steps, (A, b, y0), (b.shape,), _TILE, _NUM_WARPS, interpret)
    return ys


def are_right(n: int, dtype: DTypeLike, *, interpret: bool = False) -> bool:
    """Whether the kernels do on this machine's GPU what they are meant to do.

    A small random problem is solved by them and by a loop, once in a process for each
    `n` and `dtype`, also while something else is being traced. Pallas is experimental,
    and a compiler for each new GPU is a new compiler: where it is gone or fails, or the
    answer is wrong, there is a warning, and the ordinary scan does the work. There is
    none where there is no such GPU. With `interpret` no GPU is asked for.
    """
    return _are_right(n, np.dtype(dtype), interpret)


@functools.cache
def _are_right(n: int, dtype: np.dtype, interpret: bool) -> bool:
    device = None if interpret else _gpu()
    if not can_run(n, dtype) or (device is None and not interpret):
        return False
    if not _has_pallas():
        return False
    try:
        error = _error(n, dtype, device)
    # A compiler may fail in any way.
    except Exception as e:
        cause = f"could not be run ({type(e).__name__}: {e})"
    else:
        # False for NaN.
        if error <= _ROUNDING_UNITS:
            return True
        cause = f"are wrong by {error:.3g} units of rounding"
    warnings.warn(
        f"`deer_ode` has GPU kernels for affine scans, of which those for {n} entries "
        f"of {dtype} {cause}. The ordinary scan is taken in their place: the answer is "
        "the same, and takes longer.",
        stacklevel=3,
    )
    return False


def _gpu() -> Any:
    """The first CUDA device of this process, if Triton compiles for its kind."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    return device if float(device.compute_capability) >= 8.0 else None


def _error(n: int, dtype: np.dtype, device: Any) -> float:
    """Between kernels and loop, in units of rounding of the largest number.

    On `device`, or interpreted where it is `None`.
    """
    # Rounds of every length and a rest; more than a program, the last one in part.
    num_steps, lanes = 2 * _MAX_UNROLL + 3, 3 * _WARP + 5
    rng = np.random.default_rng(n)
    uniform = lambda *shape: rng.uniform(-1, 1, shape).astype(dtype)
    # Near the identity, so that all steps count in a product of all.
    A = np.eye(n, dtype=dtype)[:, :, None] + uniform(num_steps, n, n, lanes) / (2 * n)
    b, y0 = uniform(num_steps, n, lanes), uniform(n, lanes)

    def solve(A, b, y0):
        interpret = device is None
        return [
            (
                *compose(A, b, reverse, interpret=interpret),
                run(A, b, y0, reverse, interpret=interpret),
            )
            for reverse in (False, True)
        ]

    place = None if device is None else jax.sharding.SingleDeviceSharding(device)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in (A, b, y0)
    ]
    # In two steps, both of which are taken now, whatever is being traced. Under
    # `ensure_compile_time_eval` kernels cannot be traced.
    answers = jax.jit(solve).lower(*shapes).compile()(A, b, y0)
    errors = []
    for answer, order in zip(answers, (1, -1), strict=True):
        y, P, d = y0.astype(np.float64), np.eye(n)[:, :, None], np.zeros((n, 1))
        states = []
        for A_i, b_i in list(zip(A, b, strict=True))[::order]:
            y = np.sum(A_i * y, axis=1) + b_i
            P = np.sum(A_i[:, :, None] * P, axis=1)
            d = np.sum(A_i * d, axis=1) + b_i
            states.append(y)
        expected = P, d, np.stack(states[::order])
        for x, reference in zip(answer, expected, strict=True):
            difference = np.max(np.abs(np.asarray(x) - reference))
            errors.append(difference / np.max(np.abs(reference)))
    # NaN wins.
    return float(np.max(errors)) / float(np.finfo(dtype).eps)


def _compose_tile(n: int, dtype: DTypeLike) -> tuple[int, int, int]:
    """Columns of a tile, lanes of a tile, and warps."""
    if n <= _MAX_SIZE_PER_THREAD:
        return n, _TILE, _NUM_WARPS
    # What one thread cannot hold is spread over several: columns of P, in tiles that
    # have to be powers of two. Columns beyond the last one of P are never looked at.
    # Each of the threads of a lane works out d, which is less than to pad for it. A
    # thread has a column in double precision and two in single: no register is spilt.
    num_columns = 1 << (n - 1).bit_length()
    return num_columns, _BYTES_PER_LINE // np.dtype(dtype).itemsize, num_columns // 2


def _unroll(n: int) -> int:
    """How many steps are loaded at a time."""
    return min(max(_MAX_LOADS // (n * n + n), 1), _MAX_UNROLL)


def _rows_at_a_time(n: int) -> int:
    return n if n <= _MAX_SIZE_PER_THREAD else _NUM_ROWS


def _in_rounds(take: Callable, stop: int, unroll: int, carry: Any) -> Any:
    """`take(start, count, carry)` for `unroll` at a time of what goes from 0 to `stop`,
    then for what is left, so that the length of the program is bounded.
    """
    num_rounds, rest = divmod(stop, unroll)
    if num_rounds == 1:
        carry = take(0, unroll, carry)
    elif num_rounds > 1:
        carry = lax.fori_loop(
            np.int32(0),
            np.int32(num_rounds),
            lambda k, carry: take(k * unroll, unroll, carry),
            carry,
        )
    return take(stop - rest, rest, carry)


# --- arithmetic -----------------------------------------------------------------------
#
# Vectors are lists of tiles `(1, lanes)`, or `(columns, lanes)` where several are side
# by side, spread over threads. All tiles have two axes, so that all are laid out over
# threads in the same way and none has to be moved from one to another.


def _step(rows: Callable, parts: list[list]) -> list[list]:
    """$A y$ for each of `parts` and $A y + b$ for the last one.

    `rows(i)` is row $i$ of $A$, and $b_i$.
    """
    n = len(parts[0])

    def take(start, count, new):
        for i, (row, b_i) in [(start + k, rows(start + k)) for k in range(count)]:
            starts = [None] * (len(parts) - 1) + [b_i]
            entries = [_dot(row, y, b) for y, b in zip(parts, starts, strict=True)]
            new = [_replace(y, i, y_i) for y, y_i in zip(new, entries, strict=True)]
        return new

    return _in_rounds(take, n, _rows_at_a_time(n), parts)


def _dot(row: list, y: list, b: Array | None = None) -> Array:
    first, *terms = [A_k * y_k for A_k, y_k in zip(row, y, strict=True)]
    return sum(terms, first if b is None else b + first)


def _replace(y: list, i: Any, y_i: Array) -> list:
    """`y` with another entry at `i`, which may be known at run time only."""
    if isinstance(i, int):
        return [*y[:i], y_i, *y[i + 1 :]]
    return [jnp.where(i == k, y_i, y_k) for k, y_k in enumerate(y)]


# --- Pallas ---------------------------------------------------------------------------


@functools.cache
def _has_pallas() -> bool:
    """Asked where there is a GPU to use it; said once where it is missing."""
    try:
        pallas()
    except ImportError as e:
        warnings.warn(
            f"`deer_ode` has GPU kernels for affine scans that cannot be used: {e}. "
            "The ordinary scan is taken in their place: the answer is the same, and "
            "takes longer.",
            stacklevel=4,
        )
        return False
    return True


def _mask(lanes: int, tile: int) -> Array | None:
    """Which lanes of this program's tile there are; `None` where there are all."""
    if lanes % tile == 0:
        return None
    lane = lax.broadcasted_iota(jnp.int32, (1, tile), 1)
    return pallas().program_id(0) * tile + lane < lanes


def _at(ref: Any, *index: Any) -> Any:
    """A tile of `ref`: a row of lanes, or all of them for `None` at the end."""
    # The interpreter wants all indices alike, and those of slices are of this dtype.
    dtype = np.dtype(jnp.result_type(int))
    alike = lambda i: lax.convert_element_type(i, dtype)
    *before, row = index
    before = [dtype.type(i) if isinstance(i, int) else alike(i) for i in before]
    if row is None:
        row = slice(None)
    else:
        row = pallas().ds(row if isinstance(row, int) else alike(row), 1)
    return ref.at[*before, row, :]


def _load(ref: Any, mask: Array | None) -> Array:
    return pallas().load(ref, mask=mask)


def _rows(A_ref: Any, b_ref: Any, i: Any, mask: Array | None) -> Callable:
    """What gives row `j` of $A_i$ and of $b_i$: loaded now where a thread holds all."""
    n = b_ref.shape[1]

    def load(j):
        row = [_load(_at(A_ref, i, j, k), mask) for k in range(n)]
        return row, _load(_at(b_ref, i, j), mask)

    if n > _MAX_SIZE_PER_THREAD:
        return load
    return [load(j) for j in range(n)].__getitem__


def _store(ref: Any, value: Array, mask: Array | None) -> None:
    if mask is not None:
        mask = jnp.broadcast_to(mask, value.shape)
    pallas().store(ref, value, mask=mask)


def _call(
    kernel: Callable,
    inputs: tuple[Array, ...],
    shapes: tuple[tuple[int, ...], ...],
    tile: int,
    num_warps: int,
    interpret: bool,
) -> Any:
    """One program for each `tile` of lanes."""
    pl = pallas()

    def spec(shape):
        before = (0,) * (len(shape) - 1)
        return pl.BlockSpec((*shape[:-1], tile), lambda i: (*before, i))

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, inputs[0].dtype) for shape in shapes],
        grid=(pl.cdiv(shapes[0][-1], tile),),
        in_specs=[spec(x.shape) for x in inputs],
        out_specs=[spec(shape) for shape in shapes],
        # One stage: Triton is not to reorder loads by way of shared memory.
        compiler_params=pl.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
    )(*inputs)
