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
        jax.random.key(options.seed),
        options.steps,
    )
    num_weights = task.first.size - len(system.PARAMETERS)
    print(
        f"Two bodies, {options.points:,} observations, "
        f"{problem.grid.shape[0] - 1:,} time steps of "
        f"{type(task.solver).__name__}; {len(system.PARAMETERS)} physical parameters "
        f"and {num_weights} weights to fit."
    )
    return task


def _draw(path: str, task, training) -> None:
    import jax.numpy as jnp

    from . import _fit as fit, _plot as picture

    model = task.model(training.parameters)
    guesses = {
        "the initial state everywhere": jnp.broadcast_to(
            model.start, training.states.shape
        ),
        "the orbit before the fit": training.first_states,
        "an adaptive solve (default)": None,
    }
    histories = fit.residual_history(task, model, guesses)
    picture.plot(path, task, training, histories)


def speed(ratio: float) -> str:
    """In words, so that a ratio below one is not called faster."""
    if ratio < 1:
        return f"{ratio:.1f} times the speed of stock Diffrax"
    return f"{ratio:.1f} times as fast as stock Diffrax"


def _report(task, training, comparison) -> None:
    _print_parameters(task, training)
    print(
        "\n`std. err.`: left by the noise, friction unknown; linearised at the fit.\n"
    )
    for name, value in _summary(task, training, comparison).items():
        print(f"{name:44}{value}")


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
    import jax

    from . import _system as system

    friction = system.friction_error(task.problem, task.model(training.parameters))
    steps = training.newton_steps
    parallel, stock = training.seconds, comparison.seconds_stock
    return {
        "loss (mean square, in units of the noise)": (
            f"{training.losses[0]:.4g} first, {training.losses[-1]:.5f} last, "
            f"{system.loss_of_truth(task.problem):.5f} for the truth"
        ),
        "learned friction along the true orbit": f"{friction:.1%} off (rms)",
        "Newton steps per solve": (
            f"{steps[0]} first, {max(steps)} most, {steps[-1]} last"
        ),
        "steps finished sequentially, in all solves": training.num_fallback_steps,
        "time per gradient step": (
            f"{1e3 * parallel:.1f} ms DEER, {1e3 * stock:.1f} ms stock Diffrax: "
            f"{speed(stock / parallel)} (JAX {jax.__version__}, "
            f"{jax.devices()[0].device_kind})"
        ),
        "difference from stock, loss": f"{comparison.loss_difference:.1e}",
        "difference from stock, gradient": (
            f"{comparison.gradient_difference:.1e} (rounding allows "
            f"{comparison.tolerance:.1e})"
        ),
    }
