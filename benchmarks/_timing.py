"""Fair timing of several programs in one process."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def time_alternating(
    programs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """Times all programs, alternating, so that drifts of the machine meet them alike.

    The first call of each, which compiles, is timed by itself; a second warms up. Every
    call is waited for. Seconds: `first`, `median`, `minimum`.
    """
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for name, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program())
        first[name] = time.perf_counter() - start
        jax.block_until_ready(program())
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "first": first[name],
            "median": statistics.median(times[name]),
            "minimum": min(times[name]),
        }
        for name in programs
    }
