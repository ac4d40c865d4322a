r"""Newton's method on a whole trajectory, in correction form.

With the residual $r_i = f_i(y_{i-1}) - y_i$ and the Jacobian (or what stands for it)
$A_i$ at the iterate, an iteration solves

$$\delta_i = A_i \delta_{i-1} + r_i, \qquad \delta_0 = 0, \qquad y_i \leftarrow
y_i + \delta_i.$$

Rounding in the scan is relative to $\delta$, not to $y$, and $r$ is the honest measure
of error. After $k$ iterations the first $k$ states are exact whatever the finite
$A_i$, so there is always progress, and what is left over can be finished sequentially.
"""

import dataclasses
import functools as ft
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array

from ._affine import scan_steps
from ._custom_types import Mask, State, Trajectory
from ._damping import AbstractDamping, Undamped
from ._linearisation import AbstractLinearisation, Dense, Exact, SharedJacobian
from ._method import AbstractMethod, TrajectorySolution, solve_sequentially
from ._misc import (
    ROUNDING_UNITS,
    by_platform,
    describe,
    finite,
    has_accelerator,
    hold_last_good,
    is_reasonable,
    leading_true,
)
from ._predictor import AbstractPredictor, Coarse
from ._recurrence import AbstractRecurrence
from ._shooting import Chunks, can_be_chunked, chunk_that_fits
from ._window import March, Progress, Updated, Window


# A correction leaves its square: with half the digits right before it, all are right
# after it. The quarter is for second derivatives above one.
_HALF_THE_DIGITS = 1 / 4

# In units of rounding: a correction that is all rounding.
_CORRECTION_UNITS = 8

# From this number of steps on two cores have enough to do with one solve.
_LONG = 1024

# Operations of one Newton iteration, and how many of them take about a second on two
# CPU cores. More than a minute of iterations is worth a warning.
_OPERATIONS_PER_SECOND = 1e10
_MOST_SECONDS = 60
_USUAL_ITERATIONS = 5


