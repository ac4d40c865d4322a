"""Differential equations to measure with: fields, where they start, and parameters."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr


class Problem(NamedTuple):
    """Time starts at zero. Steps are all alike where `t1` is five times a power of two,
    and their number another: then no time is rounded, in single precision either.
    """

    field: Callable
    y0: tuple[float, ...]
    parameters: Callable[[Any], Any]
    """Of the dtype."""
    t1: float = 10.0
    is_network: bool = False

    @property
    def n(self) -> int:
        return len(self.y0)


def lotka_volterra(t, y, args):
    del t
    a, b, c, d = args
    prey, predators = y
    return jnp.stack(
        [a * prey - b * prey * predators, -c * predators + d * prey * predators]
    )


def _van_der_pol(t, y, args):
    del t
    (mu,) = args
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def _rigid_body(t, y, args):
    """Euler's equations, of angular velocities and principal moments of inertia."""
    del t
    a, b, c = args
    x, y, z = y
    return jnp.stack([(b - c) / a * y * z, (c - a) / b * z * x, (a - b) / c * x * y])


def _fitzhugh_nagumo(t, y, args):
    del t
    a, b, rate, current = args
    v, w = y
    return jnp.stack([v - v**3 / 3 - w + current, rate * (v + a - b * w)])


def _henon_heiles(t, y, args):
    del t
    (strength,) = args
    x, y, u, v = y
    return jnp.stack(
        [u, v, -x - 2 * strength * x * y, -y - strength * (x**2 - y**2)],
    )


def network_weights(sizes: tuple[int, ...], dtype, key) -> list:
    """As `equinox.nn.MLP` draws them, without anything but arrays around them."""
    weights = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        keys, width = jr.split(jr.fold_in(key, i)), n**-0.5
        draw = lambda key, shape, width=width: jr.uniform(
            key, shape, dtype, minval=-width, maxval=width
        )
        weights.append((draw(keys[0], (m, n)), draw(keys[1], (m,))))
    return weights


def network(weights: list, x, activation):
    for W, b in weights[:-1]:
        x = activation(jnp.matmul(W, x, precision="highest") + b)
    W, b = weights[-1]
    return jnp.matmul(W, x, precision="highest") + b


def _mlp(t, y, args):
    del t
    return network(args, y, jnp.tanh)


def _mlp_problem(n: int) -> Problem:
    y0 = (1.0, *(0.0,) * (n - 1))
    weights = lambda dtype: network_weights((n, 32, n), dtype, jr.key(0))
    return Problem(_mlp, y0, weights, is_network=True)


def _numbers(*values: float) -> Callable:
    return lambda dtype: tuple(jnp.asarray(x, dtype) for x in values)


PROBLEMS = {
    "Lotka-Volterra": Problem(
        lotka_volterra, (10.0, 5.0), _numbers(1.1, 0.4, 0.4, 0.1)
    ),
    "Van der Pol": Problem(_van_der_pol, (2.0, 0.0), _numbers(1.0)),
    "rigid body": Problem(_rigid_body, (1.0, 0.1, 0.9), _numbers(1.0, 2.0, 3.0)),
    # Its slower variable moves in some ten units of time.
    "FitzHugh-Nagumo": Problem(
        _fitzhugh_nagumo, (-1.0, 1.0), _numbers(0.7, 0.8, 0.08, 0.5), 40.0
    ),
    "Henon-Heiles": Problem(_henon_heiles, (0.0, 0.1, 0.35, 0.1), _numbers(1.0)),
    **{f"MLP {n}": _mlp_problem(n) for n in (2, 4, 8, 16, 32)},
}
