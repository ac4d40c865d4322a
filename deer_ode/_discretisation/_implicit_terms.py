"""Terms for equations that are not solved for the time derivative (DAEs)."""

import abc
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .._custom_types import Args, Y
from .._foreign import unwrap
from .._misc import StateFlattener


class AbstractImplicitTerm(diffrax.AbstractTerm):
    r"""$F(t, y, \dot y) = 0$, for the solvers that can solve it."""

    @abc.abstractmethod
    def residual(self, t, y: Y, dy: Y, args: Args) -> PyTree[Array]:
        """What has to vanish: as many numbers as `y` has."""

    def vf(self, t, y, args):
        # Diffrax asks for the shape of the field of every term.
        del t, args
        return jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), y)

    def contr(self, t0, t1, **kwargs):
        del kwargs
        return t1 - t0

    def prod(self, vf, control):
        del vf, control
        raise ValueError(
            f"A `{type(self).__name__}` is not solved for the time derivative, so it "
            "has no vector field. Solve it with `DEER(RadauIIA())`."
        )


class DAETerm(AbstractImplicitTerm):
    r"""A fully implicit differential-algebraic equation.

    $$F(t, y, \dot y, \text{args}) = 0.$$

    Not every component of $\dot y$ need appear: an equation without any is a
    constraint, and a component of which only the value appears is algebraic. The index
    may be 1, or 2 or 3 in the usual forms (mechanics with constraints).

    !!! example

        A pendulum in Cartesian coordinates; `tension` keeps it on the unit circle.

        >>> import jax.numpy as jnp
        >>> from deer_ode import DAETerm, DEER, RadauIIA, diffeqsolve
        >>> def pendulum(t, y, dy, gravity):
        ...     (q, v, tension), (dq, dv, _) = y, dy
        ...     weight = jnp.array([0.0, 1.0]) * gravity
        ...     return dq - v, dv + tension * q + weight, jnp.sum(q**2) - 1
        >>> y0 = (jnp.array([1.0, 0.0]), jnp.zeros(2), jnp.array(0.0))
        >>> sol = diffeqsolve(
        ...     DAETerm(pendulum), DEER(RadauIIA()), 0, 1, 0.02, y0, args=9.81
        ... )
        >>> round(float(jnp.sum(sol.ys[0] ** 2)), 5)
        1.0
    """

    function: Callable[[Any, Y, Y, Args], PyTree[Array]]

    def residual(self, t, y, dy, args):
        return self.function(t, y, dy, args)


DAETerm.__init__.__doc__ = """**Arguments:**

- `function`: `(t, y, dy, args)` to what has to vanish, a pytree of as many numbers as
    `y` has. `dy` is the time derivative, a pytree like `y`.
"""


class MassMatrixTerm(AbstractImplicitTerm):
    r"""$M(t, y, \text{args}) \, \dot y = f(t, y, \text{args})$ with any matrix $M$.

    With a singular mass matrix it is a differential-algebraic equation.
    """

    vector_field: Callable[[Any, Y, Args], Y]
    mass: Any

    def residual(self, t, y, dy, args):
        mass = self.mass
        if not isinstance(mass, lx.AbstractLinearOperator) and callable(mass):
            mass = mass(t, y, args)
        flattener = StateFlattener(y)
        dy = flattener.flatten(dy)
        if isinstance(mass, lx.AbstractLinearOperator):
            product = flattener.flatten(mass.mv(flattener.unflatten(dy)))
        else:
            mass = jnp.asarray(mass, dy.dtype)
            if mass.shape != (dy.size, dy.size):
                raise ValueError(
                    "The mass matrix must act on the flattened state of "
                    f"{dy.size} numbers; got the shape {mass.shape}."
                )
            product = jnp.matmul(mass, dy, precision=jax.lax.Precision.HIGHEST)
        # Of the state's structure and shapes, or an error of Diffrax's.
        field = diffrax.ODETerm(self.vector_field).vf(t, y, args)
        return product - flattener.flatten(field)


MassMatrixTerm.__init__.__doc__ = """**Arguments:**

- `vector_field`: `(t, y, args)` to $f$, a pytree like `y`.
- `mass`: the mass matrix: an array of shape `(n, n)` that acts on the flattened state
    of `n` numbers, a Lineax operator on states, or a function `(t, y, args)` to either.
"""


def implicit_residual(terms) -> Callable[[Any, Y, Y, Args], PyTree[Array]] | None:
    """The residual of an implicit term, also where Diffrax has turned time round."""
    if isinstance(terms, AbstractImplicitTerm):
        return terms.residual
    if wrapped := unwrap(terms):
        term, direction = wrapped
        inner = implicit_residual(term)
        if inner is None:
            return None

        def residual(t, y, dy, args):
            turned = jtu.tree_map(lambda x: x * jnp.asarray(direction, x.dtype), dy)
            return inner(t * direction, y, turned, args)

        return residual
    return None
