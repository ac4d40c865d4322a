r"""Collocation: polynomials that satisfy the equation at some points of each step.

Within a step the solution is a polynomial through $y_{i-1}$ and the stages $Y_1, \dots,
Y_s$ at the nodes $c_1, \dots, c_s$. Its derivative at the nodes is linear in them,

$$h \dot Y_k = \sum_j D_{kj} (Y_j - y_{i-1}), \qquad D = A^{-1},$$

with the matrix $A$ of the Runge--Kutta method, so that an equation in any form,
$F(t, Y, \dot Y) = 0$, can be asked for at the nodes. All stages of all steps are
unknowns of one system.
"""

import abc
import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .._custom_types import Args, State, Y
from .._misc import StateFlattener, previous_states
from ._adaptive import guess_field
from ._base import Grid
from ._equations import (
    AbstractEquationRecurrence,
    AbstractEquationSolver,
    solve_blocks,
)
from ._hermite import fraction_of_step
from ._implicit_terms import implicit_residual
from ._one_step import tracing_steps


@dataclasses.dataclass(frozen=True, eq=False)
class Nodes:
    """A collocation method, by its nodes. There is one object for each method."""

    c: tuple[float, ...]
    D: np.ndarray
    """`(stages, stages)`; see the top of this module."""
    end: np.ndarray
    """`(stages,)`: the value at the end of a step is the start plus the sum of these
    weights times the stages, less the start.
    """
    powers: np.ndarray
    """`(stages, stages)`: stages, less the start, to coefficients of the powers 1 to
    `stages` of the fraction of the step.
    """
    error: tuple[float, np.ndarray] | None = None
    r"""$\gamma$ and the weights $e$ of an error estimate; see `_embedded`."""


def _embedded(nodes: Nodes) -> tuple[float, np.ndarray]:
    r"""A quadrature of order $s$ that uses the start of the step as well, with weight
    $\gamma$. It differs from the solution by $\gamma h f(y_{i-1}) + \sum_k e_k (Y_k -
    y_{i-1})$. Where $D$ has a real eigenvalue it is $1 / \gamma$, as in RADAU5.
    """
    c, D = np.asarray(nodes.c), nodes.D
    eigenvalues = np.asarray(np.linalg.eigvals(D), np.complex128)
    is_real = np.abs(eigenvalues.imag) < 1e-8 * np.abs(eigenvalues)
    mean = np.abs(np.linalg.det(D)) ** (1 / len(c))
    gamma = 1 / (eigenvalues[is_real].real[0] if np.any(is_real) else mean)
    moments = c ** np.arange(len(c))[:, None]
    return float(gamma), -gamma * np.linalg.inv(moments)[:, 0] @ D


def _collocation(c: np.ndarray) -> Nodes:
    # The polynomial through zero: values at the nodes are c_k^(m+1) times coefficients.
    exponents = np.arange(1, len(c) + 1)
    values = c[:, None] ** exponents
    slopes = exponents * c[:, None] ** (exponents - 1)
    powers = np.linalg.inv(values)
    end = np.ones(len(c)) @ powers
    return Nodes(tuple(float(x) for x in c), slopes @ powers, end, powers)


@ft.cache
def gauss_nodes(num_stages: int) -> Nodes:
    return _collocation((np.polynomial.legendre.leggauss(num_stages)[0] + 1) / 2)


@ft.cache
def radau_nodes(num_stages: int) -> Nodes:
    series = np.zeros(num_stages + 1)
    series[-1], series[-2] = 1, -1  # P_s - P_(s-1), which vanishes at 1
    roots = np.sort(np.polynomial.legendre.legroots(series).real)
    derivative = np.polynomial.legendre.legder(series)
    for _ in range(3):  # to the last digit
        value = np.polynomial.legendre.legval(roots, series)
        roots = roots - value / np.polynomial.legendre.legval(roots, derivative)
    roots[-1] = 1.0
    nodes = _collocation((roots + 1) / 2)
    # The last stage is the end of the step.
    end = np.zeros(num_stages)
    end[-1] = 1
    return dataclasses.replace(nodes, end=end, error=_embedded(nodes))


