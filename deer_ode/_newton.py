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
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array

from ._acceptance import Acceptance
from ._affine import scan_steps
from ._custom_types import Mask, State, Trajectory
from ._damping import AbstractDamping, Undamped
from ._linearisation import AbstractLinearisation, Exact
from ._method import AbstractMethod, TrajectorySolution, solve_sequentially
from ._misc import describe, finite, hold_last_good, is_reasonable, leading_true
from ._plan import Plan, dense_operations, estimated_minutes, plan_newton
from ._predictor import AbstractPredictor, Adaptive
from ._progress import Progress, Updated
from ._recurrence import AbstractMapRecurrence, AbstractRecurrence
from ._shooting import Chunks
from ._solve import Solve
from ._window import Window, as_window


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
    guess: AbstractPredictor = Adaptive()  # pyright: ignore
    rtol: float | None = None
    atol: float | None = None
    norm: Callable[[Array], Array] = eqx.field(static=True, default=optx.max_norm)
    newton_max_steps: int = eqx.field(static=True, default=64)
    fallback: bool = eqx.field(static=True, default=True)  # pyright: ignore
    damping: AbstractDamping = Undamped()
    window: Window | None = eqx.field(converter=as_window, default=Window())
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
                "`Newton(guess=...)` must be a predictor such as `Adaptive()` or "
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
        return self.linearisation.exact

    def start_from(self, guess):
        return eqx.tree_at(lambda method: method.guess, self, guess)

    def report_to(self, meter):
        return dataclasses.replace(self, progress_meter=meter)

    def plan(self, recurrence, platform):
        is_default = self.window is not None and self.window.length is None
        length = None if self.window is None else self.window.length
        if self.chunk is not None and self.chunk > 1 and not recurrence.is_explicit:
            raise ValueError(
                f"`Newton(chunk={self.chunk})`: only explicit steps can be taken "
                "several at a time, but those of this solver solve an equation. Leave "
                "`chunk` out."
            )
        window = "default" if is_default else length
        return plan_newton(recurrence, self.linearisation, window, self.chunk, platform)

    def solve(self, recurrence: AbstractRecurrence, plan: Plan) -> TrajectorySolution:
        if recurrence.num_steps == 0 or recurrence.y0.shape[0] == 0:
            return solve_sequentially(recurrence)
        chosen = plan.linearisation
        if chosen is None:
            chosen = recurrence.choose(self.linearisation)
        _warn_of_long_solves(recurrence, chosen)
        recurrence = self._simplified(recurrence, chosen)
        method = dataclasses.replace(self, linearisation=chosen)
        if not plan.is_batch_sequential or self.progress_meter is not None:
            return method._run(recurrence, plan)
        # A member that has converged costs nothing more, and memory is that of one.
        # What the steps close over becomes an argument: there is one per member.
        run = eqx.filter_closure_convert(
            lambda method, recurrence: method._run(recurrence, plan), method, recurrence
        )
        arrays, rest = eqx.partition((run, method, recurrence), eqx.is_array)

        @jax.custom_batching.sequential_vmap
        def run_one(arrays):
            run, *inputs = eqx.combine(arrays, rest)
            return run(*inputs)

        return run_one(arrays)

    def choose(self, recurrence) -> tuple[AbstractRecurrence, AbstractLinearisation]:
        """What is iterated on, and how it is linearised."""
        chosen = recurrence.choose(self.linearisation)
        return self._simplified(recurrence, chosen), chosen

    def _simplified(self, recurrence, chosen) -> AbstractRecurrence:
        is_simplified = self.linearisation.simplifies_steps and chosen.is_dense
        return recurrence.simplified() if is_simplified else recurrence

    def _run(self, recurrence: AbstractRecurrence, plan: Plan) -> TrajectorySolution:
        if plan.chunk == 1:
            return self.start(recurrence, plan).run(self.fallback)
        assert isinstance(recurrence, AbstractMapRecurrence)
        chunks, ys = Chunks.of(recurrence, plan.chunk), None
        if self.guess.for_window() is not self.guess:
            ys = chunks.fold(self.guess(recurrence))
        solution = self.start(chunks, plan).run(self.fallback, ys)
        return chunks.unfold(solution, recurrence.num_steps, self.fallback)

    def iterate(
        self, recurrence: AbstractRecurrence, ys: Trajectory | None = None
    ) -> Progress:
        """The iteration over all steps, from `ys` or else from the guess: what it ended
        with, converged or not.
        """
        solve = self.start(recurrence)
        return solve.whole(solve.begin(ys))

    def start(
        self, recurrence: AbstractRecurrence, plan: Plan = Plan("newton")
    ) -> Solve:
        """The solve of `recurrence`; by default over all steps at once."""
        num_steps, state_size = recurrence.num_steps, recurrence.y0.shape[0]
        recurrence, linearisation = self.choose(recurrence)
        longest = num_steps if plan.whole_first else plan.window or num_steps
        linearisation.check_size(longest, state_size, recurrence.y0.dtype)
        step = ft.partial(self.step, linearisation)
        return Solve(
            recurrence,
            self.guess,
            step,
            plan,
            self.newton_max_steps,
            self.progress_meter,
        )

    def step(
        self,
        linearisation: AbstractLinearisation,
        recurrence: AbstractRecurrence,
        ys: Trajectory,
        largest: State,
        damping: Array,
        num_known: Array,
        was_at_rounding: Mask,
    ) -> Updated:
        """One iteration. `largest` is the largest magnitude of each entry before the
        steps of `recurrence`, `damping` what the last iteration left, and the first
        `num_known` states have converged, whatever they are. `was_at_rounding` says of
        which steps the last correction was no more than rounding.
        """
        is_known = jnp.arange(ys.shape[0], dtype=jnp.int32) < num_known
        linearised = recurrence.linearise(ys, linearisation)
        residual, A = linearised.residual, linearised.A
        residual = jnp.where(is_known[:, None], 0, residual)
        correction = scan_steps(A, residual)
        accepted = Acceptance(self.rtol, self.atol, self.norm)(
            recurrence,
            linearised,
            correction,
            linearisation.is_exact,
            is_known,
            is_reasonable(ys + correction, largest),
        )
        # A correction of rounding's size may be large in a problem that makes errors
        # grow. That it does no harm shows after it: the residual is still small.
        at_rounding = accepted.at_rounding
        is_settled = at_rounding & was_at_rounding
        good = is_known | (accepted.is_right & accepted.is_small) | is_settled
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
        # Converged steps get all of their correction.
        corrected = ys + jnp.where(good[:, None], correction, delta)
        corrected = jnp.where(is_known[:, None], ys, corrected)
        is_fine = is_known | is_reasonable(corrected, largest)
        corrected = hold_last_good(recurrence.y0, corrected, is_fine)
        at_rounding = at_rounding & is_fine
        return Updated(corrected, good, residual, accepted.error, damping, at_rounding)


