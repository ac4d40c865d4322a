"""What Diffrax is used for, whole programs small: through all three doors, against
stock Diffrax on the same grid.
"""

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from scipy.linalg import expm

from deer_ode import Auto

from .helpers import (
    DOORS,
    ROOT_FINDER,
    assert_close,
    one_door_each,
    rounding,
    slow,
)


class Chosen:
    """By which method all doors solve; None is Newton's."""

    method = None


def solve(door, terms, solver, grid, y0, args=None, *, substeps=3, **kwargs):
    """From time zero; `door` is a name, or None for stock Diffrax.

    `grid` is the end and the number of steps, or the ends of windows, each of them
    `substeps` even steps.
    """
    if isinstance(grid, tuple):
        t1, num_steps = grid
        windows, dt0 = num_steps // substeps, t1 / num_steps
        assert windows * substeps == num_steps
        window_dt0 = t1 / windows
    else:
        fraction = np.linspace(0, 1, substeps + 1)[1:]
        starts, ends = grid[:-1, None], grid[1:, None]
        ts = np.append(grid[:1], starts + fraction * (ends - starts))
        t1, num_steps, windows = grid[-1], len(ts) - 1, len(grid) - 1
        dt0 = window_dt0 = None
        points = jnp.asarray(grid if door == "c" else ts)
        kwargs["stepsize_controller"] = diffrax.StepTo(points)
    if door == "c":
        dt0, num_steps = window_dt0, windows
        kwargs["num_substeps"] = substeps
    fn = diffrax.diffeqsolve if door is None else DOORS[door]
    if door is not None:
        kwargs["method"] = Chosen.method
    return fn(terms, solver, 0.0, t1, dt0, y0, args, max_steps=num_steps, **kwargs)


def mlp(size_in, size_out, key):
    return eqx.nn.MLP(size_in, size_out, 4, 1, activation=jnp.tanh, key=key)


def descend(loss, model, *args, rate=0.1):
    """Three steps of gradient descent by one compiled program."""

    @eqx.filter_jit
    def step(model, *args):
        value, grads = eqx.filter_value_and_grad(loss)(model, *args)
        updates = jtu.tree_map(lambda g: -rate * g, grads)
        return value, eqx.apply_updates(model, updates)

    values = []
    for _ in range(3):
        value, model = step(model, *args)
        values.append(value)
    assert values[0] > values[1] > values[2]
    return values, eqx.filter(model, eqx.is_array)


# --- situations: from the name of a door to what must be the same --------------------


def neural_ode(door):
    """A field learnt from several trajectories of a spiral."""
    ts = jnp.linspace(0.0, 1.2, 5)
    angles = jnp.array([0.0, 1.0, 2.5, 4.0])[:, None] + 2 * ts[None]
    data = jnp.exp(-0.3 * ts)[None, :, None] * jnp.stack(
        [jnp.cos(angles), jnp.sin(angles)], axis=-1
    )
    term = diffrax.ODETerm(lambda t, y, field: field(y))

    def loss(field, data):
        def predict(y0):
            saveat = diffrax.SaveAt(ts=ts)
            return solve(
                door, term, diffrax.Midpoint(), (1.2, 12), y0, field, saveat=saveat
            ).ys

        return jnp.mean((jax.vmap(predict)(data[:, 0]) - data) ** 2)

    return descend(loss, mlp(2, 2, jr.key(0)), data)


class LatentODE(eqx.Module):
    cell: eqx.nn.GRUCell
    to_latent: eqx.nn.Linear
    field: eqx.nn.MLP
    decoder: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 4)
        self.cell = eqx.nn.GRUCell(2, 4, key=keys[0])
        self.to_latent = eqx.nn.Linear(4, 4, key=keys[1])
        self.field = mlp(2, 2, keys[2])
        self.decoder = eqx.nn.Linear(2, 1, key=keys[3])

    def loss(self, door, ts, xs, key):
        """The negative evidence lower bound of one irregular series."""
        read = lambda hidden, tx: (self.cell(tx, hidden), None)
        series = jnp.stack([ts, xs], axis=-1)
        hidden, _ = lax.scan(read, jnp.zeros(4), series, reverse=True)
        mean, log_std = jnp.split(self.to_latent(hidden), 2)
        latent = mean + jnp.exp(log_std) * jr.normal(key, mean.shape)
        # The parameters are in the term, not among `args`.
        term = diffrax.ODETerm(lambda t, y, args: self.field(y))
        saveat = diffrax.SaveAt(ts=ts)
        sol = solve(door, term, diffrax.Heun(), (1.0, 12), latent, saveat=saveat)
        misfit = jnp.sum((jax.vmap(self.decoder)(sol.ys)[:, 0] - xs) ** 2)
        divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 2 * log_std - 1)
        return misfit / 0.02 + divergence


