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
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._affine import matmul
from .._custom_types import Args, State, Y
from .._foreign import nextafter, prevbefore
from .._misc import StateFlattener
from ._adaptive import flat_field, guess_field
from ._base import Grid
from ._equations import (
    AbstractEquationRecurrence,
    AbstractEquationSolver,
    solve_blocks,
)
from ._explicit_rk import explicit_rk_step
from ._hermite import HermiteInterpolation
from ._one_step import tracing_steps


Jacobians = tuple[Float[Array, "steps state state"], ...]

# The end of a step is the one nearby if it is where an explicit step ends, up to this
# fraction of what the step moves, and this fraction of the state where nothing moves.
_NEAR = 0.1
_NEGLIGIBLE = 1e-6

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
    r"""$f, \dot f, \ddot f$ along the solution: the first `num` of them.

    With the direction $d = (1, f)$ of the solution in time and state, $\dot f = Df \,
    d$ and $\ddot f = D^2 f \, [d, d] + Df \, (0, \dot f)$. The direction is held fixed
    where $Df$ is differentiated, which is half the work of differentiating $\dot f$.
    """
    f, pushforward = jax.linearize(field, t, y)
    if num == 1:
        return f[None]
    one = jnp.ones_like(t)
    f_dot = pushforward(one, f)
    if num == 2:
        return jnp.stack([f, f_dot])
    along = lambda t, y: jax.jvp(field, (t, y), (one, f))[1]
    second = jax.jvp(along, (t, y), (one, f))[1]
    f_ddot = second + pushforward(jnp.zeros_like(t), f_dot)
    return jnp.stack([f, f_dot, f_ddot])


def _with_third(J0: Jacobians, J1: Jacobians, h: Array) -> tuple[Jacobians, ...]:
    r"""The Jacobians of $f, \dot f, \ddot f$ at both ends, from those of the first two.

    With $S = D^2 f[d, \cdot\,]$, by which $\partial_y \dot f$ exceeds $J^2$, that of
    $\ddot f$ is $J \, \partial_y \dot f + 2 S J + \dot S$. Along a solution $\dot S$ is
    the slope of $S$ over the step; the errors that this makes at the two ends cancel to
    first order. To have it exactly would take longer than all the rest.
    """
    S0, S1 = (J[1] - matmul(J[0], J[0]) for J in (J0, J1))
    slope = (S1 - S0) / h
    return tuple(
        (*J, matmul(J[0], J[1]) + 2 * matmul(S, J[0]) + slope)
        for J, S in ((J0, S0), (J1, S1))
    )


