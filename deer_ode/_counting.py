"""What is known of Diffrax's steps while tracing: how many, and what is saved at them.

Plain NumPy, in the dtype in which Diffrax computes times.
"""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._custom_types import StepCounts
from ._foreign import SNAPPED_UNITS, EvenSteps, even_steps, num_even_steps


class KnownSteps(NamedTuple):
    """Steps that Diffrax makes all of."""

    num_steps: int
    saved: tuple[StepCounts | None, ...]
    """For each `SubSaveAt` after how many steps its `ts` are, where they are the ends
    of all steps, or of every so many.
    """


def is_subsaveat(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _saved_times(saveat: diffrax.SaveAt) -> list:
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_subsaveat)
    return [sub.ts for sub in subs]


def _static(x, dtype) -> Any:
    """`x` as numbers known while tracing, or `None`."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    return np.asarray(x).astype(dtype)[()]


def time_dtype(t0, t1, dt0, saveat: diffrax.SaveAt) -> np.dtype:
    """The dtype in which Diffrax computes times; `dt0` may be `None`."""
    times = [t0, t1, dt0, *_saved_times(saveat)]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(t for t in times if t is not None))
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    return np.dtype(dtype)


def count_even_steps(t0, t1, dt0, saveat: diffrax.SaveAt) -> tuple[int | None, bool]:
    """How many, and whether it makes all of them: `None` where that is not static, or
    makes no sense.
    """
    dtype = time_dtype(t0, t1, dt0, saveat)
    t0, t1, dt0 = (_static(t, dtype) for t in (t0, t1, dt0))
    if t0 is None or t1 is None or dt0 is None:
        return None, False
    if not np.isfinite(t1 - t0) or not abs(dt0) > 0:
        return None, False
    if not abs((t1 - t0) / dt0) < np.iinfo(np.int32).max:
        return None, False
    num_steps = num_even_steps(t0, t1, dt0)
    if num_steps == 1 and (t1 - (t0 + dt0)) * np.sign(dt0) > 0:
        # Rounding leaves it short of `t1`, and Diffrax takes what is left for a second.
        return 2, False
    # Whether a step ends that close to `t1` must not depend on rounding. Where one of
    # them ends is rounded four times, on each side.
    units = (SNAPPED_UNITS + 10) * max(np.spacing(abs(t0)), np.spacing(abs(t1)))
    left = [abs(t1 - t0) / num_steps]
    if num_steps > 1:
        left.append(abs(t1 - t0) - abs(dt0))
    return num_steps, bool(min(left) > units)


def count_resumed_steps(
    state: tuple, t0, t1, dt0, saveat: diffrax.SaveAt
) -> int | None:
    """How many steps a solve makes that goes on from the `controller_state` of another
    with `ConstantStepSize`, up to rounding; `None` where that is not static.

    The first step is `dt0` long. Those after it end where the grid of the solve before
    would have its ends if it went on.
    """
    dtype = time_dtype(t0, t1, dt0, saveat)
    t0, t1, dt0 = (_static(t, dtype) for t in (t0, t1, dt0))
    even = EvenSteps(*(_static(x, np.float64) for x in state))
    if any(x is None for x in (t0, t1, dt0, *even)):
        return None
    # Its times are counted forwards, as Diffrax has them.
    direction = 1 if t0 < t1 else -1
    first, last = direction * (t0 + dt0), direction * t1
    if t0 == t1 or first >= last:
        return 1
    if even.total == 0:
        return None
    # Fewer units of rounding than end the solve: one step too many does no harm.
    units = (SNAPPED_UNITS - 50) * max(np.spacing(abs(t0)), np.spacing(abs(t1)))
    last = np.float64(last) - units
    if even.total < 0:
        more = (last - first) / even.end
    else:
        length = even.end - even.start
        more = even.total * (last - even.start) / length - even.count
    return 1 + max(1, int(np.ceil(more))) if more < np.iinfo(np.int32).max else None


def count_steps(
    controller: diffrax.AbstractStepSizeController,
    t0,
    t1,
    dt0,
    saveat: diffrax.SaveAt,
    max_steps: int | None,
) -> tuple[int | None, KnownSteps | None]:
    """At most how many steps there are, and which they are, as far as it is known.

    If they are known, they are part of what a compiled program is for.
    """
    dtype = time_dtype(t0, t1, dt0, saveat)
    if isinstance(controller, diffrax.StepTo):
        num_steps = controller.ts.shape[0] - 1
        points, units = _static(controller.ts, dtype), 0
        # Diffrax sees to it that they begin at `t0` and end at `t1`.
        is_exact = points is not None and _is_monotonic(points)
    elif isinstance(controller, diffrax.ConstantStepSize):
        num_steps, is_exact = count_even_steps(t0, t1, dt0, saveat)
        # Times that are worked out in another way differ by rounding, twice in either.
        points, units = None, 4
        if max_steps is not None:
            # Times in arrays may be others in the next call of one program.
            is_exact = is_exact and all(type(t) in (int, float) for t in (t0, t1, dt0))
    else:
        return None, None
    if num_steps is None or not is_exact:
        return num_steps, None
    if max_steps is not None and num_steps > max_steps:
        return num_steps, None
    times = [_static(ts, dtype) for ts in _saved_times(saveat)]
    saved: tuple[StepCounts | None, ...] = (None,) * len(times)
    if any(ts is not None and ts.size > 0 for ts in times):
        if points is None:
            points = _points_of_even_steps(t0, t1, dt0, num_steps, dtype)
        saved = tuple(_saved_after(points, ts, units) for ts in times)
    return num_steps, KnownSteps(num_steps, saved)


def _is_monotonic(points: np.ndarray) -> bool:
    steps = np.diff(points)
    return bool(np.all(steps > 0) or np.all(steps < 0))


def _points_of_even_steps(t0, t1, dt0, num_steps: int, dtype) -> np.ndarray:
    """Up to rounding, which XLA does in its own way."""
    t0, t1, dt0 = (_static(t, dtype) for t in (t0, t1, dt0))
    first = t0 + dt0 if num_steps > 1 else t1
    _, ends = even_steps(t0, first, t1, num_steps, np)
    return np.concatenate([[t0], ends])


def _patterns(num_steps: int, num_saved: int) -> list[StepCounts]:
    """The ends of all steps, or of every $k$-th, with `t0` or without."""
    out = []
    if num_saved > 1 and num_steps % (num_saved - 1) == 0:
        out.append(range(0, num_steps + 1, num_steps // (num_saved - 1)))
    if 0 < num_saved <= num_steps:
        stride = num_steps // num_saved
        out.append(range(stride, num_steps + 1, stride))
    return [counts for counts in out if len(counts) == num_saved]


def _saved_after(points: np.ndarray, ts, units: int) -> StepCounts | None:
    """After how many steps `ts` are, up to so many units of rounding."""
    if ts is None:
        return None
    for counts in _patterns(len(points) - 1, ts.size):
        ends = points[counts.start :: counts.step]
        slack = units * np.spacing(np.maximum(abs(points[0]), np.abs(ends)))
        if np.all(np.abs(ends - ts) <= slack):
            return counts
    return None