def latent_ode(door):
    """An encoder, a sample of the latent state, its motion, a decoder."""
    ts = jnp.sort(jr.uniform(jr.key(1), (3, 6)), axis=-1)
    xs = jnp.sin(4 * ts + jnp.array([0.0, 0.5, 1.0])[:, None])

    def loss(model, ts, xs, keys):
        losses = jax.vmap(lambda *x: model.loss(door, *x))(ts, xs, keys)
        return jnp.mean(losses)

    model = LatentODE(jr.key(2))
    fn = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    return fn(model, ts, xs, jr.split(jr.key(3), 3))


class NeuralCDE(eqx.Module):
    initial: eqx.nn.Linear
    field: eqx.nn.MLP
    readout: eqx.nn.Linear
    as_ode: bool

    def __init__(self, as_ode, key):
        keys = jr.split(key, 3)
        self.initial = eqx.nn.Linear(2, 2, key=keys[0])
        self.field = mlp(2, 4, keys[1])
        self.readout = eqx.nn.Linear(2, "scalar", key=keys[2])
        self.as_ode = as_ode

    def __call__(self, door, control):
        field = lambda t, y, args: self.field(y).reshape(2, 2)
        term = diffrax.ControlTerm(field, control)
        term, solver = (
            (term.to_ode(), diffrax.Ralston())
            if self.as_ode
            else (term, diffrax.Heun())
        )
        y0 = self.initial(control.evaluate(0.0))
        sol = solve(door, term, solver, (1.0, 12), y0)
        return self.readout(sol.ys[-1])


def irregular_series():
    """Three series of time and a value, at times of their own, with gaps."""
    inner = jnp.sort(jr.uniform(jr.key(4), (3, 4)), axis=-1)
    ts = jnp.concatenate([jnp.zeros((3, 1)), inner, jnp.ones((3, 1))], axis=-1)
    xs = jnp.sin(3 * ts + jnp.array([[0.0], [1.0], [2.0]]))
    xs = xs.at[0, 2].set(jnp.nan).at[2, 4].set(jnp.nan)
    return ts, jnp.stack([ts, xs], axis=-1), jnp.array([0.0, 1.0, 1.0])


def neural_cde(as_ode, interpolate):
    def situation(door):
        ts, xs, labels = irregular_series()

        def loss(model, ts, xs):
            logits = jax.vmap(lambda t, x: model(door, interpolate(t, x)))(ts, xs)
            entropy = jnp.logaddexp(0.0, logits) - labels * logits
            return jnp.mean(entropy), logits

        fn = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
        return fn(NeuralCDE(as_ode, jr.key(5)), ts, xs)

    return situation


def hermite(ts, xs):
    coefficients = diffrax.backward_hermite_coefficients(ts, xs)
    return diffrax.CubicInterpolation(ts, coefficients)


def rectilinear(ts, xs):
    """Causal: first the time moves on, then the value."""
    _, xs = diffrax.rectilinear_interpolation(ts, xs)
    return diffrax.LinearInterpolation(jnp.linspace(0.0, 1.0, xs.shape[0]), xs)


def forcing(door):
    """A measured force among the arguments; what the answer owes to each value."""
    times = jnp.array([0.0, 0.3, 0.35, 1.1, 2.0])

    def field(t, y, args):
        force, stiffness = args
        position, velocity = y
        acceleration = force.evaluate(t) - stiffness * position - 0.2 * velocity
        return jnp.stack([velocity, acceleration])

    def loss(args):
        values, stiffness = args
        force = diffrax.LinearInterpolation(times, values)
        term, y0 = diffrax.ODETerm(field), jnp.array([0.5, 0.0])
        saveat = diffrax.SaveAt(ts=[0.5, 1.7], t1=True)
        sol = solve(
            door, term, diffrax.Bosh3(), (2.0, 24), y0, (force, stiffness),
            saveat=saveat,
        )  # fmt: skip
        return jnp.sum(sol.ys[:, 0] ** 2), sol.ys

    args = (jnp.array([1.0, -0.5, 2.0, 0.0, 1.5]), jnp.array(3.0))
    return eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(args)


