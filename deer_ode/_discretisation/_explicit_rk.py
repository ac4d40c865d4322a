"""One step of an explicit Runge--Kutta method, its stages written out."""

from typing import Any

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._custom_types import Args, Y


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
    become one fused kernel over the grid; forward mode goes through them as well.
    """
    tableau = solver.tableau
    assert isinstance(tableau, diffrax.ButcherTableau)
    control = terms.contr(t0, t1)
    dt = t1 - t0
    ks = []
    y = y0
    for stage in range(tableau.num_stages):
        if stage == 0:
            c = 0.0 if tableau.c1 is None else tableau.c1
        else:
            c = tableau.c[stage - 1]
            y = _add(y0, _weighted_sum(tableau.a_lower[stage - 1], ks))
        # No rounding at the ends, as in Diffrax.
        t = t0 if c == 0 else t1 if c == 1 else t0 + jnp.asarray(c, dt.dtype) * dt
        ks.append(terms.vf_prod(t, y, args, control))
    y1 = y if tableau.ssal else _add(y0, _weighted_sum(tableau.b_sol, ks))
    y_error = _weighted_sum(tableau.b_error, ks)
    if y_error is None:
        y_error = jtu.tree_map(jnp.zeros_like, y0)
    k = jtu.tree_map(lambda *x: jnp.stack(x), *ks)
    return y1, y_error, dict(y0=y0, y1=y1, k=k)
