r"""Symplectic methods for separable systems: drifts and kicks in turn.

$$\frac{\mathrm{d}q}{\mathrm{d}t} = f(t, p), \qquad
\frac{\mathrm{d}p}{\mathrm{d}t} = g(t, q).$$

With `p` held the first equation is solved exactly (a drift of `q`), with `q` held the
second (a kick of `p`). A step is a palindrome of both, with kicks at its ends. Each is
a shear of phase space, so the step preserves phase-space structure to rounding, and
run backwards it undoes itself.

Where the fields depend on time, `q` brings a clock that only drifts advance and `p` one
that only kicks advance: `f` reads the clock of `p`, and `g` that of `q`. So extended
the system depends on no time and has the same form, hence the order is the same.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import diffrax
import jax.tree_util as jtu

from .._custom_types import Args, Y


if TYPE_CHECKING:
    from typing import ClassVar as AbstractClassVar
else:
    from equinox import AbstractClassVar


def _add(y: Y, weight: float, increment: Y) -> Y:
    return jtu.tree_map(lambda a, b: a + weight * b, y, increment)


class AbstractSplitting(diffrax.AbstractSolver):
    """Kick, drift, kick, ..., kick: all but the coefficients."""

    term_structure: ClassVar = (diffrax.AbstractTerm, diffrax.AbstractTerm)
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )

    kicks: AbstractClassVar[tuple[float, ...]]
    """Lengths of the kicks, in units of the step. They and the drifts each add up to
    one.
    """
    drifts: AbstractClassVar[tuple[float, ...]]
    """Lengths of the drifts between the kicks, one fewer."""

    @abc.abstractmethod
    def order(self, terms) -> int:
        """Order of convergence."""

    def init(self, terms, t0, t1, y0: Y, args: Args) -> None:
        del terms, t0, t1, y0, args

    def step(self, terms, t0, t1, y0: Y, args: Args, solver_state, made_jump):
        del solver_state, made_jump
        # Increments are fractions of the whole step's, as in Diffrax's Runge--Kutta
        # methods. Differences of times within the step would round the coefficients,
        # and the order rests on cancellation between those.
        drift_term, kick_term = terms
        drift_control = drift_term.contr(t0, t1)
        kick_control = kick_term.contr(t0, t1)
        drift_by = lambda t, p: drift_term.vf_prod(t, p, args, drift_control)
        kick_by = lambda t, q: kick_term.vf_prod(t, q, args, kick_control)

        q, p = q0, p0 = y0
        kick0 = kick = kick_by(t0, q)
        p = _add(p, self.kicks[0], kick)
        for i, drift in enumerate(self.drifts, start=1):
            q = _add(q, drift, drift_by(t0 + sum(self.kicks[:i]) * (t1 - t0), p))
            # No rounding at the end.
            is_last = i == len(self.drifts)
            t = t1 if is_last else t0 + sum(self.drifts[:i]) * (t1 - t0)
            kick = kick_by(t, q)
            p = _add(p, self.kicks[i], kick)

        # The compiler removes the two extra drifts where nothing is interpolated.
        y1 = (q, p)
        k0 = (drift_by(t0, p0), kick0)
        k1 = (drift_by(t1, p), kick)
        dense_info = dict(y0=(q0, p0), y1=y1, k0=k0, k1=k1)
        return y1, None, dense_info, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0: Y, args: Args):
        drift_term, kick_term = terms
        q, p = y0
        return drift_term.vf(t0, p, args), kick_term.vf(t0, q, args)


class StormerVerlet(AbstractSplitting):
    r"""The Störmer--Verlet method (leapfrog, velocity Verlet), of second order.

    For separable systems, $\mathrm{d}q/\mathrm{d}t = f(t, p)$ and
    $\mathrm{d}p/\mathrm{d}t = g(t, q)$, with terms and states given as pairs, as for
    `diffrax.SemiImplicitEuler`: the first term gives `q` its increments from `p`, the
    second gives `p` its from `q`. Symplectic where the fields derive from a
    Hamiltonian, time reversible, and without drift of the energy. Works as well in
    `diffrax.diffeqsolve` as in [`deer_ode.DEER`][].

    Two kicks and one drift per step. Constant steps only: there is no error estimate,
    and steps that vary with the state would give away what the method preserves.
    Interpolates by cubic polynomials through the values and the slopes at both ends.

    !!! example

        >>> import diffrax, jax.numpy as jnp, math
        >>> from deer_ode import DEER, diffeqsolve
        >>> from deer_ode import StormerVerlet
        >>> terms = (
        ...     diffrax.ODETerm(lambda t, p, args: p),
        ...     diffrax.ODETerm(lambda t, q, args: -jnp.sin(q)),
        ... )
        >>> y0 = (jnp.array(1.0), jnp.array(0.0))
        >>> sol = diffeqsolve(terms, DEER(StormerVerlet()), 0, 1, 0.01, y0)
        >>> q, p = sol.ys
        >>> round(float(p[0] ** 2 / 2 - jnp.cos(q[0])), 4), round(-math.cos(1.0), 4)
        (-0.5403, -0.5403)

    ??? cite "Reference"

        Hairer, Lubich, Wanner (2003), *Geometric numerical integration illustrated by
        the Störmer--Verlet method*, equation 1.5.
    """

    kicks: ClassVar[tuple[float, ...]] = (0.5, 0.5)
    drifts: ClassVar[tuple[float, ...]] = (1.0,)

    def order(self, terms):
        del terms
        return 2


StormerVerlet.__init__.__doc__ = """**Arguments:** None"""


# The root makes the errors of third order of the three jumps cancel.
_OUTER = 1 / (2 - 2 ** (1 / 3))
_INNER = 1 - 2 * _OUTER


class Yoshida4(AbstractSplitting):
    r"""Yoshida's triple jump, of fourth order: three steps of Störmer--Verlet.

    As [`deer_ode.StormerVerlet`][], with four kicks and three drifts per step. Its
    middle step goes backwards, so that the fields are evaluated up to 0.36 steps before
    and after the step, and its errors are large for its order:
    [`deer_ode.BlanesMoan4`][] is more accurate at equal cost.

    ??? cite "Reference"

        Yoshida (1990), *Construction of higher order symplectic integrators*, Physics
        Letters A 150, 262--268.
    """

    kicks: ClassVar[tuple[float, ...]] = (
        _OUTER / 2,
        (_OUTER + _INNER) / 2,
        (_INNER + _OUTER) / 2,
        _OUTER / 2,
    )
    drifts: ClassVar[tuple[float, ...]] = (_OUTER, _INNER, _OUTER)

    def order(self, terms):
        del terms
        return 4


Yoshida4.__init__.__doc__ = """**Arguments:** None"""


# Two of these five satisfy the conditions of fourth order, which the tests check to
# rounding; the other three make the errors of fifth order small.
_KICKS = (0.0792036964311957, 0.353172906049774, -0.0420650803577195)
_DRIFTS = (0.209515106613362, -0.143851773179818)


class BlanesMoan4(AbstractSplitting):
    r"""Blanes and Moan's optimised splitting of six stages, of fourth order.

    As [`deer_ode.StormerVerlet`][], with seven kicks and six drifts per step. Made for
    small errors: four hundred times less per step than [`deer_ode.Yoshida4`][], for
    twice the work, and twenty-five times less at equal work. All evaluations lie
    within the step.

    ??? cite "Reference"

        Blanes, Moan (2002), *Practical symplectic partitioned Runge--Kutta and
        Runge--Kutta--Nyström methods*, Journal of Computational and Applied
        Mathematics 142, 313--330, table 2.
    """

    kicks: ClassVar[tuple[float, ...]] = (*_KICKS, 1 - 2 * sum(_KICKS), *_KICKS[::-1])
    drifts: ClassVar[tuple[float, ...]] = (
        *_DRIFTS,
        0.5 - sum(_DRIFTS),
        0.5 - sum(_DRIFTS),
        *_DRIFTS[::-1],
    )

    def order(self, terms):
        del terms
        return 4


BlanesMoan4.__init__.__doc__ = """**Arguments:** None"""
