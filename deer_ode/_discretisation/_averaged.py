r"""The discretisation of the DEER paper, with a true matrix exponential.

Within a step the field is replaced by the average of its linearisations at both ends,
$\dot y = \bar J y + \bar z$ with $z = f - J y$, and that is integrated exactly.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._affine import matvec
from .._custom_types import Args, State, Y
from .._misc import StateFlattener, previous_states
from ._adaptive import guess_field
from ._base import Grid
from ._equations import AbstractEquationRecurrence, AbstractEquationSolver
from ._hermite import HermiteInterpolation
from ._one_step import tracing_steps
from ._phi import phi_functions


class _AveragedRecurrence(AbstractEquationRecurrence):
    y0: State
    grid: Grid
    flattener: StateFlattener
    product: Callable[[Any, State, Grid], State]
    """`(t, y, x)` to the field times the increment of the control over the step `x`."""
    ode: Callable[[Any, State], State] | None = eqx.field(static=True)
    is_stiff = True
    threshold = None

    def __init__(self, terms, grid: Grid, y0: Y, args: Args):
        self.flattener = flattener = StateFlattener(y0)
        self.ode = guess_field(terms, args, flattener)

        def product(t, y, x):
            control = terms.contr(x.tprev, x.tnext)
            y = flattener.unflatten(y)
            return flattener.flatten(terms.vf_prod(t, y, args, control))

        self.y0 = flattener.flatten(y0)
        self.grid = grid
        first = jtu.tree_map(lambda x: x[0], grid)
        with tracing_steps():
            self.product = eqx.filter_closure_convert(
                product, first.tprev, self.y0, first
            )

    def _inputs(self, ys):
        """Both ends and the steps; padding takes the first step, from its start."""
        grid = self.grid
        x = jtu.tree_map(lambda x: jnp.where(grid.active, x, x[0]), grid)
        select = lambda y: jnp.where(grid.active[:, None], y, self.y0[None])
        return select(previous_states(self.y0, ys)), select(ys), x

    def _defect(self, y0, y1, x):
        def linearise(t, y):
            f = lambda y: self.product(t, y, x)
            J, value = jax.jacfwd(lambda y: (f(y),) * 2, has_aux=True)(y)
            return J, value - matvec(J, y)

        (J0, z0), (J1, z1) = linearise(x.tprev, y0), linearise(x.tnext, y1)
        J, z = (J0 + J1) / 2, (z0 + z1) / 2
        _, phi_1 = phi_functions(J, 1)
        return y0 - y1 + matvec(phi_1, matvec(J, y0) + z)

    def _padded(self, ys, F):
        still = previous_states(self.y0, ys) - ys
        return jnp.where(self.grid.active[:, None], F, still)

    def field_values(self, ys):
        starts, ends, x = self._inputs(ys)
        at = jax.vmap(self.product)
        return jnp.stack([at(x.tprev, starts, x), at(x.tnext, ends, x)])

    def evaluate(self, ys):
        return self._padded(ys, jax.vmap(self._defect)(*self._inputs(ys)))

    def blocks(self, ys, exact):
        del exact  # they always are

        def with_jacobians(y0, y1, x):
            twice = lambda y0, y1: (self._defect(y0, y1, x),) * 2
            return jax.jacfwd(twice, argnums=(0, 1), has_aux=True)(y0, y1)

        (C, B), F = jax.vmap(with_jacobians)(*self._inputs(ys))
        active = self.grid.active[:, None, None]
        eye = jnp.eye(ys.shape[1], dtype=ys.dtype)[None]
        return (
            self._padded(ys, F),
            jnp.where(active, B, -eye),
            jnp.where(active, C, eye),
        )

    @property
    def may_be_singular(self):
        return False

    def from_states(self, states):
        return states

    def predict_step(self):
        return self.y0

    def dense_info(self, ys):
        starts, ends, x = self._inputs(ys)
        unflatten = jax.vmap(self.flattener.unflatten)
        return dict(
            y0=unflatten(starts),
            y1=unflatten(ends),
            derivatives0=(unflatten(jax.vmap(self.product)(x.tprev, starts, x)),),
            derivatives1=(unflatten(jax.vmap(self.product)(x.tnext, ends, x)),),
        )

    def interpolate(self, info, t0, t1, t):
        return HermiteInterpolation(t0=t0, t1=t1, **info).evaluate(t)

    def error_estimate(self, ys):
        return None


class AveragedExponential(AbstractEquationSolver):
    r"""The discretisation of the DEER paper.

    $$y_i = e^{\bar J h} y_{i-1} + \varphi_1(\bar J h) h \bar z, \qquad \bar J =
    \tfrac12 (J_{i-1} + J_i), \qquad \bar z = \tfrac12 (z_{i-1} + z_i),$$

    with $z = f - J y$ at both ends of the step, and $\varphi_1(x) = (e^x - 1) / x$. Of
    order 2, and exact for linear equations with constant coefficients, however stiff.
    Kept for comparison: [`deer_ode.Obreshkov`][] needs far less work for the same
    accuracy.

    Takes any terms; the increment of a control over the step takes part in the
    linearisation. Interpolation is Hermite's cubic. There is no error estimate.

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., HermiteInterpolation]] = (
        HermiteInterpolation
    )

    def order(self, terms):
        del terms
        return 2

    def recurrence(self, terms, grid, y0, args):
        return _AveragedRecurrence(terms, grid, y0, args)
