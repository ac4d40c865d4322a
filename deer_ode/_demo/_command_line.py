"""The command line: options, their errors, and the table that is printed."""

import argparse
import os
import sys
import time
from typing import NoReturn


_DESCRIPTION = """\
Fits masses, initial state and an unknown law of friction (a neural network) to a long,
noisy and irregularly sampled time series of two bodies, with all time steps of every
solve taken in parallel; checks loss and gradient against stock Diffrax; prints a table
and draws a picture.
"""


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"deer_ode: error: {message}", file=sys.stderr)
    sys.exit(code)


def _integer(at_least: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < at_least:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {at_least}; got {text!r}"
            )
        return value

    return parse


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-12 <= value <= 1e-4:
        raise argparse.ArgumentTypeError(
            f"must be a number from 1e-12 to 1e-4; got {text!r}"
        )
    return value


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deer_ode", description=_DESCRIPTION
    )
    # One line, where the default adds the usage.
    parser.error = _fail
    parser.add_argument(
        "--steps", type=_integer(2), default=300, help="gradient steps [%(default)s]"
    )
    parser.add_argument(
        "--points", type=_integer(2), default=10_000, help="observations [%(default)s]"
    )
    parser.add_argument(
        "--solver",
        default="tsit5",
        help="explicit Runge-Kutta solver of Diffrax: heun, dopri5, ... [%(default)s]",
    )
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-8,
        help="of every time step, relative and absolute [%(default)s]",
    )
    parser.add_argument(
        "--out", default="two_body.png", help="the picture to write [%(default)s]"
    )
    parser.add_argument(
        "--seed", type=_integer(0), default=0, help="of the noise [%(default)s]"
    )
    return parser.parse_args(argv)


def _check_writable(path: str) -> None:
    if not path.lower().endswith(".png"):
        _fail(f"argument --out: must end in .png; got {path!r}")
    is_new = not os.path.exists(path)
    try:
        # Appending changes nothing in a picture that is there already.
        with open(path, "ab"):
            pass
    except OSError as error:
        _fail(f"argument --out: cannot write {path!r}: {error.strerror}")
    if is_new:
        os.remove(path)