def stiff(door):
    """Robertson's three reactions, over seven powers of ten of time."""

    def field(t, y, rates):
        a, b, c = y
        slow, fast, back = rates[0] * a, rates[1] * b**2, rates[2] * b * c
        return jnp.stack([back - slow, slow - fast - back, fast])

    def loss(log_rates):
        rates = jnp.array([0.04, 3e7, 1e4]) * jnp.exp(log_rates)
        sol = solve(
            door, diffrax.ODETerm(field), diffrax.Kvaerno5(root_finder=ROOT_FINDER),
            np.append(0.0, np.geomspace(1e-5, 100.0, 8)), jnp.array([1.0, 0.0, 0.0]),
            rates, saveat=diffrax.SaveAt(ts=[1e-4, 1.0, 100.0]),
        )  # fmt: skip
        # The middle one is five powers of ten smaller than the others.
        return jnp.sum(sol.ys[:, 2]), (sol.ys[:, ::2], sol.ys[:, 1])

    fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, aux), grads = fn(jnp.zeros(3))
    np.testing.assert_allclose(aux[0].sum(1) + aux[1], 1.0, rtol=1e-10)
    return value, aux, grads


def fit_oscillators(door):
    """Two masses and their springs, a tree of a state; Gauss and Newton find springs
    and damping.
    """
    ts = jnp.linspace(0.25, 3.0, 5)

    def field(t, y, args):
        x, v = y["x"], y["v"]
        stretch = args["between"] * (x[1] - x[0])
        force = jnp.stack([stretch, -stretch]) - args["wall"] * x
        return {"x": v, "v": force - args["damping"] * v}

    # Diffrax's default adjoint has no forward mode.
    kwargs = {} if door in ("a", "b") else {"adjoint": diffrax.ForwardMode()}

    def observe(args):
        y0 = {"x": jnp.array([1.0, 0.0]), "v": jnp.array([0.0, -0.5])}
        saveat = diffrax.SaveAt(ts=ts, fn=lambda t, y, args: y["x"])
        return solve(
            door, diffrax.ODETerm(field), diffrax.Heun(), (3.0, 24), y0, args,
            saveat=saveat, **kwargs,
        ).ys.reshape(-1)  # fmt: skip

    @jax.jit
    def step(args, data):
        prediction = observe(args)
        J = jnp.stack(jtu.tree_leaves(jax.jacfwd(observe)(args)), axis=-1)
        rest = data - prediction
        change = jnp.linalg.solve(J.T @ J, J.T @ rest)
        leaves, structure = jtu.tree_flatten(args)
        changed = [x + dx for x, dx in zip(leaves, change, strict=True)]
        return jnp.sum(rest**2), jtu.tree_unflatten(structure, changed)

    # The motion is linear, so data come from the exponential of a matrix.
    truth = {"wall": 2.0, "between": 0.7, "damping": 0.2}
    springs = np.array([[-2.7, 0.7], [0.7, -2.7]])
    matrix = np.block([[np.zeros((2, 2)), np.eye(2)], [springs, -0.2 * np.eye(2)]])
    start = np.array([1.0, 0.0, 0.0, -0.5])
    data = jnp.stack([expm(matrix * t) @ start for t in np.asarray(ts)])[:, :2]
    args = {
        "wall": jnp.array(1.6),
        "between": jnp.array(0.9),
        "damping": jnp.array(0.1),
    }
    losses = []
    for _ in range(3):
        value, args = step(args, data.reshape(-1))
        losses.append(value)
    for name, value in truth.items():
        np.testing.assert_allclose(args[name], value, atol=5e-2)
    return jnp.stack(losses), args


def planet(door):
    """A second order equation, symplectic: once around and more."""

    def loss(y0):
        terms = (
            diffrax.ODETerm(lambda t, momentum, args: momentum),
            diffrax.ODETerm(lambda t, q, mass: -mass * q / jnp.sum(q**2) ** 1.5),
        )
        saveat = diffrax.SaveAt(t0=True, steps=True)
        sol = solve(
            door, terms, diffrax.SemiImplicitEuler(), (7.5, 30), y0, jnp.array(1.0),
            saveat=saveat,
        )  # fmt: skip
        q, momentum = sol.ys
        # Windows save their ends only.
        thin = lambda x: x if door == "c" else x[::3]
        return jnp.sum(q[-1] ** 2), (sol.ts, thin(q), thin(momentum))

    y0 = (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (_, q, momentum)), grads = fn(y0)
    momenta = q[:, 0] * momentum[:, 1] - q[:, 1] * momentum[:, 0]
    np.testing.assert_allclose(momenta, 1.0, rtol=rounding())
    return value, (q, momentum), grads


