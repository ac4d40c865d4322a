"""The fit: two bodies fitted to observations, and how it compares with stock Diffrax.

Wanted are the masses, the separation and velocity at the start, and the law of
friction, for which nothing is assumed: a neural network stands in its place. All are
fitted at once, by gradient descent through the differential equation.
"""

import math
import time
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from .._integrate import diffeqsolve
from .._newton import Newton
from .._predictor import Adaptive, Trajectory
from .._solver import DEER
from ._system import (
    NOISE,
    PARAMETERS,
    TERM,
    Model,
    Problem,
    first_model,
    integrate,
    see,
)


SOLVERS = dict(
    heun=diffrax.Heun,
    midpoint=diffrax.Midpoint,
    ralston=diffrax.Ralston,
    bosh3=diffrax.Bosh3,
    tsit5=diffrax.Tsit5,
    dopri5=diffrax.Dopri5,
    dopri8=diffrax.Dopri8,
)
# How uncertain the parameters are taken to be before the data speak: a tenth of the
# units for the physical ones, and weights of order one.
_PRIOR_PHYSICS = 0.1
_PRIOR_WEIGHTS = 1.0
# Of gradient descent in coordinates in which the misfit is nearly a sphere, so that a
# rate of one would be a Gauss--Newton step. They are computed again for every round.
_LEARNING_RATE = 0.1
_MOMENTUM = 0.8
_LONGEST_UPDATE = 0.5
_NUM_ROUNDS = 10
# Newton steps after which a solve is no longer worth a picture.
_MAX_HISTORY = 60


class Frame(NamedTuple):
    """Coordinates `z` for the parameters, which are `mean + scale @ z`."""

    mean: Float[Array, " parameters"]
    scale: Float[Array, "parameters parameters"]


class Information(NamedTuple):
    """What there is to know at some parameters."""

    JTJ: Float[Array, "parameters parameters"]
    r"""$J^\top J$ of the misfit."""
    sensitivity: float
    r"""The largest $\partial y_i / \partial y_0$."""
    loss: Float[Array, ""]
    states: Float[Array, "points state"]
    mesh: Float[np.ndarray, " knots"]
    """The ends of the steps, chosen all at once."""
    stats: dict[str, Array]