def _check_extras() -> None:
    try:
        import matplotlib  # noqa: F401
        import optax  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is missing: pip install "deer_ode[demo]"')


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; returns the exit code."""
    options = _parse(argv)
    _check_writable(options.out)
    _check_extras()
    import jax

    # Ten thousand steps of an orbit leave too little of single precision.
    jax.config.update("jax_enable_x64", True)

    from . import _fit as fit

    if options.solver.lower() not in fit.SOLVERS:
        _fail(
            f"argument --solver: must be one of {', '.join(fit.SOLVERS)}; got "
            f"{options.solver!r}"
        )
    start = time.perf_counter()
    task = _make_task(options)
    try:
        training = fit.train(task, options.steps)
    except FloatingPointError as error:
        _fail(f"training failed: {error}", code=1)
    comparison = fit.compare(task, training)
    _draw(options.out, task, training)
    _report(task, training, comparison)
    print(f"\nPicture: {options.out}. Total time: {time.perf_counter() - start:.0f} s.")
    if not comparison.agrees:
        _fail("loss and gradient differ from stock Diffrax's by more than rounding", 1)
    return 0


def _make_task(options: argparse.Namespace):
    """The data and all that is compiled; prints how large the problem is."""
    import jax
    import numpy as np

    from . import _fit as fit, _system as system

    problem = system.simulate(options.points, np.random.default_rng(options.seed))
    task = fit.Task(
        problem,
        fit.SOLVERS[options.solver.lower()](),
        options.tolerance,
        jax.random.key(options.seed),
        options.steps,
    )
    num_weights = task.first.size - len(system.PARAMETERS)
    print(
        f"Two bodies, {options.points:,} observations; "
        f"{type(task.solver).__name__} to {options.tolerance:g}; "
        f"{len(system.PARAMETERS)} physical parameters and {num_weights} weights to "
        "fit."
    )
    return task


def _draw(path: str, task, training) -> None:
    import jax.numpy as jnp

    from . import _fit as fit, _plot as picture

    model = task.model(training.parameters)
    mesh = jnp.asarray(training.mesh)
    before = task.integrate_stock(task.model(task.first), mesh[1:]).ys
    guesses = {
        "the initial state everywhere": jnp.broadcast_to(model.start, before.shape),
        "the orbit before the fit": before,
        "an adaptive solve (default)": None,
    }
    histories = fit.residual_history(task, model, mesh, guesses)
    picture.plot(path, task, training, histories)


def speed(ratio: float) -> str:
    """In words, so that a ratio below one is not called faster."""
    if ratio < 1:
        return f"{ratio:.1f} times the speed of stock Diffrax"
    return f"{ratio:.1f} times as fast as stock Diffrax"


def _print_times(comparison) -> None:
    """Of a gradient step three ways."""
    import jax

    ours, same, adaptive = comparison.seconds
    num_steps, num_adaptive_steps = comparison.num_steps, comparison.num_adaptive_steps
    rows = {
        "": ("DEER", "Diffrax, same steps", "Diffrax, adaptive"),
        "time steps": (num_steps, num_steps, num_adaptive_steps),
        "gradient step, ms": tuple(f"{1e3 * t:.1f}" for t in comparison.seconds),
    }
    print()
    for name, (first, second, third) in rows.items():
        print(f"{name:24}{first:>12}{second:>22}{third:>20}")
    print(
        f"\nDEER: {speed(same / ours)} on the same steps, "
        f"{speed(adaptive / ours)} on its own "
        f"(JAX {jax.__version__}, {jax.devices()[0].device_kind})"
    )


def _report(task, training, comparison) -> None:
    _print_parameters(task, training)
    print(
        "\n`std. err.`: left by the noise, friction unknown; linearised at the fit.\n"
    )
    for name, value in _summary(task, training, comparison).items():
        print(f"{name:44}{value}")
    _print_times(comparison)


def _print_parameters(task, training) -> None:
    from . import _system as system

    true = system.true_parameters()
    # A component is compared with the length of its vector.
    sizes = [true[0], true[1], *2 * [abs(true[2])], *2 * [abs(true[5])]]
    print(
        f"\n{'':6}{'true':>10}{'before':>10}{'fitted':>10}{'error':>10}"
        f"{'std. err.':>10}{'relative':>10}"
    )
    for i, name in enumerate(system.PARAMETERS):
        error = abs(float(training.parameters[i] - true[i]))
        print(
            f"{name:6}{float(true[i]):10.5f}{float(task.first[i]):10.5f}"
            f"{float(training.parameters[i]):10.5f}{error:10.1e}"
            f"{training.standard_errors[i]:10.1e}{error / float(sizes[i]):10.1e}"
        )


def _summary(task, training, comparison) -> dict[str, object]:
    """What is said of the fit beside its parameters, by name."""
    from . import _system as system

    friction = system.friction_error(task.problem, task.model(training.parameters))
    steps, meshes = training.newton_steps, training.num_mesh_steps
    return {
        "loss (mean square, in units of the noise)": (
            f"{training.losses[0]:.4g} first, {training.losses[-1]:.5f} last, "
            f"{system.loss_of_truth(task.problem):.5f} for the truth"
        ),
        "learned friction along the true orbit": f"{friction:.1%} off (rms)",
        "time steps per solve": f"{meshes[0]} first, {meshes[-1]} last",
        "Newton steps per solve": (
            f"{steps[0]} first, {max(steps)} most, {steps[-1]} last"
        ),
        "steps finished sequentially, in all solves": training.num_fallback_steps,
        "difference from stock, loss": f"{comparison.loss_difference:.1e}",
        "difference from stock, gradient": (
            f"{comparison.gradient_difference:.1e} (rounding allows "
            f"{comparison.tolerance:.1e})"
        ),
    }
