r"""Scans: the affine recurrence, solved in one way or another.

A step is the affine map $y \mapsto A y + b$, written as the pair $(A, b)$. Doing
$(A_1, b_1)$ first and $(A_2, b_2)$ second is again such a map,

$$(A_2, b_2) \circ (A_1, b_1) = (A_2 A_1, A_2 b_1 + b_2),$$

and because the composition is associative, all prefixes follow from a parallel scan.
The recurrence $y_i = A_i y_{i-1} + b_i$ is also the block-bidiagonal linear system
$y_i - A_i y_{i-1} = b_i$, whose transpose is the same kind of recurrence, run
backwards with $A^\top$. That is all that derivatives of any order need.
"""

import abc
from typing import TypeAlias

import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._plan import Platform
from . import _kernels
from ._arrays import shift
from ._transitions import AbstractCoreTransition


# A state is a vector, or one that is split into blocks.
_State: TypeAlias = Float[Array, "*state"]
_Steps: TypeAlias = Float[Array, "steps *state"]


class AbstractAffineScan(eqx.Module):
    r"""Solves $y_i = A_i y_{i-1} + b_i$ for all steps."""

    @abc.abstractmethod
    def scan(
        self,
        A: AbstractCoreTransition,
        b: _Steps,
        y0: _State | None = None,
        reverse: bool = False,
    ) -> _Steps:
        """From `y0`, or zero; if `reverse`, from the last step to the first. Not to be
        differentiated.
        """

    @abc.abstractmethod
    def scan_transposed(
        self,
        A: AbstractCoreTransition,
        b: _Steps,
        after: _State | None = None,
        reverse: bool = False,
    ) -> tuple[_State, _Steps]:
        r"""The transpose of `scan`, with the same `reverse`:

        $$y_i = A_{i+1}^\top y_{i+1} + b_i, \qquad i = T, \dots, 1,$$

        with `after` for $A_{T+1}^\top y_{T+1}$; the first value is $A_1^\top y_1$.
        """

    def solve(
        self,
        A: AbstractCoreTransition,
        b: _Steps,
        y0: _State | None = None,
        reverse: bool = False,
    ) -> _Steps:
        """As `scan`, and differentiable to any order in `A`, `b` and `y0`: a linear
        solve that JAX transposes by `scan_transposed`. Only the answer is stored.
        """
        if y0 is not None:
            # No unknown of its own: JAX cannot differentiate a linear solve with
            # respect to a part of its right-hand side.
            first = -1 if reverse else 0
            b = b.at[first].add(A.at(first).apply(y0))
        return lax.custom_linear_solve(
            lambda ys: ys - A.apply(shift(ys, reverse)),
            b,
            solve=lambda _, b: self.scan(A, b, reverse=reverse),
            transpose_solve=lambda _, b: self.scan_transposed(A, b, reverse=reverse)[1],
        )


class SequentialScan(AbstractAffineScan):
    """One step after the other: $O(T)$ depth, and one `apply` for each step."""

    def scan(self, A, b, y0=None, reverse=False):
        def step(y, element):
            A_i, b_i = element
            y = A_i.apply_in_loop(y) + b_i
            return y, y

        y0 = jnp.zeros_like(b[0]) if y0 is None else y0
        return lax.scan(step, y0, (A, b), reverse=reverse)[1]

    def scan_transposed(self, A, b, after=None, reverse=False):
        def step(after, element):
            A_i, b_i = element
            y = after + b_i
            return A_i.apply_in_loop(y), y

        after = jnp.zeros_like(b[0]) if after is None else after
        # Jacobians are made column by column, so this turns them round for nothing.
        return lax.scan(step, after, (A.transpose(), b), reverse=not reverse)


class AbstractParallelScan(AbstractAffineScan):
    """A scan that starts from zero and takes all steps at once."""

    @abc.abstractmethod
    def from_zero(
        self, A: AbstractCoreTransition, b: _Steps, reverse: bool = False
    ) -> _Steps:
        """`scan` from zero."""

    def scan(self, A, b, y0=None, reverse=False):
        if y0 is not None:
            # What it adds to the first of the biases.
            first = -1 if reverse else 0
            b = b.at[first].add(A.at(first).apply(y0))
        return self.from_zero(A, b, reverse)

    def scan_transposed(self, A, b, after=None, reverse=False):
        # The transpose of "multiply the neighbour by mine" is "multiply by the
        # neighbour's, transposed".
        A = A.transpose()
        first, last = (-1, 0) if reverse else (0, -1)
        b = b if after is None else b.at[last].add(after)
        ys = self.from_zero(shift(A, not reverse), b, not reverse)
        return A.at(first).apply(ys[first]), ys


def _compose(first, second):
    A1, b1 = first
    A2, b2 = second
    return A2.compose(A1), A2.apply(b1) + b2


