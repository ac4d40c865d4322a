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


class KnownSteps(NamedTuple):
    """Steps that Diffrax makes all of."""

    num_steps: int
    saved: tuple[StepCounts | None, ...]
    """For each `SubSaveAt` after how many steps its `ts` are, where all of them are
    ends of steps.
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


def num_even_steps(t0: np.floating, t1: np.floating, dt0: np.floating) -> int:
    """How many steps `ConstantStepSize` makes, by the rule of Diffrax's controller."""
    # The next number, so that rounding of `dt0` makes no extra step.
    longest = np.nextafter(abs(dt0), dt0.dtype.type(np.inf))
    return max(1, int(np.ceil(abs(t1 - t0) / longest)))


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
    num_steps = num_even_steps(t0, t1, dt0)
    if num_steps == 1 and (t1 - (t0 + dt0)) * np.sign(dt0) > 0:
        # Rounding leaves it short of `t1`, and Diffrax takes what is left for a second.
        return 2, False
    # A step that ends within a hundred units of rounding of `t1` is the last one. The
    # first one is `dt0` long, the others divide the interval.
    units = 200 * max(np.spacing(abs(t0)), np.spacing(abs(t1)))
    left = [abs(t1 - t0) / num_steps]
    if num_steps > 1:
        left.append(abs(t1 - t0) - abs(dt0))
    return num_steps, bool(min(left) > units)


def count_steps(
    controller: diffrax.AbstractStepSizeController, t0, t1, dt0, saveat: diffrax.SaveAt
) -> tuple[int | None, KnownSteps | None]:
    """At most how many steps there are, and which they are, as far as it is known."""
    dtype = time_dtype(t0, t1, dt0, saveat)
    if isinstance(controller, diffrax.StepTo):
        bound = controller.ts.shape[0] - 1
        points = _given_points(controller.ts, t0, t1, dtype)
        slack = 0.0
    elif isinstance(controller, diffrax.ConstantStepSize):
        bound, is_exact = count_even_steps(t0, t1, dt0, saveat)
        points = _even_points(t0, t1, dt0, bound, dtype) if bound and is_exact else None
        # Times that are worked out in another way differ by rounding, twice in either.
        slack = 4 * _unit(t0, t1, dtype) if is_exact else 0.0
    else:
        return None, None
    if points is None:
        return bound, None
    saved = tuple(_saved_at(points, ts, slack) for ts in _saved_times(saveat))
    return bound, KnownSteps(len(points) - 1, saved)


def _unit(t0, t1, dtype) -> float:
    return float(np.spacing(max(abs(dtype.type(t0)), abs(dtype.type(t1)))))


def _given_points(ts, t0, t1, dtype) -> np.ndarray | None:
    """Where `StepTo(ts)` is sure to make all steps."""
    points, t0, t1 = (_static(t, dtype) for t in (ts, t0, t1))
    if points is None or t0 is None or t1 is None:
        return None
    is_whole = points[0] == t0 and points[-1] == t1
    steps = np.diff(points) * np.sign(t1 - t0)
    return points if is_whole and np.all(steps > 0) else None


def _even_points(t0, t1, dt0, num_steps: int, dtype) -> np.ndarray:
    t0, t1, dt0 = (_static(t, dtype) for t in (t0, t1, dt0))
    points = t0 + (t1 - t0) * (np.arange(num_steps + 1) / num_steps).astype(dtype)
    if num_steps > 1:
        points[1] = t0 + dt0
    points[-1] = t1
    return points


def _saved_at(points: np.ndarray, ts, slack: float) -> StepCounts | None:
    ts = _static(ts, points.dtype)
    if ts is None or ts.size == 0:
        return None
    direction = np.sign(points[-1] - points[0])
    after = np.searchsorted(direction * points, direction * ts)
    after = np.clip(after, 1, len(points) - 1)
    before = after - 1
    is_before = np.abs(points[before] - ts) < np.abs(points[after] - ts)
    counts = np.where(is_before, before, after)
    if not np.all(np.abs(points[counts] - ts) <= slack):
        return None
    first, *rest = counts.tolist()
    stride = rest[0] - first if rest else 1
    even = range(first, first + len(counts) * stride, stride) if stride > 0 else ()
    return even if list(even) == [first, *rest] else (first, *rest)
