"""Every performance decision, made once, and every question about the platform.

A solve is planned before it is traced: which path, over which windows, in which memory.
No other module asks for the platform or holds a constant that was tuned. Each constant
says where its value comes from.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.lax as lax
import jax.numpy as jnp


Platform = Literal["cpu", "accelerator"]

# --- constants ----------------------------------------------------------------------

# Accelerators: shorter sequences end before an iteration of the whole has been
# launched. Reasoned, not measured.
_SHORT = 64

# Accelerators: from this size on the published speed-up over the loop is 1.3 at most,
# since the work of the scan grows with its cube (Lim et al. 2024, figure 2).
_LARGE = 64

# The window. Of Lorenz and Kepler windows of 64, 256 and 1,024 steps took 2.7, 3.0 and
# 3.3, and 1.3, 1.3 and 1.4 updates per step (JAX 0.10); of Lorenz by Heun over 6,000
# steps, after the whole interval, 256 leave no sequential step and 1,024 leave 3,307.
_WINDOW = 256

# CPU: up to so many steps the whole interval is the window. Over 1,024 steps or fewer
# windows took up to 2.4 times as long (2 cores, JAX 0.10). For more steps the whole
# interval is not tried: it would double the time of compilation.
_CPU_WHOLE = 1024

# CPU: from so many steps on the members of a batch (`vmap`) are solved sequentially, as
# each of them can use both cores. Reasoned, not measured.
_LONG = 1024

# CPU: the exact Jacobians of so many steps stay in its cache. With windows of 128 to
# 512 steps gradients took 0.5 to 1.0 times as long as with all at once (JAX 0.10).
_CPU_TANGENT_WINDOW = 512

# The relative tolerance of an adaptive guess. Of a pendulum near the top and Kepler's
# orbit over 1,000 to 20,000 steps by Tsit5, 1e-4, 1e-5 and 1e-6 left 5, 4 to 5 and 3 to
# 5 iterations. Implicit steps for stiff equations: 58 steps for Robertson's reaction,
# 413 for Van der Pol's oscillator with mu = 100 (JAX 0.12).
_GUESS_RTOL = 1e-6

# Its absolute tolerance, in units of the relative one times the largest initial entry.
# Reasoned, not measured: entries of a thousandth of the largest are still resolved.
GUESS_ATOL = 1e-3

# The most attempts of an adaptive guess: as a fraction of the steps, and beside those.
# An attempt takes twice the work of a step of Tsit5, so on a long grid at most half of
# that of a sequential solve (reasoned, not measured). With 64 in place of 256 attempts
# Robertson, over nine decades of time, took 30 iterations in place of 5.
_ATTEMPTS = 0.25
_FEW_ATTEMPTS = 256

# The fewest steps of an adaptive guess, if the grid has so many. A stiff equation with
# a slow force, 10 units of time long, was guessed in steps of 3, and was off by 0.3
# between them (JAX 0.12).
FEWEST_GUESS_STEPS = 32

# Meshes for a tolerance. Into how many candidates each step of the loose solve is cut,
# whose order is higher; and how many there are without one. Reasoned, not measured.
MESH_CUTS = 4
MESH_UNIFORM = 128

# By how much their steps grow or shrink per unit of time: a step is at most half as
# long again as the one beside it. With a bound per step of the mesh before, in place of
# one per unit of time, a jump of the field took 300 steps for 56 (JAX 0.12).
MESH_GROWTH = 0.5

# The loosest relative tolerance that is aimed at. On a coarser mesh the solution's fast
# phases lie elsewhere than in the loose solve: with 1e-3 Van der Pol's oscillator
# (mu = 5) and Kepler's orbit (e = 0.9) took 9 and 7 meshes, with 1e-4 two (JAX 0.12).
MESH_LOOSEST = 1e-4

# A step is not divided into more than so many at once. Reasoned, not measured.
MESH_MOST_PARTS = 50

# How far the states are perturbed from which the errors of the first meshes are taken,
# in units of the smallest entry's tolerance and the square root of how many entries
# there are. Decay chains and heat equations (DETEST B2, C2, C3, 3 to 10 entries; 1e-3
# to 1e-10, JAX 0.12): one mesh of 0.92 to 1.5 times Diffrax's steps in two to four
# iterations, where without it there were two of up to 2.5 times in 5 to 14. With a
# third of it some are not stable; nor is a heat equation of 40 entries with half of it
# (852 steps, two meshes, 48 iterations; 118 in one and two, Diffrax 118).
MESH_PERTURBATION = 2.5

# Room for the steps that follow from a tolerance, in states: so many bytes at first and
# at most, and at most so many steps. Reasoned, not measured.
_FIRST_BYTES = 2**27
_ROOM_BYTES = 2**32
_MOST_ROOM = 2**20

# CPU: operations per second of an iteration (reasoned, 2 cores), and how many
# iterations a solve takes. A solve that takes more than a minute is worth a warning.
_OPERATIONS_PER_SECOND = 1e10
_USUAL_ITERATIONS = 5
_MOST_SECONDS = 60

# Elimination of blocks of up to so many rows is written out as arithmetic: one kernel,
# three to six times as fast as a call of LAPACK for each. Beyond it compiles slowly and
# gains nothing (JAX 0.10).
_WRITTEN_OUT = 4

# CPU: up to this size elimination of all blocks at once takes less time than a call of
# LAPACK for each, whose threads wait for each other: of 100 blocks of 32 rows 12 ms in
# place of 3,700 on busy cores, of 64 rows 130 in place of 60 to 3,900 (JAX 0.12).
_IN_A_LOOP = 64

# CPU: up to this size XLA is quicker with multiply-and-add than with a batched matrix
# product, which costs a call per matrix. No figures were kept, nor is it measured with
# JAX 0.12; `python -m benchmarks --only affine` would show it.
SMALL_MATRIX = 8

# Up to this size sums of products are written out, so that they fuse with what is
# around them. No figures were kept either.
TINY_MATRIX = 4

# A loop over sequential steps after windows writes at most so many states at once: one
# that holds the whole trajectory would copy it. Reasoned, not measured.
STRETCH = 256

# Of a loop over maps with room for more steps than are made, so many are left out or
# made together. With 32 in place of 256 the gradient of 19 steps of a network, with
# room for 4,096, took 0.27 ms for 0.87; of 91 steps of Lotka--Volterra 0.18 for 0.16
# (JAX 0.12). Stretches of stretches gain nothing.
PADDED_STRETCH = 32

# Bytes of the Jacobians of implicit steps that are taken side by side. Reasoned, not
# measured: as much as stays in a large cache, and keeps a GPU busy.
_MOST_BYTES = 2**26

# Operations per entry to make a Jacobian an array of its own. Derivatives through cheap
# stages are one kernel with the rest: with one Jacobian for all, iterations took 1.0 to
# 1.5 times as long on Lotka--Volterra, a rigid body and Henon--Heiles, and 0.4 to 0.8
# times as long on networks of 2 to 16 states (JAX 0.10).
_WORK_OF_ENTRY = 200

# --- the platform -------------------------------------------------------------------

_planned: contextvars.ContextVar[Platform | None] = contextvars.ContextVar(
    "platform", default=None
)


@contextlib.contextmanager
def tracing_for(platform: Platform) -> Iterator[None]:
    """What is traced within is for this platform, whether it is there or not."""
    token = _planned.set(platform)
    try:
        yield
    finally:
        _planned.reset(token)


def default_platform() -> Platform:
    """What is traced now is for: an accelerator, unless JAX's default backend is a CPU,
    or `tracing_for` says otherwise.
    """
    known = _planned.get()
    if known is not None:
        return known
    return "cpu" if jax.default_backend() == "cpu" else "accelerator"


def by_platform(run: Callable[[Platform], Any]) -> Any:
    """`run(platform)` for the platform that the program is compiled for.

    `jax.lax.platform_dependent`, but within another call the platform is known, and
    where JAX's default backend is a CPU nothing else is traced, which would take as
    long as all the rest. (Exported from there to accelerators, a program does as on a
    CPU, with the same answer.)
    """
    if _planned.get() is not None or default_platform() == "cpu":
        return run(default_platform())

    def on(platform: Platform) -> Callable[[], Any]:
        def traced():
            with tracing_for(platform):
                return run(platform)

        return traced

    return lax.platform_dependent(cpu=on("cpu"), default=on("accelerator"))


# --- plans --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a recurrence is solved on a platform. Lengths are in steps of the iteration,
    `chunk` steps of the recurrence each.
    """

    path: Literal["sequential", "newton"]
    platform: Platform = "cpu"
    whole_first: bool = True
    """Whether to iterate over the whole interval before windows."""
    window: int | None = None
    """The length of the sliding window; `None` for the whole interval alone."""
    chunk: int = 1
    """How many steps are taken as one."""
    is_batch_sequential: bool = False
    """Whether the members of a batch are solved sequentially."""
    linearisation: Any = None
    """Which Jacobian is used, chosen by its structure; `None` for the method's own."""


