r"""Initial values that satisfy a differential-algebraic equation.

The equation must hold at the start, and so must its time derivatives: those are the
hidden constraints of a system of higher index. Along the curve $y(\tau) = y_0 + \tau
\dot y_0 + \tfrac{\tau^2}{2} \ddot y_0 + \dots$ the function $\phi(\tau) = F(t_0 + \tau,
y(\tau), \dot y(\tau))$ has derivatives $\phi, \dot \phi, \ddot \phi$ at $\tau = 0$ in
terms of $y_0$ and the derivatives of $y$, all of which have to vanish.
"""

from typing import NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._custom_types import Args, State, Y
from .._misc import StateFlattener
from .._programs import without_checks
from ._implicit_terms import AbstractImplicitTerm
from ._one_step import tracing_steps


# Enough for systems of index 3: the equation and two of its derivatives.
_NUM_DERIVATIVES = 2
_NUM_ITERATIONS = 20


class InitialValues(NamedTuple):
    """What [`deer_ode.consistent_initial_values`][] returns.

    - `y0`: the initial state, its algebraic components worked out.
    - `residual`: what the equation and its derivatives leave: the largest entry, in
        units of the terms that should cancel. Of the size of rounding where `y0` is
        consistent.
    - `correction`: the largest change of a component of the state.
    """

    y0: Y
    residual: Float[Array, ""]
    correction: Float[Array, ""]


def consistent_initial_values(
    term: AbstractImplicitTerm, t0, y0: Y, args: Args = None
) -> InitialValues:
    r"""Works out the algebraic components of an initial state.

    Components whose time derivative appears in the equation at `y0` are kept as they
    are; the others are determined from them by the equation and its first two time
    derivatives, by the method of Gauss and Newton. Where that cannot be done, since the
    components that are kept contradict each other (a pendulum that does not start on
    its circle, or not along it), the residual says so.

    **Arguments:**

    - `term`: a [`deer_ode.DAETerm`][] or [`deer_ode.MassMatrixTerm`][], three times
        differentiable at least; of index 3 at most.
    - `t0`, `y0`, `args`: as in `diffeqsolve`. The algebraic components of `y0` are a
        first guess.

    **Returns:**

    A named tuple of `y0`, `residual` and `correction`. `y0` is differentiable, once.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode import DAETerm, consistent_initial_values
        >>> term = DAETerm(lambda t, y, dy, args: jnp.stack([dy[0] + y[1], y[1] - 2]))
        >>> consistent_initial_values(term, 0.0, jnp.array([1.0, 0.0])).y0.tolist()
        [1.0, 2.0]

    ??? cite "Reference"

        Campbell, Gear (1995), *The index of general nonlinear DAEs*, for the derivative
        array.
    """
    flattener = StateFlattener(y0)
    flat_y0 = flattener.flatten(y0)
    size = flattener.size
    dtype = flattener.dtype
    t0 = jnp.asarray(t0)
    if not jnp.issubdtype(t0.dtype, jnp.floating):
        t0 = t0.astype(jnp.result_type(float))

    @without_checks
    def equation(t, y, dy):
        left = term.residual(t, flattener.unflatten(y), flattener.unflatten(dy), args)
        with jax.numpy_dtype_promotion("standard"):
            return StateFlattener(left).flatten(left).astype(dtype)

    def derivative_array(y: State, derivatives) -> Array:
        def phi(tau):
            value, slope = y, jnp.zeros_like(y)
            power, factorial = jnp.ones_like(tau), 1.0
            for k in range(_NUM_DERIVATIVES + 1):
                slope = slope + power * derivatives[k] / factorial
                power, factorial = power * tau, factorial * (k + 1)
                value = value + power * derivatives[k] / factorial
            return equation(t0 + tau.astype(t0.dtype), value, slope)

        functions = [phi]
        for _ in range(_NUM_DERIVATIVES):
            last = functions[-1]
            functions.append(
                lambda tau, last=last: jax.jvp(last, (tau,), (jnp.ones_like(tau),))[1]
            )
        return jnp.concatenate([g(jnp.zeros((), dtype)) for g in functions])

    with tracing_steps():
        M = jax.jacfwd(lambda dy: equation(t0, flat_y0, dy))(jnp.zeros_like(flat_y0))
        is_algebraic = lax.stop_gradient(jnp.all(M == 0, axis=0))

        def unknown_to_array(z, flat_y0):
            change, derivatives = z[0], z[1:]
            y = flat_y0 + jnp.where(is_algebraic, change, 0)
            return derivative_array(y, derivatives)

        def solve(z, flat_y0):
            left = unknown_to_array(z, flat_y0)
            J = jax.jacfwd(unknown_to_array)(z, flat_y0)
            J = lax.stop_gradient(J.reshape(left.shape[0], z.size))
            inverse = jnp.linalg.pinv(J, rtol=size * float(jnp.finfo(dtype).eps) * 1e3)
            step = -jnp.matmul(inverse, left, precision=lax.Precision.HIGHEST)
            scale = jnp.sum(jnp.abs(J) * jnp.abs(z.reshape(1, -1)), axis=1)
            return z + step.reshape(z.shape), left, scale

        start = jnp.zeros((_NUM_DERIVATIVES + 2, size), dtype)
        constant = lax.stop_gradient(flat_y0)
        z = lax.fori_loop(0, _NUM_ITERATIONS, lambda _, z: solve(z, constant)[0], start)
        # Once more, for the derivatives: those of an implicit function.
        z, left, scale = solve(lax.stop_gradient(z), flat_y0)
    change = jnp.where(is_algebraic, z[0], 0)
    # A term that does not depend on the unknowns has no part in the scale.
    residual = jnp.max(jnp.abs(left) / (1 + scale), initial=0)
    return InitialValues(
        y0=flattener.unflatten(flat_y0 + change),
        residual=lax.stop_gradient(residual),
        correction=lax.stop_gradient(jnp.max(jnp.abs(change), initial=0)),
    )
