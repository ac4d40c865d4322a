"""A neural CDE that classifies spoken digits: `DEER` beside stock Diffrax.

`python -m benchmarks._neural_cde` prints Markdown tables; `--out FILE` keeps as JSON
what they show, and the loss curves.
"""

import argparse
import functools as ft
import os
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import deer_ode

from ._process import again_with_cpu_flag, can_use_cpu_flag, environment, write
from ._timing import time_alternating


SAMPLE_RATE = 8000
# Of what a clip is padded or cut to: 6,144 samples, longer than 97% of the clips.
SECONDS = 0.768
# The energies are those of 16 ms, about two periods of a low voice.
WINDOW = 128
BANDS = 3
# A third of the frames is dropped, and a fifth of what is left of each band.
KEPT, MISSING = 2 / 3, 0.2
# In tenths of a second, time moves about as far as the energies do (a few units).
TIME_UNIT = 0.1
LEARNING_RATE = 0.01
PLAIN = deer_ode.Newton(window=None)
SOLVERS = {"deer": deer_ode.DEER(diffrax.Heun(), PLAIN), "diffrax": diffrax.Heun()}


Batch = tuple[diffrax.AbstractPath, jax.Array]


class Series(NamedTuple):
    """Irregular series with missing values, as NaN; arrays of NumPy."""

    ts: np.ndarray
    xs: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray


def data_file() -> pathlib.Path:
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("DEER_ODE_DATA", default))
    return folder / "spoken_digits_8khz.npz"


