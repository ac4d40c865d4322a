"""The fit: two bodies fitted to observations, and how it compares with stock Diffrax.

Wanted are the masses, the separation and velocity at the start, and the law of
friction, for which nothing is assumed: a neural network stands in its place. All are
fitted at once, by gradient descent through the differential equation.
"""

import time
from typing import NamedTuple

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


class Task:
    """Everything that is compiled: solves, gradients and linearisations of the fit.

    Parameters are one vector: `PARAMETERS` in their order, then the network's weights.
    """

    def __init__(
        self, problem: Problem, solver: diffrax.AbstractSolver, key, num_steps: int
    ):
        self.problem = problem
        self.solver = solver
        dynamic, self._static = eqx.partition(first_model(key), eqx.is_array)
        self.first, self._unravel = jfu.ravel_pytree(dynamic)
        schedule = optax.cosine_decay_schedule(
            _LEARNING_RATE, -(-num_steps // _NUM_ROUNDS)
        )
        self.optimiser = optax.chain(
            optax.clip_by_global_norm(_LONGEST_UPDATE),
            optax.sgd(schedule, momentum=_MOMENTUM),
        )
        self.solve = eqx.filter_jit(self._solve)
        self.gradient_step = eqx.filter_jit(self._gradient_step)
        self.information = eqx.filter_jit(self._information)

    def model(self, parameters) -> Model:
        return eqx.combine(self._unravel(parameters), self._static)

    def _misfit(self, model, ys):
        """Difference from the data in units of the noise."""
        seen = see(model, ys[self.problem.indices])
        return (seen - self.problem.positions) / NOISE

    def _solve(self, parameters):
        """The loss and the solution."""
        model = self.model(parameters)
        sol = integrate(
            diffeqsolve, DEER(self.solver, Newton()), model, self.problem.grid
        )
        return jnp.mean(self._misfit(model, sol.ys) ** 2), sol

    def _gradient_step(self, z, frame, opt_state, level, is_parallel):
        """One step of training. Returns the gradient as well, with respect to `z`."""

        def loss(z):
            model = self.model(frame.mean + frame.scale @ z)
            grid = self.problem.grid
            if is_parallel:
                sol = integrate(diffeqsolve, DEER(self.solver, Newton()), model, grid)
            else:
                sol = integrate(diffrax.diffeqsolve, self.solver, model, grid)
            value = jnp.mean(self._misfit(model, sol.ys) ** 2)
            return value / (2 * level), (value, sol)

        (_, (value, sol)), gradient = jax.value_and_grad(loss, has_aux=True)(z)
        # Optax relies on promotion; the solve does not.
        with jax.numpy_dtype_promotion("standard"):
            update, opt_state = self.optimiser.update(gradient, opt_state)
        return z + update, opt_state, value, gradient, sol

    def _information(self, parameters):
        r"""$J^\top J$ of the misfit, and the largest $\partial y_i / \partial y_0$."""

        def solve(parameters):
            model = self.model(parameters)
            grid = self.problem.grid
            sol = integrate(diffeqsolve, DEER(self.solver, Newton()), model, grid)
            return sol.ys, self._misfit(model, sol.ys).ravel()

        _, push_forward = jax.linearize(solve, parameters)
        basis = jnp.eye(parameters.size, dtype=parameters.dtype)
        states, J = jax.lax.map(push_forward, basis, batch_size=8)
        return J @ J.T, jnp.max(jnp.abs(states[2 : len(PARAMETERS)]))

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
    num_fallback_steps: int
    seconds: float
    first_states: Float[Array, "steps state"]
    states: Float[Array, "steps state"]
    sensitivity: float


def train(task: Task, num_steps: int) -> Training:
    """Fits all parameters by momentum, in coordinates made to measure."""
    mean = task.first
    loss, sol = task.solve(mean)
    first_states = sol.ys
    newton_steps = [int(sol.stats["num_newton_steps"])]
    num_fallback_steps = int(sol.stats["num_fallback_steps"])
    losses, seconds = [], []
    num_data = task.problem.positions.size
    ends = np.linspace(0, num_steps, min(_NUM_ROUNDS, num_steps) + 1).astype(int)
    with tqdm(total=num_steps, desc="training", unit="step") as progress:
        for count in np.diff(ends).tolist():
            # The parameters differ a thousandfold in how much they matter. In these
            # coordinates the linearised misfit is nearly a sphere.
            JTJ, _ = task.information(mean)
            hessian = np.asarray(JTJ) / (num_data * loss) + task.prior_precision()
            scale = np.linalg.cholesky(np.linalg.inv(hessian))
            frame = Frame(mean, jnp.asarray(scale))
            level = loss
            z = jnp.zeros_like(mean)
            opt_state = task.optimiser.init(z)
            for _ in range(count):
                start = time.perf_counter()
                z, opt_state, loss, _, sol = jax.block_until_ready(
                    task.gradient_step(z, frame, opt_state, level, True)
                )
                seconds.append(time.perf_counter() - start)
                losses.append(float(loss))
                newton_steps.append(int(sol.stats["num_newton_steps"]))
                num_fallback_steps += int(sol.stats["num_fallback_steps"])
                progress.set_postfix(loss=f"{losses[-1]:.4g}", newton=newton_steps[-1])
                progress.update()
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss became {losses[-1]}")
            mean = frame.mean + frame.scale @ z
    loss, sol = task.solve(mean)
    JTJ, sensitivity = task.information(mean)
    covariance = np.linalg.inv(np.asarray(JTJ) + task.prior_precision())
    return Training(
        parameters=mean,
        standard_errors=np.sqrt(np.diag(covariance))[: len(PARAMETERS)],
        losses=[*losses, float(loss)],
        newton_steps=newton_steps,
        num_fallback_steps=num_fallback_steps,
        # The first one was compiled.
        seconds=float(np.median(seconds[1:])) if len(seconds) > 1 else float("nan"),
        first_states=first_states,
        states=sol.ys,
        sensitivity=float(sensitivity),
    )


class Comparison(NamedTuple):
    """The same training step in parallel and by stock Diffrax: relative differences."""

    loss_difference: float
    gradient_difference: float
    tolerance: float
    seconds_stock: float

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

    def gradient_step(is_parallel):
        return jax.block_until_ready(
            task.gradient_step(z, frame, opt_state, level, is_parallel)
        )

    _, _, loss, gradient, _ = gradient_step(True)
    _, _, stock_loss, stock_gradient, _ = gradient_step(False)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        gradient_step(False)
        seconds.append(time.perf_counter() - start)
    num_steps = task.problem.grid.shape[0] - 1
    eps = float(jnp.finfo(z.dtype).eps)
    return Comparison(
        float(abs(loss - stock_loss) / stock_loss),
        float(
            jnp.max(jnp.abs(gradient - stock_gradient))
            / jnp.max(jnp.abs(stock_gradient))
        ),
        64 * eps * num_steps * training.sensitivity,
        float(np.median(seconds)),
    )


def residual_history(
    task: Task, system: Model, guesses: dict[str, Float[Array, "steps state"] | None]
) -> dict[str, list[float]]:
    """The largest residual of any step, before and after each Newton step.

    One Newton step at a time, from the trajectory that the one before it left: the same
    as one solve stopped after 1, 2, ... of them. The residual is computed here, by the
    base solver. `None` is Newton's default guess, whose own residual is not known.
    """
    grid, solver = task.problem.grid, task.solver

    @eqx.filter_jit
    def residual(ys):
        def step(t0, t1, y):
            state = solver.init(TERM, t0, t1, y, system)
            return solver.step(TERM, t0, t1, y, system, state, made_jump=True)[0]

        starts = jnp.concatenate([system.start[None], ys[:-1]])
        return jnp.max(jnp.abs(jax.vmap(step)(grid[:-1], grid[1:], starts) - ys))

    @eqx.filter_jit
    def newton_step(predictor):
        method = Newton(
            guess=predictor, window=None, newton_max_steps=1, fallback=False
        )
        saveat = diffrax.SaveAt(solver_state=True)
        sol = integrate(diffeqsolve, DEER(solver, method), system, grid, saveat, False)
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