class _ObreshkovRecurrence(AbstractEquationRecurrence):
    y0: State
    grid: Grid
    flattener: StateFlattener
    field: Callable[[Any, State, Grid], State]
    """`(t, y, x)` to the time derivative at `t` within the step `x`."""
    ode: Callable[[Any, State], State] | None = eqx.field(static=True)
    threshold: State | None
    is_stiff = False
    num_derivatives: int = eqx.field(static=True)

    def __init__(self, terms, grid: Grid, y0: Y, args: Args, num_derivatives: int):
        self.flattener = flattener = StateFlattener(y0)
        self.threshold = None
        self.num_derivatives = num_derivatives
        ode = flat_field(terms, args, flattener)
        self.ode = guess_field(terms, args, flattener)

        def field(t, y, x):
            if ode is not None:
                return ode(t, y)
            # The control moves at a constant rate within a step.
            control = terms.contr(x.tprev, x.tnext)
            product = terms.vf_prod(t, flattener.unflatten(y), args, control)
            product = flattener.flatten(product)
            return product / (x.tnext - x.tprev).astype(product.dtype)

        self.y0 = flattener.flatten(y0)
        self.grid = grid
        first = jtu.tree_map(lambda x: x[0], grid)
        with tracing_steps():
            self.field = eqx.filter_closure_convert(field, first.tprev, self.y0, first)

    def on(self, grid):
        # With its static fields, which tell whether the field may jump.
        return eqx.tree_at(lambda r: r.grid, self, grid)

    def are_sequential_ends(self, ys):
        """Whether each step ends about where a step that solves no equations does.

        Either explicit, or linearly implicit where stiffness forbids that. To solve
        each step by itself would be as much work as the iteration.
        """
        starts, ys, grid = ends = self.ends(ys)
        explicit = jax.vmap(self._explicit_step)(starts, grid)
        size = jnp.max(jnp.abs(starts), axis=-1)

        def is_near(others):
            moved = jnp.max(jnp.abs(others - starts), axis=-1)
            distance = jnp.max(jnp.abs(others - ys), axis=-1)
            return distance <= _NEAR * moved + _NEGLIGIBLE * size

        near = is_near(explicit)
        return lax.cond(
            jnp.all(near | ~grid.active),
            lambda: near,
            lambda: near | is_near(self._linearly_implicit_steps(ends)),
        )

    def _linearly_implicit_steps(self, ends):
        """One Newton iteration for each step by itself, from where it starts."""
        num = min(self.num_derivatives, 2)
        starts, _, x = ends

        def with_jacobians(t, y, x):
            J = jax.jacfwd(lambda y: self._tower(num)(t, y, x))(y)
            return J, self._tower(1)(t, y, x)[0]

        J, f = jax.vmap(with_jacobians)(x.tprev, starts, x)
        h = self._lengths(x)[:, None, None]
        B = jnp.eye(starts.shape[1], dtype=starts.dtype)[None]
        for j, c in enumerate(coefficients(num)):
            B -= c * h ** (j + 1) * (-1) ** j * J[:, j]
        # The derivatives at both ends are the same: of the field nothing else is left.
        return starts + solve_blocks(B, h * f[..., None])[..., 0]

    def _tower(self, num):
        def tower(t, y, x):
            field = lambda t, y: self.field(t, y, x)
            return total_derivatives(field, t, y, num)

        return tower

    def _at_ends(self, ends, fn):
        """`fn(t, y, x)` at the start and at the end of every step."""
        starts, ys, grid = ends
        # A control may jump at the points of the grid, and so differ on either side.
        if self.ode is not None and not self.grid.has_jumps:
            # Where a step ends the next one starts. (Padding has no use for either.)
            ts = jnp.concatenate([grid.tprev[:1], grid.tnext])
            first = jtu.tree_map(lambda x: x[0], grid)
            out = jax.vmap(lambda t, y: fn(t, y, first))(
                ts, jnp.concatenate([starts[:1], ys])
            )
            return (
                jtu.tree_map(lambda x: x[:-1], out),
                jtu.tree_map(lambda x: x[1:], out),
            )
        # Inside the step, where it differs from its neighbours.
        tprev, tnext = nextafter(grid.tprev), prevbefore(grid.tnext)
        return jax.vmap(fn)(tprev, starts, grid), jax.vmap(fn)(tnext, ys, grid)

    def _lengths(self, grid):
        return (grid.tnext - grid.tprev).astype(self.y0.dtype)

    def _combine(self, ends, start, end, num):
        h = self._lengths(ends.grid)[:, None]
        F = ends.starts - ends.ys
        for j, c in enumerate(coefficients(num)):
            F += c * h ** (j + 1) * (start[:, j] + (-1) ** j * end[:, j])
        return F

    def field_values(self, ends):
        return jnp.stack(self._at_ends(ends, lambda t, y, x: self.field(t, y, x)))

    def defects(self, ends):
        start, end = self._at_ends(ends, self._tower(self.num_derivatives))
        return self._combine(ends, start, end, self.num_derivatives)

    def linearised_defects(self, ends, exact):
        num = self.num_derivatives
        num_differentiated = num if exact else min(num, 2)

        def with_jacobians(t, y, x):
            Js = jax.jacfwd(lambda y: self._tower(num_differentiated)(t, y, x))(y)
            return tuple(Js), self._tower(num)(t, y, x)

        (J0, start), (J1, end) = self._at_ends(ends, with_jacobians)
        # Or the compiler works them out again for each use.
        J0, start, J1, end = lax.optimization_barrier((J0, start, J1, end))
        h = self._lengths(ends.grid)[:, None, None]
        if num_differentiated < num:
            J0, J1 = _with_third(J0, J1, jnp.where(h == 0, 1, h))
        eye = jnp.eye(ends.ys.shape[1], dtype=ends.ys.dtype)
        eye = jnp.broadcast_to(eye, J0[0].shape)
        B, C = -eye, eye
        for j, c in enumerate(coefficients(num)):
            weight = c * h ** (j + 1)
            B += weight * (-1) ** j * J1[j]
            C += weight * J0[j]
        return self._combine(ends, start, end, num), B, C

    @property
    def prefers_sequential(self):
        return False

    @property
    def may_be_singular(self):
        return False

    def from_states(self, states):
        return states

    def predict_step(self):
        first = jtu.tree_map(lambda x: x[0], self.grid.plain())
        return self._explicit_step(self.y0, first)

    def _explicit_step(self, y, x):
        term = diffrax.ODETerm(lambda t, y, args: self.field(t, y, x))
        return explicit_rk_step(diffrax.Tsit5(), term, x.tprev, x.tnext, y, None)[0]

    def _num_interpolated(self):
        return 2 if self.num_derivatives > 2 else 1

    def dense_info(self, ends):
        num = self._num_interpolated()
        unflatten = jax.vmap(self.flattener.unflatten)
        h = self._lengths(ends.grid)[:, None]
        scaled = tuple(
            tuple(unflatten(h ** (j + 1) * end[:, j]) for j in range(num))
            for end in self._at_ends(ends, self._tower(num))
        )
        return dict(
            y0=unflatten(ends.starts),
            y1=unflatten(ends.ys),
            derivatives0=scaled[0],
            derivatives1=scaled[1],
        )

    def interpolate(self, info, t0, t1, t):
        return HermiteInterpolation(t0=t0, t1=t1, **info).evaluate(t)

    def error_estimate(self, ends):
        num = max(self.num_derivatives - 1, 1)
        start, end = self._at_ends(ends, self._tower(num))
        if self.num_derivatives == 1:
            # Against Euler's method, the only formula of a lower order.
            return self._lengths(ends.grid)[:, None] / 2 * (end[:, 0] - start[:, 0])
        return self._combine(ends, start, end, num)


