r"""From Newton iterations to a solution.

First the iteration runs over the whole interval. Steps that do not converge there are
left to a window that slides along the trajectory: it begins at the first step that has
not converged, and advances as steps converge. Where the window does not advance, steps
are sequential. The second part is a loop of its own, entered only if the first did not
converge, so that a batch of easy problems never runs it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._custom_types import Trajectory
from ._method import TrajectorySolution, first_nonfinite_step
from ._misc import (
    finite,
    hold_last_good,
    is_reasonable,
    leading_true,
    select,
    state_at,
)
from ._plan import STRETCH, Plan
from ._predictor import AbstractPredictor
from ._progress import Patience, Progress, Tally, Updated
from ._recurrence import AbstractRecurrence


# The number of sequential steps doubles with each failure, at most so often.
_MOST_DOUBLINGS = 20


@dataclasses.dataclass(frozen=True)
class Solve:
    """One recurrence, solved as planned."""

    recurrence: AbstractRecurrence
    guess: AbstractPredictor
    update: Callable[..., Updated]
    """`(recurrence, ys, largest, damping, num_known, was_at_rounding)`: one iteration.
    """
    plan: Plan
    max_steps: int
    """The most iterations over the whole interval, or as much work over windows."""
    meter: Any = None
    """A progress meter as Diffrax has them, or `None`."""

    @property
    def num_steps(self) -> int:
        return self.recurrence.num_steps

    @property
    def window(self) -> int:
        """The length of the window; where there is none, of the whole interval."""
        return self.num_steps if self.plan.window is None else self.plan.window

    @property
    def spans_all(self) -> bool:
        return self.plan.whole_first or self.window == self.num_steps

    def begin(self, ys: Trajectory | None = None) -> Progress:
        """From `ys`, or else from the guess."""
        y0, num_steps = self.recurrence.y0, self.num_steps
        zero = jnp.asarray(0, jnp.int32)
        num_guessed = jnp.asarray(num_steps, jnp.int32)
        is_local = self.guess.for_window() is self.guess
        if ys is None and (self.spans_all or not is_local):
            ys = self.guess(self.recurrence)
        if ys is None:
            ys = jnp.broadcast_to(y0, (num_steps, *y0.shape))
            num_guessed = zero
        ys = ys.astype(y0.dtype)
        none, no = jnp.zeros((), y0.dtype), jnp.asarray(False)
        nowhere = jnp.zeros(num_steps, bool)
        return Progress(
            ys=hold_last_good(y0, ys, is_reasonable(ys, jnp.abs(y0))),
            num_good=zero,
            largest=finite(jnp.abs(y0)),
            damping=none,
            at_rounding=nowhere,
            is_nonfinite=no,
            is_stuck=no,
            patience=Patience.at(zero, y0.dtype),
            tally=Tally(zero, none, zero + 1, none, none, nowhere),
            num_guessed=num_guessed,
            suspects_guess=no,
            gives_up=no,
            num_failures=zero,
            is_checked=jnp.asarray(not self.recurrence.has_other_solutions),
            num_trusted=zero,
            meter=None if self.meter is None else self.meter.init(),
        )

    def _show(self, progress: Progress) -> Progress:
        if self.meter is None:
            return progress
        # Diffrax's meters keep a Python number's dtype.
        fraction = progress.num_good.astype(jnp.result_type(float)) / self.num_steps
        return progress._replace(meter=self.meter.step(progress.meter, fraction))

    def _is_running(self, progress: Progress) -> Bool[Array, ""]:
        return (
            (progress.num_good < self.num_steps)
            & ~progress.is_stuck
            & (progress.tally.work < self.max_steps)
        )

    # --- the whole interval ---------------------------------------------------------

    def whole(self, progress: Progress) -> Progress:
        """Iterates over all steps: while there is progress, or if there is no window to
        follow, to the limit.
        """
        is_patient = self.plan.window is None

        def goes_on(progress):
            is_spent = progress.patience.is_spent & (not is_patient)
            return self._is_running(progress) & ~is_spent

        def iterate(progress):
            progress = self._show(progress)
            updated = self.update(
                self.recurrence,
                progress.ys,
                progress.largest,
                progress.damping,
                progress.num_good,
                progress.at_rounding,
            )
            progress = self.advance(progress, updated, 0, self.num_steps)
            patience, _ = progress.patience.after(
                progress.num_good, jnp.max(updated.error), self.num_steps
            )
            return progress._replace(patience=patience)

        return lax.while_loop(goes_on, iterate, progress)

    def advance(
        self,
        progress: Progress,
        updated: Updated,
        start: Int[Array, ""] | int,
        length: int,
    ) -> Progress:
        """With what an iteration made of `length` steps from `start` on."""
        num_steps, tally = self.num_steps, progress.tally
        num_good = start + leading_true(updated.good)
        is_end = num_good >= self.recurrence.num_active
        num_good = jnp.where(is_end, num_steps, num_good)
        steps = start + jnp.arange(length, dtype=jnp.int32)
        is_new = (steps >= progress.num_good) & (steps < num_good)
        is_new = (is_new & (steps < self.recurrence.num_active))[:, None]
        newly = lambda x: jnp.where(is_new, jnp.abs(x), 0)
        # If the step after the converged ones is not finite, neither is the answer. A
        # bad guess may be the cause, but is replaced after one iteration.
        following = jnp.minimum(num_good - start, length - 1)
        is_finite = jnp.all(jnp.isfinite(updated.residual[following]))
        is_nonfinite = (num_good < start + length) & ~is_finite
        is_stuck = (
            is_nonfinite & progress.is_nonfinite & (num_good == progress.num_good)
        )
        new_ys, at_rounding = updated.ys, updated.at_rounding
        if length != num_steps:
            place = lax.dynamic_update_slice_in_dim
            new_ys = place(progress.ys, new_ys, start, 0)
            at_rounding = place(progress.at_rounding, at_rounding, start, 0)
        largest = jnp.max(finite(newly(updated.ys)), axis=0)
        residual = jnp.max(newly(updated.residual), initial=0)
        return progress._replace(
            ys=new_ys,
            num_good=num_good,
            largest=jnp.maximum(progress.largest, largest),
            damping=updated.damping,
            at_rounding=at_rounding,
            is_nonfinite=is_nonfinite,
            is_stuck=is_stuck,
            tally=tally._replace(
                num_newton_steps=tally.num_newton_steps + 1,
                work=tally.work + length / num_steps,
                residual=jnp.maximum(tally.residual, residual),
                damping=jnp.maximum(tally.damping, updated.damping),
            ),
        )

    # --- windows --------------------------------------------------------------------

    def _begin_windows(self, progress: Progress) -> Progress:
        """What the whole interval left unconverged, guessed again."""
        return self._restarted(progress)._replace(
            num_guessed=progress.num_good, damping=jnp.zeros_like(progress.damping)
        )

    def _restarted(self, progress: Progress) -> Progress:
        return progress._replace(
            patience=Patience.at(progress.num_good, progress.ys.dtype),
            at_rounding=jnp.zeros_like(progress.at_rounding),
            is_nonfinite=jnp.zeros_like(progress.is_nonfinite),
        )

    def windows(self, progress: Progress) -> Progress:
        """Slides the window until all steps have converged, or it fails twice."""
        goes_on = lambda progress: self._is_running(progress) & ~progress.gives_up
        return lax.while_loop(goes_on, self._iterate_window, progress)

    def _iterate_window(self, progress: Progress) -> Progress:
        progress = self._show(progress)
        recurrence, num_steps, length = self.recurrence, self.num_steps, self.window
        if length == num_steps:
            start = jnp.asarray(0, jnp.int32)
            progress = self._hold_unknown(progress)
            part, ys, was = recurrence, progress.ys, progress.at_rounding
        else:
            start = jnp.minimum(progress.num_good, num_steps - length)
            progress = self._guess_entering(start + length, progress)
            part = self._part(progress.ys, start)
            ys = lax.dynamic_slice_in_dim(progress.ys, start, length)
            was = lax.dynamic_slice_in_dim(progress.at_rounding, start, length)
        num_known = progress.num_good - start
        updated = self.update(
            part, ys, progress.largest, progress.damping, num_known, was
        )
        progress = self.advance(progress, updated, start, length)
        return self._adapt(progress, jnp.max(updated.error))

    def _adapt(self, progress: Progress, error: Float[Array, ""]) -> Progress:
        """Without progress: first another guess, then sequential steps."""
        num_good, length = progress.num_good, self.window
        patience, advanced = progress.patience.after(num_good, error, length)
        is_unfinished = num_good < self.num_steps
        failed = patience.is_spent & is_unfinished
        slid = advanced & is_unfinished & (length < self.num_steps)
        tally = progress.tally
        progress = progress._replace(
            patience=patience,
            tally=tally._replace(
                num_windows=tally.num_windows + slid.astype(jnp.int32)
            ),
        )
        after_failure = self._begin_windows(progress)._replace(
            gives_up=progress.suspects_guess,
            suspects_guess=~progress.suspects_guess,
            num_failures=progress.num_failures + 1,
        )
        return select(failed, after_failure, progress)

    def _part(self, ys: Trajectory, start: Int[Array, ""]) -> AbstractRecurrence:
        y0 = state_at(self.recurrence.y0, ys, start)
        return self.recurrence.part(start, self.window, y0)

    def _guess_entering(self, stop: Int[Array, ""], progress: Progress) -> Progress:
        """Guesses at the states before `stop` that have none."""
        length = self.window

        def extend(ys):
            start = jnp.minimum(progress.num_guessed, self.num_steps - length)
            part = self._part(ys, start)
            guessed = self.guess.for_window()(part)
            is_fine = is_reasonable(guessed, progress.largest)
            guessed = hold_last_good(part.y0, guessed, is_fine)
            # After a failure the guess may have been the cause.
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
            # States guessed beyond `stop` are guessed again from a better state.
            num_guessed=jnp.maximum(progress.num_guessed, stop),
        )

    def _hold_unknown(self, progress: Progress) -> Progress:
        """A constant for what has no guess, which is after a failure: at first there
        was a guess for all.
        """
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        is_guessed = steps < progress.num_guessed
        return progress._replace(
            ys=hold_last_good(self.recurrence.y0, progress.ys, is_guessed),
            num_guessed=jnp.full_like(progress.num_guessed, self.num_steps),
        )

    # --- sequential steps -----------------------------------------------------------

    def check(self, progress: Progress) -> Progress:
        """Goes back to the first step that sequential steps would not have found."""
        is_answer = self.recurrence.is_sequential_answer(progress.ys)
        if is_answer is None:
            return progress
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        is_answer = is_answer | (steps < progress.num_trusted)
        num_good = jnp.minimum(progress.num_good, leading_true(is_answer))
        return progress._replace(
            num_good=num_good,
            is_stuck=progress.is_stuck & (num_good == progress.num_good),
            is_checked=jnp.ones_like(progress.is_checked),
        )

    def take_steps(self, progress: Progress) -> Progress:
        """Takes sequential steps from the first one that has not converged on."""
        num_good, length = progress.num_good, min(self.window, STRETCH)
        stop = jnp.full_like(num_good, self.num_steps)
        if self.plan.window is not None:
            is_spent = progress.tally.work >= self.max_steps
            stop = jnp.where(is_spent, stop, num_good + self._num_sequential(progress))
        # Nothing to do where all steps have converged.
        stop = jnp.clip(stop, num_good, self.num_steps)

        def take(carry):
            index, ys, largest = carry
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
        tally, no = progress.tally, jnp.zeros_like(progress.gives_up)
        is_sequential = tally.is_sequential | ((indices >= num_good) & (indices < end))
        # A failure of the window has been counted; one of `check` has not.
        uncounted = (~progress.gives_up).astype(jnp.int32)
        progress = progress._replace(
            ys=ys,
            num_good=end,
            largest=largest,
            is_stuck=no,
            tally=tally._replace(is_sequential=is_sequential),
            num_guessed=jnp.where(end > num_good, end, progress.num_guessed),
            suspects_guess=no,
            gives_up=no,
            num_failures=progress.num_failures + uncounted,
            num_trusted=end,
        )
        return self._restarted(progress)

    def _num_sequential(self, progress: Progress) -> Int[Array, ""]:
        """The length of the window, doubled for each failure; never more than all."""
        # Compared before it is multiplied, which might overflow.
        factor = jnp.left_shift(1, jnp.minimum(progress.num_failures, _MOST_DOUBLINGS))
        is_more = factor > self.num_steps // self.window
        return jnp.where(is_more, self.num_steps, self.window * factor)

    # --- all of it ------------------------------------------------------------------

    def run(self, fallback: bool, ys: Trajectory | None = None) -> TrajectorySolution:
        """To the end; with `fallback=False` as far as iterations lead. From `ys`, or
        else from the guess.
        """
        progress = self.begin(ys)
        if self.plan.whole_first:
            progress = self.whole(progress)
        if self.plan.whole_first and self.plan.window is not None:
            progress = self._begin_windows(progress)
        has_windows = self.plan.window is not None
        windows = self.windows if has_windows else lambda progress: progress
        if fallback:
            # One loop, so that an iteration is compiled once.
            progress = lax.while_loop(
                lambda p: (p.num_good < self.num_steps) | ~p.is_checked,
                lambda p: self.take_steps(self.check(windows(p))),
                progress,
            )
            nonfinite = first_nonfinite_step(progress.ys)
        else:
            progress = self.check(windows(progress))
            nonfinite = jnp.where(progress.is_stuck, progress.num_good, -1)
        if self.meter is not None:
            self.meter.close(self._show(progress).meter)
        tally = progress.tally
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        is_made = steps < self.recurrence.num_active
        return TrajectorySolution(
            ys=hold_last_good(self.recurrence.y0, progress.ys, is_made),
            num_good_steps=progress.num_good,
            num_newton_steps=tally.num_newton_steps,
            num_windows=tally.num_windows,
            is_sequential=tally.is_sequential,
            residual=tally.residual,
            damping=tally.damping,
            first_nonfinite_step=nonfinite,
            is_stuck=progress.is_stuck,
        )
