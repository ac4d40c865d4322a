r"""Exponential Rosenbrock methods, as solvers of Diffrax.

Written for the product $P(t, y)$ of vector field and control, which holds the step:
$P = h f$ for an ordinary differential equation, $P = g \, \Delta X$ for a controlled
one, whose control thereby enters the linearisation. With $P$ at $(t_0, y_0)$ and its
derivatives there,

$$J = \partial_y P, \qquad \dot P = h \, \partial_t P, \qquad
D_i = P(t_0 + c_i h, y_0 + u_i) - P - J u_i - c_i \dot P,$$

the linear part of the step is exact, and only the remainders $D_i$ at the stages
$u_i$ are approximated.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._affine import matvec
from .._custom_types import Args, State, Y
from .._misc import StateFlattener
from ._phi import phi_functions, phi_functions_half_and_full


class Linearised(eqx.Module):
    r"""$P$ and its derivatives at the start of a step, on flat states."""

    product: Callable[[Array, State], State]
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    y: State
    value: State
    jacobian: Float[Array, "state state"]
    time_derivative: State

    def __init__(self, product, t0, t1, y):
        def with_value(y):
            value = product(t0, y)
            return value, value

        self.product = product
        self.t0 = t0
        self.t1 = t1
        self.y = y
        self.jacobian, self.value = jax.jacfwd(with_value, has_aux=True)(y)
        _, self.time_derivative = jax.jvp(
            lambda t: product(t, y), (t0,), ((t1 - t0).astype(t0.dtype),)
        )

    def remainder(self, c: float, u: State) -> State:
        """What the linear part leaves of $P$ at `c` of the step, where `y` is `y + u`.

        From the increment `u` and not from `y + u`, so that no rounding of a sum is
        multiplied by a stiff Jacobian.
        """
        # No rounding at the end, as in Diffrax.
        dt = self.t1 - self.t0
        t = self.t1 if c == 1 else self.t0 + jnp.asarray(c, dt.dtype) * dt
        linear = self.value + matvec(self.jacobian, u) + c * self.time_derivative
        return self.product(t, self.y + u) - linear


class AbstractExponentialRosenbrock(diffrax.AbstractSolver[None]):
    """One linearisation per step, and no state between steps."""

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[
        Callable[..., diffrax.ThirdOrderHermitePolynomialInterpolation]
    ] = diffrax.ThirdOrderHermitePolynomialInterpolation

    @abc.abstractmethod
    def increment(self, start: Linearised) -> tuple[State, State | None]:
        """The step, and an estimate of its error if there is one."""

    def init(self, terms, t0, t1, y0: Y, args: Args) -> None:
        del terms, t0, t1, y0, args
        return None

    def step(self, terms, t0, t1, y0: Y, args: Args, solver_state, made_jump):
        del solver_state, made_jump
        flattener = StateFlattener(y0)
        control = terms.contr(t0, t1)

        def product(t, y):
            y = flattener.unflatten(y)
            return flattener.flatten(terms.vf_prod(t, y, args, control))

        # For the products that the vector field takes as well.
        with jax.default_matmul_precision("highest"):
            t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
            start = Linearised(product, t0, t1, flattener.flatten(y0))
            increment, error = self.increment(start)
            y1 = start.y + increment
            k1 = product(t1, y1)
        k0, y1, k1 = map(flattener.unflatten, (start.value, y1, k1))
        y_error = None if error is None else flattener.unflatten(error)
        dense_info = dict(y0=y0, y1=y1, k0=k0, k1=k1)
        return y1, y_error, dense_info, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0: Y, args: Args):
        return terms.vf(t0, y0, args)


class ExponentialRosenbrockEuler(AbstractExponentialRosenbrock):
    r"""The exponential Rosenbrock--Euler method, of order 2.

    $$y_1 = y_0 + \varphi_1(hJ) \, h f + \varphi_2(hJ) \, h^2 \partial_t f,$$

    exact for any step where $f$ is linear in $t$ and $y$ with constant coefficients.
    One evaluation of $f$ and its Jacobian per step, no equations to solve, and any
    stiffness of the Jacobian at no cost in accuracy or stability. No error estimate:
    for constant steps, or in `diffrax.HalfSolver`.

    For ordinary and controlled differential equations, whose state may be any pytree
    of real or complex arrays; everything is done with dense matrices, so for states of
    tens of numbers at most. Values within a step come from a cubic through its ends and
    their slopes, which swings far where a single step covers a stiff transient; the
    values at the ends do not.

    !!! example

        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from deer_ode import ExponentialRosenbrockEuler
        >>> term = diffrax.ODETerm(lambda t, y, args: -1e6 * (y - 2.0))
        >>> sol = diffrax.diffeqsolve(
        ...     term, ExponentialRosenbrockEuler(), 0.0, 1.0, 0.5, jnp.zeros(1)
        ... )
        >>> [round(float(y), 6) for y in sol.ys[0]]
        [2.0]

    ??? cite "Reference"

        Hochbruck and Ostermann (2010), *Exponential integrators*, Acta Numerica 19,
        section 2.4.
    """

    def order(self, terms):
        del terms
        return 2

    def increment(self, start):
        _, phi_1, phi_2 = phi_functions(start.jacobian, 2)
        step = matvec(phi_1, start.value) + matvec(phi_2, start.time_derivative)
        return step, None


class Exprb32(AbstractExponentialRosenbrock, diffrax.AbstractAdaptiveSolver[None]):
    r"""The exponential Rosenbrock method `exprb32`, of order 3 with an embedded 2.

    The stage is the step of [`deer_ode.ExponentialRosenbrockEuler`][], which is also
    the embedded method, and

    $$y_1 = y_0 + u_2 + 2 \varphi_3(hJ) D_2, \qquad
    D_2 = h f(t_1, y_0 + u_2) - h f - hJ u_2 - h^2 \partial_t f.$$

    The order holds for stiff problems too, as long as what is stiff is linear in the
    state and does not change fast with time: bounds on the error do not contain the
    stiff part. Two evaluations of $f$ and one Jacobian per step, and no equations to
    solve. As for [`deer_ode.ExponentialRosenbrockEuler`][] otherwise.

    !!! example

        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from deer_ode import Exprb32
        >>> term = diffrax.ODETerm(lambda t, y, args: -y * y)
        >>> sol = diffrax.diffeqsolve(
        ...     term,
        ...     Exprb32(),
        ...     0.0,
        ...     1.0,
        ...     0.1,
        ...     jnp.ones(1),
        ...     stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        ... )
        >>> [round(float(y), 3) for y in sol.ys[0]]
        [0.5]

    ??? cite "Reference"

        Hochbruck, Ostermann and Schweitzer (2009), *Exponential Rosenbrock-type
        methods*, SIAM Journal on Numerical Analysis 47, section 5.1.
    """

    def order(self, terms):
        del terms
        return 3

    def increment(self, start):
        _, phi_1, phi_2, phi_3 = phi_functions(start.jacobian, 3)
        u = matvec(phi_1, start.value) + matvec(phi_2, start.time_derivative)
        error = matvec(phi_3, 2 * start.remainder(1.0, u))
        return u + error, error


class Exprb43(AbstractExponentialRosenbrock, diffrax.AbstractAdaptiveSolver[None]):
    r"""The exponential Rosenbrock method `exprb43`, of order 4 with an embedded 3.

    With $F = h f$ and $\dot F = h^2 \partial_t f$, stages at half the step and at its
    end,

    $$u_2 = \tfrac12 \varphi_1(\tfrac12 hJ) F + \tfrac14 \varphi_2(\tfrac12 hJ) \dot F,
    \qquad u_3 = \varphi_1(hJ) (F + D_2) + \varphi_2(hJ) \dot F,$$

    $$y_1 = y_0 + \varphi_1(hJ) F + \varphi_2(hJ) \dot F
    + \varphi_3(hJ) (16 D_2 - 2 D_3) + \varphi_4(hJ) (12 D_3 - 48 D_2),$$

    where the embedded method leaves out the last term. The order holds for stiff
    problems too, as for [`deer_ode.Exprb32`][]; where the forcing is as stiff as the
    linear part (an equilibrium that moves, and is followed), order 3 was measured.
    Three evaluations of $f$ and one Jacobian per step, and no equations to solve. As
    for [`deer_ode.ExponentialRosenbrockEuler`][] otherwise.

    !!! example

        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from deer_ode import Exprb43
        >>> term = diffrax.ODETerm(lambda t, y, args: -y * y)
        >>> sol = diffrax.diffeqsolve(
        ...     term,
        ...     Exprb43(),
        ...     0.0,
        ...     1.0,
        ...     0.1,
        ...     jnp.ones(1),
        ...     stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        ... )
        >>> [round(float(y), 3) for y in sol.ys[0]]
        [0.5]

    ??? cite "Reference"

        Hochbruck, Ostermann and Schweitzer (2009), *Exponential Rosenbrock-type
        methods*, SIAM Journal on Numerical Analysis 47, section 5.1.
    """

    def order(self, terms):
        del terms
        return 4

    def increment(self, start):
        half, full = phi_functions_half_and_full(start.jacobian, 4)
        _, phi_1, phi_2, phi_3, phi_4 = full
        value, derivative = start.value, start.time_derivative
        u2 = 0.5 * matvec(half[1], value) + 0.25 * matvec(half[2], derivative)
        D2 = start.remainder(0.5, u2)
        linear = matvec(phi_1, value) + matvec(phi_2, derivative)
        D3 = start.remainder(1.0, linear + matvec(phi_1, D2))
        error = matvec(phi_4, 12 * D3 - 48 * D2)
        return linear + matvec(phi_3, 16 * D2 - 2 * D3) + error, error
