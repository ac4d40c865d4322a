"""The training example, on tones that are told apart in seconds."""

import dataclasses
import functools
import json
import types

import equinox as eqx
import jax
import numpy as np
import pytest

import deer_ode
from examples import classify, datasets

from .helpers import rounding


EPOCHS = 12
# Those of the tones and of the waveforms, so that both are learned by one program.
NUM_SAMPLES, NUM_STEPS, FRAME = 54, 16, 4
# Of the 45 training samples in each epoch.
NUM_BATCHES = 5


def tones(num_samples=NUM_SAMPLES, num_steps=NUM_STEPS, frame=FRAME, seed=0):
    """Tones of three pitches and of several lengths, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_samples, dtype=np.int32) % 3
    lengths = rng.integers(num_steps // 2, num_steps + 1, num_samples).astype(np.int32)
    times = np.arange(num_steps * frame).reshape(num_steps, frame)
    phases = rng.uniform(0, 2 * np.pi, (num_samples, 1, 1))
    xs = np.sin(np.array([0.3, 0.9, 1.5])[labels][:, None, None] * times + phases)
    xs = xs + 0.1 * rng.normal(size=xs.shape)
    xs[np.arange(num_steps) >= lengths[:, None]] = 0
    is_test = np.arange(num_samples) // 3 % 6 == 5
    classes = ("low", "middle", "high")
    return datasets.Sequences(xs.astype(np.float32), lengths, labels, is_test, classes)


SMALL = [
    *"--width 8 --filters 8 --heads 4 --batch-size 8 --layers 1 --quiet".split(),
    *f"--epochs {EPOCHS}".split(),
]


def options(out, *more):
    return classify.parse(["digits", "--out", str(out), *SMALL, "--plain", *more])


@pytest.fixture(scope="module", autouse=True)
def as_users_have_it():
    """Single precision, and without the strictness of the tests."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def few_and_quick_programs():
    """All runs pad to one length, so that those which differ in their options only
    share their programs; and these are compiled with less optimisation.
    """
    digits = dataclasses.replace(classify.TASKS["digits"], padded_steps=None)
    # One window over all steps, of which there are few. What does not converge fails.
    small = dict(window=None, chunk=1, fallback=False)
    newton = functools.partial(deer_ode.Newton, **small)
    methods = types.SimpleNamespace(Newton=newton, Sequential=deer_ode.Sequential)
    fast = {"xla_llvm_disable_expensive_passes": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classify.TASKS, "digits", digits)
        patch.setattr(classify, "deer_ode", methods)
        for name in ("train_step", "predict"):
            plain = getattr(classify, name).__wrapped__
            compiled = eqx.filter_jit(plain, compiler_options=fast)
            patch.setattr(classify, name, compiled)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def parallel(folder):
    return classify.train(options(folder / "parallel"), tones())


def test_learns(parallel, folder):
    losses = np.reshape(parallel["loss"], (EPOCHS, NUM_BATCHES))
    assert np.mean(losses[-1]) < 0.7 * np.mean(losses[0])
    assert parallel["accuracy"][-1] > 0.9
    assert all(0 < n < 20 for n in parallel["newton_steps"])
    assert not any(parallel["fallback_steps"])
    # What is written is what is returned, and can be looked at.
    assert json.loads((folder / "parallel" / "history.json").read_text()) == json.loads(
        json.dumps(parallel)
    )
    assert (folder / "parallel" / "curves.png").stat().st_size > 10_000


def test_sequential_has_the_same_losses(parallel, folder):
    sequential = classify.train(options(folder / "loop", "--sequential"), tones())
    assert not any(sequential["newton_steps"])
    # In the first steps; later the rounding of both has been trained on.
    np.testing.assert_allclose(
        parallel["loss"][:4], sequential["loss"][:4], rtol=rounding(np.float32)
    )


def test_resumed_is_the_same_run(parallel, folder):
    """Stopped after the first epoch and gone on with, to the last bit."""
    out = folder / "resumed"
    interrupted = tones()
    seen = []
    real_save = classify.save

    def stop(folder, state, history):
        real_save(folder, state, history)
        seen.append(len(history["accuracy"]))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classify, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            classify.train(options(out), interrupted)
    assert seen == [1]
    resumed = classify.train(options(out, "--resume"), tones())
    assert resumed["loss"] == parallel["loss"]
    assert resumed["accuracy"] == parallel["accuracy"]
    with pytest.raises(ValueError, match=r"other options.*'seed': \(1, 0\)"):
        classify.train(options(out, "--resume", "--seed", "1"), tones())