def guess_tolerance(rtol: float | None, dtype: Any) -> float:
    """The relative tolerance of an adaptive guess, given or by default: no tighter than
    rounding allows.
    """
    rtol = _GUESS_RTOL if rtol is None else rtol
    return max(rtol, 64 * float(jnp.finfo(dtype).eps))


def room_for_steps(state_size: int, first: int) -> tuple[int, int]:
    """For how many steps there is room at first, if not for `first`; and at most."""
    rows = lambda num_bytes: max(64, num_bytes // (8 * max(state_size, 1)))
    first = min(first, rows(_FIRST_BYTES))
    return first, max(first, min(_MOST_ROOM, rows(_ROOM_BYTES)))


def most_attempts(num_steps: int) -> int:
    """The most attempted steps of an adaptive guess at a trajectory of `num_steps`."""
    return int(_ATTEMPTS * num_steps) + _FEW_ATTEMPTS


def prefers_sequential(recurrence: Any, linearisation: Any, platform: Platform) -> bool:
    """Whether sequential steps take less time than iterations."""
    if not recurrence.prefers_sequential:
        return False
    if platform == "cpu":
        return True
    if not recurrence.is_map:
        return False
    if recurrence.num_steps < _SHORT:
        return True
    # Without structure in the Jacobian the scan multiplies whole matrices.
    is_large = recurrence.y0.shape[0] >= _LARGE
    return is_large and recurrence.choose(linearisation).is_dense


def plan_newton(
    recurrence: Any,
    linearisation: Any,
    window: int | Literal["default"] | None,
    chunk: int | None,
    platform: Platform,
) -> Plan:
    """Newton's method over windows of given or default length. Where the Jacobians of a
    window do not fit into memory a default one is shortened, and of an explicit one
    several steps are taken as one.
    """
    total, state_size = recurrence.num_steps, recurrence.y0.shape[0]
    if total == 0:
        return Plan("newton", platform)
    linearisation = recurrence.choose(linearisation)
    fits = lambda n: linearisation.fits(n, state_size, recurrence.y0.dtype)
    is_default = window == "default"
    if window == "default":
        is_short = platform == "cpu" and total <= _CPU_WHOLE
        length = total if is_short else min(_WINDOW, total)
    else:
        length = total if window is None else min(window, total)
    if chunk is None:
        can_choose = not is_default and recurrence.is_explicit
        chunk = _chunk_that_fits(length, fits) if can_choose else 1
    chunk = min(chunk, total)
    num_chunks = -(-total // chunk)
    length = num_chunks if length == total else max(1, length // chunk)
    while is_default and length > 1 and not fits(length):
        length = -(-length // 2)
    whole_first = is_default and platform != "cpu" and fits(num_chunks)
    return Plan(
        "newton",
        platform,
        whole_first=window is None or (whole_first and length < num_chunks),
        window=None if window is None else length,
        chunk=chunk,
        is_batch_sequential=platform == "cpu" and total >= _LONG,
        linearisation=linearisation,
    )


def _chunk_that_fits(num_steps: int, fits: Callable[[int], bool]) -> int:
    """The smallest power of two steps per chunk so that one Jacobian of each chunk fits
    into memory; all steps if there is none.
    """
    size = 1
    while size < num_steps and not fits(-(-num_steps // size)):
        size *= 2
    return min(size, num_steps)


def tangent_window(
    num_steps: int, fits: Callable[[int], bool], platform: Platform
) -> int:
    """How many exact Jacobians the derivative holds at a time."""
    length = min(_CPU_TANGENT_WINDOW, num_steps) if platform == "cpu" else num_steps
    while length > 1 and not fits(length):
        length = -(-length // 2)
    return length


def estimated_minutes(num_steps: int, state_size: int) -> float | None:
    """How long Newton's method takes with dense Jacobians, if that is worth a warning:
    more than a minute on a CPU. A model's figure.
    """
    seconds = _USUAL_ITERATIONS * dense_operations(num_steps, state_size)
    seconds = seconds / _OPERATIONS_PER_SECOND
    is_long = default_platform() == "cpu" and seconds >= _MOST_SECONDS
    return seconds / 60 if is_long else None


def dense_operations(num_steps: int, state_size: int) -> float:
    """Floating-point operations of one iteration with dense Jacobians."""
    return 4.0 * num_steps * state_size**3


# --- parts of a step ----------------------------------------------------------------


def elimination(
    num_rows: int, platform: Platform
) -> Literal["written out", "in a loop", "lapack"]:
    """How blocks of `num_rows` equations are solved, many at a time."""
    if num_rows <= _WRITTEN_OUT:
        return "written out"
    is_in_a_loop = platform == "cpu" and num_rows <= _IN_A_LOOP
    return "in a loop" if is_in_a_loop else "lapack"


def steps_at_a_time(bytes_per_step: int) -> int:
    """How many implicit steps are taken side by side."""
    return max(1, _MOST_BYTES // max(bytes_per_step, 1))


def shares_jacobian(
    num_stages: int, work_of_field: float | None, state_size: int, degree: int
) -> bool:
    """Whether one Jacobian for all stages, in a series of `degree` powers, is less work
    than tangents through the stages of a field of so many operations.
    """
    # No count of operations is available: honour the request.
    if work_of_field is None:
        return True
    saved = (num_stages - 1) * state_size * work_of_field
    return saved > 2 * degree * state_size**3 + _WORK_OF_ENTRY * state_size**2
