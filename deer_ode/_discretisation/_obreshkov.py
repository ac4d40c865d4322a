r"""Two-point formulas: the field and its time derivatives at both ends of a step.

$$y_i = y_{i-1} + \sum_{j=1}^{p} c_j h^j \left( f^{(j-1)}_{i-1} - (-1)^j
f^{(j-1)}_i \right),$$

where $f^{(j)}$ is the $j$-th total time derivative along the solution. All is known at
the points of the grid, so the field, its derivatives and its Jacobian are worked out
once per point, and both steps that meet there share them.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax._term import WrapTerm, _ControlToODE
from jaxtyping import Array, Float

from .._custom_types import Args, State, Trajectory, Y
from .._misc import StateFlattener, previous_states
from ._base import Grid
from ._equations import AbstractEquationRecurrence, AbstractEquationSolver
from ._hermite import HermiteInterpolation
from ._step_map import tracing_steps


Tower = Float[Array, "derivatives state"]


def coefficients(p: int) -> list[float]:
    r"""$c_1, \dots, c_p$: those of the diagonal Pade approximant of the exponential."""
    c = lambda j: (
        math.factorial(p)
        * math.factorial(2 * p - j)
        / (math.factorial(2 * p) * math.factorial(j) * math.factorial(p - j))
    )
    return [c(j) for j in range(1, p + 1)]


def total_derivatives(
    field: Callable[[Any, State], State], t, y: State, num: int
) -> Tower:
    r"""$f, \dot f, \ddot f, \dots$ along the solution, `num` of them."""
    fields = [field]
    for _ in range(num - 1):
        last = fields[-1]

        def derivative(t, y, last=last):
            return jax.jvp(last, (t, y), (jnp.ones_like(t), field(t, y)))[1]

        fields.append(derivative)
    return jnp.stack([g(t, y) for g in fields])


def _is_ode(term) -> bool:
    """Whether the field of `term` is one of time and state alone."""
    if isinstance(term, diffrax.MultiTerm):
        return all(_is_ode(t) for t in term.terms)
    if isinstance(term, WrapTerm):
        return _is_ode(term.term)
    return isinstance(term, diffrax.ODETerm)


def _has_control(term) -> bool:
    """Whether the derivative of a control is part of a field, which jumps with it."""
    is_control = lambda x: isinstance(x, _ControlToODE)
    return any(is_control(x) for x in jtu.tree_leaves(term, is_leaf=is_control))


class _ObreshkovRecurrence(AbstractEquationRecurrence):
    y0: State
    grid: Grid
    flattener: StateFlattener
    field: Callable[[Any, State, Grid], State]
    """`(t, y, x)` to the time derivative at `t` within the step `x`."""
    num_derivatives: int = eqx.field(static=True)
    is_shared: bool = eqx.field(static=True)

    def __init__(self, terms, grid: Grid, y0: Y, args: Args, num_derivatives: int):
        self.flattener = flattener = StateFlattener(y0)
        self.num_derivatives = num_derivatives
        is_ode = _is_ode(terms)
        # A control may jump at the points of the grid, and so differ on either side.
        self.is_shared = is_ode and not _has_control(terms)

        def field(t, y, x):
            if is_ode:
                zero = jnp.zeros_like(t)
                control = terms.contr(zero, zero + 1)
            else:
                control = terms.contr(x.tprev, x.tnext)
            product = flattener.flatten(
                terms.vf_prod(t, flattener.unflatten(y), args, control)
            )
            if is_ode:
                return product
            # The control moves at a constant rate within a step.
            return product / (x.tnext - x.tprev).astype(product.dtype)

        self.y0 = flattener.flatten(y0)
        self.grid = grid
        first = jtu.tree_map(lambda x: x[0], grid)
        with tracing_steps():
            self.field = eqx.filter_closure_convert(field, first.tprev, self.y0, first)

    @property
    def has_unique_steps(self):
        return True

    def _tower(self, num):
        def tower(t, y, x):
            field = lambda t, y: self.field(t, y, x)
            return total_derivatives(field, t, y, num)

        return tower

    def _at_ends(self, ys: Trajectory, fn):
        """`fn(t, y, x)` at the start and at the end of every step."""
        grid, y0 = self.grid, self.y0
        if self.is_shared:
            ts = jnp.concatenate([grid.tprev[:1], grid.tnext])
            first = jtu.tree_map(lambda x: x[0], grid)
            out = jax.vmap(lambda t, y: fn(t, y, first))(
                ts, jnp.concatenate([y0[None], ys])
            )
            return (
                jtu.tree_map(lambda x: x[:-1], out),
                jtu.tree_map(lambda x: x[1:], out),
            )
        # Padding repeats the first step.
        grid = jtu.tree_map(lambda x: jnp.where(grid.active, x, x[0]), grid)
        select = lambda y: jnp.where(grid.active[:, None], y, y0)
        starts, ends = select(previous_states(y0, ys)), select(ys)
        # Inside the step, where it differs from its neighbours.
        tprev, tnext = eqxi.nextafter(grid.tprev), eqxi.prevbefore(grid.tnext)
        return (
            jax.vmap(fn)(tprev, starts, grid),
            jax.vmap(fn)(tnext, ends, grid),
        )

    @property
    def _lengths(self):
        h = (self.grid.tnext - self.grid.tprev).astype(self.y0.dtype)
        return jnp.where(self.grid.active, h, 0)

    def _combine(self, ys, start, end, num):
        h = self._lengths[:, None]
        F = previous_states(self.y0, ys) - ys
        for j, c in enumerate(coefficients(num)):
            F += c * h ** (j + 1) * (start[:, j] + (-1) ** j * end[:, j])
        return F

    def defects(self, ys):
        start, end = self._at_ends(ys, self._tower(self.num_derivatives))
        return self._combine(ys, start, end, self.num_derivatives)

    def blocks(self, ys):
        num = self.num_derivatives

        def with_jacobian(t, y, x):
            def twice(y):
                tower = self._tower(num)(t, y, x)
                return tower, tower

            return jax.jacfwd(twice, has_aux=True)(y)

        (J0, start), (J1, end) = self._at_ends(ys, with_jacobian)
        h = self._lengths[:, None, None]
        eye = jnp.broadcast_to(
            jnp.eye(ys.shape[1], dtype=ys.dtype), (ys.shape[0], *J0.shape[2:])
        )
        B, C = -eye, eye
        for j, c in enumerate(coefficients(num)):
            weight = c * h ** (j + 1)
            B += weight * (-1) ** j * J1[:, j]
            C += weight * J0[:, j]
        return self._combine(ys, start, end, num), B, C

    def from_states(self, states):
        return states

    def _num_interpolated(self):
        return 2 if self.num_derivatives > 2 else 1

    def dense_info(self, ys):
        num = self._num_interpolated()
        ends = self._at_ends(ys, self._tower(num))
        unflatten = jax.vmap(self.flattener.unflatten)
        h = self._lengths[:, None]
        scaled = tuple(
            tuple(unflatten(h ** (j + 1) * end[:, j]) for j in range(num))
            for end in ends
        )
        return dict(
            y0=unflatten(previous_states(self.y0, ys)),
            y1=unflatten(ys),
            derivatives0=scaled[0],
            derivatives1=scaled[1],
        )

    def interpolate(self, info, t0, t1, t):
        return HermiteInterpolation(t0=t0, t1=t1, **info).evaluate(t)

    def error_estimate(self, ys):
        num = max(self.num_derivatives - 1, 1)
        start, end = self._at_ends(ys, self._tower(num))
        if self.num_derivatives == 1:
            # Against Euler's method, the only formula of a lower order.
            return self._lengths[:, None] / 2 * (end[:, 0] - start[:, 0])
        return self._combine(ys, start, end, num)


class Obreshkov(AbstractEquationSolver, diffrax.AbstractAdaptiveSolver):
    r"""Two-point formulas of order 2, 4 or 6, implicit and A-stable.

    With $p$ half the order,

    $$y_i = y_{i-1} + \sum_{j=1}^{p} c_j h^j \left( f^{(j-1)}_{i-1} - (-1)^j
    f^{(j-1)}_i \right), \qquad c_j = \frac{p! \, (2p-j)!}{(2p)! \, j! \, (p-j)!},$$

    where $f^{(j)}$ is the $j$-th total time derivative of the field along the solution,
    found by forward differentiation: $\dot f = \partial_t f + J f$, and so on. Order 2
    is the trapezoidal rule; order 4 is $y_i = y_{i-1} + \frac h2 (f_{i-1} + f_i) +
    \frac{h^2}{12} (\dot f_{i-1} - \dot f_i)$. The leading errors are $h^3/12$, $h^5/720$
    and $h^7/100800$ times a derivative of the solution.

    In parallel time an implicit formula costs no more than an explicit one: the one
    Newton iteration over the grid solves its equations as well. The field, its
    derivatives and its Jacobian are worked out once per point of the grid and nothing
    at any stage between, which makes this the default of [`deer_ode.DEER`][].

    Stable for every step size, without damping what is infinitely stiff: for that, see
    [`deer_ode.RadauIIA`][]. The field has to be as often differentiable as there are
    derivatives here, three times with Newton's method for order 6. Fields that jump in
    time lose order, unless the jumps come from a control (`ControlTerm`, and
    `ControlTerm.to_ode()`) and lie on the grid. A `ControlTerm` itself is taken to
    move at a constant rate within a step: exact for `LinearInterpolation` with its
    knots on the grid, and of order 2 otherwise; `to_ode()` keeps the order.

    Interpolation is Hermite's, cubic, or quintic for order 6. The error estimate is
    what the formula of the next lower order leaves.

    ??? cite "Reference"

        Obreshkov (1940), *Neue Quadraturformeln*; Hairer, Wanner (1996), *Solving
        Ordinary Differential Equations II*, section II.13 of volume I for the
        formulas.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., HermiteInterpolation]] = (
        HermiteInterpolation
    )

    num_derivatives: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        if self.num_derivatives not in (1, 2, 3):
            raise ValueError(
                "`Obreshkov(num_derivatives=...)` must be 1, 2 or 3, for the orders 2, "
                f"4 and 6; got {self.num_derivatives!r}."
            )

    def order(self, terms):
        del terms
        return 2 * self.num_derivatives

    def error_order(self, terms):
        del terms
        return max(2 * self.num_derivatives - 1, 2)

    def recurrence(self, terms, grid, y0, args):
        return _ObreshkovRecurrence(terms, grid, y0, args, self.num_derivatives)


Obreshkov.__init__.__doc__ = """**Arguments:**

- `num_derivatives`: how many time derivatives of the solution are matched at either
    end: 1, 2 or 3 for the orders 2, 4 and 6. Defaults to 3.

**Raises:**

- `ValueError`: for any other number.
"""
