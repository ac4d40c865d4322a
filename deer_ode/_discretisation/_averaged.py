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
from .._misc import StateFlattener
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

    def _defect(self, y0, y1, x):
        def linearise(t, y):
            f = lambda y: self.product(t, y, x)
            J, value = jax.jacfwd(lambda y: (f(y),) * 2, has_aux=True)(y)
            return J, value - matvec(J, y)

        (J0, z0), (J1, z1) = linearise(x.tprev, y0), linearise(x.tnext, y1)
        J, z = (J0 + J1) / 2, (z0 + z1) / 2
        _, phi_1 = phi_functions(J, 1)
        return y0 - y1 + matvec(phi_1, matvec(J, y0) + z)

    def _at_ends(self, ends):
        at, x = jax.vmap(self.product), ends.grid
        return at(x.tprev, ends.starts, x), at(x.tnext, ends.ys, x)

    def field_values(self, ends):
        return jnp.stack(self._at_ends(ends))

    def defects(self, ends):
        return jax.vmap(self._defect)(*ends)

    def linearised_defects(self, ends, exact):
        del exact  # they always are

        def with_jacobians(y0, y1, x):
            twice = lambda y0, y1: (self._defect(y0, y1, x),) * 2
            return jax.jacfwd(twice, argnums=(0, 1), has_aux=True)(y0, y1)

        (C, B), F = jax.vmap(with_jacobians)(*ends)
        return F, B, C

    @property
    def may_be_singular(self):
        return False

    def from_states(self, states):
        return states

    def predict_step(self):
        return self.y0

    def dense_info(self, ends):
        unflatten = jax.vmap(self.flattener.unflatten)
        start, end = self._at_ends(ends)
        return dict(
            y0=unflatten(ends.starts),
            y1=unflatten(ends.ys),
            derivatives0=(unflatten(start),),
            derivatives1=(unflatten(end),),
        )

    def interpolate(self, info, t0, t1, t):
        return HermiteInterpolation(t0=t0, t1=t1, **info).evaluate(t)

    def error_estimate(self, ends):
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
