"""Trains a recurrent classifier of long sequences, solved in parallel over time.

`python -m examples.classify` needs no files: it trains on synthetic waveforms that it
makes itself. `python -m examples.classify digits` trains on spoken digits, read from
the folder that the environment variable DEER_ODE_DATA names. Either writes the losses,
the accuracy, a picture of both and a checkpoint to `--out`. With `--sequential` the
recurrences run step by step.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import tqdm

import deer_ode
from examples import datasets
from examples.models import apply, make_model


Rng = np.random.Generator
Method = deer_ode.Newton | deer_ode.Sequential


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, and what to do with it."""

    load: Callable[[argparse.Namespace], datasets.Sequences]
    augment: Callable[[np.ndarray, Rng], np.ndarray]
    # Sequences are padded to the shortest of these that holds the whole batch, so that
    # few programs are compiled. `None`: to that of the longest.
    padded_steps: tuple[int, ...] | None
    defaults: dict[str, Any]


def augment_clip(xs: np.ndarray, rng: Rng) -> np.ndarray:
    """A clip as it might as well have been spoken: a little faster or slower, a little
    longer or shorter, through another microphone, in noise. Frames to frames.
    """
    frame, clip = xs.shape[1], xs.reshape(-1)
    speed = rng.uniform(0.9, 1.1)
    places = np.arange(int(len(clip) / speed)) * speed
    clip = np.interp(places, np.arange(len(clip)), clip)
    margin = len(clip) // 20
    start, end = rng.integers(0, frame + margin), rng.integers(0, margin + 1)
    clip = clip[start : len(clip) - end]
    taps = np.concatenate([[1], rng.normal(size=3) * [0.3, 0.3, 0.15]])
    clip = np.convolve(clip, taps)[: len(clip)]
    clip = clip / np.sqrt(np.mean(clip**2) + 1e-12)
    clip = clip * np.exp(0.3 * rng.normal()) * rng.choice([-1, 1])
    clip = clip + 0.1 * rng.uniform() ** 2 * rng.normal(size=len(clip))
    clip = np.pad(clip, (0, -len(clip) % frame)).astype(np.float32)
    return clip.reshape(-1, frame)


def crop_vibration(xs: np.ndarray, rng: Rng) -> np.ndarray:
    """Some 2,048 samples of a vibration, a little faster or slower, louder or softer
    in each channel, either way up, in noise.
    """
    speed, num_steps = rng.uniform(0.95, 1.05), min(2048, int(len(xs) / 1.06))
    start = rng.integers(0, len(xs) - int(num_steps * speed) - 1)
    places = start + speed * np.arange(num_steps)
    channels = [np.interp(places, np.arange(len(xs)), x) for x in xs.T]
    crop = np.stack(channels, axis=1) * np.exp(0.2 * rng.normal(size=xs.shape[1]))
    crop = crop * rng.choice([-1, 1])
    crop = crop + 0.1 * rng.uniform() * rng.normal(size=crop.shape)
    return crop.astype(np.float32)


def leave(xs: np.ndarray, rng: Rng) -> np.ndarray:
    del rng
    return xs


def _standardised(data: datasets.Sequences) -> datasets.Sequences:
    """Each channel of each window by itself: how loud it is tells the machine."""
    mean, std = data.xs.mean(1, keepdims=True), data.xs.std(1, keepdims=True)
    return data._replace(xs=((data.xs - mean) / std).astype(np.float32))


TASKS = {
    "waveforms": Task(
        lambda o: datasets.make_waveforms(frame=o.frame or 4, seed=o.seed),
        leave,
        None,
        dict(epochs=10, heads=16, layers=1, width=16, filters=32),
    ),
    "digits": Task(
        lambda o: datasets.load_spoken_digits(o.frame or 16, max_steps=376),
        augment_clip,
        (184, 256, 376),
        dict(epochs=40, heads=32, layers=1),
    ),
    "bearings": Task(
        lambda o: _standardised(datasets.load_bearings(o.frame or 1, o.seed)),
        crop_vibration,
        (2048, 17_984),
        # A pass is five batches.
        dict(epochs=7, passes=20, heads=16, layers=1, width=16, filters=16),
    ),
    "mnist": Task(lambda o: datasets.load_mnist(), leave, None, dict(epochs=5)),
    "eigenworms": Task(
        lambda o: datasets.load_eigenworms(o.folder), leave, None, dict(epochs=60)
    ),
    "cifar10": Task(
        lambda o: datasets.load_cifar10(o.folder), leave, None, dict(epochs=20)
    ),
}


@eqx.filter_jit
def predict(model, xs, lengths, method: Method):
    return jnp.argmax(apply(model, xs, lengths, method).logits, axis=-1)


@eqx.filter_jit
def train_step(model, opt_state, optimiser, batch, method: Method, guess, key):
    xs, lengths, labels = batch

    def loss_fn(model):
        out = apply(model, xs, lengths, method, guess, key)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, out.logits.shape[-1]), 0.1)
        return jnp.mean(optax.softmax_cross_entropy(out.logits, targets)), out

    (loss, out), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimiser.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss, out


