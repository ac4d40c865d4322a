r"""Transition matrices: $A_i$ of the affine steps $y_i = A_i y_{i-1} + b_i$.

An object holds the matrices of all steps, or of one inside a loop or under `jax.vmap`:
each method is batched over the leading axes. Which entries of the matrices are stored,
and how, is known here and nowhere else.
"""

import abc
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._blocks import BlockOrder
from .._custom_types import Mask
from ._arrays import matmul, matvec, matvec_in_loop, shift


Solve: TypeAlias = Callable[
    ["AbstractCoreTransition", Array, Array | None, bool], Array
]
"""`(A, b, y0, reverse)`: the states of a recurrence of a core."""

SolveTransposed: TypeAlias = Callable[
    ["AbstractCoreTransition", Array, Array | None, bool], tuple[Array, Array]
]
"""`(A, b, after, reverse)`: the transpose of it."""


# `Self`, which beartype knows in decorated classes only.
_T = TypeVar("_T")


class AbstractTransition(eqx.Module):
    """$A_i$ of all steps, the first axis of every leaf; or of one step.

    A scan runs over the *core* of it: the recurrence of those entries of a state that
    the next step depends on, in the layout in which arithmetic is fastest. `solve` and
    `solve_transposed` go there and back.
    """

    @abc.abstractmethod
    def apply(self, y: Float[Array, "*steps state"]) -> Float[Array, "*steps state"]:
        """$A y$."""

    @abc.abstractmethod
    def compose(self: _T, earlier: _T) -> _T:
        r"""$A_2 A_1$, where `earlier` is $A_1$: the step $A_1$ is taken first."""

    @abc.abstractmethod
    def rescaled(self: _T, scale: Float[Array, "1 state"]) -> _T:
        r"""$S^{-1} A S$ with $S = \operatorname{diag}(s)$: for states in units of $s$,
        which is nowhere zero.
        """

    @abc.abstractmethod
    def passed_on(self, y: Float[Array, "*steps state"]) -> Array:
        """`y`, with zeros for the entries that the next step does not depend on."""

    @abc.abstractmethod
    def solve(
        self,
        solve: Solve,
        b: Float[Array, "steps *state"],
        y0: Float[Array, "*state"] | None,
        reverse: bool,
    ) -> Float[Array, "steps *state"]:
        r"""$y_i = A_i y_{i-1} + b_i$ from `y0`, or zero, by `solve` for the core."""

    @abc.abstractmethod
    def solve_transposed(
        self,
        solve: SolveTransposed,
        b: Float[Array, "steps *state"],
        after: Float[Array, "*state"] | None,
        reverse: bool,
    ) -> tuple[Float[Array, "*state"], Float[Array, "steps *state"]]:
        r"""$y_i = A_{i+1}^\top y_{i+1} + b_i$, with `after` for $A_{T+1}^\top y_{T+1}$,
        by `solve` for the core: the first value is $A_1^\top y_1$.
        """

    def abs(self: _T) -> _T:
        """$|A|$, entry by entry."""
        return jtu.tree_map(jnp.abs, self)

    def scaled(self: _T, factor: float) -> _T:
        r"""$\kappa A$."""
        return jtu.tree_map(lambda a: jnp.asarray(factor, a.dtype) * a, self)

    def where_finite(self: _T) -> _T:
        """Zero for every entry that is not a finite number."""
        return jtu.tree_map(lambda a: jnp.where(jnp.isfinite(a), a, 0), self)

    def masked(self: _T, keep: Mask) -> _T:
        """Zero matrices where `keep` is false, in derivatives as well: what is there
        may be NaN.
        """

        def where(a):
            return jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, 0)

        return jtu.tree_map(where, self)

    def zero_first(self: _T) -> _T:
        """Zero for the matrix of the first step, which may be NaN."""
        return jtu.tree_map(lambda a: a.at[0].set(0), self)

    def at(self: _T, step: int) -> _T:
        """The matrix of one step."""
        return jtu.tree_map(lambda a: a[step], self)


