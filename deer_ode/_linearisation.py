"""Which Jacobian of the step map is kept: all of it, or something cheaper."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._affine import (
    AbstractTransition,
    BlockTransition,
    DenseTransition,
    DiagonalTransition,
)
from ._blocks import BlockOrder, contiguous, find_blocks, have_blocks, strided
from ._custom_types import State


Groups: TypeAlias = Callable[[], tuple[int, ...] | None]


class AbstractLinearisation(eqx.Module):
    """How the map of one step is linearised about the iterate.

    Any choice leaves the answer of Newton's method unchanged, since the residual
    decides what an answer is; it changes how many iterations the answer takes and what
    an iteration costs. Derivatives always use the exact Jacobian.
    """

    @property
    def is_exact(self) -> bool:
        """Whether nothing of the Jacobian is left out."""
        return False

    @property
    def is_dense(self) -> bool:
        """Whether the Jacobian is kept as a whole matrix."""
        return False

    @property
    def simplifies_steps(self) -> bool:
        """Whether the iteration may differentiate a cheaper step in place of a map."""
        return False

    @property
    def exact(self) -> "AbstractLinearisation":
        """For derivatives of the solution: the whole Jacobian."""
        return Exact()

    @abc.abstractmethod
    def for_map(self, groups: Groups, state_size: int) -> "AbstractLinearisation":
        """What to use for a map. Asked once, before the iteration; an object that does
        not look is its own answer.

        `groups()` says for each entry of a state to which group it belongs: entries of
        different groups do not depend on each other. `None` where that is not known.
        """

    def for_equations(self) -> "AbstractLinearisation":
        """What to use for steps that are equations."""
        raise ValueError(
            "The steps of this solver are equations, which are solved with their "
            f"whole Jacobians: use `Newton(linearisation=Dense())`; got {self!r}."
        )

    @abc.abstractmethod
    def __call__(
        self, step: Callable[[State], Any], y: State, has_aux: bool = False
    ) -> tuple[Any, AbstractTransition]:
        """The value of `step` at `y`, and its (approximate) Jacobian there.

        With `has_aux` the value is a pair, of which the first is differentiated.
        """

    def fits(self, num_steps: int, state_size: int, dtype: np.dtype) -> bool:
        """Whether the Jacobians of so many steps are small enough."""
        del num_steps, state_size, dtype
        return True

    def check_size(self, num_steps: int, state_size: int, dtype: np.dtype) -> None:
        """Raises `ValueError` where they are not."""
        del num_steps, state_size, dtype


class AbstractLimited(AbstractLinearisation):
    """A linearisation that may take more memory than there is."""

    max_bytes: eqx.AbstractVar[int | None]
    """The most that Jacobians may take at a time, if there is a limit."""

    @abc.abstractmethod
    def num_entries(self, state_size: int) -> int:
        """How many numbers the Jacobian of one step holds."""

    def _num_bytes(self, num_steps: int, state_size: int, dtype: np.dtype) -> int:
        return num_steps * self.num_entries(state_size) * np.dtype(dtype).itemsize

    def fits(self, num_steps, state_size, dtype):
        if self.max_bytes is None:
            return True
        return self._num_bytes(num_steps, state_size, dtype) <= self.max_bytes

    def check_size(self, num_steps, state_size, dtype):
        if not self.fits(num_steps, state_size, dtype):
            needed = self._num_bytes(num_steps, state_size, dtype)
            kind = "dense Jacobians" if self.is_dense else "blocks of the Jacobians"
            raise ValueError(
                f"The {kind} of {num_steps} steps of a state of {state_size} "
                f"numbers ({np.dtype(dtype).name}) need {needed:,} bytes, more than "
                f"the {self.max_bytes:,} allowed. Take several explicit steps as one "
                "(`Newton(chunk=...)`), solve in shorter windows "
                "(`Newton(window=Window(...))`, or, for derivatives as well, "
                "`DEER(..., num_substeps=...)` in `diffrax.diffeqsolve`), keep only "
                "the diagonal (`Newton(linearisation=Diagonal())`; derivatives of "
                "differential equations need all of it all the same), divide the "
                "state into heads that do not depend on each other, or, if the memory "
                "is there, allow it (`Newton(linearisation=Exact(max_bytes=...))`)."
            )


class Dense(AbstractLimited):
    r"""The whole Jacobian, $\partial f_i / \partial y_{i-1}$: Newton's method (DEER).

    Converges quadratically. Costs `state` tangents per step of the base solver and
    `steps * state**2` numbers of memory.
    """

    max_bytes: int = eqx.field(static=True, default=4 * 2**30)

    @property
    def is_exact(self):
        return True

    @property
    def is_dense(self):
        return True

    @property
    def exact(self):
        return self

    def for_map(self, groups, state_size):
        del groups, state_size
        return self

    def for_equations(self):
        return self

    def __call__(self, step, y, has_aux=False):
        def with_value(y):
            value = step(y)
            return value[0] if has_aux else value, value

        A, value = jax.jacfwd(with_value, has_aux=True)(y)
        return value, DenseTransition(A)

    def num_entries(self, state_size):
        return state_size**2


Dense.__init__.__doc__ = """**Arguments:**

