"""Which entries of a state make a block: those that depend on each other only."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import csgraph


class BlockOrder(eqx.Module):
    """Which entry of a state is the $k$-th of its $j$-th block.

    Blocks smaller than the largest are padded with entries that are always zero.
    Blocks come last in arrays, so that arithmetic over them runs side by side.
    """

    _entries: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    state_size: int = eqx.field(static=True)

    def __init__(self, entries: Int[np.ndarray, "size blocks"], state_size: int):
        self._entries = tuple(tuple(int(i) for i in row) for row in entries)
        self.state_size = state_size

    @property
    def entries(self) -> Int[np.ndarray, "size blocks"]:
        """Indices into a state; `state_size` where there is padding."""
        return np.asarray(self._entries, np.int32)

    @property
    def size(self) -> int:
        return len(self._entries)

    @property
    def num_blocks(self) -> int:
        return len(self._entries[0])

    def _is(self, order: Callable[[int, int], Int[np.ndarray, "size blocks"]]) -> bool:
        """Whether this is all of `order`, without padding."""
        entries = self.entries
        is_full = entries.size == self.state_size
        return is_full and np.array_equal(entries, order(*entries.shape))

    def split(self, y: Float[Array, "*batch state"]) -> Array:
        """A state as `(..., size, blocks)`."""
        batch, entries = y.shape[:-1], self.entries
        if self._is(strided):
            return y.reshape(*batch, self.size, self.num_blocks)
        if self._is(contiguous):
            y = y.reshape(*batch, self.num_blocks, self.size)
            return jnp.swapaxes(y, -1, -2)
        return y.at[..., entries].get(mode="fill", fill_value=0)

    def join(self, parts: Float[Array, "*batch size blocks"]) -> Array:
        """The inverse of `split`."""
        batch, entries = parts.shape[:-2], self.entries
        if self._is(strided):
            return parts.reshape(*batch, self.state_size)
        if self._is(contiguous):
            return jnp.swapaxes(parts, -1, -2).reshape(*batch, self.state_size)
        places = np.argsort(entries.reshape(-1), kind="stable")[: self.state_size]
        return parts.reshape(*batch, entries.size)[..., places]


def strided(size: int, num_blocks: int) -> Int[np.ndarray, "size blocks"]:
    """Entry by entry: the first of all blocks, then the second of all."""
    return np.arange(size * num_blocks, dtype=np.int32).reshape(size, num_blocks)


def contiguous(size: int, num_blocks: int) -> Int[np.ndarray, "size blocks"]:
    """Block by block."""
    return np.arange(size * num_blocks, dtype=np.int32).reshape(num_blocks, size).T


def connected(dependence: Bool[np.ndarray, "state state"]) -> tuple[int, ...]:
    """For each entry of a state the number of its group: entries of different groups do
    not depend on each other, not by way of others either.
    """
    _, labels = csgraph.connected_components(dependence, directed=False)
    return tuple(labels.tolist())


def have_blocks(groups: tuple[int, ...], order: BlockOrder) -> bool:
    """Whether no group is divided between blocks of `order`."""
    block_of = np.zeros(order.state_size + 1, np.int32)
    block_of[order.entries] = np.arange(order.num_blocks)
    pairs = set(zip(groups, block_of[:-1].tolist(), strict=True))
    return len(pairs) == len(set(groups))


def find_blocks(groups: tuple[int, ...]) -> BlockOrder | None:
    """The finest division of a state into blocks that do not depend on each other.

    Groups of different sizes are put together into blocks of the largest of these
    sizes. `None` where that leaves more than half of all entries.
    """
    state_size = len(groups)
    members: dict[int, list[int]] = {}
    for entry, label in enumerate(groups):
        members.setdefault(label, []).append(entry)
    ordered = sorted(members.values(), key=len, reverse=True)
    size = len(ordered[0])
    full = [group for group in ordered if len(group) == size]
    bins: list[list[int]] = []
    for group in ordered[len(full) :]:
        # First fit, the largest first, which wastes little.
        into = next((b for b in bins if len(b) + len(group) <= size), None)
        if into is None:
            bins.append(list(group))
        else:
            into.extend(group)
    bins = full + bins
    if 2 * len(bins) * size**2 > state_size**2:
        return None
    # In the order of the state where that is possible, so that it need not be sorted.
    bins = sorted((sorted(b) for b in bins), key=lambda b: b[0])
    entries = np.full((size, len(bins)), state_size, np.int32)
    for j, block in enumerate(bins):
        entries[: len(block), j] = block
    return BlockOrder(entries, state_size)
