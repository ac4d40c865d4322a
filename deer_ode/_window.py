"""How long a sliding window is: an option of Newton's method."""

from typing import Any

import equinox as eqx


class Window(eqx.Module):
    """Solves window by window where the whole interval at once does not converge.

    A window begins at the first step that has not converged, and advances as steps
    converge. States that enter it are guessed from the end of the window at that time,
    by the method's own predictor. If it has neither advanced by a quarter of its length
    nor halved the residual in 8 iterations, the states that have not converged are
    replaced by the last one that has; if that fails too, four times as many steps as
    the window is long are sequential, the next time 16 times as many, and so on.

    ??? cite "Reference"

        Shih et al. (2023), *Parallel sampling of diffusion models*, for windows that
        slide over a trajectory which is iterated on.
    """

    length: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.length is None:
            return
        if type(self.length) is not int or self.length < 1:
            raise ValueError(
                "`Window(length)` must be a positive integer, or `None` for the "
                f"default; got {self.length!r}."
            )


def as_window(window: Any) -> Any:
    """`Newton(window=256)` is `Newton(window=Window(256))`."""
    return Window(window) if type(window) is int else window


Window.__init__.__doc__ = """**Arguments:**

- `length`: how many steps a window spans. By default 256: on accelerators for what does
    not converge over the whole interval, which is tried first; on a CPU for more than
    1,024 steps, while fewer are one window. Where several steps are taken as one
    (`chunk` of [`Newton`][deer_ode.Newton]) it is as many of these as fit into it.
"""
