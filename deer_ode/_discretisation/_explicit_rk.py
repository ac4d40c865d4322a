"""One step of an explicit Runge--Kutta method, its stages written out."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from .._affine import matvec
from .._custom_types import Args, State, Y
from .._misc import finite
from .._plan import default_platform


def _weighted_sum(weights, ks):
    """Sum of `weights[i] * ks[i]`, zero weights left out; `None` if all are zero."""
    terms = [
        jtu.tree_map(lambda k, w=w: jnp.asarray(w, k.dtype) * k, k)
        for w, k in zip(weights, ks, strict=True)
        if w != 0
    ]
    return jtu.tree_map(lambda *x: sum(x[1:], x[0]), *terms) if terms else None


def _add(y, increment):
    if increment is None:
        return y
    return jtu.tree_map(lambda a, b: a + b, y, increment)


def _as_one_leaf(y: Y) -> tuple[Callable[[Y], Y], Callable[[Y], Y]]:
    """To one vector and back, where all leaves are of one dtype: what is computed for
    each leaf of its own compiles many times as long.
    """
    leaves = jtu.tree_leaves(y)
    if len(leaves) < 2 or len({x.dtype for x in leaves}) > 1:
        return (lambda y: y), (lambda y: y)
    return lambda y: jfu.ravel_pytree(y)[0], jfu.ravel_pytree(y)[1]


def is_explicit_rk(solver: diffrax.AbstractSolver) -> bool:
    """Whether `explicit_rk_step` is the step of `solver`.

    By its class and not by `isinstance`, which wrapped solvers pass as well.
    """
    return (
        issubclass(type(solver), diffrax.AbstractERK)
        and isinstance(solver.tableau, diffrax.ButcherTableau)  # pyright: ignore
        and type(solver).step is diffrax.AbstractRungeKutta.step
    )


def explicit_rk_step(
    solver: Any, terms, t0, t1, y0: Y, args: Args
) -> tuple[Y, Y, dict]:
    r"""The same step as `solver.step`, and its error estimate and dense information.

    Diffrax runs the stages in a loop, which compiles fast once per solve. Here the
    step is taken at all points of a grid at the same time, and written out the stages
    become one fused kernel over the grid of an accelerator; forward mode goes through
    them as well.

    On a CPU XLA would fuse all stages too, and evaluate each of them again for every
    use of every number. Kept apart, a loop over steps took 0.2 to 1.0 times as long
    (256 coupled states 0.24 ms for 1.26, Hodgkin--Huxley 0.30 for 1.15,
    Lotka--Volterra 0.45 for 0.56), its gradient 0.05 to 1.0 times (JAX 0.12).
    """
    is_cpu = default_platform() == "cpu"
    apart = lax.optimization_barrier if is_cpu else lambda x: x
    join, split = _as_one_leaf(y0)
    tableau = solver.tableau
    assert isinstance(tableau, diffrax.ButcherTableau)
    control = terms.contr(t0, t1)
    dt = t1 - t0
    ks = []
    y = start = join(y0)
    for stage in range(tableau.num_stages):
        if stage == 0:
            c = 0.0 if tableau.c1 is None else tableau.c1
        else:
            c = tableau.c[stage - 1]
            y = apart(_add(start, _weighted_sum(tableau.a_lower[stage - 1], ks)))
        # No rounding at the ends, as in Diffrax.
        t = t0 if c == 0 else t1 if c == 1 else t0 + jnp.asarray(c, dt.dtype) * dt
        ks.append(apart(join(terms.vf_prod(t, split(y), args, control))))
    y1 = split(y if tableau.ssal else _add(start, _weighted_sum(tableau.b_sol, ks)))
    y_error = _weighted_sum(tableau.b_error, ks)
    if y_error is None:
        y_error = jtu.tree_map(jnp.zeros_like, start)
    k = jtu.tree_map(lambda *x: jnp.stack(x), *ks)
    k = jax.vmap(split)(k) if jtu.tree_leaves(k) else k
    return y1, split(y_error), dict(y0=y0, y1=y1, k=k)


# Of the exponential's series. One Jacobian in the middle of a step is off by the third
# power of its length anyway; the third power of the series is cheap, and all there is
# of it where the field is linear.
DEGREE = 3


def half_way(terms, t0, t1, y: Y, args: Args) -> Y:
    """The field in the middle of a step, times its length."""
    return terms.vf_prod(t0 + (t1 - t0) / 2, y, args, terms.contr(t0, t1))


@jax.custom_jvp
def _with_exponential(y: State, value: State, hJ: Float[Array, "state state"]) -> State:
    """`value`, whose derivative in `y` is the exponential of `hJ`, nearly."""
    del y, hJ
    return value


@_with_exponential.defjvp
def _with_exponential_jvp(primals, tangents):
    _, value, hJ = primals
    tangent, *_ = tangents
    out = tangent
    for k in range(DEGREE, 0, -1):
        out = tangent + matvec(hJ, out) / k
    return value, out


class SimplifiedStep(eqx.Module):
    """A step that is differentiated by one Jacobian of the field for all stages."""

    step: Callable[[State, Any], State]
    half_way: Callable[[State, Any], State]
    """`(y, x)`: the field in the middle of the step `x`, times its length."""

    def __call__(self, y: State, x: Any) -> State:
        y0 = lax.stop_gradient(y)
        y1 = self.step(y0, x)
        hJ = jax.jacfwd(lambda middle: self.half_way(middle, x))((y0 + y1) / 2)
        # Any finite matrix will do where there is no derivative.
        return _with_exponential(y, *lax.stop_gradient((y1, finite(hJ))))
