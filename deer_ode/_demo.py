r"""The demonstration behind `python -m deer_ode`: two bodies and an unknown friction.

Two bodies attract each other, and a friction that depends on their distance takes
energy out of the orbit. With $x$ the separation, $v$ its rate and $G = 1$,

$$\dot x = v, \qquad \dot v = -(m_1 + m_2) \frac{x}{|x|^3} - g(|x|) \, v.$$

Both bodies are seen from their common centre, at irregular times and with noise.
Wanted are the masses, the separation and velocity at the start, and the law $g$, for
which nothing is assumed: a neural network stands in its place. All are fitted at once,
by gradient descent through the differential equation.

Units: the semi-major axis is 1 and, with a total mass of $\mu$, the period is
$2 \pi / \sqrt{\mu}$.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.flatten_util as jfu
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from tqdm import tqdm

from ._integrate import diffeqsolve
from ._newton import Newton
from ._predictor import Coarse, Trajectory
from ._solver import DEER


SOLVERS = dict(
    heun=diffrax.Heun,
    midpoint=diffrax.Midpoint,
    ralston=diffrax.Ralston,
    bosh3=diffrax.Bosh3,
    tsit5=diffrax.Tsit5,
    dopri5=diffrax.Dopri5,
    dopri8=diffrax.Dopri8,
)
PARAMETERS = ("m1", "m2", "x(0)", "y(0)", "vx(0)", "vy(0)")

_MASSES = np.array([1.0, 0.6])
_ECCENTRICITY = 0.5
_NUM_ORBITS = 4
_FRICTION = 1.2e-3
# Standard deviation of the noise in each coordinate.
_NOISE = 0.005
# How wrong the values are that the fit starts from.
_OFFSETS = np.array([0.03, -0.02, 0.01, 0.01, 0.01, -0.01])
# Between observations that lie further apart the solver makes more steps, so that few
# observations still give an accurate orbit. (10,000 lie closer by far.)
_LONGEST_STEP = 0.05
# Scale of the network's output, so that weights of order one mean a weak friction.
_NETWORK_SCALE = 0.02
# How uncertain the parameters are taken to be before the data speak: a tenth of the
# units for the physical ones, and weights of order one.
_PRIOR_PHYSICS = 0.1
_PRIOR_WEIGHTS = 1.0
# Of gradient descent in coordinates in which the misfit is nearly a sphere, so that a
# rate of one would be a Gauss--Newton step. They are made anew for every round.
_LEARNING_RATE = 0.1
_MOMENTUM = 0.8
_LONGEST_UPDATE = 0.5
_NUM_ROUNDS = 10
# Newton steps after which a solve is no longer worth a picture.
_MAX_HISTORY = 60


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


def _true_system() -> Truth:
    # From the far end of the ellipse.
    distance = 1 + _ECCENTRICITY
    speed = np.sqrt(_MASSES.sum() * (1 - _ECCENTRICITY) / (1 + _ECCENTRICITY))
    return Truth(jnp.asarray(_MASSES), jnp.asarray([distance, 0.0, 0.0, speed]))


def _first_model(key) -> Model:
    """Physics alone, and not quite right: the network starts as zero."""
    truth = _true_system()
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


_TERM = diffrax.ODETerm(_vector_field)


class Problem(NamedTuple):
    """The data, and the grid of time steps, which passes through all of them."""

    positions: Float[Array, "bodies points 2"]
    truth: Float[Array, "points state"]
    grid: Float[Array, " knots"]
    indices: Int[Array, " points"]
    """Which step of the grid ends at each observation."""


def _solve(
    run: Callable,
    solver,
    system,
    grid,
    saveat=diffrax.SaveAt(steps=True),
    throw=True,
) -> Any:
    """`run` is Diffrax's `diffeqsolve` or ours: only `DEER` is new.

    Newton's method starts from its default guess. The solution of the last gradient
    step, by way of `solver_state`, takes as long here: with so many points to an orbit
    a coarse solve is a better guess than the orbit of slightly different parameters.
    """
    return run(
        _TERM,
        solver,
        grid[0],
        grid[-1],
        None,
        system.start,
        system,
        saveat=saveat,
        stepsize_controller=diffrax.StepTo(grid),
        max_steps=grid.shape[0] - 1,
        throw=throw,
    )


def _see(system, states):
    """Where the two bodies are, seen from their common centre."""
    fraction = system.masses / jnp.sum(system.masses)
    x = states[:, :2]
    return jnp.stack([-fraction[1] * x, fraction[0] * x])


def simulate(num_points: int, rng: np.random.Generator) -> Problem:
    """Observations at random times, from an eighth-order reference solution."""
    system = _true_system()
    ts = np.cumsum(rng.exponential(size=num_points))
    ts *= _NUM_ORBITS * 2 * np.pi / np.sqrt(_MASSES.sum()) / ts[-1]
    gaps = np.diff(ts, prepend=0.0)
    counts = np.ceil(gaps / _LONGEST_STEP).astype(int)
    parts = [
        t - gap * np.arange(count - 1, -1, -1) / count
        for t, gap, count in zip(ts, gaps, counts, strict=True)
    ]
    grid = jnp.asarray(np.concatenate([[0.0], *parts]))
    indices = jnp.asarray(np.cumsum(counts) - 1)
    reference = eqx.filter_jit(_solve)(
        diffrax.diffeqsolve, diffrax.Dopri8(), system, grid
    )
    truth = reference.ys[indices]
    positions = _see(system, truth)
    noise = jnp.asarray(_NOISE * rng.standard_normal(positions.shape))
    return Problem(positions + noise, truth, grid, indices)


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
        dynamic, self._static = eqx.partition(_first_model(key), eqx.is_array)
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
        seen = _see(model, ys[self.problem.indices])
        return (seen - self.problem.positions) / _NOISE

    def _solve(self, parameters):
        """The loss and the solution."""
        model = self.model(parameters)
        sol = _solve(diffeqsolve, DEER(self.solver, Newton()), model, self.problem.grid)
        return jnp.mean(self._misfit(model, sol.ys) ** 2), sol

    def _gradient_step(self, z, frame, opt_state, level, is_parallel):
        """One step of training. Returns the gradient as well, with respect to `z`."""

        def loss(z):
            model = self.model(frame.mean + frame.scale @ z)
            grid = self.problem.grid
            if is_parallel:
                sol = _solve(diffeqsolve, DEER(self.solver, Newton()), model, grid)
            else:
                sol = _solve(diffrax.diffeqsolve, self.solver, model, grid)
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
            sol = _solve(diffeqsolve, DEER(self.solver, Newton()), model, grid)
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
            state = solver.init(_TERM, t0, t1, y, system)
            return solver.step(_TERM, t0, t1, y, system, state, made_jump=True)[0]

        starts = jnp.concatenate([system.start[None], ys[:-1]])
        return jnp.max(jnp.abs(jax.vmap(step)(grid[:-1], grid[1:], starts) - ys))

    @eqx.filter_jit
    def newton_step(predictor):
        method = Newton(guess=predictor, newton_max_steps=1, fallback=False)
        saveat = diffrax.SaveAt(solver_state=True)
        sol = _solve(diffeqsolve, DEER(solver, method), system, grid, saveat, False)
        return sol.solver_state.ys, sol.result == diffrax.RESULTS.successful

    histories = {}
    for name, ys in guesses.items():
        history = [np.nan if ys is None else float(residual(ys))]
        is_done = False
        while not is_done and len(history) <= _MAX_HISTORY:
            ys, is_done = newton_step(Coarse() if ys is None else Trajectory(ys))
            history.append(float(residual(ys)))
        histories[name] = history
    return histories


def loss_of_truth(problem: Problem) -> float:
    """What noise alone leaves: about one."""
    noise = problem.positions - _see(_true_system(), problem.truth)
    return float(jnp.mean((noise / _NOISE) ** 2))


def friction_error(problem: Problem, model: Model) -> float:
    """Of the learned friction along the true orbit: rms, relative to its own rms."""
    distances = jax.vmap(_length)(problem.truth[:, :2])
    speeds = jax.vmap(_length)(problem.truth[:, 2:])
    learned = jax.vmap(model.friction)(distances) * speeds
    true = jax.vmap(_true_system().friction)(distances) * speeds
    return float(jnp.sqrt(jnp.mean((learned - true) ** 2) / jnp.mean(true**2)))


def true_parameters() -> Float[Array, " parameters"]:
    truth = _true_system()
    return jnp.concatenate([truth.masses, truth.start])


def plot(
    path: str, task: Task, training: Training, histories: dict[str, list[float]]
) -> None:
    """Writes the picture: orbits, loss, and Newton's method at work."""
    problem = task.problem
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    data = np.asarray(problem.positions)
    before = np.asarray(_see(task.model(task.first), training.first_states))
    fitted = np.asarray(_see(task.model(training.parameters), training.states))
    true = np.asarray(_see(_true_system(), problem.truth))
    # All of it, and from nearby the far end of the lighter body's orbit.
    close = left.inset_axes((0.6, 0.7, 0.4, 0.3))
    for axes in (left, close):
        size = 1.5 if axes is left else 2.5
        for body, colour in enumerate(("tab:blue", "tab:orange")):
            axes.plot(*data[body].T, ".", color=colour, markersize=size, alpha=0.4)
            axes.plot(*before[body].T, color="0.6", linewidth=0.8)
            axes.plot(*true[body].T, color="black", linewidth=1.0)
            axes.plot(*fitted[body].T, "--", color="white", linewidth=1.0)
    end = true[1, 0]
    close.set(
        xlim=(end[0] - 0.12, end[0] + 0.04),
        ylim=(end[1] - 0.06, end[1] + 0.06),
        xticks=[],
        yticks=[],
        facecolor="0.85",
    )
    left.indicate_inset_zoom(close, edgecolor="black")
    names = ["data", "before the fit", "truth", "fit"]
    legend = left.legend(
        close.get_lines()[:4], names, loc="upper left", fontsize=8, facecolor="0.85"
    )
    legend.get_lines()[0].set(markersize=6, alpha=1)
    left.set(title="Two bodies", xlabel="x", ylabel="y", aspect="equal")
    # Room for the inset.
    left.set_ylim(top=left.get_ylim()[0] + np.diff(left.get_xlim()).item())

    middle.loglog(np.arange(1, len(training.losses) + 1), training.losses)
    noise = loss_of_truth(problem)
    middle.axhline(noise, color="black", linewidth=0.8, linestyle=":", label="noise")
    middle.legend(fontsize=8)
    middle.set(title="Training", xlabel="gradient step", ylabel="loss")

    for name, history in histories.items():
        right.semilogy(history, ".-", label=name)
    right.set(
        title=f"One solve of {problem.grid.shape[0] - 1:,} steps",
        xlabel="Newton step",
        ylabel="largest residual of any step",
    )
    right.legend(title="guess", fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100, format="png")
