"""Hard dynamics: what each remedy does for them, beside one step after the other.

`python -m benchmarks._hard` prints a Markdown table and writes what it shows as JSON.
"""

import argparse
import dataclasses
import functools as ft
import math
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import optimistix as optx
from jaxtyping import Array

import deer_ode
from deer_ode import DEER, Newton, Obreshkov, RadauIIA
from deer_ode._discretisation import Grid, discretise

from ._process import environment, write
from ._timing import time_alternating


#: The largest Lyapunov exponent of Lorenz' system, per unit of time.
LORENZ_EXPONENT = 0.906

#: What is compared, by what it is called.
METHODS = {
    "plain": Newton(window=None),
    "constant guess": Newton(window=None, guess=deer_ode.Constant()),
    "damped": Newton(window=None, damping=deer_ode.LevenbergMarquardt()),
    "scaled": Newton(window=None, damping=deer_ode.Scaled(0.9)),
    "windows": Newton(),
    "default": deer_ode.Auto(),
    "sequential": deer_ode.Sequential(),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A recurrence or a differential equation, from a start that can be changed.

    `solve(start, method)` gives all states and the statistics; `twin(start)` the states
    that `jax.lax.scan` or stock Diffrax finds; `noisy(start, key)`
    what they are with other errors of rounding in every step.
    """

    name: str
    start: Any
    solve: Callable[[Any, deer_ode.AbstractMethod], tuple[Any, dict]]
    twin: Callable[[Any], Any]
    noisy: Callable[[Any, Array], Any]
    again: Callable[[Any, Any], Any]
    """`(start, states)` to where a step from each of the states leads."""
    has_equations: bool = False
    """Whether its steps are equations."""


def rounded_otherwise(y, key):
    change = 4 * jnp.finfo(y.dtype).eps
    return y * (1 + change * jr.uniform(key, y.shape, y.dtype, minval=-1.0))


# --- differential equations ---------------------------------------------------------


def lorenz(t, y, args):
    del t, args
    x, v, z = y
    return jnp.stack([10 * (v - x), x * (28 - z) - v, x * v - 8 * z / 3])


def van_der_pol(t, y, mu):
    del t
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def fitzhugh_nagumo(t, y, args):
    del t, args
    v, w = y
    return jnp.stack([v - v**3 / 3 - w + 0.5, 0.08 * (v + 0.7 - 0.8 * w)])


def henon_heiles(t, y, args):
    del t, args
    x, z, p, q = y
    return jnp.stack([p, q, -x - 2 * x * z, -z - x**2 + z**2])


def kepler(t, y, args):
    del t, args
    x, z, p, q = y
    cubed = (x**2 + z**2) ** 1.5
    return jnp.stack([p, q, -x / cubed, -z / cubed])


def pendulum(t, y, args):
    del t, args
    angle, speed = y
    return jnp.stack([speed, -jnp.sin(angle)])


def robertson(t, y, args):
    del t, args
    a, b, c = y
    slow, fast, back = 0.04 * a, 3e7 * b**2, 1e4 * b * c
    return jnp.stack([back - slow, slow - back - fast, fast])


def infinite_once(t, y, args):
    """A field that is infinite at one time, where a step begins."""
    del args
    return -y + jnp.where(t == 0.5, jnp.inf, 0.0)


def nothing(t, y, args):
    del t, args
    return jnp.zeros_like(y)


def equation(name, field, y0, ts, solver, args=None) -> Problem:
    term = diffrax.ODETerm(field)
    ts = jnp.asarray(ts, jnp.float64)
    args = None if args is None else jnp.asarray(args, jnp.float64)
    where = (term, ts[0], ts[-1], None)
    kwargs: dict[str, Any] = dict(
        saveat=diffrax.SaveAt(steps=True),
        stepsize_controller=diffrax.StepTo(ts),
        # What is not finite is compared as well.
        throw=False,
    )

    def solve(start, method):
        term, t0, t1, dt0 = where
        sol = deer_ode.diffeqsolve(
            term, DEER(solver, method), t0, t1, dt0, start, args, **kwargs
        )
        return sol.ys, sol.stats

    def twin(start):
        term, t0, t1, dt0 = where
        sol = diffrax.diffeqsolve(
            term, solver, t0, t1, dt0, start, args, max_steps=ts.shape[0] - 1,
            **kwargs,
        )  # fmt: skip
        return sol.ys

    def noisy(start, key):
        grid = Grid.from_points(ts)
        recurrence = discretise(solver, term, grid, start, args).recurrence

        def step(y, inputs):
            index, key = inputs
            y = rounded_otherwise(recurrence.step(index, y), key)
            return y, y

        count = grid.num_steps
        indices = jnp.arange(count, dtype=jnp.int32)
        ys = lax.scan(step, recurrence.y0, (indices, jr.split(key, count)))[1]
        return recurrence.states(ys)

    def again(start, states):
        grid = Grid.from_points(ts)
        recurrence = discretise(solver, term, grid, start, args).recurrence
        before = jnp.concatenate([start[None], states[:-1]])
        # The stages of a step do not pass on to the next.
        before = jnp.tile(before, (1, recurrence.y0.shape[0] // start.shape[0]))
        indices = jnp.arange(grid.num_steps, dtype=jnp.int32)
        return recurrence.states(jax.vmap(recurrence.step)(indices, before))

    has_equations = isinstance(solver, Obreshkov | RadauIIA)
    y0 = jnp.asarray(y0, jnp.float64)
    return Problem(name, y0, solve, twin, noisy, again, has_equations)


def equations(shrink: int = 1) -> list[Problem]:
    """All of them, over a horizon `shrink` times shorter than it is meant to be."""
    tsit5 = diffrax.Tsit5()
    newton = optx.Newton(rtol=1e-10, atol=1e-12)
    kvaerno = diffrax.Kvaerno5(root_finder=newton)
    period = 4 * float(_complete_elliptic(math.sin(1.0)))  # from rest at 2 rad

    def even(t1, dt0):
        t1 = t1 / shrink
        return np.linspace(0, t1, max(2, round(t1 / dt0)) + 1)

    def graded(t1, count):
        count = max(8, count // shrink)
        return np.concatenate([[0.0], np.geomspace(1e-6, t1, count)])

    far = [1 - 0.9, 0.0, 0.0, math.sqrt(1.9 / 0.1)]
    smooth = [
        *(
            (f"Lorenz, {n} Lyapunov times", lorenz, [1.0, 1.0, 1.0],
             n / LORENZ_EXPONENT, 0.005, None)
            for n in (2, 10, 50)
        ),
        ("Van der Pol, mu = 1", van_der_pol, [2.0, 0.0], 40.0, 0.01, 1.0),
        ("Van der Pol, mu = 5", van_der_pol, [2.0, 0.0], 40.0, 0.005, 5.0),
        ("Van der Pol, mu = 100", van_der_pol, [2.0, 0.0], 200.0, 0.005, 100.0),
        ("FitzHugh-Nagumo", fitzhugh_nagumo, [-1.0, 1.0], 200.0, 0.05, None),
        ("Henon-Heiles", henon_heiles, [0.0, 0.1, 0.49, 0.1], 200.0, 0.02, None),
        ("Kepler, e = 0.9", kepler, far, 8 * math.pi, 6e-4, None),
        ("pendulum, 1,000 periods", pendulum, [2.0, 0.0], 1000 * period, 0.1, None),
    ]  # fmt: skip
    problems = []
    for name, field, y0, t1, dt0, args in smooth:
        problems.append(
            equation(f"{name}, Tsit5", field, y0, even(t1, dt0), tsit5, args)
        )
        ts = even(t1, 4 * dt0)
        problems.append(
            equation(f"{name}, Obreshkov", field, y0, ts, Obreshkov(), args)
        )
    stiff = [
        ("Robertson", robertson, [1.0, 0.0, 0.0], graded(1e6, 400), None),
        # Up to its first jump, within which equal steps have several solutions.
        ("Van der Pol, mu = 1000", van_der_pol, [2.0, 0.0], even(800.0, 0.4), 1000.0),
    ]
    for name, field, y0, ts, args in stiff:
        for solver in (RadauIIA(3), kvaerno):
            label = f"{name}, {type(solver).__name__}"
            problems.append(equation(label, field, y0, ts, solver, args))
    grid = np.linspace(0, 1, 65)
    problems += [
        equation("infinite field", infinite_once, [1.0, 2.0], grid, tsit5),
        equation("zero field", nothing, [1.0, 2.0], grid, tsit5),
        equation("zero field, Obreshkov", nothing, [1.0, 2.0], grid, Obreshkov()),
        equation("one step", lorenz, [1.0, 1.0, 1.0], [0.0, 0.01], tsit5),
    ]
    return problems


def _complete_elliptic(k: float) -> float:
    """$K(k)$ by the arithmetic-geometric mean."""
    a, b = 1.0, math.sqrt(1 - k**2)
    while abs(a - b) > 1e-15:
        a, b = (a + b) / 2, math.sqrt(a * b)
    return math.pi / (2 * a)


# --- recurrences --------------------------------------------------------------------


def recurrence(name, step, start, xs) -> Problem:
    """`step` is `(state, x) -> state`."""
    twice = lambda y, x: (step(y, x),) * 2

    def solve(start, method):
        sol = deer_ode.solve_recurrence(twice, start, xs, method=method)
        return sol.ys, sol.stats

    def noisy(start, key):
        def noisy_step(y, inputs):
            x, key = inputs
            y = rounded_otherwise(step(y, x), key)
            return y, y

        return lax.scan(noisy_step, start, (xs, jr.split(key, xs.shape[0])))[1]

    twin = lambda start: lax.scan(twice, start, xs)[1]
    again = lambda start, states: jax.vmap(step)(
        jnp.concatenate([start[None], states[:-1]]), xs
    )
    return Problem(name, start, solve, twin, noisy, again)


def _gru(key, inputs: int, size: int, scale: float = 1.0):
    cell = eqx.nn.GRUCell(inputs, size, key=key)
    return jtu.tree_map(
        lambda x: scale * x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, cell
    )


def signals(key, count: int, length: int):
    """Noisy oscillations of two frequencies, and which of them each is."""
    keys = jr.split(key, 3)
    labels = jr.bernoulli(keys[0], 0.5, (count,)).astype(jnp.int32)
    phases = 2 * jnp.pi * jr.uniform(keys[1], (count, 1), jnp.float64)
    times = jnp.arange(length, dtype=jnp.float64)[None]
    rates = jnp.where(labels == 1, 0.8, 0.2)[:, None]
    noise = 0.3 * jr.normal(keys[2], (count, length), jnp.float64)
    return (jnp.sin(rates * times + phases) + noise)[..., None], labels


def layers(cells, xs, method):
    """The states of the last layer, and the largest statistics of all layers."""
    stats = []
    for cell in cells:
        init = jnp.zeros(cell.hidden_size, xs.dtype)
        step = lambda y, x, cell=cell: (cell(x, y),) * 2
        sol = deer_ode.solve_recurrence(step, init, xs, method=method)
        xs = sol.ys
        stats.append(sol.stats)
    return xs, jtu.tree_map(lambda *x: jnp.max(jnp.stack(x)), *stats)


def train_classifier(num_updates: int, length: int, size: int = 8):
    """Five GRU layers that tell two frequencies apart, and how often they are right."""
    keys = jr.split(jr.key(0), 7)
    cells = [_gru(key, 1 if i == 0 else size, size) for i, key in enumerate(keys[:5])]
    head = jr.normal(keys[5], (2, size), jnp.float64) / size**0.5

    def logits(model, xs):
        cells, head = model
        return head @ jnp.mean(layers(cells, xs, deer_ode.Auto())[0], axis=0)

    def loss(model, xs, labels):
        predictions = jax.nn.log_softmax(jax.vmap(ft.partial(logits, model))(xs))
        return -jnp.mean(jnp.where(labels == 1, predictions[:, 1], predictions[:, 0]))

    optimiser = optax.adam(2e-2)

    @eqx.filter_jit
    def update(model, state, key):
        gradient = eqx.filter_grad(loss)(model, *signals(key, 32, length))
        changes, state = optimiser.update(gradient, state)
        return eqx.apply_updates(model, changes), state

    model = (cells, head)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    # Optax counts in integers.
    with jax.numpy_dtype_promotion("standard"):
        for key in jr.split(keys[6], num_updates):
            model, state = update(model, state, key)
    xs, labels = signals(jr.key(1), 128, length)
    guessed = jnp.argmax(jax.vmap(ft.partial(logits, model))(xs), axis=1)
    return model[0], float(np.mean(np.asarray(guessed) == np.asarray(labels)))


def classifier(num_updates: int, length: int) -> Problem:
    cells, accuracy = train_classifier(num_updates, length)
    xs = signals(jr.key(2), 1, length)[0][0]

    def twin(xs, key=None):
        for cell in cells:
            init = jnp.zeros(cell.hidden_size, xs.dtype)
            step = lambda y, x, cell=cell: (cell(x, y),) * 2
            xs = lax.scan(step, init, xs)[1]
            xs = xs if key is None else rounded_otherwise(xs, key)
        return xs

    # Of many layers only the first could be taken again: all of them are.
    again = lambda xs, states: twin(xs)
    name = f"five GRU layers trained to {accuracy:.0%}"
    return Problem(name, xs, ft.partial(layers, cells), twin, twin, again)


def root(y, x):
    return jnp.sqrt(y - 10) + x


def recurrences(length: int = 2000) -> list[Problem]:
    xs = jr.normal(jr.key(1), (length, 2), jnp.float64)
    problems = []
    for scale in (1, 3, 10, 100):
        cell = _gru(jr.key(0), 2, 4, scale)
        step = lambda y, x, cell=cell: cell(x, y)
        problems.append(
            recurrence(f"GRU, weights x {scale}", step, jnp.zeros(4, jnp.float64), xs)
        )
    start = jnp.zeros(2, jnp.float64)
    problems.append(recurrence("square root of y - 10", root, start, xs))
    return problems


# --- what comes of it ---------------------------------------------------------------


def difference(actual, expected) -> float:
    """Largest, relative to the largest; infinite where one is no number alone."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(np.abs(expected[finite]).max(), 1e-300)
    return float(np.abs(actual[finite] - expected[finite]).max() / scale)


def conditioning(problem: Problem, expected) -> float:
    """How far off the states are that other errors of rounding lead to."""
    noisy = eqx.filter_jit(problem.noisy)
    return max(
        difference(noisy(problem.start, key), expected)
        for key in jr.split(jr.key(3), 4)
    )


# Damping takes minutes where there are more steps.
_MOST_DAMPED = 5_000


# There the default is windows, and compiling takes half a minute.
_FOR_EQUATIONS = ("plain", "damped", "default", "sequential")


def measure(problem: Problem, repeats: int, methods=METHODS) -> list[dict]:
    expected = eqx.filter_jit(problem.twin)(problem.start)
    lost = conditioning(problem, expected)
    programs = {"twin": ft.partial(eqx.filter_jit(problem.twin), problem.start)}
    found = {}
    for name, method in methods.items():
        if name == "damped" and expected.shape[0] > _MOST_DAMPED:
            continue
        if name not in _FOR_EQUATIONS and problem.has_equations:
            continue
        run = ft.partial(eqx.filter_jit(problem.solve), problem.start, method)
        found[name] = run()
        programs[name] = run
    times = time_alternating(programs, repeats)
    rows = []
    for name, (states, stats) in found.items():
        rows.append(
            {
                "problem": problem.name,
                "method": name,
                "steps": int(jtu.tree_leaves(states)[0].shape[0]),
                "num_newton_steps": int(stats["num_newton_steps"]),
                "num_windows": int(stats["num_windows"]),
                "num_fallback_steps": int(stats["num_fallback_steps"]),
                "first_nonfinite_step": int(stats["first_nonfinite_step"]),
                "damping": float(stats["newton_damping"]),
                "seconds": times[name]["median"],
                "seconds_in_turn": times["sequential"]["median"],
                "seconds_twin": times["twin"]["median"],
                "difference": difference(states, expected),
                "conditioning": lost,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """A line a problem: iterations, milliseconds and the ratio to one step after the
    other, for each method.
    """
    names = [name for name in METHODS if any(r["method"] == name for r in rows)]
    lines = [
        "| problem | steps | stock | sequential | "
        + " | ".join(n for n in names if n != "sequential")
        + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = {row["method"]: row for row in rows if row["problem"] == problem}
        first = next(iter(own.values()))
        cells = [
            problem,
            f"{first['steps']:,}",
            f"{1e3 * first['seconds_twin']:.3g} ms",
            f"{1e3 * first['seconds_in_turn']:.3g} ms",
        ]
        for name in names:
            if name == "sequential":
                continue
            if name not in own:
                cells.append("-")
                continue
            row = own[name]
            in_turn = row["num_fallback_steps"]
            share = f" ({in_turn / row['steps']:.0%} sequential)" if in_turn else ""
            ratio = row["seconds"] / row["seconds_in_turn"]
            cells.append(
                f"{row['num_newton_steps']}{share}; {1e3 * row['seconds']:.3g} ms; "
                f"{ratio:.2g}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks._hard", description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="short horizons")
    parser.add_argument("--repeats", type=int, help="timed runs of each (3)")
    parser.add_argument("--only", help="problems whose names contain this")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    options = parser.parse_args(argv)
    repeats = options.repeats or (1 if options.quick else 3)
    jax.config.update("jax_enable_x64", True)
    if options.quick:
        problems = equations(50) + recurrences(100) + [classifier(2, 50)]
    else:
        problems = equations() + recurrences() + [classifier(150, 1000)]
    if options.only:
        problems = [p for p in problems if options.only in p.name]
    results = {"environment": environment(), "hard": []}
    for problem in problems:
        rows = measure(problem, repeats)
        results["hard"] += rows
        # As it goes, for it takes half an hour.
        write(results, options.out)
        print(table(rows).splitlines()[-1], flush=True)
        jax.clear_caches()
    print()
    print(table(results["hard"]))
    return results


if __name__ == "__main__":
    main()