class PolynomialInterpolation(diffrax.AbstractLocalInterpolation):
    """The collocation polynomial itself."""

    t0: ArrayLike
    t1: ArrayLike
    y0: PyTree[ArrayLike]
    coefficients: PyTree[Array]
    """Like `y0`, with a leading axis: of the powers, from the first, of the fraction of
    the step.
    """

    def evaluate(self, t0, t1=None, left=True) -> Y:
        del left
        if t1 is not None:
            return jtu.tree_map(
                lambda a, b: b - a, self.evaluate(t0), self.evaluate(t1)
            )
        s = fraction_of_step(self.t0, self.t1, t0)

        def horner(y0, coefficients):
            fraction = s.astype(jnp.asarray(y0).dtype)
            value = jnp.zeros_like(y0)
            for k in reversed(range(coefficients.shape[0])):
                value = (value + coefficients[k]) * fraction
            return y0 + value

        return jtu.tree_map(horner, self.y0, self.coefficients)


class _CollocationRecurrence(AbstractEquationRecurrence):
    """States are `(Y_1, ..., Y_s)`, followed by the end where that is not the last."""

    y0: State
    grid: Grid
    flattener: StateFlattener
    equation: Callable[[Any, State, State, Grid], State]
    r"""`(t, Y, h dY/dt, x)` to what has to vanish, in the step `x`."""
    nodes: Nodes = eqx.field(static=True)
    ode: Callable[[Any, State], State] | None = eqx.field(static=True)
    threshold: State | None
    is_stiff: bool = eqx.field(static=True)
    is_solved: bool = eqx.field(static=True)
    r"""Whether the equation is $h \dot Y$ less something that depends on $Y$ alone."""

    def __init__(self, terms, grid: Grid, y0: Y, args: Args, nodes: Nodes):
        self.flattener = flattener = StateFlattener(y0)
        self.threshold = None
        self.ode = guess_field(terms, args, flattener)
        self.is_stiff = nodes.c[-1] == 1
        self.nodes = nodes
        residual = implicit_residual(terms)
        self.is_solved = residual is None
        flat_y0 = flattener.flatten(y0)

        def equation(t, y, increment, x):
            y = flattener.unflatten(y)
            if residual is None:
                control = terms.contr(x.tprev, x.tnext)
                product = flattener.flatten(terms.vf_prod(t, y, args, control))
                return increment - product
            h = (x.tnext - x.tprev).astype(increment.dtype)
            dy = flattener.unflatten(increment / h)
            left = residual(t, y, dy, args)
            with jax.numpy_dtype_promotion("standard"):
                left = StateFlattener(left).flatten(left).astype(flattener.dtype)
            if left.shape != increment.shape:
                raise ValueError(
                    "An implicit term must have as many equations as there are "
                    f"unknowns: {increment.shape[0]} numbers; got {left.shape[0]}."
                )
            return left

        self.y0 = jnp.tile(flat_y0, self._num_entries)
        self.grid = grid
        first = jtu.tree_map(lambda x: x[0], grid)
        with tracing_steps():
            self.equation = eqx.filter_closure_convert(
                equation, first.tprev, flat_y0, flat_y0, first
            )

    @property
    def _num_stages(self):
        return len(self.nodes.c)

    @property
    def _has_end(self) -> bool:
        """Whether the end of a step is no stage."""
        return self.nodes.c[-1] != 1

    @property
    def _num_entries(self):
        return self._num_stages + self._has_end

    def _constant(self, x):
        return jnp.asarray(x, self.y0.dtype)

    def _stages(self, ends):
        size = self.flattener.size
        entries = ends.ys.reshape(ends.ys.shape[0], self._num_entries, size)
        return entries[:, : self._num_stages]

    def _at_stages(self, ends):
        """Times, stages and their increments, and inputs."""
        starts, _, x = ends
        stages = self._stages(ends)
        differences = stages - starts[:, None]
        D = self._constant(self.nodes.D)
        increments = jnp.sum(D[None, :, :, None] * differences[:, None], axis=2)
        c = jnp.asarray(self.nodes.c, x.tprev.dtype)
        ts = x.tprev[:, None] + c[None] * (x.tnext - x.tprev)[:, None]
        if not self._has_end:
            ts = ts.at[:, -1].set(x.tnext)
        return ts, stages, increments, x

    def _per_stage(self, fn):
        return jax.vmap(jax.vmap(fn, in_axes=(0, 0, 0, None)))

    def _assemble(self, ends, stage_defects):
        entries = stage_defects
        if self._has_end:
            weights = self._constant(self.nodes.end)[None, :, None]
            differences = self._stages(ends) - ends.starts[:, None]
            end = ends.starts - self.states(ends.ys)
            end = jnp.sum(weights * differences, axis=1) + end
            entries = jnp.concatenate([entries, end[:, None]], axis=1)
        return entries.reshape(ends.ys.shape)

    def defects(self, ends):
        values = self._per_stage(self.equation)(*self._at_stages(ends))
        return self._assemble(ends, values)

    def linearised_defects(self, ends, exact):
        del exact  # they always are
        ys = ends.ys
        size, num_stages = self.flattener.size, self._num_stages
        num_steps = ys.shape[0]
        eye = jnp.eye(size, dtype=ys.dtype)

        def with_jacobians(t, y, increment, x):
            def twice(y, increment):
                value = self.equation(t, y, increment, x)
                return value, value

            if self.is_solved:
                J, value = jax.jacfwd(twice, has_aux=True)(y, increment)
                return value, J, eye
            (J, M), value = jax.jacfwd(twice, argnums=(0, 1), has_aux=True)(
                y, increment
            )
            return value, J, M

        # (steps, stages, equations, unknowns)
        values, J, M = self._per_stage(with_jacobians)(*self._at_stages(ends))
        D = self._constant(self.nodes.D)
        # (steps, stage of the equation, stage of the unknown, equations, unknowns)
        same = jnp.eye(num_stages, dtype=ys.dtype)[None, :, :, None, None]
        BB = same * J[:, :, None] + D[None, :, :, None, None] * M[:, :, None]
        CC = -jnp.sum(D, axis=1)[None, :, None, None] * M
        if self._has_end:
            end = self._constant(self.nodes.end)
            row = jnp.broadcast_to(
                end[None, None, :, None, None] * eye[None, None, None],
                (num_steps, 1, num_stages, size, size),
            )
            column = jnp.zeros((num_steps, num_stages, 1, size, size), ys.dtype)
            corner = jnp.broadcast_to(-eye, (num_steps, 1, 1, size, size))
            BB = jnp.concatenate([BB, row], axis=1)
            BB = jnp.concatenate(
                [BB, jnp.concatenate([column, corner], axis=1)], axis=2
            )
            last = (1 - jnp.sum(end)) * eye
            last = jnp.broadcast_to(last, (num_steps, 1, size, size))
            CC = jnp.concatenate([CC, last], axis=1)
        B = jnp.swapaxes(BB, 2, 3).reshape(num_steps, ys.shape[1], ys.shape[1])
        C = CC.reshape(num_steps, ys.shape[1], size)
        return self._assemble(ends, values), B, C

    @property
    def may_be_singular(self):
        return not self.is_solved

    def from_states(self, states):
        starts = previous_states(self.y0[-self.flattener.size :], states)
        c = self._constant([*self.nodes.c, 1.0][: self._num_entries])[None, :, None]
        entries = starts[:, None] * (1 - c) + states[:, None] * c
        return entries.reshape(states.shape[0], -1)

    def predict_step(self):
        return jnp.tile(self.y0[-self.flattener.size :], self._num_entries)

    def dense_info(self, ends):
        powers = self._constant(self.nodes.powers)
        differences = self._stages(ends) - ends.starts[:, None]
        coefficients = jnp.sum(powers[None, :, :, None] * differences[:, None], axis=2)
        unflatten = self.flattener.unflatten
        return dict(
            y0=jax.vmap(unflatten)(ends.starts),
            coefficients=jax.vmap(jax.vmap(unflatten))(coefficients),
        )

    def interpolate(self, info, t0, t1, t):
        return PolynomialInterpolation(t0=t0, t1=t1, **info).evaluate(t)

    def error_estimate(self, ends):
        # The field at the start is not known of an equation in another form.
        if self.nodes.error is None or not self.is_solved:
            return None
        gamma, weights = self.nodes.error
        starts, _, x = ends

        def with_jacobian(y, x):
            def twice(y):
                value = -self.equation(x.tprev, y, jnp.zeros_like(y), x)
                return value, value

            return jax.jacfwd(twice, has_aux=True)(y)

        hJ, hf = jax.vmap(with_jacobian)(starts, x)
        weights = self._constant(weights)[None, :, None]
        differences = self._stages(ends) - starts[:, None]
        difference = jnp.sum(weights * differences, axis=1)
        difference = self._constant(gamma) * hf + difference
        # What decays at once would be seen as an error as large as the state's change.
        eye = jnp.eye(hJ.shape[-1], dtype=hJ.dtype)[None]
        B = eye - self._constant(gamma) * hJ
        return solve_blocks(B, difference[..., None])[..., 0]