class Newton(AbstractMethod):
    r"""Newton's method, for all steps of a recurrence at once.

    A step is accepted when its residual $r_i = f_i(y_{i-1}) - y_i$ satisfies

    $$\left\| \frac{r_i}{\text{atol} + \text{rtol} \, (|y_i| + |A_i| |y_{i-1}|)}
    \right\| \le 1,$$

    which is the componentwise backward error of one step: what rounding alone causes
    has this size. (A step that is an equation $F_i(y_{i-1}, y_i) = 0$ is accepted when
    $|F_i|$ is small beside $|B_i| |y_i| + |C_i| |y_{i-1}|$, with its Jacobians $B_i$
    and $C_i$.) So an entry that is zero because the others cancel is judged by what
    cancels there. Unless `rtol` or `atol` is given, the correction $\delta_i$ has to be
    small beside $|y_i| + |A_i| |y_{i-1}|$ at their largest so far as well, since small
    residuals may add up; or twice in a row no larger than what rounding in all steps
    adds up to, for entries that are zero but for the rounding of others. The solve is
    converged when every step is; a residual that is not a number is never small. The
    correction belonging to the accepted residual is still applied.

    Non-finite iterates do no harm: every step from the first such state on restarts
    from the last good one.

    ??? cite "References"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, equations 3 to 5, for the iteration.

        Oettli, Prager (1964), *Compatibility of approximate solution of linear
        equations with given error bounds*, for the acceptance test.
    """

    linearisation: AbstractLinearisation = Exact()
    guess: AbstractPredictor = Coarse()  # pyright: ignore
    rtol: float | None = None
    atol: float | None = None
    norm: Callable[[Array], Array] = eqx.field(static=True, default=optx.max_norm)
    newton_max_steps: int = eqx.field(static=True, default=64)
    fallback: bool = eqx.field(static=True, default=True)  # pyright: ignore
    damping: AbstractDamping = Undamped()
    window: Window | None = Window()
    chunk: int | None = eqx.field(static=True, default=None)
    progress_meter: Any = None

    def __check_init__(self):
        if not isinstance(self.linearisation, AbstractLinearisation):
            raise ValueError(
                "`Newton(linearisation=...)` must be a linearisation such as `Exact()` "
                f"or `Diagonal()`; got {describe(self.linearisation)}."
            )
        if not isinstance(self.guess, AbstractPredictor):
            raise ValueError(
                "`Newton(guess=...)` must be a predictor: `Coarse()`, `Constant()` or "
                f"`Trajectory(ys)`; got {describe(self.guess)}."
            )
        if not isinstance(self.damping, AbstractDamping):
            raise ValueError(
                "`Newton(damping=...)` must be `Undamped()`, `LevenbergMarquardt()` or "
                f"`Scaled(factor)`; got {describe(self.damping)}."
            )
        if not (self.window is None or isinstance(self.window, Window)):
            raise ValueError(
                "`Newton(window=...)` must be `Window(length)`, or `None` for the "
                f"whole interval at once; got {describe(self.window)}."
            )
        if self.newton_max_steps < 1:
            raise ValueError(
                "`Newton(newton_max_steps=...)` must be a positive integer; got "
                f"{self.newton_max_steps}."
            )
        if self.chunk is not None and not (type(self.chunk) is int and self.chunk > 0):
            raise ValueError(
                "`Newton(chunk=...)` must be a positive integer, or `None`; got "
                f"{self.chunk!r}."
            )
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(
                    f"`Newton({name}=...)` must not be negative; got {value}."
                )

    @property
    def exact_linearisation(self):
        if isinstance(self.linearisation, SharedJacobian):
            return self.linearisation.exact
        is_exact = isinstance(self.linearisation, Dense | Exact)
        return self.linearisation if is_exact else Exact()

    def start_from(self, guess):
        return eqx.tree_at(lambda method: method.guess, self, guess)

    def report_to(self, meter):
        return dataclasses.replace(self, progress_meter=meter)

    def solve(
        self, recurrence: AbstractRecurrence, is_cpu: bool | None = None
    ) -> TrajectorySolution:
        """As every method; `is_cpu` where it is known what the solve will run on."""
        if recurrence.num_steps == 0 or recurrence.y0.shape[0] == 0:
            return solve_sequentially(recurrence)
        # What there is to find out about the steps is found out once.
        self._warn_of_long_solves(recurrence)
        recurrence, chosen = self.choose(recurrence)
        method = dataclasses.replace(self, linearisation=chosen)
        elsewhere = lambda: method._run(recurrence, method._plan(recurrence, False))
        if is_cpu is False:
            return elsewhere()
        on_cpu = lambda: method._run_each(recurrence, method._plan(recurrence, True))
        return by_platform(cpu=on_cpu, elsewhere=elsewhere)

    def _warn_of_long_solves(self, recurrence) -> None:
        num_steps, size = recurrence.num_steps, recurrence.y0.shape[0]
        operations = 4.0 * num_steps * size**3
        seconds = _USUAL_ITERATIONS * operations / _OPERATIONS_PER_SECOND
        if has_accelerator() or seconds < _MOST_SECONDS:
            return
        if not isinstance(recurrence.choose(self.linearisation), Dense):
            return
        warnings.warn(
            f"Newton's method on {num_steps:,} steps of a state of {size:,} numbers: "
            f"about {operations:.0e} operations per iteration, some "
            f"{seconds / 60:.0f} minutes on a CPU, for the dense Jacobians of all "
            "steps. `DEER()` (sequential steps of `Tsit5` on a CPU) needs none of "
            "them; nor does `method=Sequential()`. Where entries depend on themselves "
            "mostly, `Newton(linearisation=Diagonal())` keeps only the diagonals.",
            stacklevel=2,
        )

    def choose(self, recurrence) -> tuple[AbstractRecurrence, AbstractLinearisation]:
        """What is iterated on, and how it is linearised."""
        chosen = recurrence.choose(self.linearisation)
        if isinstance(self.linearisation, SharedJacobian) and isinstance(chosen, Dense):
            recurrence = recurrence.simplified()
        return recurrence, chosen

    def _plan(self, recurrence, is_cpu) -> tuple[int, tuple[int, ...] | None]:
        """How many steps are taken as one, and the windows in units of these."""
        total, y0 = recurrence.num_steps, recurrence.y0
        lengths = None if self.window is None else self.window.lengths(total, is_cpu)
        chunk = self._chunk(recurrence, total if lengths is None else lengths[-1])
        if lengths is None:
            return chunk, None
        fits = lambda n: self.linearisation.fits(n, y0.size, y0.dtype)
        num_chunks = -(-total // chunk)
        whole = lambda n: num_chunks if n == total else max(1, n // chunk)
        *longer, last = sorted({whole(n) for n in lengths}, reverse=True)
        # Those whose Jacobians there is memory for, or else the shortest; or one that
        # is shorter still, where nobody has said how long.
        while self._is_window_free and last > 1 and not fits(last):
            last = -(-last // 2)
        return chunk, (*filter(fits, longer), last)

    @property
    def _is_window_free(self) -> bool:
        return self.window is not None and self.window.length is None

    def _chunk(self, recurrence, longest: int) -> int:
        """One, unless more are asked for, or the Jacobians of the `longest` window that
        has to be do not fit into memory.
        """
        y0, linearisation = recurrence.y0, self.linearisation
        if self.chunk is not None and self.chunk > 1 and not can_be_chunked(recurrence):
            raise ValueError(
                f"`Newton(chunk={self.chunk})`: only explicit steps can be taken "
                "several at a time, but those of this solver solve an equation. Leave "
                "`chunk` out."
            )
        if self.chunk is not None:
            return min(self.chunk, recurrence.num_steps)
        if self._is_window_free or not can_be_chunked(recurrence):
            return 1
        if not isinstance(linearisation, Dense):
            return 1
        bytes_per_step = linearisation.num_bytes(1, y0.size, y0.dtype)
        return chunk_that_fits(longest, bytes_per_step, linearisation.max_bytes)

    def _run_each(self, recurrence, plan) -> TrajectorySolution:
        """As `_run`; of a batch under `jax.vmap` one after the other, if each is long.

        So a solve that has converged costs nothing more, and the memory is that of one.
        """
        if recurrence.num_steps < _LONG or self.progress_meter is not None:
            return self._run(recurrence, plan)
        arrays, rest = eqx.partition((self, recurrence), eqx.is_array)

        @jax.custom_batching.sequential_vmap
        def run(arrays):
            method, recurrence = eqx.combine(arrays, rest)
            return method._run(recurrence, plan)

        return run(arrays)

    def _run(self, recurrence, plan) -> TrajectorySolution:
        chunk, lengths = plan
        if chunk == 1:
            return self.march(recurrence, lengths).run(self.fallback)
        chunks, ys = Chunks.of(recurrence, chunk), None
        if self.guess.anew() is not self.guess:
            ys = chunks.fold(self.guess(recurrence))
        solution = self.march(chunks, lengths).run(self.fallback, ys)
        return chunks.unfold(solution, recurrence.num_steps, self.fallback)

    def iterate(
        self, recurrence: AbstractRecurrence, ys: Trajectory | None = None
    ) -> Progress:
        """The iteration over all steps, from `ys` or else from the guess: what it ended
        with, converged or not.
        """
        march = self.march(recurrence)
        return march.iterate(march.begin(ys))

    def march(
        self, recurrence: AbstractRecurrence, lengths: tuple[int, ...] | None = None
    ) -> March:
        """Windows of given lengths; or all steps at once, `newton_max_steps` times."""
        num_steps, state_size = recurrence.num_steps, recurrence.y0.shape[0]
        recurrence, linearisation = self.choose(recurrence)
        is_patient = lengths is None
        lengths = (num_steps,) if is_patient else lengths
        linearisation.check_size(lengths[0], state_size, recurrence.y0.dtype)
        return March(
            recurrence,
            self.guess,
            ft.partial(self.update, linearisation),
            lengths,
            self.newton_max_steps,
            is_patient,
            self.progress_meter,
        )

    def _tolerance(self, recurrence, scale):
        dtype = scale.dtype
        if self.rtol is None:
            rtol = ROUNDING_UNITS * jnp.asarray(recurrence.eps, dtype)
        else:
            rtol = jnp.asarray(self.rtol, dtype)
        # Below the smallest normal number relative accuracy has no meaning.
        atol = jnp.finfo(dtype).tiny if self.atol is None else self.atol
        return jnp.asarray(atol, dtype) + jnp.broadcast_to(rtol, scale.shape) * scale

    def _are_small(
        self, linearisation, recurrence, linearised, correction, is_right
    ) -> tuple[Mask, Mask]:
        """Of which steps the correction leaves nothing to correct; and of which it is
        no more than what rounding of the steps adds up to.

        Residuals that are small each may add up, over many steps. The correction is
        their sum to first order; what is left after it is of second order. (With a
        Jacobian that leaves something out it is of first order: then no more than what
        rounding adds up to will do.) Only where nobody has asked for less.

        An entry that is zero but for the rounding of others cannot be right relative to
        itself. How large it is by rounding, a recurrence of arbitrary rounding errors
        says.
        """
        num_steps, dtype = correction.shape[0], correction.dtype
        if self.rtol is not None or self.atol is not None:
            are_all = jnp.ones(num_steps, bool)
            return are_all, are_all
        eps = jnp.asarray(recurrence.eps, dtype)[None]
        share = _HALF_THE_DIGITS * jnp.sqrt(eps)
        if not linearisation.is_exact:
            share = jnp.minimum(share, num_steps**0.5 * _CORRECTION_UNITS * eps)
        share = jnp.maximum(share, _CORRECTION_UNITS * eps)
        bound = share * recurrence.largest_scale(linearised.scale)
        bound = bound + jnp.finfo(dtype).tiny
        small = jnp.all(jnp.abs(correction) <= bound, axis=-1)

        def at_rounding():
            added_up = jnp.abs(scan_steps(linearised.A, linearised.rounding))
            floor = ROUNDING_UNITS * eps * lax.cummax(finite(added_up))
            return jnp.all(jnp.abs(correction) <= jnp.maximum(bound, floor), axis=-1)

        is_asked = leading_true(is_right & small) < leading_true(is_right)
        return small, lax.cond(is_asked, at_rounding, lambda: small)

    def update(
        self,
        linearisation: AbstractLinearisation,
        recurrence: AbstractRecurrence,
        ys: Trajectory,
        largest: State,
        damping: Array,
        num_known: Array,
        was_at_rounding: Mask,
    ) -> Updated:
        """One iteration. `largest` is what each entry was at most before the steps of
        `recurrence`, `damping` what the last iteration left, and the first `num_known`
        states are right, whatever they are. `was_at_rounding` says of which steps the
        last correction was no more than rounding.
        """
        is_known = jnp.arange(ys.shape[0], dtype=jnp.int32) < num_known
        linearised = recurrence.linearise(ys, linearisation)
        residual, A = linearised.residual, linearised.A
        residual = jnp.where(is_known[:, None], 0, residual)
        correction = scan_steps(A, residual)
        scale = linearised.defect_scale
        if linearised.per_unit is not None:
            largest_change = jnp.max(jnp.abs(correction), axis=-1, keepdims=True)
            scale = scale + linearised.per_unit * finite(largest_change)
        tolerance = self._tolerance(recurrence, scale)
        error = jax.vmap(self.norm)(linearised.defect / tolerance)
        error = jnp.where(is_known, 0, error)
        # Written so that NaN is not right.
        is_right = is_known | ((error <= 1) & is_reasonable(ys + correction, largest))
        small, at_rounding = self._are_small(
            linearisation, recurrence, linearised, correction, is_right
        )
        # A correction of rounding's size may be large in a problem that makes errors
        # grow. That it does no harm shows after it: the residual is still small.
        at_rounding = is_right & at_rounding
        good = is_known | (is_right & small) | (at_rounding & was_at_rounding)
        values = jnp.maximum(jnp.abs(ys), jnp.abs(ys + residual))
        size = jnp.maximum(jnp.max(finite(values), axis=0), largest)
        delta, damping = self.damping(
            A,
            residual,
            correction,
            lambda delta: recurrence.linearise(ys + delta, linearisation).residual,
            jnp.where(size > 0, size, 1)[None],
            damping,
            leading_true(good),
        )
        # What is right already gets all of its correction.
        corrected = ys + jnp.where(good[:, None], correction, delta)
        corrected = jnp.where(is_known[:, None], ys, corrected)
        is_fine = is_known | is_reasonable(corrected, largest)
        corrected = hold_last_good(recurrence.y0, corrected, is_fine)
        at_rounding = at_rounding & is_fine
        return Updated(corrected, good, residual, error, damping, at_rounding)


Newton.__init__.__doc__ = """**Arguments:**

- `linearisation`: which Jacobian to use: by default [`deer_ode.Exact`][], all of it
    without the zeros that it is bound to have.
- `guess`: the initial trajectory: [`deer_ode.Coarse`][], [`deer_ode.Constant`][] or
    [`deer_ode.Trajectory`][].
- `rtol`, `atol`: tolerances for the residual of a step, relative and in units of the
    state (or of the equation that the step is). By default a small multiple of rounding
    (64 units) and nothing, so that the answer is that of the sequential solver up to
    rounding.
- `norm`: how the scaled residual of one step becomes one number.
- `newton_max_steps`: the most iterations over the whole interval; of those over a
    window as many as come to the same work.
- `fallback`: whether to take sequentially, from the last converged step, the steps that
    do not converge (the default), so that the answer always is the sequential one. If
    `False` such a solve fails with `RESULTS.nonlinear_max_steps_reached`, or
    `RESULTS.nonfinite` where the next state is not a finite number.
- `damping`: [`deer_ode.Undamped`][] (the default), [`deer_ode.LevenbergMarquardt`][] or
    [`deer_ode.Scaled`][].
- `window`: a [`deer_ode.Window`][] that moves along the trajectory (the default), or
    `None` for the whole interval at once and nothing else.
- `chunk`: how many steps are taken as one (shooting): the unknowns of the iteration are
    the states between chunks, and within a chunk states and tangents are carried along
    in a loop. The answer is the same. Explicit steps only. By default one; or, where
    `window` is given and Jacobians are dense, as many as it takes for them to fit into
    the memory that the linearisation allows.
- `progress_meter`: shows how much of the trajectory is right: a progress meter of
    Diffrax, such as `diffrax.TqdmProgressMeter()`, or `None`.
"""
