"""The time grid that every discretisation is made on."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Grid(eqx.Module):
    """The steps of a solve: step `i` goes from `tprev[i]` to `tnext[i]`.

    The number of steps is static. Where a solve takes fewer, the rest is padding:
    inactive steps that leave the state exactly as it is.
    """

    tprev: Float[Array, " steps"]
    tnext: Float[Array, " steps"]
    active: Bool[Array, " steps"]
    is_full: bool = eqx.field(static=True, default=False)
    """Whether it is known while tracing that there is no padding."""
    has_jumps: bool = eqx.field(static=True, default=False)
    """Whether steps may end just before a jump of the field and begin just after it."""

    @property
    def num_steps(self) -> int:
        return self.tprev.shape[0]

    def plain(self) -> "Grid":
        """Without static fields: a traced step takes grids of one structure only."""
        return Grid(self.tprev, self.tnext, self.active)

    def filled(self) -> "Grid":
        """Padding repeats the first step, which can be made from where that starts."""
        fill = lambda x: jnp.where(self.active, x, x[0])
        return Grid(fill(self.tprev), fill(self.tnext), self.active)

    @property
    def ends(self) -> Float[Array, " steps"]:
        """The end of each step as Diffrax saves it: where the next one begins."""
        goes_on = jnp.append(self.active[1:], False)
        return jnp.where(goes_on, jnp.roll(self.tprev, -1), self.tnext)

    @property
    def num_active(self) -> Int[Array, ""]:
        return jnp.sum(self.active, dtype=jnp.int32)

    def until(self, num_steps: Int[Array, ""]) -> "Grid":
        """The same, of which the first `num_steps` steps at most are made."""
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        return dataclasses.replace(
            self, active=self.active & (steps < num_steps), is_full=False
        )

    @classmethod
    def from_points(cls, ts: Float[Array, " points"]) -> "Grid":
        """A grid without padding through all of `ts`."""
        return cls(ts[:-1], ts[1:], jnp.ones(ts.shape[0] - 1, bool), True)

    def coarsen(self, every: int) -> "Grid":
        """`every` steps at once; the last coarse step may span fewer."""
        num_coarse = -(-self.num_steps // every)
        starts = every * jnp.arange(num_coarse)
        ends = jnp.minimum(starts + every, self.num_steps) - 1
        # Unused steps repeat the end of the grid. Not so after `until`, where the last
        # coarse step may go beyond the event; it is used by guesses only.
        return Grid(self.tprev[starts], self.tnext[ends], self.active[starts])
