r"""Two bodies and an unknown friction: the system, its data, and how well it is known.

Two bodies attract each other, and a friction that depends on their distance takes
energy out of the orbit. With $x$ the separation, $v$ its rate and $G = 1$,

$$\dot x = v, \qquad \dot v = -(m_1 + m_2) \frac{x}{|x|^3} - g(|x|) \, v.$$

Both bodies are seen from their common centre, at irregular times and with noise.

Units: the semi-major axis is 1 and, with a total mass of $\mu$, the period is
$2 \pi / \sqrt{\mu}$.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


PARAMETERS = ("m1", "m2", "x(0)", "y(0)", "vx(0)", "vy(0)")

_MASSES = np.array([1.0, 0.6])
_ECCENTRICITY = 0.5
_NUM_ORBITS = 4
_FRICTION = 1.2e-3
# Standard deviation of the noise in each coordinate.
NOISE = 0.005
# How wrong the values are that the fit starts from.
_OFFSETS = np.array([0.03, -0.02, 0.01, 0.01, 0.01, -0.01])
# Scale of the network's output, so that weights of order one mean a weak friction.
_NETWORK_SCALE = 0.02


class Model(eqx.Module):
    """What is fitted."""

    masses: Float[Array, " bodies"]
    start: Float[Array, " state"]
    """Separation and its rate at time zero, both in the plane of the orbit."""
    network: eqx.nn.MLP

    def friction(self, distance):
        # Forces fall with distance, so its inverse is what they are smooth in. It lies
        # between about a half and two.
        return _NETWORK_SCALE * self.network(2 * (1 / distance - 1))


class Truth(eqx.Module):
    """What the data come from."""

    masses: Float[Array, " bodies"]
    start: Float[Array, " state"]

    def friction(self, distance):
        return _FRICTION / distance**2


def true_system() -> Truth:
    # From the far end of the ellipse.
    distance = 1 + _ECCENTRICITY
    speed = np.sqrt(_MASSES.sum() * (1 - _ECCENTRICITY) / (1 + _ECCENTRICITY))
    return Truth(jnp.asarray(_MASSES), jnp.asarray([distance, 0.0, 0.0, speed]))


def first_model(key) -> Model:
    """Physics alone, and not quite right: the network starts as zero."""
    truth = true_system()
    network = eqx.nn.MLP("scalar", "scalar", 8, 1, jnp.tanh, key=key)
    network = eqx.tree_at(
        lambda n: (n.layers[-1].weight, n.layers[-1].bias),
        network,
        replace_fn=jnp.zeros_like,
    )
    return Model(truth.masses + _OFFSETS[:2], truth.start + _OFFSETS[2:], network)


def _length(x):
    return jnp.sqrt(jnp.sum(x * x))


def _vector_field(t, y, system):
    del t
    x, v = y[:2], y[2:]
    distance = _length(x)
    gravity = -jnp.sum(system.masses) * x / distance**3
    return jnp.concatenate([v, gravity - system.friction(distance) * v])


TERM = diffrax.ODETerm(_vector_field)


class Problem(NamedTuple):
    """The data."""

    times: Float[Array, " points"]
    positions: Float[Array, "bodies points 2"]
    truth: Float[Array, "points state"]


def integrate(
    run: Callable, solver, system, t1, controller, saveat, max_steps=None, throw=True
) -> Any:
    """`run` is Diffrax's `diffeqsolve` or ours: only `DEER` is new."""
    return run(
        TERM,
        solver,
        0.0,
        t1,
        None,
        system.start,
        system,
        saveat=saveat,
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=throw,
    )


def see(system, states):
    """Where the two bodies are, seen from their common centre."""
    fraction = system.masses / jnp.sum(system.masses)
    x = states[:, :2]
    return jnp.stack([-fraction[1] * x, fraction[0] * x])


def simulate(num_points: int, rng: np.random.Generator) -> Problem:
    """Observations at random times, from an eighth-order reference solution."""
    system = true_system()
    ts = np.cumsum(rng.exponential(size=num_points))
    ts *= _NUM_ORBITS * 2 * np.pi / np.sqrt(_MASSES.sum()) / ts[-1]
    times = jnp.asarray(ts)
    reference = integrate(
        *(diffrax.diffeqsolve, diffrax.Dopri8(), system, times[-1]),
        diffrax.PIDController(rtol=1e-12, atol=1e-12),
        diffrax.SaveAt(ts=times),
    )
    truth = reference.ys
    positions = see(system, truth)
    noise = jnp.asarray(NOISE * rng.standard_normal(positions.shape))
    return Problem(times, positions + noise, truth)


def loss_of_truth(problem: Problem) -> float:
    """What noise alone leaves: about one."""
    noise = problem.positions - see(true_system(), problem.truth)
    return float(jnp.mean((noise / NOISE) ** 2))


def friction_error(problem: Problem, model: Model) -> float:
    """Of the learned friction along the true orbit: rms, relative to its own rms."""
    distances = jax.vmap(_length)(problem.truth[:, :2])
    speeds = jax.vmap(_length)(problem.truth[:, 2:])
    learned = jax.vmap(model.friction)(distances) * speeds
    true = jax.vmap(true_system().friction)(distances) * speeds
    return float(jnp.sqrt(jnp.mean((learned - true) ** 2) / jnp.mean(true**2)))


def true_parameters() -> Float[Array, " parameters"]:
    truth = true_system()
    return jnp.concatenate([truth.masses, truth.start])
