"""Measures a case: fair times, compilation, memory, and how far answers differ."""

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._case import KEY, Case, Counted
from ._process import precision


# Programs that take longer in all are run fewer times, and at least once.
_SECONDS_EACH = 20.0

# Shorter calls are timed several at once: the clock and the interpreter take
# microseconds.
_SHORTEST_RUN = 1e-3

# No rounding is so large: what differs by more solved something else, or nothing.
_WRONG = 0.1

#: The rivals that this package brings, by their names in every family.
OURS = ("default", "newton", "newton, shared", "default, ts", "Obreshkov")


def measure(case: Case, repeats: int) -> dict:
    """A row of results; a rival that fails has an `error` in place of figures."""
    with precision(case.dtype):
        arguments = jax.block_until_ready(case.arguments())
        expected, rivals, calls = None, {}, {}
        others = [name for name in case.programs if name != case.reference]
        for name in [case.reference, *others]:
            try:
                program, figures = _compile(case.programs[name], arguments)
                # The first call finds what was compiled.
                answer = program()
                first = _seconds(program, 1)
                if name == case.reference:
                    expected = answer
                if name not in case.not_compared and expected is not None:
                    figures["difference"] = _check(difference(answer, expected))
                del answer
                rivals[name] = figures
                calls[name] = program, first
            # A rival that fails does not stop the others.
            except Exception as error:
                rivals[name] = {"error": _say(error)}
        for name, times in _time_alternating(calls, repeats).items():
            if isinstance(times, str):
                rivals[name] = {"error": times}
            else:
                rivals[name]["median"] = statistics.median(times)
                rivals[name]["minimum"] = min(times)
        newton_steps, fallback_steps = _count(case, rivals, arguments)
    jax.clear_caches()
    ours = [rivals[name].get("difference") for name in OURS if name in rivals]
    return {name: getattr(case, name) for name in KEY} | {
        "rivals": {name: rivals[name] for name in case.programs},
        "newton_steps": newton_steps,
        "fallback_steps": fallback_steps,
        "difference": max((d for d in ours if d is not None), default=None),
    }


def _compile(program: Callable, arguments: tuple) -> tuple[Callable[[], Any], dict]:
    start = time.perf_counter()

    def answer(*args):
        """And nothing else: what is not asked for is not worked out."""
        output = program(*args)
        return output.answer if isinstance(output, Counted) else output

    # One function each, so that nothing is taken from a cache.
    jitted = jax.jit(answer)
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    size = None if analysis is None else int(analysis.temp_size_in_bytes)
    limit = _memory_limit()
    if size is not None and size > limit:
        # A CPU would not refuse, but end the process.
        raise MemoryError(f"{size / 1e9:.1f} GB, of {limit / 1e9:.1f} GB for it")
    # As users call it, which does not compile again, and takes less of Python's time.
    return (lambda: jitted(*arguments)), {"compile_s": seconds, "temp_bytes": size}


def _count(case: Case, rivals: dict, arguments: tuple) -> list[int | None]:
    """How many iterations, and how many sequential steps, of the forced iteration or
    else of the default.
    """
    for name in ("newton", "default"):
        if "error" in rivals.get(name, {"error": "there is none"}):
            continue
        output = jax.jit(case.programs[name])(*arguments)
        if isinstance(output, Counted):
            return [int(jnp.max(x)) for x in output[1:]]
    return [None, None]


def _memory_limit() -> float:
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _time_alternating(
    calls: dict[str, tuple[Callable[[], Any], float]], repeats: int
) -> dict[str, list[float] | str]:
    """Seconds of each run, programs alternating, so that drifts of the machine meet
    them alike; or what stopped one.
    """
    times: dict[str, list[float] | str] = {name: [] for name in calls}
    for i in range(repeats):
        for name, (program, first) in calls.items():
            done = times[name]
            if isinstance(done, str) or i >= max(1, _SECONDS_EACH / first):
                continue
            if first > _SECONDS_EACH:
                done.append(first)
                continue
            count = max(1, math.ceil(_SHORTEST_RUN / first))
            try:
                done.append(_seconds(program, count))
            except Exception as error:
                times[name] = _say(error)
    return times


def _seconds(program: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(program())
    return (time.perf_counter() - start) / count


def difference(actual, expected) -> float:
    """Largest difference over the largest entry, over all leaves together; not a number
    where any entry is none.
    """
    # By NumPy: XLA on CPU was seen to find a maximum of -inf where there are NaNs.
    pairs = [
        (np.asarray(a), np.asarray(e))
        for a, e in zip(jtu.tree_leaves(actual), jtu.tree_leaves(expected), strict=True)
    ]
    if any(a.shape != e.shape for a, e in pairs):
        raise ValueError("the answer has another shape")
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.max([np.max(np.abs(e)) for _, e in pairs])
        off = np.max([np.max(np.abs(a - e)) for a, e in pairs])
        return float(off / np.maximum(largest, np.finfo(largest.dtype).tiny))


def _check(size: float) -> float:
    if not 0 <= size <= _WRONG:
        raise ArithmeticError(f"another answer, off by {size:.1g}")
    return size


def _say(error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}"[:200]