class Task:
    """Everything that is compiled: solves, gradients and linearisations of the fit.

    Parameters are one vector: `PARAMETERS` in their order, then the network's weights.
    """

    def __init__(
        self,
        problem: Problem,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        key,
        num_steps: int,
    ):
        self.problem = problem
        self.solver = solver
        # The orbit is of order one.
        self.controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        dynamic, self._static = eqx.partition(first_model(key), eqx.is_array)
        self.first, self._unravel = jfu.ravel_pytree(dynamic)
        schedule = optax.cosine_decay_schedule(
            _LEARNING_RATE, -(-num_steps // _NUM_ROUNDS)
        )
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(_LONGEST_UPDATE),
            optax.sgd(schedule, momentum=_MOMENTUM),
        )
        # Room for the steps, whose number changes with the parameters.
        sol = self.integrate_stock(self.model(self.first), self.problem.times)
        num_mesh_steps = int(sol.stats["num_accepted_steps"])
        self._room = 2 ** math.ceil(math.log2(1.5 * num_mesh_steps))
        self.gradient_step = eqx.filter_jit(self._gradient_step)
        self._compiled_information = eqx.filter_jit(self._information)

    def model(self, parameters) -> Model:
        return eqx.combine(self._unravel(parameters), self._static)

    def integrate_stock(self, model: Model, ts: Float[Array, " times"]) -> Any:
        """States at `ts` by stock Diffrax, to the tolerance."""
        t1, saveat = self.problem.times[-1], diffrax.SaveAt(ts=ts)
        run = diffrax.diffeqsolve
        return integrate(run, self.solver, model, t1, self.controller, saveat)

    def _integrate(self, model, is_ours=True, mesh=None, saveat=None):
        """By the tolerance, or on given steps."""
        run = diffeqsolve if is_ours else diffrax.diffeqsolve
        solver = DEER(self.solver, Newton()) if is_ours else self.solver
        times = self.problem.times
        # Diffrax counts rejected steps as well.
        controller, room = self.controller, self._room * (1 if is_ours else 2)
        if mesh is not None:
            controller, room = diffrax.StepTo(mesh), mesh.size - 1
        saveat = diffrax.SaveAt(ts=times) if saveat is None else saveat
        return integrate(run, solver, model, times[-1], controller, saveat, room)

    def _misfit(self, model, ys):
        """Difference from the data in units of the noise."""
        return (see(model, ys) - self.problem.positions) / NOISE

    def _gradient_step(self, z, frame, opt_state, level, is_ours=True, mesh=None):
        """One step of training. Returns the gradient as well, with respect to `z`."""

        def loss(z):
            model = self.model(frame.mean + frame.scale @ z)
            sol = self._integrate(model, is_ours, mesh)
            value = jnp.mean(self._misfit(model, sol.ys) ** 2)
            return value / (2 * level), (value, sol)

        (_, (value, sol)), gradient = jax.value_and_grad(loss, has_aux=True)(z)
        # Optax relies on promotion; the solve does not.
        with jax.numpy_dtype_promotion("standard"):
            update, opt_state = self.optimiser.update(gradient, opt_state)
        return z + update, opt_state, value, gradient, sol

    def _information(self, parameters):
        saveat = diffrax.SaveAt(
            subs=[
                diffrax.SubSaveAt(ts=self.problem.times),
                diffrax.SubSaveAt(t0=True, steps=True),
            ]
        )

        def solve(parameters):
            model = self.model(parameters)
            sol = self._integrate(model, saveat=saveat)
            misfit = self._misfit(model, sol.ys[0])
            return (sol.ys[0], misfit.ravel()), (jnp.mean(misfit**2), sol)

        _, push_forward, aux = jax.linearize(solve, parameters, has_aux=True)
        basis = jnp.eye(parameters.size, dtype=parameters.dtype)
        states, J = jax.lax.map(push_forward, basis, batch_size=8)
        return J @ J.T, jnp.max(jnp.abs(states[2 : len(PARAMETERS)])), *aux

    def information(self, parameters) -> Information:
        """About all parameters, at once."""
        JTJ, sensitivity, loss, sol = self._compiled_information(parameters)
        mesh = np.asarray(sol.ts[1][: int(sol.stats["num_accepted_steps"]) + 1])
        stats = {k: v for k, v in sol.stats.items() if not isinstance(v, str)}
        return Information(JTJ, float(sensitivity), loss, sol.ys[0], mesh, stats)

    def prior_precision(self):
        physics = np.full(len(PARAMETERS), _PRIOR_PHYSICS**-2)
        weights = np.full(self.first.size - physics.size, _PRIOR_WEIGHTS**-2)
        return np.diag(np.concatenate([physics, weights]))


class Training(NamedTuple):
    """What came out of the fit."""

    parameters: Float[Array, " parameters"]
    standard_errors: np.ndarray
    losses: list[float]
    """Before each step, and after the last."""
    newton_steps: list[int]
    num_mesh_steps: list[int]
    num_fallback_steps: int
    first_states: Float[Array, "points state"]
    states: Float[Array, "points state"]
    mesh: Float[np.ndarray, " knots"]
    """Of the last solve."""
    sensitivity: float


def train(task: Task, num_steps: int) -> Training:
    """Fits all parameters by momentum, in coordinates made to measure."""
    mean = task.first
    first = found = task.information(mean)
    stats, losses = [first.stats], []
    num_data = task.problem.positions.size
    ends = np.linspace(0, num_steps, min(_NUM_ROUNDS, num_steps) + 1).astype(int)
    with tqdm(total=num_steps, desc="training", unit="step") as progress:
        for count in np.diff(ends).tolist():
            # The parameters differ a thousandfold in how much they matter. In these
            # coordinates the linearised misfit is nearly a sphere.
            level = found.loss
            hessian = np.asarray(found.JTJ) / (num_data * level)
            scale = np.linalg.cholesky(np.linalg.inv(hessian + task.prior_precision()))
            frame = Frame(mean, jnp.asarray(scale))
            z = jnp.zeros_like(mean)
            opt_state = task.optimiser.init(z)
            for _ in range(count):
                z, opt_state, loss, _, sol = task.gradient_step(
                    z, frame, opt_state, level
                )
                losses.append(float(loss))
                stats.append(sol.stats)
                num_newton_steps = int(sol.stats["num_newton_steps"])
                progress.set_postfix(loss=f"{losses[-1]:.4g}", newton=num_newton_steps)
                progress.update()
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss became {losses[-1]}")
            mean = frame.mean + frame.scale @ z
            found = task.information(mean)
    covariance = np.linalg.inv(np.asarray(found.JTJ) + task.prior_precision())
    counts = lambda name: [int(s[name]) for s in stats]
    return Training(
        parameters=mean,
        standard_errors=np.sqrt(np.diag(covariance))[: len(PARAMETERS)],
        losses=[*losses, float(found.loss)],
        newton_steps=counts("num_newton_steps"),
        num_mesh_steps=counts("num_accepted_steps"),
        num_fallback_steps=sum(counts("num_fallback_steps")),
        first_states=first.states,
        states=found.states,
        mesh=found.mesh,
        sensitivity=found.sensitivity,
    )


