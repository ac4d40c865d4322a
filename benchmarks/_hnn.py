"""A training step of a Hamiltonian neural network, as in figure 4 of the DEER paper:
two bodies, and a neural ODE through many points of their orbits.
"""

import functools as ft
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import deer_ode

from ._case import Case, Counted, Plan
from ._fields import network, network_weights
from ._ode import NEWTON, deer, grid, loop, plain, stock


T1 = 10.0
BATCH = 2
WIDTH = 64
_RATE, _DECAY, _SQUARE_DECAY = 1e-3, 0.9, 0.999


def field(t, y, weights):
    """Hamilton's equations, of a network in place of the energy."""
    del t

    def energy(y):
        return network(weights, y, jax.nn.softplus)[0]

    slopes = jax.grad(energy)(y)
    return jnp.concatenate([slopes[4:], -slopes[:4]])


def _training_step(solve: Callable) -> Callable:
    """Loss, gradient, and an update like Adam's."""

    def loss(weights, y0s, data):
        found = jax.vmap(solve, in_axes=(None, 0))(weights, y0s)
        ys, *counts = found if isinstance(found, Counted) else (found,)
        return jnp.mean((ys - data) ** 2), counts

    def step(weights, moments, y0s, data):
        (value, counts), slopes = jax.value_and_grad(loss, has_aux=True)(
            weights, y0s, data
        )
        mean, square = (
            jax.tree.map(lambda m, g, d=d, p=p: d * m + (1 - d) * g**p, m, slopes)
            for m, d, p in zip(moments, (_DECAY, _SQUARE_DECAY), (1, 2), strict=True)
        )
        weights = jax.tree.map(
            lambda w, m, s: w - _RATE * m / (jnp.sqrt(s) + 1e-8), weights, mean, square
        )
        answer = (value, slopes, weights)
        return Counted(answer, *counts) if counts else answer

    return step


def arguments(steps: int, dtype: str) -> tuple:
    """Weights, moments, and two circles on which two bodies move about each other."""
    weights = network_weights((8, WIDTH, WIDTH, 1), jnp.dtype(dtype), jr.key(0))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    # Not zero, or the first update would be the sign of the gradient, and so rounding
    # where that is small.
    moments = (zeros, jax.tree.map(jnp.ones_like, weights))
    # Unit masses at distance $2 r$ attract each other by $1 / 4 r^2$.
    radii = np.linspace(0.9, 1.1, BATCH)[:, None]
    speeds = 0.5 / radii**1.5
    ts = np.concatenate([[0.0], grid(T1, steps, np.float64)])
    x, y = radii * np.cos(speeds * ts), radii * np.sin(speeds * ts)
    data = np.stack(
        [x, y, -x, -y, *(speeds * z for z in (-y, x, y, -x))], axis=-1
    ).astype(dtype)
    return weights, moments, jnp.asarray(data[:, 0]), jnp.asarray(data[:, 1:])


def cases(plan: Plan) -> list[Case]:
    out = []
    for steps in plan.choose_steps((10_000,), (10_000, 100_000), (20,)):
        of = (field, T1, steps)
        solves = {
            "default": deer(*of, deer_ode.DEER(diffrax.Tsit5()), at_ts=True),
            "Obreshkov": deer(*of, deer_ode.DEER(deer_ode.Obreshkov()), at_ts=True),
            "newton": deer(*of, NEWTON, at_ts=True),
            "loop": loop(*of),
            "diffrax, ts": stock(*of, "ts"),
            "plain DEER": plain(*of),
        }
        if plan.quick:
            # Nearly all of the time is compilation.
            for name in ("Obreshkov", "newton", "plain DEER"):
                del solves[name]
        out += [
            Case(
                family="hnn",
                name="two bodies",
                n=8,
                steps=steps,
                batch=BATCH,
                dtype=dtype,
                work="gradient",
                programs={k: _training_step(f) for k, f in solves.items()},
                arguments=ft.partial(arguments, steps, dtype),
                reference="loop",
            )
            for dtype in ("float32", "float64")[: 1 if plan.quick else 2]
        ]
    return out
