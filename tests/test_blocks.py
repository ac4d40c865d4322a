"""Block-diagonal matrices and the search for them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from deer_ode._affine import BlockTransition, affine_solve, transition_of
from deer_ode._affine._scans import AssociativeScan, SequentialScan
from deer_ode._blocks import (
    BlockOrder,
    connected,
    contiguous,
    find_blocks,
    have_blocks,
    strided,
)

from .helpers import assert_close, quick, rounding, slow_rows


# Of ten entries: two blocks of four, and one of two that is padded.
_SCATTERED = np.array([[9, 0, 4], [3, 2, 6], [8, 1, 10], [5, 7, 10]])

ORDERS = {
    "contiguous": BlockOrder(contiguous(2, 5), 10),
    "strided": BlockOrder(strided(2, 5), 10),
    "scattered": BlockOrder(_SCATTERED, 10),
    "one block": BlockOrder(contiguous(10, 1), 10),
    "diagonal": BlockOrder(strided(1, 10), 10),
}


def as_dense(A: BlockTransition):
    """The same matrices, zeros and all, put together entry by entry."""
    order = A.order
    dense = np.zeros(
        (*A.entries.shape[:-3], order.state_size + 1, order.state_size + 1)
    )
    dense = jnp.asarray(dense, A.entries.dtype)
    for j, members in enumerate(order.entries.T):
        rows, columns = np.meshgrid(members, members, indexing="ij")
        dense = dense.at[..., rows, columns].set(A.entries[..., j])
    return transition_of(dense[..., :-1, :-1])


def used(order):
    """Which entries of a block are not padding."""
    inside = order.entries < order.state_size
    return jnp.asarray(inside[:, None] & inside[None])


def elements(order, num_steps=19):
    keys = jr.split(jr.key(0), 3)
    shape = (num_steps, order.size, order.size, order.num_blocks)
    entries = jnp.where(used(order), 0.5 * jr.normal(keys[0], shape), 0)
    A = BlockTransition(entries, order)
    return A, *(jr.normal(key, (num_steps, order.state_size)) for key in keys[1:])


@pytest.mark.parametrize("name", ORDERS)
def test_orders_lose_nothing(name):
    order = ORDERS[name]
    y = jnp.arange(1.0, 31.0).reshape(3, 10)
    parts = order.split(y)
    assert parts.shape == (3, order.size, order.num_blocks)
    np.testing.assert_array_equal(order.join(parts), y)
    expected = np.concatenate([y, np.zeros((3, 1))], axis=1)[:, order.entries]
    np.testing.assert_array_equal(parts, expected)


@pytest.mark.parametrize("layout", [contiguous, strided])
def test_an_order_that_lacks_its_last_entry(layout):
    """Then `state_size` stands where the order without padding has its last entry."""
    order, y = layout(2, 3), jnp.arange(1.0, 6.0)
    parts = BlockOrder(order, 5).split(y)
    np.testing.assert_array_equal(parts, np.append(y, 0.0)[order])
    np.testing.assert_array_equal(BlockOrder(order, 5).join(parts), y)


#: Both ways, and the orders that are the least and the most of one.
ORDINARY = (("scattered", True),)


@pytest.mark.parametrize(
    "name, reverse",
    slow_rows(
        [(name, reverse) for name in ORDERS for reverse in (False, True)],
        lambda row: row not in ORDINARY,
    ),
)
def test_blocks_are_dense_matrices(name, reverse):
    A, b, weights = elements(ORDERS[name])

    def loss(A, b, to=lambda A: A):
        return jnp.sum(weights * affine_solve(to(A), b, b[0], reverse) ** 2)

    slopes = jax.value_and_grad(loss, argnums=(0, 1))

    @quick
    def compare(A, b):
        """What is to agree, in one program."""
        dense = as_dense(A)
        solved = SequentialScan().scan(dense, b, None, reverse)
        values = [
            (A.apply(b), dense.apply(b)),
            (A.solve(SequentialScan().scan, b, None, reverse), solved),
            (A.solve(AssociativeScan().scan, b, None, reverse), solved),
        ]
        (value, actual), (expected, exact) = slopes(A, b), slopes(A, b, as_dense)
        return [*values, (value, expected)], actual, exact

    values, actual, exact = compare(A, b)
    for value, expected in values:
        assert_close(value, expected, rounding())
    # Where there is padding a derivative means nothing.
    kept = used(A.order)
    actual, exact = ((jnp.where(kept, g[0].entries, 0), g[1]) for g in (actual, exact))
    assert_close(actual, exact, rounding())


# --- the search ---------------------------------------------------------------------


def dependent(size, groups):
    out = np.zeros((size, size), bool)
    for group in groups:
        out[np.ix_(group, group)] = True
    return out


def groups_of(size, groups):
    return connected(dependent(size, groups))


def members(order):
    return {frozenset(i for i in column if i < order.state_size)
            for column in order.entries.T.tolist()}  # fmt: skip


def test_blocks_are_found_wherever_they_are():
    groups = [[0, 5, 7], [1, 2, 6], [3, 4, 8]]
    order = find_blocks(groups_of(9, groups))
    assert members(order) == set(map(frozenset, groups))
    assert order.size == 3
    # One direction of dependence is enough, and so is a detour.
    chain = np.eye(6, dtype=bool)
    chain[0, 4] = chain[4, 2] = True
    order = find_blocks(connected(chain))
    assert frozenset({0, 2, 4}) in members(order)
    assert order.size == 3 and order.num_blocks == 2


def test_small_groups_share_blocks():
    groups = [[0, 1, 2], [3, 4, 5], [6], [7, 8], [9], [10, 11]]
    order = find_blocks(groups_of(12, groups))
    assert order.size == 3
    found = members(order)
    assert sum(len(m) for m in found) == 12
    for group in groups:
        assert any(set(group) <= m for m in found)
    # Four blocks of three hold twelve.
    assert order.num_blocks == 4


def test_what_does_not_pay_is_left():
    assert find_blocks(connected(np.ones((4, 4), bool))) is None
    # One large group: blocks of its size would hold as much as the whole.
    assert find_blocks(groups_of(8, [[0, 1, 2, 3, 4, 5], [6], [7]])) is None
    assert find_blocks(connected(np.eye(3, dtype=bool))).size == 1


def test_declared_blocks_may_hold_several_groups():
    groups = groups_of(4, [[0, 1], [2], [3]])
    assert have_blocks(groups, BlockOrder(contiguous(2, 2), 4))
    assert not have_blocks(groups, BlockOrder(strided(2, 2), 4))
    assert not have_blocks(groups, BlockOrder(strided(1, 4), 4))
    assert have_blocks((0, 1, 2, 3), BlockOrder(strided(1, 4), 4))