@functools.cache  # The same object again, so that nothing is compiled twice.
def make_optimiser(learning_rate: float, num_steps: int):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, num_steps // 10), num_steps, 0.01 * learning_rate
    )
    matrices = lambda params: jtu.tree_map(lambda x: x.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.02, mask=matrices),
    )


def make_batch(data, ids, augment, rng: Rng | None, padded_steps):
    """Sequences of a batch, padded to one of a few lengths."""
    series = [data.xs[i, : data.lengths[i]] for i in ids]
    if rng is not None:
        series = [augment(xs, rng) for xs in series]
    longest = max(map(len, series))
    sizes = padded_steps or (data.xs.shape[1],)
    num_steps = next((n for n in sizes if n >= longest), sizes[-1])
    xs = np.zeros((len(ids), num_steps, data.xs.shape[2]), np.float32)
    for row, x in zip(xs, series, strict=True):
        row[: len(x)] = x[:num_steps]
    lengths = np.array([min(len(x), num_steps) for x in series], np.int32)
    return xs, lengths, data.labels[ids]


def epoch_of_batches(data, options, rng: Rng) -> list[np.ndarray]:
    """All training samples, so many times, in batches of similar length."""
    batch_size, ids = options.batch_size, np.flatnonzero(~data.is_test)
    count = len(ids) // batch_size * batch_size
    ids = np.concatenate([rng.permutation(ids)[:count] for _ in range(options.passes)])
    by_length = [p[np.argsort(data.lengths[p])] for p in np.array_split(ids, 3)]
    batches = np.concatenate(by_length).reshape(-1, batch_size)
    return list(rng.permutation(batches))


def accuracy(model, data, ids, options, padded_steps, method: Method) -> float:
    right = 0
    ids = ids[np.argsort(data.lengths[ids])]
    for start in range(0, len(ids), options.batch_size):
        # The last batch is filled up, since its shape would be compiled for.
        now = ids[start : start + options.batch_size]
        filled = np.resize(now, options.batch_size)
        xs, lengths, labels = make_batch(data, filled, leave, None, padded_steps)
        found = np.asarray(
            predict(model, jnp.asarray(xs), jnp.asarray(lengths), method)
        )
        right += int(np.sum((found == labels)[: len(now)]))
    return right / len(ids)


