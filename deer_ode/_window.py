r"""Which part of a trajectory is iterated on: all of it, or windows that move along it.

Iterations follow the horizon, not the number of steps. Over a short window Newton's
method needs a few of them whatever comes later, and where a window's worth of the
trajectory is right the window moves on. It always begins at the first step that is not
right yet: what is right is not solved for again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import Mask, State, Trajectory
from ._method import TrajectorySolution, first_nonfinite_step
from ._misc import finite, hold_last_good, is_reasonable, leading_true, state_at
from ._predictor import AbstractPredictor
from ._recurrence import AbstractRecurrence


# So many iterations to get on by a quarter of a window, or to halve the residual.
# Newton's method takes three to five from a good guess, and two or three per window
# once it moves.
_PATIENCE = 8
_QUARTER = 4

# The window has to prove itself for twice as long after each failure, up to so often.
_MOST_DOUBLINGS = 20

# On a CPU windows pay where there are many of them: over a thousand steps that could be
# solved at once they took up to 2.4 times as long. Longer ones than 256 steps were as
# fast where all went well, and slower where it did not. (Another window, of a second
# length, would double what there is to compile.)
_CPU = 256
_CPU_WHOLE = 1024
_ACCELERATOR = (4096, 256)


class Window(eqx.Module):
    r"""Solves window by window where the whole interval at once does not pay.

    A window begins at the first step that is not right yet and moves on as steps become
    right. States that enter it are guessed from the end of the window as it is then, by
    the method's own predictor. If it has neither moved on by a quarter of its length
    nor halved the residual in 8 iterations, a shorter window takes over. The shortest
    one gets a second chance, from the last state that is right, held constant; if that
    fails too, as many steps as it is long are taken sequentially. After a failure the
    longer window is tried again once the shorter one has covered its length, the next
    time twice that, and so on, so that trying in vain costs little.

    ??? cite "References"

        Shih et al. (2023), *Parallel sampling of diffusion models*, for windows that
        slide over a trajectory which is iterated on.
    """

    length: int | tuple[int, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.length is None:
            return
        lengths = self.length if isinstance(self.length, tuple) else (self.length,)
        if not (
            len(lengths) > 0
            and all(type(n) is int and n > 0 for n in lengths)
            and list(lengths) == sorted(set(lengths), reverse=True)
        ):
            raise ValueError(
                "`Window(length)` must be a positive integer, or a tuple of such from "
                f"the longest to the shortest; got {self.length!r}."
            )

    def lengths(self, num_steps: int, is_cpu: bool) -> tuple[int, ...]:
        """The windows for so many steps, from the longest to the shortest."""
        if self.length is None and is_cpu:
            lengths = (num_steps if num_steps <= _CPU_WHOLE else _CPU,)
        elif self.length is None:
            lengths = (num_steps, *_ACCELERATOR)
        elif isinstance(self.length, tuple):
            lengths = self.length
        else:
            lengths = (self.length,)
        return tuple(sorted({min(n, num_steps) for n in lengths}, reverse=True))


Window.__init__.__doc__ = """**Arguments:**

- `length`: how many steps a window spans; or several lengths, from the longest to the
    shortest, each of which is compiled. By default, on a CPU, the whole interval up to
    1,024 steps and 256 where there are more; on accelerators the whole interval, then
    4,096, then 256. Where several steps are taken as one (`chunk` of
    [`Newton`][deer_ode.Newton]) it is as many of these as fit into the length.
