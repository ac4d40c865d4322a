"""The few ratios that README and docs state: `python -m benchmarks._first_contact`.

The default beside stock Diffrax on the same grid (`jax.lax.scan` for recurrences),
forward and gradient, and a pendulum with many samples beside an adaptive solve. All
ways of one problem take turns within one process; figures are the least of several
runs, and the ratios are what to read. A few minutes.
"""

import sys
import time

import jax


jax.config.update("jax_enable_x64", True)

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

import deer_ode
from deer_ode import DEER, Newton, Obreshkov


NUM_STEPS = 10_000
REPEATS = 9


def lotka_volterra(t, y, a):
    del t
    return jnp.stack(
        [a[0] * y[0] - a[1] * y[0] * y[1], -a[2] * y[1] + a[3] * y[0] * y[1]]
    )


def network(t, y, weights):
    del t
    first, second, third = weights
    return third @ jnp.tanh(second @ jnp.tanh(first @ y))


def weights_of(size, width):
    keys = jr.split(jr.key(0), 3)
    shapes = ((width, size), (width, width), (size, width))
    scales = (size**-0.5, width**-0.5, 0.1 * width**-0.5)
    return [
        scale * jr.normal(key, shape)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ]


def hodgkin_huxley(t, y, a):
    V, m, h, n = y
    current = jnp.where((t > 5) & (t < 30), 10.0, 0.0)
    rates = (
        0.1 * (V + 40) / (1 - jnp.exp(-(V + 40) / 10)),
        4 * jnp.exp(-(V + 65) / 18),
        0.07 * jnp.exp(-(V + 65) / 20),
        1 / (1 + jnp.exp(-(V + 35) / 10)),
        0.01 * (V + 55) / (1 - jnp.exp(-(V + 55) / 10)),
        0.125 * jnp.exp(-(V + 65) / 80),
    )
    am, bm, ah, bh, an, bn = rates
    sodium, potassium, leak = a
    ions = (
        sodium * m**3 * h * (V - 50) + potassium * n**4 * (V + 77) + leak * (V + 54.4)
    )
    return (
        current - ions,
        am * (1 - m) - bm * m,
        ah * (1 - h) - bh * h,
        an * (1 - n) - bn * n,
    )


def lorenz_96(t, x, force):
    del t
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + force


def numbers(*values):
    return tuple(jnp.asarray(v) for v in values)


#: Field, state, parameters, length and number of steps.
ODES = {
    "Lotka-Volterra": (
        lotka_volterra,
        jnp.array([10.0, 5.0]),
        numbers(1.1, 0.4, 0.4, 0.1),
        0.01,
        NUM_STEPS,
    ),
    "network 4x32": (network, 0.3 * jnp.ones(4), weights_of(4, 32), 0.01, NUM_STEPS),
    "Hodgkin-Huxley": (
        hodgkin_huxley,
        numbers(-64.97, 0.0529, 0.596, 0.3177),
        numbers(120.0, 36.0, 0.3),
        0.02,
        1000,
    ),
    "Lorenz-96, 256 states": (
        lorenz_96,
        8 + jr.normal(jr.key(0), (256,)),
        jnp.array(8.0),
        0.01,
        100,
    ),
}


def measure(ways, *args):
    """The least time of each way, which take turns, in milliseconds."""
    times = {name: [] for name in ways}
    for run in ways.values():
        jax.block_until_ready(run(*args))
    for _ in range(REPEATS):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(t) for name, t in times.items()}


def report(problem, losses, *args):
    """Times of each loss and its gradient in the first argument."""
    forward = measure({k: eqx.filter_jit(f) for k, f in losses.items()}, *args)
    gradients = {k: eqx.filter_jit(eqx.filter_grad(f)) for k, f in losses.items()}
    gradient = measure(gradients, *args)
    rival = next(iter(losses))
    for name in losses:
        speeds = (t[rival] / t[name] for t in (forward, gradient))
        print(
            f"{problem:24} {name:10} {forward[name]:9.2f} ms {gradient[name]:9.2f} ms  "
            + " ".join(f"{speed:5.2f}" for speed in speeds)
        )


def odes():
    for problem, (field, y0, a, dt, num_steps) in ODES.items():
        term = diffrax.ODETerm(field)

        def loss(solve, solver, a, term=term, y0=y0, dt=dt, num_steps=num_steps):
            sol = solve(
                term, solver, 0.0, dt * num_steps, dt, y0, a, max_steps=num_steps
            )
            return sum(jnp.sum(y**2) for y in jtu.tree_leaves(sol.ys))

        stock = lambda a, loss=loss: loss(diffrax.diffeqsolve, diffrax.Tsit5(), a)
        default = lambda a, loss=loss: loss(deer_ode.diffeqsolve, DEER(), a)
        report(problem, {"stock": stock, "default": default}, a)