class AssociativeScan(AbstractParallelScan):
    r"""`jax.lax.associative_scan` in $O(\log T)$ depth and two `compose` a step.

    Over chunks, if there are more than `max_elements` steps, so that neither the
    program nor what it holds of products of the $A_i$ grows with $T$. Within chunks it
    is a loop.
    """

    # An associative scan over more elements is a larger program: eleven levels are
    # enough to keep a GPU busy.
    max_elements: int = eqx.field(static=True, default=2048)

    def from_zero(self, A, b, reverse=False):
        num_steps = b.shape[0]
        if num_steps <= self.max_elements:
            return lax.associative_scan(_compose, (A, b), reverse=reverse)[1]
        size = -(-num_steps // self.max_elements)
        num_chunks = -(-num_steps // size)

        def turn(x):
            # Padding starts from zero and stays there.
            padding = ((0, num_chunks * size - num_steps), *((0, 0),) * (x.ndim - 1))
            return jnp.pad(x, padding).reshape(num_chunks, size, *x.shape[1:])

        elements = jtu.tree_map(lambda x: jnp.swapaxes(turn(x), 0, 1), (A, b))

        def compose(composed, element):
            return _compose(composed, element), None

        def step(y, element):
            A_i, b_i = element
            y = A_i.apply(y) + b_i
            return y, y

        first = -1 if reverse else 0
        rest = slice(None, -1) if reverse else slice(1, None)
        part = lambda index: jtu.tree_map(lambda x: x[index], elements)
        chunks, _ = lax.scan(compose, part(first), part(rest), reverse=reverse)
        ends = lax.associative_scan(_compose, chunks, reverse=reverse)[1]
        ys = lax.scan(step, shift(ends, reverse), elements, reverse=reverse)[1]
        return jnp.swapaxes(ys, 0, 1).reshape(-1, *b.shape[1:])[:num_steps]


class KernelScan(AbstractParallelScan):
    r"""GPU kernels that take many short recurrences (*lanes*) side by side.

    A chunk of $c$ steps is one step, $y \mapsto P y + d$. So all chunks are composed at
    the same time, the recurrence of these is solved in the same way, and then all
    chunks are run at the same time from where they start. Chunks are further lanes for
    the kernels. This is twice the work of a loop over the steps, in a program that
    hardly grows with their number: one more level for every factor of `chunk`.
    """

    # A kernel takes as long as its chunk has steps, however many chunks there are, up
    # to some 100,000 threads; and a level costs three launches. By reasoning: not
    # measured.
    chunk: int = eqx.field(static=True, default=64)
    max_in_one: int = eqx.field(static=True, default=256)
    """So many steps are one chunk."""
    interpret: bool = eqx.field(static=True, default=False)
    """Whether XLA takes the place of the GPU, slowly: for tests."""

    def from_zero(self, A, b, reverse=False):
        return A.from_lanes(self._scan_lanes(A.lanes, A.to_lanes(b), reverse))

    def _scan_lanes(
        self,
        A: Float[Array, "steps n n lanes"],
        b: Float[Array, "steps n lanes"],
        reverse: bool,
    ) -> Float[Array, "steps n lanes"]:
        num_steps, n, num_lanes = b.shape
        if num_steps <= self.max_in_one:
            zero = jnp.zeros_like(b[0])
            return _kernels.run(A, b, zero, reverse, interpret=self.interpret)
        num_chunks = -(-num_steps // self.chunk)

        def turn(x):
            """From steps to `(steps of a chunk, ..., chunks and lanes)`. Padding starts
            from zero and stays there.
            """
            padding = num_chunks * self.chunk - num_steps
            x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
            x = x.reshape(num_chunks, self.chunk, *x.shape[1:])
            x = jnp.moveaxis(x, 0, -2)
            return x.reshape(*x.shape[:-2], num_chunks * num_lanes)

        def chunks_first(x):
            x = x.reshape(*x.shape[:-1], num_chunks, num_lanes)
            return jnp.moveaxis(x, -2, 0)

        A, b = turn(A), turn(b)
        P, d = _kernels.compose(A, b, reverse, interpret=self.interpret)
        ends = self._scan_lanes(chunks_first(P), chunks_first(d), reverse)
        starts = jnp.moveaxis(shift(ends, reverse), 0, -2).reshape(n, -1)
        ys = _kernels.run(A, b, starts, reverse, interpret=self.interpret)
        ys = chunks_first(ys).reshape(num_chunks * self.chunk, n, num_lanes)
        return ys[:num_steps]


def choose_scan(A: AbstractCoreTransition, platform: Platform) -> AbstractAffineScan:
    """The scan for `A` on a platform, by its size and dtype: the one place where that
    is decided.

    On a CPU the plain loop wins at nearly every size measured (`benchmarks`; chunks
    side by side take 0.6 times as long for single numbers, and 1.1 to 2.3 times as long
    for 2 to 4). Elsewhere kernels, where there are any that are right on the GPU at
    hand, or else an associative scan.
    """
    if platform == "cpu":
        return SequentialScan()
    size, dtype = A.lanes.shape[1], A.lanes.dtype
    has_kernels = _kernels.can_run(size, dtype) and _kernels.are_right(size, dtype)
    return KernelScan() if has_kernels else AssociativeScan()