def _log_energies(clip: np.ndarray, num_frames: int, hop: int) -> np.ndarray:
    """Logarithms of the mean power in a few bands, one row for every `hop` samples."""
    clip = clip.astype(np.float32)
    clip = clip / np.sqrt(np.mean(clip**2))
    needed = num_frames * hop + WINDOW
    clip = np.pad(clip, (WINDOW // 2, max(0, needed - len(clip))))
    frames = np.lib.stride_tricks.sliding_window_view(clip, WINDOW)[::hop][:num_frames]
    frequencies = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    edges = np.geomspace(200, 3600, BANDS + 1)
    # Only those of the transform's rows that are needed, as one product.
    wave = np.exp(-2j * np.pi * np.outer(np.arange(WINDOW), frequencies) / SAMPLE_RATE)
    wave = wave * np.hanning(WINDOW)[:, None]
    powers = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        in_band = wave[:, (low <= frequencies) & (frequencies < high)]
        parts = np.concatenate([in_band.real, in_band.imag], axis=1)
        amplitudes = frames @ parts.astype(np.float32)
        powers.append(np.sum(amplitudes**2, axis=1) / in_band.shape[1])
    # What is added is far below speech, and keeps silence finite.
    return np.log(np.stack(powers, axis=1) + 0.1)


def load(num_steps: int, num_classes: int, seed: int = 0) -> Series:
    """The first `num_classes` digits as series of `num_steps + 1` observations.

    Clips begin at their beginning and are padded with silence, or cut, to `SECONDS`.
    Which frames are dropped and which values are missing is drawn for each series.

    **Raises:**

    - `FileNotFoundError`: where the data are not there, saying where they were sought.
    """
    path = data_file()
    if not path.exists():
        raise FileNotFoundError(
            f"The spoken digits are not at {path}: give the folder that holds "
            f"{path.name} as DEER_ODE_DATA."
        )
    rng = np.random.default_rng(seed)
    num_frames = round(num_steps / KEPT)
    hop = max(1, round(SECONDS * SAMPLE_RATE / num_frames))
    with np.load(path) as data:
        ends = np.cumsum(data["length"])
        picked = np.flatnonzero(data["digit"] < num_classes)
        audio, starts = data["audio"], ends - data["length"]
        is_test = data["index"][picked] < 5
        labels = data["digit"][picked].astype(np.int32)
    clips = (audio[starts[i] : ends[i]] for i in picked)
    xs = np.stack([_log_energies(clip, num_frames, hop) for clip in clips])
    xs = (xs - xs[~is_test].mean((0, 1))) / xs[~is_test].std((0, 1))
    kept = [1 + rng.permutation(num_frames - 1)[:num_steps] for _ in picked]
    kept = np.sort(np.stack(kept))
    kept = np.concatenate([np.zeros_like(kept[:, :1]), kept], axis=1)
    ts = kept * hop / SAMPLE_RATE / TIME_UNIT
    xs = np.take_along_axis(xs, kept[:, :, None], axis=1)
    xs[rng.random(xs.shape) < MISSING] = np.nan
    return Series(ts, xs, labels, is_test)


def make_control(kind: str, ts: jax.Array, xs: jax.Array) -> diffrax.AbstractPath:
    """One series as a path of time and values, interpolated over what is missing."""
    # Not by `replace_nans_at_start`: in Diffrax 0.7.2 cubic coefficients then start
    # from the replacement even where the first value was seen, and a channel that
    # never was stays NaN.
    never = jnp.all(jnp.isnan(xs), axis=0)
    xs = jnp.where(never, jnp.zeros_like(xs), xs)
    xs = xs.at[0].set(jnp.nan_to_num(xs[0]))
    if kind == "rectilinear":
        # Time moves, then the values do, and the steps are merely counted.
        ts, xs = diffrax.rectilinear_interpolation(ts, xs)
        xs = jnp.concatenate([ts[:, None], xs], axis=1)
        return diffrax.LinearInterpolation(jnp.arange(len(ts), dtype=ts.dtype), xs)
    xs = jnp.concatenate([ts[:, None], xs], axis=1)
    if kind == "linear":
        xs = diffrax.linear_interpolation(ts, xs, fill_forward_nans_at_end=True)
        return diffrax.LinearInterpolation(ts, xs)
    if kind == "cubic":
        coeffs = diffrax.backward_hermite_coefficients(
            ts, xs, fill_forward_nans_at_end=True
        )
        return diffrax.CubicInterpolation(ts, coeffs)
    raise ValueError(f"`kind` must be linear, cubic or rectilinear; got {kind!r}.")


class Classifier(eqx.Module):
    r"""$\mathrm{d}y = f(y) \, \mathrm{d}x$ from a start made of $x(t_0)$, read off at
    the end.
    """

    first: eqx.nn.Linear
    field: eqx.nn.MLP
    last: eqx.nn.Linear
    as_ode: bool = eqx.field(static=True)

    def __init__(
        self, channels, hidden, num_classes, *, width=16, as_ode=False, dtype, key
    ):
        first, field, last = jr.split(key, 3)
        self.first = eqx.nn.Linear(channels, hidden, dtype=dtype, key=first)
        self.field = eqx.nn.MLP(
            hidden, hidden * channels, width, depth=1, activation=jnp.tanh,
            final_activation=jnp.tanh, dtype=dtype, key=field,
        )  # fmt: skip
        self.last = eqx.nn.Linear(hidden, num_classes, dtype=dtype, key=last)
        self.as_ode = as_ode

    def __call__(self, control, solver) -> tuple[jax.Array, dict]:
        y0 = self.first(control.evaluate(control.ts[0]))
        term = diffrax.ControlTerm(
            lambda t, y, field: field(y).reshape(y.shape[0], -1), control
        )
        if self.as_ode:
            term = term.to_ode()
        is_deer = isinstance(solver, deer_ode.DEER)
        solve = deer_ode.diffeqsolve if is_deer else diffrax.diffeqsolve
        sol = solve(
            term,
            solver,
            control.ts[0],
            control.ts[-1],
            None,
            y0,
            self.field,
            stepsize_controller=diffrax.StepTo(control.ts),
            max_steps=control.ts.shape[0] - 1,
        )
        assert sol.ys is not None
        return self.last(sol.ys[-1]), sol.stats


def loss(classifier, controls, labels, solver):
    """Mean cross-entropy of a batch, and what was met on the way."""
    logits, stats = jax.vmap(lambda control: classifier(control, solver))(controls)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    guesses = jnp.argmax(logits, axis=-1).astype(labels.dtype)
    found = {"correct": jnp.sum(guesses == labels)}
    for name in ("num_newton_steps", "num_fallback_steps"):
        # The loop of a batch runs until its slowest member has converged.
        found[name] = jnp.max(stats[name]) if name in stats else jnp.asarray(0)
    return jnp.mean(entropy), found


OPTIMISER = optax.adam(LEARNING_RATE)


@eqx.filter_jit
def train_step(classifier, state, controls, labels, solver):
    (value, found), grads = eqx.filter_value_and_grad(loss, has_aux=True)(
        classifier, controls, labels, solver
    )
    updates, state = OPTIMISER.update(grads, state)
    return eqx.apply_updates(classifier, updates), state, value, found


def start(classifier):
    return classifier, OPTIMISER.init(eqx.filter(classifier, eqx.is_array))


def batches(series: Series, controls, batch: int, seed: int = 0) -> Iterator[Batch]:
    """Training batches without end, the same for the same seed."""
    rng = np.random.default_rng(seed)
    train = np.flatnonzero(~series.is_test)
    while True:
        yield take(series, controls, rng.choice(train, batch, replace=False))


def take(series: Series, controls, index) -> Batch:
    labels = jnp.asarray(series.labels[index])
    return jtu.tree_map(lambda x: x[index], controls), labels


def accuracy(classifier, series: Series, controls, solver, batch: int = 20) -> float:
    """Of the held-out clips, the fraction that is classified correctly."""
    evaluate = eqx.filter_jit(loss)
    held_out = np.flatnonzero(series.is_test)
    correct = 0
    for index in np.array_split(held_out, max(1, len(held_out) // batch)):
        _, found = evaluate(classifier, *take(series, controls, index), solver)
        correct += int(found["correct"])
    return correct / len(held_out)


def train(
    classifier, data: Iterator[Batch], num_steps: int
) -> tuple[dict, dict[str, Any]]:
    """Trains once with each solver, alternating, on the same batches.

    Classifiers by solver; and losses, seconds and Newton steps of every step.
    """
    runs: dict[str, Any] = {name: start(classifier) for name in SOLVERS}
    log: dict[str, Any] = {name: {"losses": [], "seconds": []} for name in SOLVERS}
    newton, fallback = [], 0
    for _ in range(num_steps):
        controls, labels = next(data)
        for name, solver in SOLVERS.items():
            before = time.perf_counter()
            classifier, state = runs[name]
            classifier, state, value, found = jax.block_until_ready(
                train_step(classifier, state, controls, labels, solver)
            )
            runs[name] = classifier, state
            log[name]["seconds"].append(time.perf_counter() - before)
            log[name]["losses"].append(float(value))
            if name == "deer":
                newton.append(int(found["num_newton_steps"]))
                fallback += int(found["num_fallback_steps"])
    log["num_newton_steps"], log["num_fallback_steps"] = newton, fallback
    return {name: run[0] for name, run in runs.items()}, log


class Case(NamedTuple):
    """What is varied."""

    steps: int = 1024
    hidden: int = 4
    batch: int = 8
    control: str = "linear"
    as_ode: bool = False
    num_classes: int = 4

    def prepare(self, dtype):
        """The data, their paths (one pytree, with a leading axis), and a classifier."""
        # Twice the observations make nearly twice the steps of a rectilinear path.
        steps = self.steps // 2 if self.control == "rectilinear" else self.steps
        series = load(steps, self.num_classes)
        controls = jax.vmap(ft.partial(make_control, self.control))(
            jnp.asarray(series.ts, dtype), jnp.asarray(series.xs, dtype)
        )
        classifier = Classifier(
            BANDS + 1, self.hidden, self.num_classes, as_ode=self.as_ode, dtype=dtype,
            key=jr.key(0),
        )  # fmt: skip
        return series, controls, classifier


CASES = (
    Case(),
    Case(steps=128),
    Case(steps=2048),
    Case(hidden=8),
    Case(batch=1),
    Case(batch=32),
    Case(control="cubic", as_ode=True),
    Case(control="rectilinear"),
)


def run(case: Case, dtype_name: str, repeats: int, train_steps: int) -> list[dict]:
    """Rows for a forward pass and for a training step of one case.

    Timed where `train_steps` steps have led, since few Newton steps are needed at the
    start of training and more after it.
    """
    series, controls, classifier = case.prepare(jnp.dtype(dtype_name))
    data = batches(series, controls, case.batch)
    trained, log = train(classifier, data, train_steps)
    controls, labels = next(data)
    evaluate = eqx.filter_jit(loss)
    classifier, state = start(trained["deer"])
    works = {
        "forward": lambda s: lambda: evaluate(classifier, controls, labels, s),
        "training step": lambda s: (
            lambda: train_step(classifier, state, controls, labels, s)
        ),
    }
    # The step has been compiled for training already.
    first = {name: log[name]["seconds"][0] for name in SOLVERS}
    curves = [np.array(log[name]["losses"]) for name in SOLVERS]
    difference = np.abs(curves[0] - curves[1]) / curves[1]
    rows = []
    for work, program in works.items():
        times = time_alternating({k: program(s) for k, s in SOLVERS.items()}, repeats)
        found = evaluate(classifier, controls, labels, SOLVERS["deer"])[1]
        if work == "training step":
            times = {k: times[k] | {"first": first[k]} for k in SOLVERS}
        rows.append(
            case._asdict()
            | {
                "dtype": dtype_name,
                "work": work,
                "train_steps": train_steps,
                "num_newton_steps": int(found["num_newton_steps"]),
                "num_fallback_steps": log["num_fallback_steps"],
                "difference_first": float(difference[:1].max()),
                "difference_first_10": float(difference[:10].max()),
                "difference_all": float(difference.max()),
                "times": times,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, times in milliseconds; in brackets the speed of `DEER` over that of
    Diffrax, below one where `DEER` is the slower.
    """
    lines = [
        "| control | dtype | steps | hidden | batch | work | Newton steps | DEER, ms "
        "| Diffrax, ms (speed of DEER over it) | compile, s (DEER / Diffrax) "
        "| losses differ by (10 steps; all) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        deer, stock = row["times"]["deer"], row["times"]["diffrax"]
        ratio = stock["median"] / deer["median"]
        control = row["control"] + (", `to_ode`" if row["as_ode"] else "")
        lines.append(
            f"| {control} | {row['dtype']} | {row['steps']:,} | {row['hidden']} | "
            f"{row['batch']} | {row['work']} | {row['num_newton_steps']} | "
            f"{1e3 * deer['median']:.1f} | {1e3 * stock['median']:.1f} ({ratio:.2g}x) "
            f"| {deer['first']:.1f} / {stock['first']:.1f} | "
            f"{row['difference_first_10']:.0e}; {row['difference_all']:.0e} |"
        )
    return "\n".join(lines)


def run_training(case: Case, num_steps: int) -> dict:
    """A whole training in float32: curves, held-out accuracy, seconds."""
    series, controls, classifier = case.prepare(jnp.float32)
    trained, log = train(classifier, batches(series, controls, case.batch), num_steps)
    # The first step compiles.
    seconds = {name: log[name].pop("seconds")[1:] for name in SOLVERS}
    return (
        case._asdict()
        | log
        | {
            "num_training_clips": int(np.sum(~series.is_test)),
            "num_held_out_clips": int(np.sum(series.is_test)),
            "accuracy": {
                name: accuracy(trained[name], series, controls, solver)
                for name, solver in SOLVERS.items()
            },
            "median_seconds": {k: statistics.median(v) for k, v in seconds.items()},
            "total_seconds": {k: sum(v) for k, v in seconds.items()},
        }
    )


def training_table(trainings: list[dict]) -> str:
    lines = [
        "| digits | steps | hidden | training steps | loss, first and last 50 "
        "| held-out accuracy (DEER / Diffrax) | Newton steps, mean and most "
        "| training, s (DEER / Diffrax) | ratio of medians |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in trainings:
        losses, newton = row["deer"]["losses"], row["num_newton_steps"]
        ends = [statistics.mean(part) for part in (losses[:50], losses[-50:])]
        right, total = row["accuracy"], row["total_seconds"]
        medians = row["median_seconds"]
        lines.append(
            f"| {row['num_classes']} | {row['steps']:,} | {row['hidden']} | "
            f"{len(losses):,} | {ends[0]:.2f}, {ends[1]:.2f} | "
            f"{right['deer']:.1%} / {right['diffrax']:.1%} | "
            f"{statistics.mean(newton):.1f}, {max(newton)} | "
            f"{total['deer']:.0f} / {total['diffrax']:.0f} | "
            f"{medians['diffrax'] / medians['deer']:.2g} |"
        )
    return "\n".join(lines)


def _parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks._neural_cde")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--repeats", type=int, help="timed runs of each (11)")
    parser.add_argument("--train", type=int, help="training steps on four digits (600)")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--one-flag", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats is None:
        options.repeats = 3 if options.quick else 11
    if options.train is None:
        options.train = 20 if options.quick else 600
    if options.repeats < 1 or options.train < 2:
        parser.error("--repeats must be positive, and --train at least 2")
    return options


def main(argv=None) -> dict | None:
    options = _parse(argv)
    if not data_file().exists():
        print(f"Not measured: the spoken digits are not at {data_file()}.")
        return None
    results: dict = {"environment": environment(), "rows": []}
    flags = results["environment"]["xla_flags"] or "default XLA flags"
    print(f"### Neural CDE, {results['environment']['device']}, {flags}\n")
    cases = (Case(steps=64, batch=2),) if options.quick else CASES
    # Single precision as its users have it, without 64-bit times.
    for case in cases:
        train_steps = 4 if options.quick else 100
        results["rows"] += run(case, "float32", options.repeats, train_steps)
    if not options.one_flag:
        # Where one can, ask whether so many steps are needed at all; and ten digits.
        trainings = [(Case(), 1), (Case(steps=128), 1)]
        trainings.append((Case(hidden=8, num_classes=10), 2))
        if options.quick:
            trainings = [(Case(steps=64), 1)]
        results["training"] = [
            run_training(case, times * options.train) for case, times in trainings
        ]
    jax.config.update("jax_enable_x64", True)
    results["rows"] += run(cases[0], "float64", options.repeats, train_steps)
    print(table(results["rows"]), flush=True)
    if not options.one_flag:
        print("\n### Training, float32\n")
        print(training_table(results["training"]), flush=True)
        if can_use_cpu_flag():
            arguments = ["--one-flag", "--repeats", str(options.repeats)]
            arguments += ["--quick"] * options.quick
            results["with_cpu_flag"] = again_with_cpu_flag(
                "benchmarks._neural_cde", arguments
            )
    write(results, options.out)
    return results


if __name__ == "__main__":
    main()