def ensemble(solver):
    """Noisy relaxation: the same paths, and what their mean owes to the parameters."""

    def situation(door):
        def path(key, args):
            noise = diffrax.VirtualBrownianTree(0.0, 1.0, 2**-6, (2,), key)
            diffusion = lambda t, y, args: lx.DiagonalLinearOperator(
                args["noise"] * jnp.sin(y)
            )
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(lambda t, y, args: args["rate"] * (1.0 - y)),
                diffrax.ControlTerm(diffusion, noise),
            )
            saveat = diffrax.SaveAt(ts=[0.25, 0.5, 1.0])
            y0 = jnp.array([0.5, 2.0])
            # A power of two of steps: times, and so noise, are free of rounding.
            return solve(
                door, terms, solver, (1.0, 16), y0, args, substeps=4, saveat=saveat
            ).ys

        def mean(args, keys):
            ys = jax.vmap(path, in_axes=(0, None))(keys, args)
            return jnp.mean(ys[:, -1]), ys

        fn = jax.jit(jax.value_and_grad(mean, has_aux=True))
        args = {"rate": jnp.array(1.5), "noise": jnp.array(0.4)}
        (value, ys), grads = fn(args, jr.split(jr.key(6), 4))
        assert np.unique(np.asarray(ys[:, -1])).size == 8
        return value, ys, grads

    return situation


def bounces(door):
    """A ball that loses speed: each flight is a solve that an event ends."""
    gravity, height = 9.8, 2.0
    term = diffrax.ODETerm(lambda t, y, args: (y[1], -args))
    ground = diffrax.Event(
        lambda t, y, args, **kw: y[0], optx.Newton(1e-12, 1e-12), direction=False
    )

    def total_time(restitution):
        def flight(y0, _):
            sol = solve(
                door, term, diffrax.Tsit5(), (1.2, 24), y0, jnp.array(gravity),
                event=ground,
            )  # fmt: skip
            speed = -restitution * sol.ys[1][-1]
            return (jnp.zeros(()), speed), sol.ts[-1]

        _, times = lax.scan(flight, (jnp.array(height), jnp.zeros(())), length=4)
        return jnp.sum(times), times

    restitution = jnp.array(0.8)
    fn = jax.jit(jax.value_and_grad(total_time, has_aux=True))
    (total, times), slope = fn(restitution)
    fall = (2 * height / gravity) ** 0.5
    exact = [fall] + [2 * fall * 0.8**k for k in (1, 2, 3)]
    np.testing.assert_allclose(times, exact, rtol=1e-11)
    np.testing.assert_allclose(slope, 2 * fall * (1 + 1.6 + 3 * 0.64), rtol=1e-11)
    return total, times, slope


def two_levels(door):
    """A driven quantum system: complex amplitudes, a real parameter."""

    def transition(drive):
        def field(t, y, args):
            off = args * jnp.cos(2.0 * t)
            H = jnp.stack([jnp.stack([1.0 + 0 * off, off]), jnp.stack([off, -1.0])])
            return -1j * (H.astype(y.dtype) @ y)

        sol = solve(
            door, diffrax.ODETerm(field), diffrax.Dopri5(), (3.0, 24),
            jnp.array([1.0 + 0j, 0.0]), drive, saveat=diffrax.SaveAt(ts=[1.0, 3.0]),
        )  # fmt: skip
        return jnp.abs(sol.ys[-1, 1]) ** 2, sol.ys

    fn = jax.jit(jax.value_and_grad(transition, has_aux=True))
    (probability, ys), slope = fn(jnp.array(0.6))
    assert 0.1 < probability < 1
    # Steps of an eighth, by a method of order five.
    np.testing.assert_allclose(jnp.sum(jnp.abs(ys) ** 2, axis=1), 1.0, rtol=1e-5)
    return probability, ys, slope


SITUATIONS = {
    "neural ODE": neural_ode,
    "latent ODE": latent_ode,
    "neural CDE as an ODE": neural_cde(True, hermite),
    "neural CDE by its control": neural_cde(False, rectilinear),
    "forcing": forcing,
    "stiff": stiff,
    "fit of oscillators": fit_oscillators,
    "planet": planet,
    "Ito ensemble": ensemble(diffrax.Euler()),
    "Stratonovich ensemble": ensemble(diffrax.Heun()),
    "bounces": bounces,
    "two levels": two_levels,
}

