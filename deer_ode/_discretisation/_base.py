"""The time grid that every discretisation is made on."""

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

    @property
    def num_steps(self) -> int:
        return self.tprev.shape[0]

    @property
    def num_active(self) -> Int[Array, ""]:
        return jnp.sum(self.active, dtype=jnp.int32)

    def until(self, num_steps: Int[Array, ""]) -> "Grid":
        """The same, of which the first `num_steps` steps at most are made."""
        steps = jnp.arange(self.num_steps, dtype=jnp.int32)
        return Grid(self.tprev, self.tnext, self.active & (steps < num_steps))

    @classmethod
    def from_points(cls, ts: Float[Array, " points"]) -> "Grid":
        """A grid without padding through all of `ts`."""
        return cls(ts[:-1], ts[1:], jnp.ones(ts.shape[0] - 1, bool), True)

    def coarsen(self, every: int) -> "Grid":
        """`every` steps at once; the last coarse step may span fewer."""
        num_coarse = -(-self.num_steps // every)
        starts = every * jnp.arange(num_coarse)
        ends = jnp.minimum(starts + every, self.num_steps) - 1
        # Padding repeats the end of the grid, so ends may be looked up as they are.
        return Grid(self.tprev[starts], self.tnext[ends], self.active[starts])