class Comparison(NamedTuple):
    """The same training step in parallel, by stock Diffrax on the same steps, and by
    stock Diffrax on its own: relative differences of the first two, numbers of steps,
    and seconds of each.
    """

    loss_difference: float
    gradient_difference: float
    tolerance: float
    num_steps: int
    num_adaptive_steps: int
    seconds: tuple[float, float, float]

    @property
    def agrees(self) -> bool:
        return (
            self.loss_difference <= self.tolerance
            and self.gradient_difference <= self.tolerance
        )


def compare(task: Task, training: Training, repeats: int = 3) -> Comparison:
    """Loss and gradient both ways, halfway from the first to the fitted parameters.

    At the fit itself the gradient is nothing but cancellation, and before the first
    step that of most weights is zero.

    Each step of the parallel solve may be off by the rounding that its acceptance test
    allows (64 units), and an error made at one step has grown by at most `sensitivity`
    at any other; hence the tolerance.
    """
    frame = Frame((task.first + training.parameters) / 2, jnp.eye(task.first.size))
    z = jnp.zeros_like(task.first)
    opt_state = task.optimiser.init(z)
    level = jnp.asarray(1.0, z.dtype)

    mesh = jnp.asarray(task.information(frame.mean).mesh)
    programs = {
        "ours": {},
        "same": dict(is_ours=False, mesh=mesh),
        "adaptive": dict(is_ours=False),
    }
    outcomes, seconds = {}, {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, how in programs.items():
            start = time.perf_counter()
            outcomes[name] = jax.block_until_ready(
                task.gradient_step(z, frame, opt_state, level, **how)
            )
            seconds[name].append(time.perf_counter() - start)
    # The first ones were compiled.
    ours, same, adaptive = (float(np.median(seconds[name][1:])) for name in programs)
    _, _, loss, gradient, sol = outcomes["ours"]
    _, _, stock_loss, stock_gradient, _ = outcomes["same"]
    num_steps = int(sol.stats["num_accepted_steps"])
    eps = float(jnp.finfo(z.dtype).eps)
    return Comparison(
        float(abs(loss - stock_loss) / stock_loss),
        float(
            jnp.max(jnp.abs(gradient - stock_gradient))
            / jnp.max(jnp.abs(stock_gradient))
        ),
        64 * eps * num_steps * training.sensitivity,
        num_steps,
        int(outcomes["adaptive"][4].stats["num_accepted_steps"]),
        (ours, same, adaptive),
    )


def residual_history(
    task: Task,
    system: Model,
    mesh: Float[Array, " knots"],
    guesses: dict[str, Float[Array, "steps state"] | None],
) -> dict[str, list[float]]:
    """The largest residual of any step of the mesh, before and after each Newton step.

    One Newton step at a time, from the trajectory that the one before it left: the same
    as one solve stopped after 1, 2, ... of them. The residual is computed here, by the
    base solver. `None` is Newton's default guess, whose own residual is not known.
    """
    solver = task.solver

    @eqx.filter_jit
    def residual(ys):
        def step(t0, t1, y):
            state = solver.init(TERM, t0, t1, y, system)
            return solver.step(TERM, t0, t1, y, system, state, made_jump=True)[0]

        starts = jnp.concatenate([system.start[None], ys[:-1]])
        return jnp.max(jnp.abs(jax.vmap(step)(mesh[:-1], mesh[1:], starts) - ys))

    @eqx.filter_jit
    def newton_step(predictor):
        method = Newton(
            guess=predictor, window=None, newton_max_steps=1, fallback=False
        )
        sol = integrate(
            *(diffeqsolve, DEER(solver, method), system, mesh[-1]),
            *(diffrax.StepTo(mesh), diffrax.SaveAt(solver_state=True)),
            throw=False,
        )
        return sol.solver_state.ys, sol.result == diffrax.RESULTS.successful

    histories = {}
    for name, ys in guesses.items():
        history = [np.nan if ys is None else float(residual(ys))]
        is_done = False
        while not is_done and len(history) <= _MAX_HISTORY:
            ys, is_done = newton_step(Adaptive() if ys is None else Trajectory(ys))
            history.append(float(residual(ys)))
        histories[name] = history
    return histories
