r"""How far a correction of Newton's method goes: all the way, or less.

Far from the solution a full step may lead anywhere. The Levenberg--Marquardt step is
the minimum of

$$\sum_i | A_i \delta_{i-1} + r_i - \delta_i |^2 + \lambda \sum_i |\delta_i|^2,$$

which is the most likely path of a linear Gaussian model whose transitions are $A_i$,
with inputs $r_i$ and unit noise, and of which every state was seen to be zero with
variance $1 / \lambda$. A Kalman smoother finds it. With the covariances known, its
means are two affine recurrences, one forward and one backward.
"""

import abc
import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._affine import (
    AbstractTransition,
    DenseTransition,
    matmul,
    matvec,
    scan_steps,
    shift,
)
from ._custom_types import Trajectory
from ._misc import ROUNDING_UNITS
from ._plan import by_platform


# Of the decrease that the linear model predicts, what is enough to go on, and what
# shows that the model can be trusted further. The usual choice.
_ENOUGH = 1e-3
_PLENTY = 0.75

_FIRST = 1e-2
_FACTOR = 8.0
_MOST_TRIALS = 12


class Correction(NamedTuple):
    delta: Trajectory
    damping: Float[Array, ""]
    """What the next iteration begins with."""


class AbstractDamping(eqx.Module):
    """What Newton's method does with a correction before it applies it.

    Whether a step is accepted is decided on the full correction; damping changes only
    where the next iterate is.
    """

    @abc.abstractmethod
    def __call__(
        self,
        A: AbstractTransition,
        residual: Trajectory,
        full: Trajectory,
        residual_at: Callable[[Trajectory], Trajectory],
        size: Float[Array, "1 state"],
        damping: Float[Array, ""],
        num_good: Int[Array, ""],
    ) -> Correction:
        r"""The damped correction.

        **Arguments:**

        - `A`, `residual`: of the iterate.
        - `full`: the undamped correction.
        - `residual_at`: the residual after a correction.
        - `size`: of the entries of a state, `(1, state)`, by which they are compared;
            nowhere zero.
        - `damping`: $\lambda$ as the last iteration left it, zero at first.
        - `num_good`: how many steps are right.
        """


class Undamped(AbstractDamping):
    """Newton's method as it is."""

    def __call__(self, A, residual, full, residual_at, size, damping, num_good):
        del A, residual, residual_at, size, num_good
        return Correction(full, damping)


class Scaled(AbstractDamping):
    r"""The recurrence of the corrections with $\kappa A_i$ in place of $A_i$.

    $$\delta_i = \kappa A_i \delta_{i-1} + r_i, \qquad 0 \le \kappa \le 1.$$

    What an error does later on is forgotten at the rate $\kappa^i$, so that products of
    many $A_i$ do not overflow. As cheap as no damping, and converges linearly: errors
    that the dynamics does not forget are passed on one step an iteration for small
    $\kappa$. With $\kappa = 0$ it is the fixed-point iteration $y_i \leftarrow
    f_i(y_{i-1})$ of all steps at once.

    ??? cite "Reference"

        Gonzalez et al. (2024), *Towards scalable and stable parallelization of
        nonlinear RNNs*, section 4, for damping by a smaller $A$.
    """

    factor: float = eqx.field(static=True)

    def __check_init__(self):
        if not 0 <= self.factor <= 1:
            raise ValueError(
                f"`Scaled(factor)` must be between 0 and 1; got {self.factor!r}."
            )

    def __call__(self, A, residual, full, residual_at, size, damping, num_good):
        del full, residual_at, size, num_good
        return Correction(scan_steps(A.scaled(self.factor), residual), damping)


Scaled.__init__.__doc__ = r"""**Arguments:**

- `factor`: $\kappa$, between 0 and 1.
"""


class LevenbergMarquardt(AbstractDamping):
    r"""Levenberg--Marquardt steps on the whole trajectory, exact ones (ELK).

    The correction minimises

    $$\sum_i \frac{| A_i \delta_{i-1} + r_i - \delta_i |^2}{s^2} + \lambda \sum_i
    \frac{|\delta_i|^2}{s^2}$$

    with $s$ the size of each entry of the state, by a Kalman smoother in $O(\log T)$
    depth and, beside what plain Newton costs, a constant number of products of matrices
    like $A_i$ a step. $\lambda$ begins at zero, so that nothing is damped while the sum
    of squared residuals falls. Where it does not, or falls by less than a thousandth of
    what the linear model predicts, $\lambda$ is raised eightfold and the same
    linearisation is used again; where it falls by three quarters of that or more,
    $\lambda$ is lowered eightfold. Where no $\lambda$ helps, the first state that is
    not right is set right.

    ??? cite "References"

        Gonzalez et al. (2024), *Towards scalable and stable parallelization of
        nonlinear RNNs*, section 4.2, for the smoother as a damped step.

        Särkkä, García-Fernández (2021), *Temporal parallelization of Bayesian
        smoothers*, for covariances by an associative scan.

        Moré (1978), *The Levenberg--Marquardt algorithm: implementation and theory*.
    """

    def __call__(self, A, residual, full, residual_at, size, damping, num_good):
        before = _merit(residual, size)
        # Rounding does not fall.
        eps = float(jnp.finfo(residual.dtype).eps)
        noise = (ROUNDING_UNITS * eps) ** 2 * residual.size

        def attempt(carry):
            trial, lam, _, _ = carry
            delta = lax.cond(
                lam > 0, lambda: smooth(A, residual, lam, size), lambda: full
            )
            predicted = _merit(_linear_residual(A, residual, delta), size)
            after = _merit(residual_at(delta), size)
            ratio = (before - after) / (before - predicted)
            # Written so that NaN is no success.
            fine = (ratio >= _ENOUGH) | (after <= noise)
            raised = jnp.maximum(lam * _FACTOR, _FIRST)
            lowered = jnp.where(lam <= _FIRST, 0, lam / _FACTOR)
            following = jnp.where(
                fine, jnp.where(ratio >= _PLENTY, lowered, lam), raised
            )
            return trial + 1, following, delta, fine

        _, damping, delta, fine = lax.while_loop(
            lambda carry: (carry[0] < _MOST_TRIALS) & ~carry[3],
            attempt,
            (jnp.asarray(0, jnp.int32), damping, full, jnp.asarray(False)),
        )
        # Nothing helps: one more state is set right, and that is all.
        steps = jnp.arange(residual.shape[0], dtype=jnp.int32)
        one_more = jnp.where((steps == num_good)[:, None], residual, 0)
        return Correction(jnp.where(fine, delta, one_more), damping)


