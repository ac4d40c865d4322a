r"""Newton's method on a whole trajectory, in correction form.

With the residual $r_i = f_i(y_{i-1}) - y_i$ and the Jacobian (or what stands for it)
$A_i$ at the iterate, an iteration solves

$$\delta_i = A_i \delta_{i-1} + r_i, \qquad \delta_0 = 0, \qquad y_i \leftarrow
y_i + \delta_i.$$

Rounding in the scan is relative to $\delta$, not to $y$, and $r$ is the honest measure
of error. After $k$ iterations the first $k$ states are exact whatever the finite
$A_i$, so there is always progress, and what is left over can be finished sequentially.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import optimistix as optx
from jaxtyping import Array, Bool, Float, Int

from ._affine import scan_from_zero
from ._custom_types import Trajectory
from ._linearisation import AbstractLinearisation, Exact
from ._misc import hold_last_good, is_reasonable, leading_true
from ._predictor import AbstractPredictor, Coarse
from ._recurrence import AbstractRecurrence


# Rounding of one step, in units of `eps * (|y| + |A| |y_previous|)`, was at most 25 on
# the published reference problems (and below 5 on most), in both precisions. 64 is
# above it, and the correction that is still applied after acceptance removes what this
# leaves.
_ROUNDING_UNITS = 64

# In the same units, but of the values, and where little is added up: a correction that
# is all rounding.
_CORRECTION_UNITS = 8


class NewtonSolution(NamedTuple):
    """What an iteration ended with."""

    ys: Trajectory
    num_good_steps: Int[Array, ""]
    """Leading steps that satisfy the recurrence; all of them after success."""
    num_newton_steps: Int[Array, ""]
    num_fallback_steps: Int[Array, ""]
    residual: Float[Array, ""]
    """Largest residual over the good steps, before the last correction."""
    is_stuck: Bool[Array, ""]
    """Whether the step after the good ones leads from a finite state to none."""


class Iterate(NamedTuple):
    """A trajectory, and how far it is right."""

    ys: Trajectory
    iteration: Int[Array, ""]
    num_good: Int[Array, ""]
    residual: Float[Array, ""]
    stuck: Bool[Array, ""]


class Newton(eqx.Module):
    r"""Newton's method, for all steps of a recurrence at once.

    A step is accepted when its residual $r_i = f_i(y_{i-1}) - y_i$ satisfies

    $$\left\| \frac{r_i}{\text{atol} + \text{rtol} \, (|y_i| + |A_i| |y_{i-1}|)}
    \right\| \le 1,$$

    which is the componentwise backward error of one step: what rounding alone causes
    has this size. (A step that is an equation $F_i(y_{i-1}, y_i) = 0$ is accepted when
    $|F_i|$ is small beside $|B_i| |y_i| + |C_i| |y_{i-1}|$, with its Jacobians $B_i$
    and $C_i$. Where a step is a map that is no differential equation's, the largest
    entry of the last few states stands for $|y_i|$.) Unless `rtol` or `atol` is given,
    the correction $\delta_i$ has to be small beside the states as well, since small
    residuals may add up. The solve is converged when every step is; a residual that is
    not a number is never small. The correction belonging to the accepted residual is
    still applied.

    Non-finite iterates do no harm: every step from the first such state on restarts
    from the last good one.

    ??? cite "References"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, equations 3 to 5, for the iteration.

        Oettli, Prager (1964), *Compatibility of approximate solution of linear
        equations with given error bounds*, for the acceptance test.
    """

    linearisation: AbstractLinearisation = Exact()
    guess: AbstractPredictor = Coarse()
    rtol: float | None = None
    atol: float | None = None
    norm: Callable[[Array], Array] = eqx.field(static=True, default=optx.max_norm)
    newton_max_steps: int = eqx.field(static=True, default=64)
    fallback: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if not isinstance(self.linearisation, AbstractLinearisation):
            raise ValueError(
                "`Newton(linearisation=...)` must be a linearisation such as `Exact()` "
                f"or `Diagonal()`; got {self.linearisation!r}."
            )
        if not isinstance(self.guess, AbstractPredictor):
            raise ValueError(
                "`Newton(guess=...)` must be a predictor: `Coarse()`, `Constant()` or "
                f"`Trajectory(ys)`; got {type(self.guess).__name__}."
            )
        if self.newton_max_steps < 1:
            raise ValueError(
                "`Newton(newton_max_steps=...)` must be a positive integer; got "
                f"{self.newton_max_steps}."
            )
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(
                    f"`Newton({name}=...)` must not be negative; got {value}."
                )

    def solve(self, recurrence: AbstractRecurrence) -> NewtonSolution:
        """Finds the trajectory of `recurrence`. Not differentiable by itself."""
        carry = self.iterate(recurrence)
        is_answer = recurrence.is_sequential_answer(carry.ys)
        if is_answer is not None:
            num_good = jnp.minimum(carry.num_good, leading_true(is_answer))
            carry = carry._replace(num_good=num_good)
        return self._postprocess(recurrence, carry)

    def iterate(
        self, recurrence: AbstractRecurrence, ys: Trajectory | None = None
    ) -> Iterate:
        """The iteration alone, from `ys` or else from the guess: what it ended with,
        converged or not.
        """
        state_size = recurrence.y0.shape[0]
        if recurrence.num_steps == 0 or state_size == 0:
            return self._trivial(recurrence)
        linearisation = recurrence.choose(self.linearisation)
        linearisation.check_size(recurrence.num_steps, state_size, recurrence.y0.dtype)
        return lax.while_loop(
            lambda carry: self._unfinished(recurrence, carry),
            lambda carry: self._iterate(recurrence, linearisation, carry),
            self._init(recurrence, self.guess(recurrence) if ys is None else ys),
        )

    def _trivial(self, recurrence):
        ys = jnp.zeros(
            (recurrence.num_steps, *recurrence.y0.shape), recurrence.y0.dtype
        )
        return self._carry(ys)._replace(
            num_good=jnp.asarray(recurrence.num_steps, jnp.int32),
            residual=jnp.zeros((), ys.dtype),
        )

    def _carry(self, ys):
        return Iterate(
            ys,
            iteration=jnp.asarray(0, jnp.int32),
            num_good=jnp.asarray(0, jnp.int32),
            residual=jnp.asarray(jnp.inf, ys.dtype),
            stuck=jnp.asarray(False),
        )

    def _init(self, recurrence, ys):
        ys = ys.astype(recurrence.y0.dtype)
        return self._carry(hold_last_good(recurrence.y0, ys, is_reasonable(ys)))

    def _unfinished(self, recurrence, carry):
        return (
            (carry.num_good < recurrence.num_steps)
            & ~carry.stuck
            & (carry.iteration < self.newton_max_steps)
        )

    def _tolerance(self, recurrence, size):
        dtype = size.dtype
        if self.rtol is None:
            rtol = _ROUNDING_UNITS * jnp.asarray(recurrence.eps, dtype)
        else:
            rtol = jnp.asarray(self.rtol, dtype)
        # Below the smallest normal number relative accuracy has no meaning.
        atol = jnp.finfo(dtype).tiny if self.atol is None else self.atol
        return jnp.asarray(atol, dtype) + jnp.broadcast_to(rtol, size.shape) * size

    def _is_small(self, recurrence, correction, ys):
        """Whether the correction is one that leaves nothing to correct.

        Residuals that are small each may add up, over many steps. The correction is
        their sum to first order; what is left after it is of second order, so with half
        the digits right before it, all of them are after it. Only where nobody has
        asked for less.
        """
        if self.rtol is not None or self.atol is not None:
            return jnp.ones(ys.shape[0], bool)
        eps = jnp.asarray(recurrence.eps, ys.dtype)[None]
        largest = lax.cummax(jnp.abs(jnp.concatenate([recurrence.y0[None], ys])))[1:]
        # No correction is smaller than rounding.
        floor = _CORRECTION_UNITS * eps * recurrence.sizes(ys)
        bound = jnp.sqrt(eps) / 4 * largest + floor + jnp.finfo(ys.dtype).tiny
        return jnp.all(jnp.abs(correction) <= bound, axis=-1)

    def _iterate(self, recurrence, linearisation, carry):
        ys = carry.ys
        residual, A, defect, size = recurrence.linearise(ys, linearisation)
        error = jax.vmap(self.norm)(defect / self._tolerance(recurrence, size))
        correction = scan_from_zero(A, residual)
        corrected = ys + correction
        # Written so that NaN is not good.
        num_good = leading_true(
            (error <= 1)
            & self._is_small(recurrence, correction, ys)
            & is_reasonable(corrected)
        )
        steps = jnp.arange(recurrence.num_steps, dtype=jnp.int32)
        good_residual = jnp.where((steps < num_good)[:, None], jnp.abs(residual), 0)
        # The next step, from a state that is right, is not a number: nor is the answer.
        next_residual = residual[jnp.minimum(num_good, recurrence.num_steps - 1)]
        is_finite = jnp.all(jnp.isfinite(next_residual))
        stuck = (num_good < recurrence.num_steps) & ~is_finite
        return Iterate(
            hold_last_good(recurrence.y0, corrected, is_reasonable(corrected)),
            carry.iteration + 1,
            num_good,
            jnp.max(good_residual),
            stuck,
        )

    def _postprocess(self, recurrence, carry):
        num_good = carry.num_good
        if not self.fallback or recurrence.num_steps == 0:
            no_steps = jnp.zeros_like(num_good)
            return NewtonSolution(
                carry.ys,
                num_good,
                carry.iteration,
                no_steps,
                carry.residual,
                carry.stuck,
            )
        return NewtonSolution(
            finish_sequentially(recurrence, carry.ys, num_good),
            jnp.full_like(num_good, recurrence.num_steps),
            carry.iteration,
            recurrence.num_steps - num_good,
            carry.residual,
            carry.stuck,
        )

    def result(
        self, solution: NewtonSolution, num_steps: int | Int[Array, ""]
    ) -> optx.RESULTS:
        """Whether the first `num_steps` steps of `solution` are the answer.

        Known when the program is traced if there is a sequential finish.
        """
        if self.fallback:
            return optx.RESULTS.successful
        return optx.RESULTS.where(
            solution.num_good_steps >= num_steps,
            optx.RESULTS.successful,
            optx.RESULTS.where(
                solution.is_stuck,
                optx.RESULTS.nonfinite,
                optx.RESULTS.nonlinear_max_steps_reached,
            ),
        )


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
- `newton_max_steps`: the most iterations.
- `fallback`: whether to finish sequentially, from the last converged step, what has not
    converged within `newton_max_steps` (the default), so that the answer always is the
    sequential one. If `False` such a solve fails with
    `RESULTS.nonlinear_max_steps_reached`, or `RESULTS.nonfinite` where the next state
    is not a finite number.
"""


def finish_sequentially(
    recurrence: AbstractRecurrence, ys: Trajectory, start: Int[Array, ""]
) -> Trajectory:
    """Computes the states after the first `start` steps one after the other."""

    def step(carry):
        index, ys = carry
        y = jnp.where(index > 0, ys[jnp.maximum(index - 1, 0)], recurrence.y0)
        return index + 1, ys.at[index].set(recurrence.step(index, y))

    return lax.while_loop(
        lambda carry: carry[0] < recurrence.num_steps, step, (start, ys)
    )[1]