class Obreshkov(AbstractEquationSolver, diffrax.AbstractAdaptiveSolver):
    r"""Two-point formulas of order 2, 4 or 6, implicit and A-stable.

    With $p$ half the order,

    $$y_i = y_{i-1} + \sum_{j=1}^{p} c_j h^j \left( f^{(j-1)}_{i-1} - (-1)^j
    f^{(j-1)}_i \right), \qquad c_j = \frac{p! \, (2p-j)!}{(2p)! \, j! \, (p-j)!},$$

    where $f^{(j)}$ is the $j$-th total time derivative of the field along the solution,
    found by forward differentiation: $\dot f = \partial_t f + J f$, and so on. Order 2
    is the trapezoidal rule; order 4 is $y_i = y_{i-1} + \frac h2 (f_{i-1} + f_i) +
    \frac{h^2}{12} (\dot f_{i-1} - \dot f_i)$. The leading errors are $h^3/12$,
    $h^5/720$ and $h^7/100800$ times a derivative of the solution.

    In parallel time an implicit formula costs no more than an explicit one: the one
    Newton iteration over the grid solves its equations as well. The field, its
    derivatives and its Jacobian are worked out once per point of the grid and nothing
    at any stage between.

    Stable for every step size, without damping what is infinitely stiff: for that, see
    [`deer_ode.RadauIIA`][]. The field has to be as often differentiable as there are
    derivatives here, three times with Newton's method for order 6. Fields that jump in
    time lose order, unless the jumps come from a control (`ControlTerm`, and
    `ControlTerm.to_ode()`) and lie on the grid, or are the `jump_ts` of a tolerance. A
    `ControlTerm` itself is taken to move at a constant rate within a step: exact for
    `LinearInterpolation` with its knots on the grid, and of order 2 otherwise;
    `to_ode()` keeps the order.

    Interpolation is Hermite's, cubic, or quintic for order 6. The error estimate is
    what the formula of the next lower order leaves.

    ??? cite "Reference"

        Obreshkov (1940), *Neue Quadraturformeln*; Hairer, Nørsett, Wanner
        (1993), *Solving Ordinary Differential Equations I*, section II.13.
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