@pytest.mark.slow(covered_by="test_scan.py::test_guess")
def test_last_states_save_newton_steps(parallel, folder):
    warm = classify.train(options(folder / "warm", "--warm-start"), tones())
    # Samples are met for the second time in the second epoch. (45 are for training, and
    # 40 of them in each epoch; the others start from zeros then.)
    # In the first epoch both run the same program on the same numbers. (Padded to 184
    # steps in place of 40 it is another program, whose rounding may decide about the
    # last iteration: of four batches 4, 4, 5, 4 in place of 4, 4, 6, 4 in single and
    # 6, 6, 6, 7 in place of 6, 6, 6, 6 in double precision, the losses being equal to
    # one unit of rounding.)
    first, later = slice(NUM_BATCHES), slice(NUM_BATCHES, None)
    assert warm["newton_steps"][first] == parallel["newton_steps"][first]
    assert warm["loss"][first] == parallel["loss"][first]
    mean_steps = lambda history: np.mean(history["newton_steps"][later])
    assert mean_steps(warm) < mean_steps(parallel)
    np.testing.assert_allclose(
        warm["loss"][: 2 * NUM_BATCHES],
        parallel["loss"][: 2 * NUM_BATCHES],
        rtol=10 * rounding(np.float32),
    )


def test_batches_are_padded_to_one_of_a_few_lengths():
    data = tones()
    longest = np.argsort(data.lengths)
    for ids, sizes, num_steps in (
        (longest[:8], (10, 12, 20), 10),
        (longest[-8:], (10, 12, 20), 20),
        (longest[-8:], (8, 10), 10),
        (longest[:8], None, NUM_STEPS),
    ):
        xs, lengths, labels = classify.make_batch(
            data, ids, classify.leave, None, sizes
        )
        assert xs.shape == (8, num_steps, FRAME)
        np.testing.assert_array_equal(lengths, np.minimum(data.lengths[ids], num_steps))
        np.testing.assert_array_equal(labels, data.labels[ids])
        for i, x, n in zip(ids, xs, lengths, strict=True):
            np.testing.assert_array_equal(x[:n], data.xs[i, :n])
            assert not np.any(x[n:])


def test_augmentation_keeps_what_a_sequence_is():
    rng = np.random.default_rng(0)
    clip = np.sin(0.3 * np.arange(4000)).astype(np.float32).reshape(250, 16)
    for _ in range(20):
        new = classify.augment_clip(clip, rng)
        assert new.dtype == np.float32 and new.shape[1] == 16
        # A tenth faster and a tenth cut off at most; or a tenth slower.
        assert 0.8 * 250 < len(new) < 1.12 * 250
        assert 0.2 < np.sqrt(np.mean(new**2)) < 5
        spectrum = np.abs(np.fft.rfft(new.reshape(-1)))
        tone = 2 * np.pi * np.argmax(spectrum) / new.size
        assert 0.26 < tone < 0.34


def test_crops_are_of_the_vibration():
    rng = np.random.default_rng(0)
    times = np.arange(17_984)
    vibration = np.stack([np.sin(0.3 * times), np.cos(0.1 * times)], axis=1)
    for _ in range(20):
        crop = classify.crop_vibration(vibration.astype(np.float32), rng)
        assert crop.dtype == np.float32 and crop.shape == (2048, 2)
        spectra = np.abs(np.fft.rfft(crop, axis=0))
        tones = 2 * np.pi * np.argmax(spectra, axis=0) / 2048
        # A twentieth faster or slower, and as fine as the transform.
        np.testing.assert_allclose(tones, [0.3, 0.1], rtol=0.05, atol=np.pi / 2048)
        assert 0.3 < np.sqrt(np.mean(crop**2)) < 2


def test_waveforms():
    data = datasets.make_waveforms(30, num_steps=64, frame=4, seed=1)
    assert data.xs.shape == (30, 64, 4) and data.xs.dtype == np.float32
    assert data.classes == ("sine", "square", "sawtooth")
    assert np.all((data.lengths >= 32) & (data.lengths <= 64))
    assert not np.any(data.xs[np.arange(64) >= data.lengths[:, None]])
    for split in (data.is_test, ~data.is_test):
        assert np.ptp(np.bincount(data.labels[split])) == 0
    again = datasets.make_waveforms(30, num_steps=64, frame=4, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))
    with pytest.raises(ValueError, match="at least 1"):
        datasets.make_waveforms(frame=0)


def test_no_files_are_needed(folder, monkeypatch, capsys):
    """Without a task the data are synthetic, and the output says so."""
    monkeypatch.setenv("DEER_ODE_DATA", str(folder / "nothing"))
    small = functools.partial(datasets.make_waveforms, NUM_SAMPLES, NUM_STEPS)
    monkeypatch.setattr(datasets, "make_waveforms", small)
    out = folder / "waveforms"
    classify.main(["--sequential", *SMALL, "--out", str(out)])
    text = capsys.readouterr().out
    assert text.startswith("Synthetic data, made by this program")
    history = json.loads((out / "history.json").read_text())
    assert len(history["accuracy"]) == EPOCHS
    with pytest.raises(SystemExit, match="(?s)DEER_ODE_DATA.*waveforms. needs no file"):
        classify.main(["digits", "--out", str(out)])
    with pytest.raises(SystemExit):
        classify.main(["--help"])
    assert "synthetic" in capsys.readouterr().out


def test_bad_options(capsys):
    for words, message in (
        (["digits", "--heads", "3"], "--heads must be an even number"),
        (["digits", "--epochs", "0"], "--epochs must be 1 or more"),
        (["cifar10"], "needs --folder"),
    ):
        with pytest.raises(SystemExit):
            classify.parse(words)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--batch-size 100.*45 training samples"):
        classify.train(options("unused", "--batch-size", "100"), tones())