"""


class Updated(NamedTuple):
    """What an iteration makes of the part of a trajectory that it is given."""

    ys: Trajectory
    good: Bool[Array, " steps"]
    residual: Trajectory
    error: Float[Array, " steps"]
    """The residual of each step, in units of its tolerance."""
    damping: Float[Array, ""]
    at_rounding: Mask
    """Of which steps residual and correction are no more than rounding."""


class Progress(NamedTuple):
    """A trajectory, and how far it is right."""

    ys: Trajectory
    num_good: Int[Array, ""]
    num_guessed: Int[Array, ""]
    """How many states hold a guess, at least."""
    largest: State
    """What each entry was at most, so far as the trajectory is right."""
    num_newton_steps: Int[Array, ""]
    num_sweeps: Int[Array, ""]
    """The same in units of iterations over the whole trajectory."""
    num_left_over: Int[Array, ""]
    """How many steps were worked on beyond those sweeps."""
    num_windows: Int[Array, ""]
    in_turn: Mask
    residual: Float[Array, ""]
    damping: Float[Array, ""]
    most_damping: Float[Array, ""]
    at_rounding: Mask
    """Of which steps the last correction was no more than rounding."""
    is_nonfinite: Bool[Array, ""]
    """Whether the step after those that are right was not a number when last seen."""
    is_stuck: Bool[Array, ""]
    rung: Int[Array, ""]
    """Which of the windows; their number if none is left."""
    entered: Int[Array, ""]
    """Where this window was begun with."""
    mark: Int[Array, ""]
    """Where the window last got on by a quarter of its length."""
    lowest: Float[Array, ""]
    """The last error that was half of the one before it."""
    since: Int[Array, ""]
    """How many iterations ago one or the other was."""
    num_failures: Int[Array, ""]
    suspects_guess: Bool[Array, ""]
    """Whether the window failed once, and holds its first state for a guess."""
    num_trusted: Int[Array, ""]
    """How many states need not be checked: sequential steps end there."""
    meter: PyTree[Array]
    """The state of the progress meter."""


@dataclasses.dataclass(frozen=True)
class March:
    """Windows of given lengths over one recurrence."""

    recurrence: AbstractRecurrence
    guess: AbstractPredictor
    update: Callable[..., Updated]
    """`(recurrence, ys, largest, damping, num_known, was_at_rounding)`: one iteration.
    """
    lengths: tuple[int, ...]
    max_sweeps: int
    is_patient: bool
    """Whether to go on until `max_sweeps`, even where nothing moves."""
    meter: Any = None
    """A progress meter as Diffrax has them, or `None`."""

    @property
    def num_steps(self) -> int:
        return self.recurrence.num_steps

    def begin(self, ys: Trajectory | None = None) -> Progress:
        """From `ys`, or else from the guess."""
        y0, num_steps = self.recurrence.y0, self.num_steps
        zero = jnp.asarray(0, jnp.int32)
        num_guessed = jnp.asarray(num_steps, jnp.int32)
        is_local = self.guess.anew() is self.guess
        # A window that spans everything is never entered, so it must have its guess.
        spans_all = self.lengths[0] == num_steps
        if ys is None and (spans_all or not is_local):
            ys = self.guess(self.recurrence)
        if ys is None:
            ys = jnp.broadcast_to(y0, (num_steps, *y0.shape))
            num_guessed = zero
        ys = ys.astype(y0.dtype)
        return Progress(
            ys=hold_last_good(y0, ys, is_reasonable(ys, jnp.abs(y0))),
            num_good=zero,
            num_guessed=num_guessed,
            largest=finite(jnp.abs(y0)),
            num_newton_steps=zero,
            num_sweeps=zero,
            num_left_over=zero,
            num_windows=zero + 1,
            in_turn=jnp.zeros(num_steps, bool),
            residual=jnp.zeros((), y0.dtype),
            damping=jnp.zeros((), y0.dtype),
            most_damping=jnp.zeros((), y0.dtype),
            at_rounding=jnp.zeros(num_steps, bool),
            is_nonfinite=jnp.asarray(False),
            is_stuck=jnp.asarray(False),
            rung=zero,
            entered=zero,
            mark=zero,
            lowest=jnp.asarray(jnp.inf, y0.dtype),
            since=zero,
            num_failures=zero,
            suspects_guess=jnp.asarray(False),
            num_trusted=zero,
            meter=None if self.meter is None else self.meter.init(),
        )

    def iterate(self, progress: Progress) -> Progress:
        """Until all is right, or no window gets on."""
        return lax.while_loop(self._goes_on, self._iterate, progress)

    def _show(self, progress):
        if self.meter is None:
            return progress
        # Diffrax's meters keep a Python number's dtype.
        fraction = progress.num_good.astype(jnp.result_type(float)) / self.num_steps
        return progress._replace(meter=self.meter.step(progress.meter, fraction))

    def _goes_on(self, progress):
        return (
            (progress.num_good < self.num_steps)
            & ~progress.is_stuck
            & (progress.rung < len(self.lengths))
            & (progress.num_sweeps < self.max_sweeps)
        )

    def _iterate(self, progress):
        progress = self._show(progress)
        branches = [
            lambda p, rung=rung: self._iterate_window(rung, p)
            for rung in range(len(self.lengths))
        ]
        if len(branches) == 1:
            return branches[0](progress)
        return lax.switch(progress.rung, branches, progress)

    def _iterate_window(self, rung, progress):
        recurrence, num_steps = self.recurrence, self.num_steps
        length = self.lengths[rung]
        if length == num_steps:
            start = jnp.asarray(0, jnp.int32)
            if len(self.lengths) > 1:
                progress = self._guess_entering(start + length, length, progress)
            elif not self.is_patient:
                progress = self._hold_unknown(progress)
            part, ys, was = recurrence, progress.ys, progress.at_rounding
        else:
            start = jnp.minimum(progress.num_good, num_steps - length)
            progress = self._guess_entering(start + length, length, progress)
            part = self._part(progress.ys, start, length)
            ys = lax.dynamic_slice_in_dim(progress.ys, start, length)
            was = lax.dynamic_slice_in_dim(progress.at_rounding, start, length)
        num_known = progress.num_good - start
        updated = self.update(
            part, ys, progress.largest, progress.damping, num_known, was
        )
        progress = self.advance(progress, updated, start, length)
        return self._adapt(rung, progress, jnp.max(updated.error))

    def advance(
        self,
        progress: Progress,
        updated: Updated,
        start: Int[Array, ""] | int,
        length: int,
    ) -> Progress:
        """With what an iteration made of `length` steps from `start` on."""
        num_steps = self.num_steps
        num_good = start + leading_true(updated.good)
        steps = start + jnp.arange(length, dtype=jnp.int32)
        is_new = ((steps >= progress.num_good) & (steps < num_good))[:, None]
        newly = lambda x: jnp.where(is_new, jnp.abs(x), 0)
        # The next step, from a state that is right, is not a number: nor is the answer.
        # Not at once, since that may be a guess's fault, which is replaced by then.
        following = jnp.minimum(num_good - start, length - 1)
        is_finite = jnp.all(jnp.isfinite(updated.residual[following]))
        is_nonfinite = (num_good < start + length) & ~is_finite
        is_stuck = (
            is_nonfinite & progress.is_nonfinite & (num_good == progress.num_good)
        )
        worked = progress.num_left_over + length
        new_ys, at_rounding = updated.ys, updated.at_rounding
        if length != num_steps:
            place = lax.dynamic_update_slice_in_dim
            new_ys = place(progress.ys, new_ys, start, 0)
            at_rounding = place(progress.at_rounding, at_rounding, start, 0)
        return progress._replace(
            ys=new_ys,
            at_rounding=at_rounding,
            num_good=num_good,
            largest=jnp.maximum(
                progress.largest, jnp.max(finite(newly(updated.ys)), axis=0)
            ),
            num_newton_steps=progress.num_newton_steps + 1,
            num_sweeps=progress.num_sweeps + worked // num_steps,
            num_left_over=worked % num_steps,
            residual=jnp.maximum(
                progress.residual, jnp.max(newly(updated.residual), initial=0)
            ),
            damping=updated.damping,
            most_damping=jnp.maximum(progress.most_damping, updated.damping),
            is_nonfinite=is_nonfinite,
            is_stuck=is_stuck,
        )

    def _adapt(self, rung, progress, error):
        """Which window comes next."""
        if self.is_patient:
            return progress
        length, num_good = self.lengths[rung], progress.num_good
        got_on = num_good - progress.mark >= max(length // _QUARTER, 1)
        # Written so that NaN is no improvement, nor what was and is infinite.
        improves = (error <= progress.lowest / 2) & (progress.lowest > 0)
        improves = improves & jnp.isfinite(error)
        since = jnp.where(got_on | improves, 0, progress.since + 1)
        is_last = rung == len(self.lengths) - 1
        moved_on = got_on & (num_good < self.num_steps) & (length < self.num_steps)
        failed = (since >= _PATIENCE) & (num_good < self.num_steps)
        # The guess is suspected before the shortest window is.
        gives_way = failed & progress.suspects_guess if is_last else failed
        step = gives_way.astype(jnp.int32)
        if rung > 0:
            proof = self._doubled(self.lengths[rung - 1], progress)
            step -= (~failed & (num_good - progress.entered >= proof)).astype(jnp.int32)
        progress = progress._replace(
            mark=jnp.where(got_on, num_good, progress.mark),
            lowest=jnp.where(
                got_on, jnp.inf, jnp.where(improves, error, progress.lowest)
            ),
            since=since,
            num_windows=progress.num_windows + moved_on.astype(jnp.int32),
        )
        changed = self._enter(rung + step, progress)._replace(
            num_guessed=jnp.where(failed, num_good, progress.num_guessed),
            num_failures=progress.num_failures + failed.astype(jnp.int32),
            suspects_guess=failed & (step == 0),
            is_nonfinite=jnp.zeros_like(failed),
            damping=jnp.where(failed, 0, progress.damping),
        )
        return _where(failed | (step != 0), changed, progress)

    def _enter(self, rung, progress):
        num_good = progress.num_good
        return progress._replace(
            rung=jnp.asarray(rung, jnp.int32),
            entered=num_good,
            mark=num_good,
            lowest=jnp.full_like(progress.lowest, jnp.inf),
            since=jnp.zeros_like(num_good),
            at_rounding=jnp.zeros_like(progress.at_rounding),
        )

    def _doubled(self, length, progress):
        """A length, doubled for each failure; never more than all."""
        # Compared before it is multiplied, which might overflow.
        factor = jnp.left_shift(1, jnp.minimum(progress.num_failures, _MOST_DOUBLINGS))
        is_more = factor > self.num_steps // length
        return jnp.where(is_more, self.num_steps, length * factor)

    def _part(self, ys, start, length):
        y0 = state_at(self.recurrence.y0, ys, start)
        return self.recurrence.part(start, length, y0)

    def _guess_entering(self, stop, length, progress):
        """Guesses at the states before `stop` that have none."""

        def extend(ys):
            start = jnp.minimum(progress.num_guessed, self.num_steps - length)
            part = self._part(ys, start, length)
            guessed = self.guess.anew()(part)
            is_fine = is_reasonable(guessed, progress.largest)
            guessed = hold_last_good(part.y0, guessed, is_fine)
            # After a failure perhaps it was the guess that led astray.
            last = state_at(self.recurrence.y0, ys, progress.num_guessed)
            guessed = jnp.where(progress.suspects_guess, last, guessed)
            steps = start + jnp.arange(length, dtype=jnp.int32)
            before = lax.dynamic_slice_in_dim(ys, start, length)
            is_new = (steps >= progress.num_guessed)[:, None]
            both = jnp.where(is_new, guessed, before)
            return lax.dynamic_update_slice_in_dim(ys, both, start, 0)

        return progress._replace(
            ys=lax.cond(
                progress.num_guessed < stop, extend, lambda ys: ys, progress.ys
            ),
            # What is guessed beyond is guessed again from a better state.
            num_guessed=jnp.maximum(progress.num_guessed, stop),
        )

    def _hold_unknown(self, progress):
        """A constant for what has no guess, which is after a failure: at first there
        was a guess for all.
        """
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        is_guessed = steps < progress.num_guessed
        return progress._replace(
            ys=hold_last_good(self.recurrence.y0, progress.ys, is_guessed),
            num_guessed=jnp.full_like(progress.num_guessed, self.num_steps),
        )

    def check(self, progress: Progress) -> Progress:
        """Goes back to where the trajectory is none that a sequential solve finds."""
        is_answer = self.recurrence.is_sequential_answer(progress.ys)
        if is_answer is None:
            return progress
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        is_answer = is_answer | (steps < progress.num_trusted)
        num_good = jnp.minimum(progress.num_good, leading_true(is_answer))
        return progress._replace(
            num_good=num_good,
            is_stuck=progress.is_stuck & (num_good == progress.num_good),
        )

    def take_steps(self, progress: Progress) -> Progress:
        """Takes steps one after the other, from the first one that is not right on."""
        num_good = progress.num_good
        if self.is_patient:
            stop = jnp.full_like(num_good, self.num_steps)
        else:
            stop = num_good + self._doubled(self.lengths[-1], progress)
            is_spent = progress.num_sweeps >= self.max_sweeps
            stop = jnp.where(is_spent, self.num_steps, stop)
        # Nothing to do where all is right.
        stop = jnp.clip(stop, num_good, self.num_steps)

        # A failure of the shortest window is, one that was seen only now is not.
        is_counted = progress.rung == len(self.lengths)
        length = min(self.lengths[-1], _CPU)

        def take(carry):
            index, ys, largest = carry
            # A stretch at a time, since a loop that holds all of `ys` copies it.
            start = jnp.minimum(index, self.num_steps - length)

            def step(y, index):
                y = self.recurrence.step(index, y)
                return y, y

            y0 = state_at(self.recurrence.y0, ys, start)
            steps = start + jnp.arange(length, dtype=jnp.int32)
            _, taken = lax.scan(step, y0, steps)
            largest = jnp.maximum(largest, jnp.max(finite(jnp.abs(taken)), axis=0))
            ys = lax.dynamic_update_slice_in_dim(ys, taken, start, 0)
            return start + length, ys, largest

        end, ys, largest = lax.while_loop(
            lambda carry: carry[0] < stop,
            take,
            (num_good, progress.ys, progress.largest),
        )
        indices = jnp.arange(self.num_steps, dtype=jnp.int32)
        progress = progress._replace(
            ys=ys,
            num_good=end,
            largest=largest,
            in_turn=progress.in_turn | ((indices >= num_good) & (indices < end)),
            num_guessed=jnp.where(end > num_good, end, progress.num_guessed),
            num_failures=progress.num_failures + (~is_counted).astype(jnp.int32),
            suspects_guess=jnp.zeros_like(progress.suspects_guess),
            num_trusted=end,
            is_nonfinite=jnp.zeros_like(progress.is_nonfinite),
            is_stuck=jnp.zeros_like(progress.is_stuck),
        )
        return self._enter(len(self.lengths) - 1, progress)

    def run(self, fallback: bool, ys: Trajectory | None = None) -> TrajectorySolution:
        """All the way, or with `fallback=False` as far as it goes; from `ys`, or else
        from the guess.
        """
        attempt = lambda progress: self.check(self.iterate(progress))
        if fallback:
            # One loop, so that an iteration is compiled once.
            progress = lax.while_loop(
                lambda progress: progress.num_good < self.num_steps,
                lambda progress: self.take_steps(attempt(progress)),
                self.begin(ys),
            )
            nonfinite = first_nonfinite_step(progress.ys)
        else:
            progress = attempt(self.begin(ys))
            nonfinite = jnp.where(progress.is_stuck, progress.num_good, -1)
        if self.meter is not None:
            self.meter.close(self._show(progress).meter)
        return TrajectorySolution(
            ys=progress.ys,
            num_good_steps=progress.num_good,
            num_newton_steps=progress.num_newton_steps,
            num_windows=progress.num_windows,
            in_turn=progress.in_turn,
            residual=progress.residual,
            damping=progress.most_damping,
            first_nonfinite_step=nonfinite,
            is_stuck=progress.is_stuck,
        )


def _where(which, yes: Progress, no: Progress) -> Progress:
    return jtu.tree_map(lambda a, b: jnp.where(which, a, b), yes, no)