def _warn_of_long_solves(
    recurrence: AbstractRecurrence, linearisation: AbstractLinearisation
) -> None:
    num_steps, size = recurrence.num_steps, recurrence.y0.shape[0]
    minutes = estimated_minutes(num_steps, size)
    if minutes is None or not linearisation.is_dense:
        return
    operations = dense_operations(num_steps, size)
    warnings.warn(
        f"Newton's method on {num_steps:,} steps of a state of {size:,} numbers: "
        f"about {operations:.0e} operations per iteration, some {minutes:.0f} minutes "
        "on a CPU, for the dense Jacobians of all steps. `DEER()` (sequential steps of "
        "`Tsit5` on a CPU) needs none of them; nor does `method=Sequential()`. Where "
        "entries depend on themselves mostly, `Newton(linearisation=Diagonal())` keeps "
        "only the diagonals.",
        stacklevel=2,
    )


Newton.__init__.__doc__ = """**Arguments:**

- `linearisation`: which Jacobian to use: by default [`deer_ode.Exact`][], all of it
    without the zeros that it is bound to have.
- `guess`: the initial trajectory: [`deer_ode.Adaptive`][], [`deer_ode.Coarse`][],
    [`deer_ode.Constant`][] or [`deer_ode.Trajectory`][].
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