class AbstractCoreTransition(AbstractTransition):
    """A matrix that scans run over as it is.

    States have the axes of `to_lanes`' argument: a vector, or `(n, lanes)` in a
    [`LaneTransition`][].
    """

    @abc.abstractmethod
    def transpose(self: _T) -> _T:
        r"""$A^\top$."""

    @abc.abstractmethod
    def apply_in_loop(self, y: Float[Array, "*state"]) -> Float[Array, "*state"]:
        """`apply` of one step, written as it is fastest inside a loop over steps."""

    @property
    @abc.abstractmethod
    def lanes(self) -> Float[Array, "steps n n lanes"]:
        """The matrices as `lanes` recurrences of `n` entries each that do not depend on
        each other.
        """

    @abc.abstractmethod
    def to_lanes(self, y: Float[Array, "steps *state"]) -> Array:
        """States as `(steps, n, lanes)`."""

    @abc.abstractmethod
    def from_lanes(self, y: Float[Array, "steps n lanes"]) -> Array:
        """The inverse of `to_lanes`."""

    def passed_on(self, y):
        return y

    def solve(self, solve, b, y0, reverse):
        return solve(self, b, y0, reverse)

    def solve_transposed(self, solve, b, after, reverse):
        return solve(self, b, after, reverse)


class DenseTransition(AbstractCoreTransition):
    """All entries. $O(n^2)$ to apply, $O(n^3)$ to compose."""

    matrix: Float[Array, "*steps state state"]

    def apply(self, y):
        return matvec(self.matrix, y)

    def apply_in_loop(self, y):
        return matvec_in_loop(self.matrix, y)

    def compose(self, earlier):
        return DenseTransition(matmul(self.matrix, earlier.matrix))

    def transpose(self):
        return DenseTransition(jnp.swapaxes(self.matrix, -1, -2))

    def rescaled(self, scale):
        return DenseTransition(self.matrix * scale[..., None, :] / scale[..., :, None])

    @property
    def lanes(self):
        return self.matrix[..., None]

    def to_lanes(self, y):
        return y[..., None]

    def from_lanes(self, y):
        return y[..., 0]


class DiagonalTransition(AbstractCoreTransition):
    r"""$A = \operatorname{diag}(a)$. $O(n)$ to apply and to compose."""

    diagonal: Float[Array, "*steps state"]

    def apply(self, y):
        return self.diagonal * y

    def apply_in_loop(self, y):
        return self.apply(y)

    def compose(self, earlier):
        return DiagonalTransition(self.diagonal * earlier.diagonal)

    def transpose(self):
        return self

    def rescaled(self, scale):
        del scale  # diagonal matrices commute
        return self

    @property
    def lanes(self):
        return self.diagonal[:, None, None]

    def to_lanes(self, y):
        return y[:, None]

    def from_lanes(self, y):
        return y[:, 0]


class LaneTransition(AbstractCoreTransition):
    r"""The diagonal blocks $A^{(j)}$ of a state that is split into them,
    `(n, lanes)`: $(A y)_{:,j} = A^{(j)} y_{:,j}$.

    Blocks are the last axis, so that arithmetic over them runs side by side. $O(n^2)$
    to apply and $O(n^3)$ to compose, for each block of $n$ rows.
    """

    entries: Float[Array, "*steps n n lanes"]
    """Row and column within a block, then the block."""

    def apply(self, y):
        return jnp.sum(self.entries * y[..., None, :, :], axis=-2)

    def apply_in_loop(self, y):
        return self.apply(y)

    def compose(self, earlier):
        later = self.entries[..., :, :, None, :]
        products = later * earlier.entries[..., None, :, :, :]
        return LaneTransition(jnp.sum(products, axis=-3))

    def transpose(self):
        return LaneTransition(jnp.swapaxes(self.entries, -2, -3))

    def rescaled(self, scale):
        columns, rows = scale[..., None, :, :], scale[..., :, None, :]
        return LaneTransition(self.entries * columns / rows)

    @property
    def lanes(self):
        return self.entries

    def to_lanes(self, y):
        return y

    def from_lanes(self, y):
        return y