# Roots are found to 1e-12, and derivatives are taken where they were found.
TOLERANCES = {"stiff": 1e-11}


@pytest.fixture(scope="module")
def sequential():
    """Answers of stock Diffrax, worked out once for the doors of one situation."""
    known = {}

    def get(name):
        if name not in known:
            known.clear()
            known[name] = SITUATIONS[name](None)
        return known[name]

    return get


#: Newton's method takes longer to compile than the default: in the ordinary run it
#: solves these situations, and the default the others.
BY_NEWTON = ("neural ODE", "neural CDE by its control")
#: What others of these stand for.
RARE = (
    "latent ODE", "neural CDE as an ODE", "neural CDE by its control", "stiff",
    "planet", "Stratonovich ensemble", "two levels", "fit of oscillators",
    "Ito ensemble", "forcing",
)  # fmt: skip


def situation_rows():
    rows = []
    for row in one_door_each(SITUATIONS):
        values, marks = getattr(row, "values", row), getattr(row, "marks", ())
        name, is_slow = values[0], bool(marks) or values[0] in RARE
        for what, method in (("auto", Auto()), ("newton", None)):
            is_other = (what == "newton") != (name in BY_NEWTON)
            marks = pytest.mark.slow if is_slow or is_other else ()
            rows.append(
                pytest.param(*values, method, marks=marks, id="-".join((*values, what)))
            )
    return rows


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.parametrize("name, door, method", situation_rows())
def test_situation(name, door, method, sequential, monkeypatch):
    monkeypatch.setattr(Chosen, "method", method)
    tol = TOLERANCES.get(name, rounding())
    assert_close(SITUATIONS[name](door), sequential(name), tol, what=name)


def steady_states(door, tol, **kwargs):
    """Three relaxations, each of which ends when it has come to rest."""
    event = diffrax.Event(diffrax.steady_state_event(tol, tol, optx.rms_norm))
    term = diffrax.ODETerm(lambda t, y, args: args - y - 0.5 * jnp.tanh(y[::-1]))

    def rest(args):
        sol = solve(
            door, term, diffrax.Heun(), (21.0, 30), jnp.array([3.0, -1.0]), args,
            event=event, **kwargs,
        )  # fmt: skip
        return jnp.sum(sol.ys[-1] * jnp.array([1.0, 2.0])), sol

    def mean(args):
        values, sols = jax.vmap(rest)(args)
        return jnp.mean(values), (sols.ys[:, -1], sols.ts[:, -1])

    args = jnp.array([[0.5, 1.0], [2.0, -3.0], [3.0, -1.5]])
    fn = jax.jit(jax.value_and_grad(mean, has_aux=True))
    (_, (ys, ts)), grads = fn(args)
    assert np.all(np.asarray(ts) < 21.0) and np.unique(np.asarray(ts)).size > 1
    return ys, ts, grads


@pytest.mark.parametrize("door", slow(("a", "b"), lambda door: door == "a"))
@pytest.mark.slow(covered_by="test_doors.py::test_steady_state_without_an_end")
def test_steady_states(door):
    assert_close(steady_states(door, 1e-5), steady_states(None, 1e-5), rounding())


@pytest.mark.slow(covered_by="test_doors.py::test_steady_state_without_an_end")
def test_steady_states_in_windows():
    """Looked for at the ends of windows, so at rest a little longer than stock."""
    tol = 1e-5
    kwargs = {"adjoint": diffrax.ImplicitAdjoint()}
    # Diffrax has this adjoint multiply times by integers.
    with jax.numpy_dtype_promotion("standard"):
        ys, ts, grads = steady_states("c", tol, **kwargs)
        expected_ys, expected_ts, expected_grads = steady_states(None, tol, **kwargs)
    step, window = 21.0 / 30, 21.0 / 10
    late = np.asarray(ts - expected_ts)
    assert np.all(late > -step / 2) and np.all(late < window - step / 2)
    np.testing.assert_allclose(ts / window, np.round(ts / window), rtol=rounding())
    # At rest the field is below `tol (1 + |y|)`, and its inverse is at most two.
    assert_close(ys, expected_ys, 10 * tol)
    assert_close(grads, expected_grads, 10 * tol)