class AbstractCollocation(AbstractEquationSolver):
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., PolynomialInterpolation]] = (
        PolynomialInterpolation
    )

    num_stages: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def nodes(self) -> Nodes:
        """The nodes of this method."""

    def recurrence(self, terms, grid, y0, args):
        return _CollocationRecurrence(terms, grid, y0, args, self.nodes)


def _check_num_stages(solver) -> None:
    if not (isinstance(solver.num_stages, int) and 1 <= solver.num_stages <= 8):
        raise ValueError(
            f"`{type(solver).__name__}(num_stages=...)` must be an integer from 1 to "
            f"8; got {solver.num_stages!r}."
        )


class RadauIIA(AbstractCollocation):
    r"""Radau IIA methods: for stiff equations and differential-algebraic ones.

    Collocation at the $s$ nodes of Radau, of which the last is the end of the step:
    order $2s - 1$, L-stable and stiffly accurate. One stage is the backward Euler
    method; the default of three has order 5. Constraints hold at the end of every step
    to rounding. The stages of all steps are unknowns of one Newton iteration.

    Takes ordinary terms, [`deer_ode.DAETerm`][] and [`deer_ode.MassMatrixTerm`][].
    Interpolation is the collocation polynomial, of order $s$. For ordinary terms there
    is an error estimate, so that they can be solved to a tolerance: the difference from
    a quadrature of order $s$,

    $$(1 - \gamma h J)^{-1} \left( \gamma h f(t_{i-1}, y_{i-1}) + \sum_k e_k (Y_k -
    y_{i-1}) \right) = O(h^{s+1}).$$

    ??? cite "Reference"

        Hairer, Wanner (1996), *Solving Ordinary Differential Equations II*, sections
        IV.5, IV.8 (equation 8.19 for the error estimate) and VII.
    """

    num_stages: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        _check_num_stages(self)

    @property
    def nodes(self):
        return radau_nodes(self.num_stages)

    def order(self, terms):
        del terms
        return 2 * self.num_stages - 1

    def error_order(self, terms):
        del terms
        return self.num_stages + 1