- `max_bytes`: the most memory, in bytes, that Jacobians may take at a time. Windows
    that need more are not tried. Where `window` leaves no choice explicit steps are
    taken several at a time, and a solve of other steps is refused before it starts.
    Defaults to 4 GiB.
"""


def _linearize(step, y: State, has_aux: bool) -> tuple[Any, Callable[[State], State]]:
    if not has_aux:
        return jax.linearize(step, y)
    value, pushforward, aux = jax.linearize(step, y, has_aux=True)
    return (value, aux), pushforward


class Blockwise(AbstractLimited):
    """Diagonal blocks, one tangent for all of them together.

    Exact where the map has this structure. Where it has not, what other blocks
    contribute is counted as the block's own.
    """

    order: BlockOrder
    has_structure: bool = eqx.field(static=True)
    max_bytes: int | None = eqx.field(static=True, default=None)

    @property
    def is_exact(self):
        return self.has_structure

    def num_entries(self, state_size):
        del state_size
        return self.order.size**2 * self.order.num_blocks

    def for_map(self, groups, state_size):
        del groups, state_size
        return self

    def __call__(self, step, y, has_aux=False):
        value, pushforward = _linearize(step, y, has_aux)
        entries = self.order.entries
        basis = np.zeros((self.order.size, y.shape[0] + 1), y.dtype)
        # The last column stands for padding.
        np.put_along_axis(basis, entries, 1, axis=1)
        columns = jax.vmap(pushforward)(jnp.asarray(basis[:, :-1]))
        entries = jnp.swapaxes(self.order.split(columns), 0, 1)
        return value, BlockTransition(entries, self.order)


def _has_blocks(groups: Groups, order: BlockOrder) -> bool:
    found = groups()
    return found is not None and have_blocks(found, order)


class BlockDiagonal(AbstractLinearisation):
    r"""The diagonal blocks of the Jacobian: for states of many small heads.

    For a state of $n / s$ heads of $s$ consecutive entries each,

    $$A \approx \operatorname{diag}(A^{(1)}, \dots, A^{(n / s)}).$$

    Costs $s$ tangents for all heads together, and $s n$ numbers per step; nothing of
    size $n^2$ is ever made. Newton's method where no head depends on another;
    otherwise quasi-Newton, with what comes from other heads counted as a head's own.
    [`deer_ode.Exact`][] finds such heads by itself, in any order.
    """

    size: int = eqx.field(static=True)

    def __check_init__(self):
        if self.size < 1:
            raise ValueError(
                f"`BlockDiagonal(size=...)` must be a positive integer; got {self.size}"
                "."
            )

    def for_map(self, groups, state_size):
        num_blocks, rest = divmod(state_size, self.size)
        if rest != 0:
            raise ValueError(
                f"`BlockDiagonal({self.size})` needs a state of a multiple of "
                f"{self.size} numbers; got {state_size}. `Exact()` finds blocks of any "
                "sizes."
            )
        order = BlockOrder(contiguous(self.size, num_blocks), state_size)
        return Blockwise(order=order, has_structure=_has_blocks(groups, order))

    def __call__(self, step, y, has_aux=False):
        return self.for_map(lambda: None, y.shape[0])(step, y, has_aux)


BlockDiagonal.__init__.__doc__ = """**Arguments:**

