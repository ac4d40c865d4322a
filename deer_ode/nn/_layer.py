"""What recurrent layers have in common: padding, direction, and how they are solved."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._auto import Auto
from .._method import AbstractMethod
from .._scan import RecurrenceSolution, solve_recurrence


class AbstractRecurrentLayer(eqx.Module):
    """A layer that turns one sequence into another, all steps at once.

    For one sequence; `jax.vmap` makes it one for a batch.

    **Fields:**

    - `out_size`: how many numbers an output has.
    """

    out_size: eqx.AbstractVar[int]

    @abc.abstractmethod
    def solve(
        self,
        xs: Float[Array, "steps inputs"],
        *,
        length: int | Int[Array, ""] | None = None,
        mask: Bool[Array, " steps"] | None = None,
        method: AbstractMethod = Auto(),
        guess: PyTree = None,
    ) -> RecurrenceSolution:
        """The sequence, and how it was found.

        **Arguments:**

        - `xs`: the inputs, of shape `(steps, inputs)`.
        - `length`: how many steps there are really; what comes after is padding, which
            leaves the state as it is and may hold anything, even what is not a number.
        - `mask`: the same, step by step: true where there is an input.
        - `method`: [`deer_ode.Auto`][], [`deer_ode.Newton`][] or
            [`deer_ode.Sequential`][].
        - `guess`: `carries` of an earlier solve, to start from.

        **Returns:**

        A [`deer_ode.RecurrenceSolution`][]: `ys` are the outputs, of shape
        `(steps, out_size)`, `carries` the states.

        **Raises:**

        - `ValueError`: for both `length` and `mask`, and for shapes that do not fit.
        """

    def __call__(self, xs, *, length=None, mask=None, method=Auto(), guess=None):
        """The outputs alone: `solve(xs, ...).ys`, with the same arguments."""
        return self.solve(xs, length=length, mask=mask, method=method, guess=guess).ys


def refuse_options(name: str, taken: str, options: dict[str, Any]) -> None:
    """Raises `TypeError` for options that a layer is not made with."""
    if not options:
        return
    given = ", ".join(f"`{option}`" for option in options)
    raise TypeError(
        f"`{name}` takes {taken}; got {given}. How a sequence is solved is an option "
        "of a call: `layer(xs, length=..., mask=..., method=..., guess=...)`."
    )


def as_mask(length, mask, num_steps: int) -> Bool[Array, " steps"] | None:
    """One mask from the two ways of saying what is padding."""
    if length is not None and mask is not None:
        raise ValueError("Give either `length` or `mask`, not both.")
    if mask is not None:
        if mask.shape != (num_steps,):
            raise ValueError(
                f"`mask` must have one entry for each of the {num_steps} steps; got "
                f"shape {mask.shape}."
            )
        return mask
    if length is None:
        return None
    # Not in the dtype of `length`, in which the count of steps might overflow.
    return jnp.arange(num_steps, dtype=jnp.int32) < jnp.asarray(length, jnp.int32)


def solve_masked(
    step: Callable[[Any, Any], Any],
    init: PyTree,
    xs: PyTree,
    mask: Bool[Array, " steps"] | None,
    *,
    reverse: bool,
    method: AbstractMethod,
    guess: PyTree,
) -> RecurrenceSolution:
    """The states of a cell, `(state, x) -> state`; `ys` are the states.

    Padding holds the state. It is computed like any other step.
    """

    def body(state, inputs):
        x, is_there = inputs
        new = step(state, x)
        if is_there is not None:
            hold = lambda new, old: jnp.where(is_there, new, old)
            new = jtu.tree_map(hold, new, state)
        return new, None

    solution = solve_recurrence(
        body, init, (xs, mask), reverse=reverse, method=method, guess=guess
    )
    return solution._replace(ys=solution.carries)


def fill_padding(xs: Array, mask: Bool[Array, " steps"] | None) -> Array:
    """The first input that there is, in place of padding, which may hold what is no
    number: and no number times zero is none, in gradients as well.
    """
    if mask is None or xs.shape[0] == 0:
        return xs
    first = jnp.argmax(mask)
    filler = jnp.where(mask[first], xs[first], jnp.zeros_like(xs[first]))
    return jnp.where(mask.reshape(-1, *(1,) * (xs.ndim - 1)), xs, filler[None])


def together(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """The statistics of several solves as those of one."""
    gather = lambda name: [s[name] for s in stats]
    most = lambda xs: jax.tree.reduce(jnp.maximum, xs)
    return dict(
        num_steps=max(gather("num_steps")),
        num_good_steps=jax.tree.reduce(jnp.minimum, gather("num_good_steps")),
        num_newton_steps=most(gather("num_newton_steps")),
        newton_residual=most(gather("newton_residual")),
        num_fallback_steps=sum(gather("num_fallback_steps")),
    )