RadauIIA.__init__.__doc__ = """**Arguments:**

- `num_stages`: 1 (backward Euler) to 8; the order is twice that, less one.
"""


class GaussLegendre(AbstractCollocation):
    r"""Gauss--Legendre methods: symplectic, and of the highest order there is.

    Collocation at the $s$ nodes of Gauss: order $2s$, A-stable, and symplectic for
    Hamiltonian systems. One stage is the implicit midpoint rule; the default of two has
    order 4. The stages of all steps are unknowns of one Newton iteration.

    Takes ordinary terms, and [`deer_ode.DAETerm`][] and [`deer_ode.MassMatrixTerm`][]
    of index 1, for which [`deer_ode.RadauIIA`][] is the better choice. Interpolation is
    the collocation polynomial, of order $s$. There is no error estimate.

    ??? cite "Reference"

        Hairer, Lubich, Wanner (2006), *Geometric Numerical Integration*, sections II.1
        and IV.2.
    """

    num_stages: int = eqx.field(static=True, default=2)

    def __check_init__(self):
        _check_num_stages(self)

    @property
    def nodes(self):
        return gauss_nodes(self.num_stages)

    def order(self, terms):
        del terms
        return 2 * self.num_stages


GaussLegendre.__init__.__doc__ = """**Arguments:**

- `num_stages`: 1 (implicit midpoint) to 8; the order is twice that.
"""