- `size`: how many entries each block has; the size of the state is a multiple of it.
"""


class Diagonal(AbstractLinearisation):
    r"""Only the diagonal of the Jacobian: quasi-Newton (quasi-DEER).

    Exact, and one tangent, where the step acts on each component by itself; otherwise
    `state` tangents, and it converges linearly where the dropped terms are small and
    slowly or not at all where they are not. Keeps `steps * state` numbers; derivatives
    of the solution need the exact Jacobians all the same.

    ??? cite "Reference"

        Gonzalez et al. (2024), *Towards scalable and stable parallelization of
        nonlinear RNNs*, section 4.1.
    """

    def for_map(self, groups, state_size):
        order = BlockOrder(strided(1, state_size), state_size)
        if not _has_blocks(groups, order):
            return self
        return Blockwise(order=order, has_structure=True)

    def __call__(self, step, y, has_aux=False):
        value, pushforward = _linearize(step, y, has_aux)
        basis = jnp.eye(y.shape[0], dtype=y.dtype)
        diagonal = jax.vmap(lambda e: jnp.sum(pushforward(e) * e))(basis)
        return value, DiagonalTransition(diagonal)


class PairedDiagonal(AbstractLinearisation):
    r"""The diagonals of the four blocks of the Jacobian: for positions and momenta.

    For a state of two halves, $y = (q, p)$,

    $$A \approx \begin{pmatrix} \operatorname{diag} a & \operatorname{diag} b \\
    \operatorname{diag} c & \operatorname{diag} d \end{pmatrix}.$$

    Such matrices are closed under products, so the scan needs $O(n)$ work and memory
    per step. Exact, and two tangents, where each degree of freedom moves by itself
    (Newton's method on many uncoupled oscillators); quasi-Newton, and `state` tangents,
    where they are coupled, which converges where that is weak. Derivatives of the
    solution use the exact Jacobians all the same.
    """

    def for_map(self, groups, state_size):
        order = self._order(state_size)
        if not _has_blocks(groups, order):
            return self
        return Blockwise(order=order, has_structure=True)

    def _order(self, state_size: int) -> BlockOrder:
        if state_size % 2 != 0:
            raise ValueError(
                "`PairedDiagonal` needs a state of two halves of equal size, such as "
                f"`(q, p)`; got {state_size} numbers."
            )
        return BlockOrder(strided(2, state_size // 2), state_size)

    def __call__(self, step, y, has_aux=False):
        order = self._order(y.shape[0])
        half = y.shape[0] // 2
        value, pushforward = _linearize(step, y, has_aux)
        basis = jnp.eye(2 * half, dtype=y.dtype).reshape(2, half, 2 * half)
        own_entries = lambda e, k: pushforward(e).reshape(2, half)[:, k]
        kept = jax.vmap(jax.vmap(own_entries), in_axes=(0, None))(
            basis, jnp.arange(half)
        )
        return value, BlockTransition(jnp.transpose(kept, (2, 0, 1)), order)


class Exact(AbstractLinearisation):
    """The exact Jacobian, without the zeros that it is bound to have.

    Which entry of a step may depend on which entry of the state before it is read off
    the traced program of the step, once, before the iteration; so what is found holds
    for every state. Entries that do not depend on each other make blocks, wherever they
    are in the state: the heads of a multi-head network, components that each move by
    themselves, positions with their momenta. One tangent serves all blocks. Where there
    are no blocks this is [`deer_ode.Dense`][].
    """

    max_bytes: int = eqx.field(static=True, default=4 * 2**30)

    @property
    def exact(self):
        return self

    def for_equations(self):
        return Dense(self.max_bytes)

    def for_map(self, groups, state_size):
        found = groups() if state_size > 1 else None
        if found is None or (order := find_blocks(found)) is None:
            return Dense(self.max_bytes)
        return Blockwise(order=order, has_structure=True, max_bytes=self.max_bytes)

    def __call__(self, step, y, has_aux=False):
        # Not asked beforehand what there is, all that is there is kept.
        return Dense(self.max_bytes)(step, y, has_aux)


Exact.__init__.__doc__ = """**Arguments:**

- `max_bytes`: the most memory, in bytes, that Jacobians may take at a time, as for
    [`deer_ode.Dense`][].
"""


class SharedJacobian(AbstractLinearisation):
    r"""One Jacobian of the field for all stages of a step: for finely resolved solves.

    For steps of explicit Runge--Kutta methods, in place of the derivative through every
    stage,

    $$A = P(h J), \qquad J = \left. \frac{\partial f}{\partial y} \right|_{t_{i - 1} +
    h / 2, \, (y_{i - 1} + \Phi(y_{i - 1})) / 2}, \qquad P(z) = 1 + z + \frac{z^2}{2} +
    \frac{z^3}{6}.$$

    It differs from it by $O(h^3)$, so an iteration leaves $O(T h^2)$ of the error over
    an interval $T$ in units of the field's own time scale (simplified Newton): as good
    as Newton's method where steps are as short as a network on a dense grid of data has
    them, slow where $\|h J\|$ is above a fifth, and useless over long intervals of
    steps as long as a method of high order allows. With a network for a field a
    solve takes from as long (2 states) to a third of the time (32); memory is that of
    [`deer_ode.Dense`][].

    Where it would be no less work (cheap fields, large states), where the Jacobian has
    blocks, and for steps of any other kind this is [`deer_ode.Exact`][].

    ??? cite "Reference"

        Hairer, Wanner (1996), *Solving Ordinary Differential Equations II*, section
        IV.8, for one Jacobian in place of those of all stages.
    """

    max_bytes: int = eqx.field(static=True, default=4 * 2**30)

    @property
    def simplifies_steps(self):
        return True

    @property
    def exact(self):
        return Exact(self.max_bytes)

    def for_equations(self):
        return Dense(self.max_bytes)

    def for_map(self, groups, state_size):
        return self.exact.for_map(groups, state_size)

    def __call__(self, step, y, has_aux=False):
        return self.exact(step, y, has_aux)


SharedJacobian.__init__.__doc__ = """**Arguments:**

- `max_bytes`: the most memory, in bytes, that Jacobians may take at a time, as for
    [`deer_ode.Dense`][].
"""