class BlockTransition(AbstractTransition):
    r"""Block-diagonal matrices without their zeros,

    $$A = P^\top \operatorname{diag}(A^{(1)}, \dots, A^{(m)}) P,$$

    where $P$ puts the entries of a state into the `order` of the blocks. The diagonals
    of the four blocks of a matrix on positions and momenta are such a matrix, of blocks
    of two rows. For $m$ blocks of $s$ rows $O(m s^2)$ to apply and $O(m s^3)$ to
    compose.
    """

    entries: Float[Array, "*steps size size blocks"]
    """Row and column within a block, then the block."""
    order: BlockOrder

    @property
    def core(self) -> LaneTransition:
        return LaneTransition(self.entries)

    def apply(self, y):
        return self.order.join(self.core.apply(self.order.split(y)))

    def compose(self, earlier):
        return BlockTransition(self.core.compose(earlier.core).entries, self.order)

    def transpose(self):
        return BlockTransition(self.core.transpose().entries, self.order)

    def rescaled(self, scale):
        scale = self.order.split(scale)
        # Padding of a block has no scale.
        scale = jnp.where(scale > 0, scale, 1)
        return BlockTransition(self.core.rescaled(scale).entries, self.order)

    def passed_on(self, y):
        return y

    def _split(self, y: Array | None) -> Array | None:
        return None if y is None else self.order.split(y)

    def solve(self, solve, b, y0, reverse):
        parts = solve(self.core, self.order.split(b), self._split(y0), reverse)
        return self.order.join(parts)

    def solve_transposed(self, solve, b, after, reverse):
        parts = self.order.split(b)
        before, ys = solve(self.core, parts, self._split(after), reverse)
        return self.order.join(before), self.order.join(ys)


class TrailingTransition(AbstractTransition):
    r"""For steps that depend on the last $m$ entries of the state before only,

    $$A = \begin{pmatrix} 0 & H \\ 0 & K \end{pmatrix},$$

    stored without the zeros. Those last entries (*tails*) are a recurrence of their
    own, with the dense core $K$; the others (*heads*) follow from it, all at once.
    $O(n m)$ to apply, $O(n m^2)$ to compose.
    """

    columns: Float[Array, "*steps state columns"]
    r"""$H$ above $K$."""

    @property
    def num_heads(self) -> int:
        return self.columns.shape[-2] - self.columns.shape[-1]

    def _tails(self, y):
        return y[..., self.num_heads :]

    @property
    def core(self) -> DenseTransition:
        return DenseTransition(self.columns[..., self.num_heads :, :])

    @property
    def _to_heads(self) -> Array:
        """$H$."""
        return self.columns[..., : self.num_heads, :]

    def apply(self, y):
        return matvec(self.columns, self._tails(y))

    def compose(self, earlier):
        return TrailingTransition(matmul(self.columns, earlier.core.matrix))

    def rescaled(self, scale):
        columns = self._tails(scale)[..., None, :]
        return TrailingTransition(self.columns * columns / scale[..., :, None])

    def passed_on(self, y):
        return y.at[..., : self.num_heads].set(0)

    def solve(self, solve, b, y0, reverse):
        y0 = None if y0 is None else self._tails(y0)
        tails = solve(self.core, self._tails(b), y0, reverse)
        before = shift(tails, reverse, y0)
        heads = matvec(self._to_heads, before) + b[:, : self.num_heads]
        return jnp.concatenate([heads, tails], axis=-1)

    def solve_transposed(self, solve, b, after, reverse):
        # Of the neighbour that follows each step; nothing but tails has a neighbour.
        heads = b[:, : self.num_heads]
        from_heads = matvec(jnp.swapaxes(self._to_heads, -1, -2), heads)
        tails = self._tails(b) + shift(from_heads, not reverse)
        after = None if after is None else self._tails(after)
        before, tails = solve(self.core, tails, after, reverse)
        before = before + from_heads[-1 if reverse else 0]
        before = jnp.concatenate([jnp.zeros_like(heads[0]), before])
        return before, jnp.concatenate([heads, tails], axis=-1)


def transition_of(matrices: Array) -> AbstractTransition:
    """Matrices of all steps as an object: `(steps, state)` are diagonals, `(steps,
    state, columns)` all entries or, with fewer columns than rows, the last of them.
    """
    if matrices.ndim == 2:
        return DiagonalTransition(matrices)
    _, num_rows, num_columns = matrices.shape
    if num_columns < num_rows:
        return TrailingTransition(matrices)
    return DenseTransition(matrices)
