r"""Several steps as one: shooting.

$c$ consecutive steps are a step as well,

$$F_k = f_{(k + 1) c} \circ \dots \circ f_{k c + 1}, \qquad
\frac{\partial F_k}{\partial y} = A_{(k + 1) c} \cdots A_{k c + 1},$$

so a recurrence of $T$ steps is one of $K = T / c$ chunks, whose unknowns are the states
between chunks. Within a chunk the state and its tangents are carried along in a loop,
all chunks side by side. What is kept is $K$ Jacobians in place of $T$, and the states
within a chunk follow from its start without any iteration.
"""

from typing import Any

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, PyTree

from ._custom_types import State, Trajectory
from ._method import TrajectorySolution, first_nonfinite_step
from ._misc import finite, previous_states
from ._recurrence import AbstractMapRecurrence, cut


class Chunks(AbstractMapRecurrence):
    """`size` steps of `steps` at a time. Those beyond the last one do nothing."""

    steps: AbstractMapRecurrence
    xs: PyTree[Array]
    """What the steps take in, and whether they do anything, turned: the first axis
    goes through a chunk, the second counts the chunks. A loop over the first takes all
    chunks along without moving anything.
    """

    def __init__(self, steps: AbstractMapRecurrence, xs: PyTree[Array]):
        self.steps, self.xs = steps, xs

    @classmethod
    def of(cls, recurrence: AbstractMapRecurrence, size: int) -> "Chunks":
        num_steps = recurrence.num_steps
        num_chunks = -(-num_steps // size)
        steps = recurrence.padded(num_chunks * size)
        active = jnp.arange(num_chunks * size) < num_steps
        turn = lambda x: x.reshape(num_chunks, size, *x.shape[1:]).swapaxes(0, 1)
        return cls(steps, jtu.tree_map(turn, (steps.xs, active)))

    @property
    def active(self) -> Bool[Array, "size chunks"]:
        return self.xs[1]

    @property
    def size(self) -> int:
        return self.active.shape[0]

    @property
    def y0(self):
        return self.steps.y0

    @property
    def is_explicit(self):
        return True

    @property
    def eps(self):
        return self.steps.eps

    @property
    def threshold(self):
        return self.steps.threshold

    @property
    def f(self):  # pyright: ignore
        return lambda y, inputs: self._through(y, inputs)[0]

    @property
    def xs_axis(self):
        return 1

    def _take(self, y: State, inputs: Any) -> State:
        """One of the steps within."""
        x, active = inputs
        return jnp.where(active, self.steps.f(y, x), y)

    def _through(self, y: State, inputs: Any) -> tuple[State, Trajectory]:
        """Where a chunk ends, and all states on the way."""

        def step(y, inputs):
            y = self._take(y, inputs)
            return y, y

        return lax.scan(step, y, inputs)

    def _with_sizes(self, y: State, inputs: Any) -> tuple[State, State]:
        """Where a chunk ends, and how large each entry was on the way."""

        def step(carry, inputs):
            y, sizes = carry
            y = self._take(y, inputs)
            now = finite(self.sizes(lax.stop_gradient(y)))
            return (y, jnp.maximum(sizes, now)), None

        return lax.scan(step, (y, jnp.zeros_like(y)), inputs)[0]

    def linearise(self, ys, linearisation):
        """Numbers within a chunk may be larger than those at its end: rounding is that
        of the largest.
        """

        def linearise_chunk(y, inputs):
            through = lambda y: self._with_sizes(y, inputs)
            return linearisation(through, y, has_aux=True)

        with self.tracing():
            all_chunks = jax.vmap(linearise_chunk, in_axes=(0, self.xs_axis))
            (values, sizes), A = all_chunks(previous_states(self.y0, ys), self.xs)
        return self._linearised(ys, values, A, sizes)

    def part(self, start, length, y0):
        steps = self.steps.part(start * self.size, length * self.size, y0)
        return Chunks(steps, cut(self.xs, start, length, axis=1))

    def groups(self):
        return self.steps.groups()

    def tracing(self):
        return self.steps.tracing()

    def largest_scale(self, scale, stride=1):
        return self.steps.largest_scale(scale, stride * self.size)

    def cause_of_failure(self):
        raise NotImplementedError("steps are looked at one by one")

    def until(self, num_steps):
        raise NotImplementedError("steps that do no harm are chosen before chunks")

    def padded(self, num_steps):
        raise NotImplementedError("chunks are padded when they are made")

    def fold(self, ys: Trajectory) -> Float[Array, "chunks state"]:
        """Of the states after each step those after each chunk."""
        padding = self.active.size - ys.shape[0]
        ys = jnp.pad(ys, ((0, padding), (0, 0)), mode="edge")
        return ys[self.size - 1 :: self.size]

    def flatten(self, ys):
        return self.fold(self.steps.flatten(ys))

    def coarse_trajectory(self, every):
        return self.fold(self.steps.coarse_trajectory(every))

    def adaptive_trajectory(self, rtol):
        ys = self.steps.adaptive_trajectory(rtol)
        return None if ys is None else self.fold(ys)

    def unfold(
        self, solution: TrajectorySolution, num_steps: int, fallback: bool
    ) -> TrajectorySolution:
        """The solution for each step from that for each chunk, which is the answer in
        any case if there is a `fallback`.
        """
        starts = previous_states(self.y0, solution.ys)
        with self.tracing():
            through = jax.vmap(self._through, in_axes=(0, self.xs_axis))
            ys = through(starts, self.xs)[1]
        ys = ys.reshape(-1, ys.shape[-1])[:num_steps]
        is_sequential = jnp.repeat(solution.is_sequential, self.size)[:num_steps]
        good_until = jnp.minimum(solution.num_good_steps * self.size, num_steps)
        nonfinite = first_nonfinite_step(ys)
        if not fallback:
            # A chunk may pass through such a state and end well. Where it is stuck, it
            # is right up to there.
            stuck_until = jnp.minimum(good_until + self.size, num_steps)
            until = jnp.where(solution.is_stuck, stuck_until, good_until)
            is_stuck = (nonfinite >= 0) & (nonfinite < until)
            good_until = jnp.where(is_stuck, nonfinite, good_until)
            nonfinite = jnp.where(is_stuck, nonfinite, -1)
            solution = solution._replace(is_stuck=is_stuck | solution.is_stuck)
        return solution._replace(
            ys=ys,
            num_good_steps=good_until,
            is_sequential=is_sequential,
            first_nonfinite_step=nonfinite,
        )