def recurrences():
    for size in (4, 16):
        cell = eqx.nn.GRUCell(3, size, key=jr.key(1))
        cell = jtu.tree_map(
            lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, cell
        )
        xs = jr.normal(jr.key(2), (NUM_STEPS, 3))

        def loss(scan, cell, xs, size=size):
            step = lambda h, x: (cell(x, h),) * 2
            return jnp.sum(scan(step, jnp.zeros(size), xs)[1] ** 2)

        ways = {"lax.scan": lax.scan, "default": deer_ode.scan}
        losses = {
            name: lambda cell, xs, scan=scan, loss=loss: loss(scan, cell, xs)
            for name, scan in ways.items()
        }
        report(f"GRU of {size}", losses, cell, xs)


def pendulum():
    """20,000 irregular samples of a driven, damped pendulum: one gradient."""
    num, end = 20_000, 100.0
    inside = np.sort(np.random.default_rng(0).uniform(0, end, num - 1))
    ts = jnp.asarray(np.concatenate([[0.0], inside, [end]]))
    term = diffrax.ODETerm(
        lambda t, y, a: jnp.stack(
            [y[1], -a[0] * jnp.sin(y[0]) - a[1] * y[1] + 0.3 * jnp.cos(0.7 * t)]
        )
    )
    y0, a = jnp.array([1.0, 0.0]), jnp.array([1.0, 0.1])
    saveat = diffrax.SaveAt(ts=ts[1:])
    to_samples = diffrax.StepTo(ts)
    adaptive = lambda tol: diffrax.PIDController(rtol=tol, atol=tol)

    def states(solve, solver, dt0, a, **kwargs):
        return solve(term, solver, 0.0, end, dt0, y0, a, saveat=saveat, **kwargs).ys

    stock, ours = diffrax.diffeqsolve, deer_ode.diffeqsolve
    tsit5 = diffrax.Tsit5()
    ways = {
        "stock, one step to each sample": lambda a: states(
            stock, tsit5, None, a, stepsize_controller=to_samples, max_steps=num
        ),
        "stock, adaptive, rtol 1e-6": lambda a: states(
            stock, tsit5, 0.1, a, stepsize_controller=adaptive(1e-6)
        ),
        "DEER(Tsit5()), adaptive, rtol 1e-6": lambda a: states(
            ours, DEER(tsit5), 0.1, a, stepsize_controller=adaptive(1e-6)
        ),
        "DEER(Tsit5()), one step to each sample": lambda a: states(
            ours, DEER(tsit5), None, a, stepsize_controller=to_samples
        ),
        "DEER(Obreshkov()), 500 steps": lambda a: states(
            ours, DEER(Obreshkov()), end / 500, a
        ),
    }
    exact = states(
        stock,
        diffrax.Dopri8(),
        0.01,
        a,
        stepsize_controller=adaptive(1e-12),
        max_steps=100_000,
    )
    gradients = {
        name: jax.jit(jax.grad(lambda a, run=run: jnp.mean((run(a)[:, 0] - 1) ** 2)))
        for name, run in ways.items()
    }
    times = measure(gradients, a)
    for name, run in ways.items():
        error = float(jnp.max(jnp.abs(jnp.asarray(run(a)) - jnp.asarray(exact))))
        print(f"{name:40} {times[name]:8.1f} ms   error {error:.1e}")


def compilation():
    """Processor time to trace and compile, in seconds, and the ratio to stock's."""
    size = 24

    def chain(t, y, a):
        del t
        return {i: a * (y[(i - 1) % size] - y[i] * (1 + 0.01 * i)) for i in range(size)}

    field, y0, a, _, _ = ODES["Lotka-Volterra"]
    problems = {
        "dict of 24 scalars": (
            chain,
            {i: jnp.array(1.0 + i) for i in range(size)},
            1.0,
        ),
        "Lotka-Volterra": (field, y0, a),
    }
    stock, ours = diffrax.diffeqsolve, deer_ode.diffeqsolve
    ways = {
        "stock": (stock, diffrax.Tsit5()),
        "default": (ours, DEER()),
        "Newton()": (ours, DEER(method=Newton())),
    }
    for problem, (field, y0, a) in problems.items():
        term, base = diffrax.ODETerm(field), []
        for name, (solve, solver) in ways.items():

            def run(a, solve=solve, solver=solver, term=term, y0=y0):
                ys = solve(term, solver, 0.0, 2.0, 0.02, y0, a).ys
                return sum(jnp.sum(y) for y in jtu.tree_leaves(ys))

            taken = []
            for f in (run, jax.grad(run)):
                start = time.process_time()
                jax.jit(f).lower(a).compile()
                taken.append(time.process_time() - start)
            base = base or taken
            ratios = "  ".join(
                f"{t:6.2f} s ({t / b:.2f})" for t, b in zip(taken, base, strict=True)
            )
            print(f"{problem:24} {name:14} {ratios}")


def main() -> None:
    print(f"JAX {jax.__version__}, {jax.default_backend()}, Python {sys.version[:6]}\n")
    print("Forward and gradient; speed over the rival on the same grid.")
    odes()
    recurrences()
    print("\nOne gradient, 20,000 irregular samples of a pendulum.")
    pendulum()
    print("\nTracing and compiling: forward, gradient, and times that of stock.")
    compilation()


if __name__ == "__main__":
    main()
