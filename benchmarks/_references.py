"""Initial value problems with published solutions.

They are read from `ivp_reference.json`, which does not belong to this repository, in
the folder that the environment variable DEER_ODE_DATA names.
"""

import json

import jax.numpy as jnp
import numpy as np

from examples.datasets import data_folder


FILE = data_folder() / "ivp_reference.json"


def _three_bodies(t, y, args):
    del t, args
    mu = 0.012277471
    x, z, dx, dz = y
    d1 = ((x + mu) ** 2 + z**2) ** 1.5
    d2 = ((x - 1 + mu) ** 2 + z**2) ** 1.5
    ddx = x + 2 * dz - (1 - mu) * (x + mu) / d1 - mu * (x - 1 + mu) / d2
    ddz = z - 2 * dx - (1 - mu) * z / d1 - mu * z / d2
    return jnp.stack([dx, dz, ddx, ddz])


def _kepler(t, y, args):
    del t, args
    cube = (y[0] ** 2 + y[1] ** 2) ** 1.5
    return jnp.stack([y[2], y[3], -y[0] / cube, -y[1] / cube])


def _b4(t, y, args):
    del t, args
    r = jnp.sqrt(y[0] ** 2 + y[1] ** 2)
    return jnp.stack([-y[1] - y[0] * y[2] / r, y[0] - y[1] * y[2] / r, y[0] / r])


def _chain(rates):
    rates = np.asarray(rates, float)

    def field(t, y, args):
        del t, args
        flow = jnp.asarray(rates) * y[:-1]
        zero = jnp.zeros((1,))
        return jnp.concatenate([zero, flow]) - jnp.concatenate([flow, zero])

    return field


def _heat(t, y, args):
    del t, args
    zero = jnp.zeros((1,))
    return jnp.concatenate([zero, y[:-1]]) - 2 * y + jnp.concatenate([y[1:], zero])


def robertson(t, y, args):
    del t, args
    a, b, c = y
    first, second, third = 0.04 * a, 3e7 * b * b, 1e4 * b * c
    return jnp.stack([third - first, first - second - third, second])


def stiff_van_der_pol(t, y, args):
    del t, args
    return jnp.stack([y[1], 1e6 * ((1 - y[0] ** 2) * y[1] - y[0])])


#: The vector fields, written for JAX; the file has them as text.
FIELDS = {
    "DETEST-A1": lambda t, y, args: -y,
    "DETEST-A2": lambda t, y, args: -0.5 * y**3,
    "DETEST-A3": lambda t, y, args: y * jnp.cos(t),
    "DETEST-A4": lambda t, y, args: 0.25 * y * (1 - y / 20),
    "DETEST-A5": lambda t, y, args: (y - t) / (y + t),
    "DETEST-B1": lambda t, y, args: jnp.stack(
        [2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])]
    ),
    "DETEST-B2": lambda t, y, args: jnp.stack(
        [-y[0] + y[1], y[0] - 2 * y[1] + y[2], y[1] - y[2]]
    ),
    "DETEST-B3": lambda t, y, args: jnp.stack([-y[0], y[0] - y[1] ** 2, y[1] ** 2]),
    "DETEST-B4": _b4,
    "DETEST-C1": _chain(np.ones(9)),
    "DETEST-C2": _chain(np.arange(1, 10)),
    "DETEST-C3": _heat,
    "DETEST-C4": _heat,
    "DETEST-D1": _kepler,
    "DETEST-D2": _kepler,
    "DETEST-D3": _kepler,
    "DETEST-D4": _kepler,
    "DETEST-D5": _kepler,
    "Arenstorf": _three_bodies,
}

STIFF_FIELDS = {"VanDerPol-stiff": stiff_van_der_pol, "Robertson": robertson}


def load():
    return {p["name"]: p for p in json.loads(FILE.read_text())["problems"]}


def reference(problem):
    y = np.asarray(problem["y_ref"], float)
    if problem["name"] == "DETEST-A1":
        # The published value is wrong in the seventh digit.
        y = np.exp([-20.0])
    return y