def save(folder: pathlib.Path, state, history: dict) -> None:
    """The checkpoint and what was seen so far; written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    eqx.tree_serialise_leaves(folder / "new.eqx", state)
    (folder / "new.json").write_text(json.dumps(history, indent=1) + "\n")
    (folder / "new.eqx").replace(folder / "checkpoint.eqx")
    (folder / "new.json").replace(folder / "history.json")


def load(folder: pathlib.Path, state, options: dict):
    """The checkpoint of a run with the same options."""
    history = json.loads((folder / "history.json").read_text())
    changed = {
        name: (value, history["options"].get(name))
        for name, value in options.items()
        if history["options"].get(name) != value
    }
    if changed:
        raise ValueError(
            f"The checkpoint in {folder} is of a run with other options (now, then): "
            f"{changed}. Give the same ones, or another `--out`."
        )
    return eqx.tree_deserialise_leaves(folder / "checkpoint.eqx", state), history


def plot(history: dict, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    epochs = np.arange(1, len(history["accuracy"]) + 1)
    loss = np.asarray(history["loss"])
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(np.linspace(0, epochs[-1], len(loss)), loss, lw=0.5, alpha=0.4)
    left.plot(epochs, loss.reshape(len(epochs), -1).mean(1), color="C0")
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.plot(epochs, 100 * np.asarray(history["accuracy"]), color="C1")
    right.set(xlabel="epoch", ylabel="accuracy on the test split, %", ylim=(None, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def train(options: argparse.Namespace, data: datasets.Sequences | None = None) -> dict:
    """Trains, and returns the history: losses of all steps, accuracy after each epoch,
    Newton steps, seconds.
    """
    task = TASKS[options.task]
    data = task.load(options) if data is None else data
    method = deer_ode.Sequential() if options.sequential else deer_ode.Newton()
    model = make_model(options, data.xs.shape[2], len(data.classes))
    num_batches = int(np.sum(~data.is_test)) // options.batch_size
    if num_batches == 0:
        raise ValueError(
            f"`--batch-size {options.batch_size}` is more than the "
            f"{int(np.sum(~data.is_test))} training samples."
        )
    num_batches *= options.passes
    optimiser = make_optimiser(options.learning_rate, options.epochs * num_batches)
    opt_state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    shown = {k: v for k, v in vars(options).items() if k not in ("out", "resume")}
    shown["folder"] = None  # Where the data are makes no difference.
    names = ("loss", "accuracy", "newton_steps", "fallback_steps", "seconds")
    history: dict[str, Any] = dict(options=shown, **{name: [] for name in names})
    if options.resume:
        (model, opt_state), history = load(options.out, (model, opt_state), shown)
    # The same inputs every time, all of one length: then last time's states fit.
    is_warm = options.warm_start
    padded_steps = task.padded_steps if not is_warm else None
    guesses = None
    test_ids = np.flatnonzero(data.is_test)
    for epoch in range(len(history["accuracy"]), options.epochs):
        # Of the epoch alone, so that a run that is resumed is the same run.
        rng = np.random.default_rng((options.seed, epoch))
        keys = jr.split(jr.fold_in(jr.key(options.seed), epoch), num_batches)
        batches = epoch_of_batches(data, options, rng)
        start, seen = time.perf_counter(), []
        progress = tqdm.tqdm(batches, f"epoch {epoch + 1}", disable=options.quiet)
        for ids, key in zip(progress, keys, strict=True):
            augment_rng = None if options.plain or is_warm else rng
            batch = make_batch(data, ids, task.augment, augment_rng, padded_steps)
            guess = None
            if is_warm and guesses is not None:
                guess = jtu.tree_map(lambda g, ids=ids: g[ids], guesses)
            model, opt_state, loss, out = train_step(
                model, opt_state, optimiser, batch, method, guess, key
            )
            if is_warm:
                guesses = _remember(guesses, out.carries, ids, len(data.xs))
            stats = (out.stats["num_newton_steps"], out.stats["num_fallback_steps"])
            seen.append((float(loss), int(stats[0].max()), int(stats[1].sum())))
            progress.set_postfix(loss=f"{seen[-1][0]:.3f}", newton=seen[-1][1])
        losses, newton_steps, fallback_steps = zip(*seen, strict=True)
        history["loss"] += losses
        history["newton_steps"] += newton_steps
        history["fallback_steps"] += fallback_steps
        history["seconds"].append(time.perf_counter() - start)
        history["accuracy"].append(
            accuracy(model, data, test_ids, options, padded_steps, method)
        )
        save(options.out, (model, opt_state), history)
        print(
            f"epoch {epoch + 1}: loss {np.mean(losses):.4f}, accuracy "
            f"{100 * history['accuracy'][-1]:.1f}%, Newton steps "
            f"{np.mean(newton_steps):.1f}, {history['seconds'][-1]:.1f} s",
            flush=True,
        )
    plot(history, options.out / "curves.png")
    return history


def _remember(guesses, carries, ids, num_samples: int):
    """The states of these samples, kept until they are met again."""
    if guesses is None:
        guesses = jtu.tree_map(
            lambda c: np.zeros((num_samples, *c.shape[1:]), c.dtype), carries
        )
    for kept, new in zip(
        jtu.tree_leaves(guesses), jtu.tree_leaves(carries), strict=True
    ):
        kept[ids] = np.asarray(new)
    return guesses


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.classify", description=__doc__
    )
    add = parser.add_argument
    add(
        "task",
        choices=TASKS,
        nargs="?",
        default="waveforms",
        help="waveforms (the default) are synthetic; all others are read from files",
    )
    add("--sequential", action="store_true", help="step by step, without Newton steps")
    add("--warm-start", action="store_true", help="start from each sample's last states"
        " (without augmentation, and padded to one length)")  # fmt: skip
    add("--plain", action="store_true", help="without augmentation")
    add("--seed", type=int, default=0)
    add("--epochs", type=int)
    add("--passes", type=int, default=1, help="through the data in each epoch")
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=5e-3)
    add("--layers", type=int, default=2)
    add("--width", type=int, default=48)
    add("--filters", type=int, default=128, help="of the encoder; an even number")
    add("--heads", type=int, default=32, help="of a layer, half of them backwards")
    add("--head-size", type=int, default=1)
    add("--dropout", type=float, default=0.1)
    add("--frame", type=int, help="samples per step (4; digits 16, bearings 1)")
    add("--folder", type=pathlib.Path, help="of EigenWorms or CIFAR-10")
    add("--out", type=pathlib.Path, help="where to write (runs/TASK)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--quiet", action="store_true", help="no progress bar")
    task, _ = parser.parse_known_args(argv)
    parser.set_defaults(**TASKS[task.task].defaults)
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = pathlib.Path("runs") / options.task
    if options.task in ("eigenworms", "cifar10") and options.folder is None:
        parser.error(f"{options.task} needs --folder, where its files are")
    for name in ("epochs", "passes", "batch_size", "layers", "width", "head_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    for name in ("filters", "heads"):
        if getattr(options, name) < 2 or getattr(options, name) % 2:
            parser.error(f"--{name} must be an even number, 2 or more")
    return options


def main(argv=None) -> None:
    options = parse(argv)
    try:
        data = TASKS[options.task].load(options)
    except FileNotFoundError as error:
        sys.exit(
            f"{error}\n`python -m examples.classify waveforms` needs no files: it "
            "makes synthetic data."
        )
    if options.task == "waveforms":
        print("Synthetic data, made by this program: noisy waveforms of three kinds.")
    train(options, data)


if __name__ == "__main__":
    main()