def _merit(residual: Trajectory, size: Float[Array, "1 state"]) -> Float[Array, ""]:
    """The sum of squares, which is to fall."""
    return jnp.sum((residual / size) ** 2)


def _linear_residual(A: AbstractTransition, residual, delta):
    return A.apply(shift(delta)) + residual - delta


def smooth(
    A: AbstractTransition,
    residual: Trajectory,
    lam: Float[Array, ""],
    size: Float[Array, "1 state"],
) -> Trajectory:
    """The damped correction for one value of `lam`."""

    def smooth_core(core, b, y0, reverse):
        del y0, reverse  # from zero, and forwards
        each = jax.vmap(ft.partial(_smooth_dense, lam=lam), in_axes=-1, out_axes=-1)
        return core.from_lanes(each(core.lanes, core.to_lanes(b)))

    # In units of each entry.
    delta = A.rescaled(size).solve(smooth_core, residual / size, None, False)
    return delta * size


def _product(*factors):
    return ft.reduce(matmul, factors)


def _inverse(M):
    """Of symmetric positive definite matrices, by elimination, which needs no pivots.

    LAPACK, called for many matrices beside XLA's own products of many matrices, was
    seen to wait for ever on a CPU (jaxlib 0.10.2; 1,000 matrices of eight rows).
    """
    size = M.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(size, dtype=M.dtype), M.shape)

    def eliminate(i, both):
        unit = lax.dynamic_index_in_dim(eye, i, axis=-1, keepdims=False)
        row = lax.dynamic_index_in_dim(both, i, axis=-2, keepdims=False)
        row = row / lax.dynamic_index_in_dim(row, i, axis=-1)
        # One more than is to be taken away, so that the row itself is replaced.
        column = lax.dynamic_index_in_dim(both, i, axis=-1, keepdims=False) - unit
        return both - column[..., :, None] * row[..., None, :]

    both = jnp.concatenate([M, eye], axis=-1)
    return lax.fori_loop(0, size, eliminate, both)[..., size:]


def _transposed(M):
    return jnp.swapaxes(M, -1, -2)


def _smooth_dense(A, r, lam):
    """For matrices `(steps, n, n)` and vectors `(steps, n)`."""
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    # The first state is known.
    P = _covariances(A, lam)
    predicted = (_product(A, shift(P), _transposed(A)) + eye).at[0].set(0)
    gain = _inverse(eye + lam * predicted)
    mean = _scan(_product(gain, A), matvec(gain, r))
    A_next, r_next = shift(A, reverse=True), shift(r, reverse=True)
    predicted_next = jnp.concatenate([predicted[1:], eye[:1]])
    G = _product(P, _transposed(A_next), _inverse(predicted_next))
    inputs = mean - matvec(G, matvec(A_next, mean) + r_next)
    return _scan(G, inputs, reverse=True)


def _scan(A, b, reverse: bool = False):
    return scan_steps(DenseTransition(A), b, reverse=reverse)


def covariances_by_a_loop(A, lam):
    r"""$P_i$ after each step: $P_i = (I + \lambda M_i)^{-1} M_i$ with $M_i = A_i
    P_{i-1} A_i^\top + I$, from $P_1 = 0$.
    """
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape[1:])

    def step(P, A_i):
        M = _product(A_i, P, _transposed(A_i)) + eye
        P = _product(_inverse(eye + lam * M), M)
        return P, P

    zero = jnp.zeros_like(A[0])
    return jnp.concatenate([zero[None], lax.scan(step, zero, A[1:])[1]])


def covariances_at_once(A, lam):
    """The same by an associative scan.

    What a stretch of steps makes of a covariance is a fractional linear map, written as
    a transition, a covariance and an information matrix.
    """
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    kept = 1 / (1 + lam)
    F = (kept * A).at[0].set(0)
    C = jnp.broadcast_to(kept * eye, A.shape).at[0].set(0)
    J = (lam * kept * _product(_transposed(A), A)).at[0].set(0)

    def compose(first, second):
        F1, C1, J1 = first
        F2, C2, J2 = second
        # Not symmetric, so by pivots.
        between = jnp.linalg.inv(eye[: len(C1)] + _product(C1, J2))
        F = _product(F2, between, F1)
        C = _product(F2, between, C1, _transposed(F2)) + C2
        J = _product(_transposed(F1), J2, between, F1) + J1
        return F, C, J

    return lax.associative_scan(compose, (F, C, J))[1]


def _covariances(A, lam):
    def run(platform):
        is_cpu = platform == "cpu"
        return (covariances_by_a_loop if is_cpu else covariances_at_once)(A, lam)

    return by_platform(run)
