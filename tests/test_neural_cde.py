"""Neural CDEs on irregular series with missing values: parallel as stock Diffrax."""

import functools as ft
import json

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks import _neural_cde
from benchmarks._neural_cde import (
    BANDS,
    MISSING,
    Case,
    Classifier,
    Series,
    batches,
    load,
    loss,
    make_control,
    run,
    table,
    take,
    train,
)
from deer_ode import DEER, Newton

from .helpers import assert_close, quick, rounding, slow_rows
from .test_nn import drawn


NUM_STEPS, NUM_CLASSES, BATCH = 48, 3, 3
KINDS = ("linear", "cubic", "rectilinear")
FORMS = {"raw": False, "to_ode": True}
#: Of one stage and one window, for the smallest programs.
SOLVERS = {
    "deer": DEER(diffrax.Euler(), Newton(window=None, chunk=1)),
    "diffrax": diffrax.Euler(),
}


@pytest.fixture(scope="module")
def series():
    """Waves whose frequency is their class, as `load` gives spoken digits."""
    rng = np.random.default_rng(0)
    num_series = 12
    ts = np.cumsum(rng.uniform(0.02, 0.3, (num_series, NUM_STEPS + 1)), axis=1)
    labels = np.arange(num_series, dtype=np.int32) % NUM_CLASSES
    phase = (1 + labels)[:, None] * ts
    xs = np.stack([np.sin(phase + i) for i in range(BANDS)], axis=-1)
    xs[rng.random(xs.shape) < 0.3] = np.nan
    # What no interpolation can look back, or ahead, for.
    xs[0, :3, 0] = xs[0, -3:, 1] = np.nan
    xs[1, :, 2] = np.nan
    return Series(ts, xs, labels, np.arange(num_series) >= 9)


@pytest.fixture
def as_users_have_it():
    """The strictness is for the package, not for its rivals and Optax."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def observed(series, kind):
    """Half as many where each takes two steps, so that programs compile only once."""
    every = 2 if kind == "rectilinear" else 1
    return series.ts[:, ::every], series.xs[:, ::every]


def controls_of(series, kind):
    ts, xs = observed(series, kind)
    return jax.jit(jax.vmap(ft.partial(make_control, kind)))(
        jnp.asarray(ts), jnp.asarray(xs)
    )


def classifier_of(as_ode=False):
    make = ft.partial(
        Classifier, BANDS + 1, 4, NUM_CLASSES, as_ode=as_ode, dtype=jnp.float64
    )
    return drawn(make, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_missing_from_the_controls(series, kind):
    ts, xs = observed(series, kind)
    controls = controls_of(series, kind)
    assert controls.ts.shape == (12, NUM_STEPS + 1)
    at_knots = jax.jit(jax.vmap(lambda path: jax.vmap(path.evaluate)(path.ts)))
    values = np.asarray(at_knots(controls))
    assert np.all(np.isfinite(values))
    # Where something was seen, that is what the path says.
    values = values[:, ::2] if kind == "rectilinear" else values
    seen = np.isfinite(xs)
    assert_close(values[..., 0], ts, rounding())
    assert_close(values[..., 1:][seen], xs[seen], rounding())


@quick
def value_and_grad(classifier, controls, labels, solver):
    def of_both(both):
        return loss(*both, labels, solver)

    return eqx.filter_value_and_grad(of_both, has_aux=True)((classifier, controls))


@pytest.mark.parametrize(
    "kind, form",
    slow_rows(
        [(kind, form) for kind in KINDS for form in FORMS],
        # Raw controls have less to differentiate.
        lambda row: row != ("linear", "to_ode"),
    ),
)
def test_loss_and_gradients(series, kind, form):
    """Those of stock Diffrax, for the parameters and for the controls themselves."""
    batch = take(series, controls_of(series, kind), np.arange(BATCH))
    answers = {
        name: value_and_grad(classifier_of(FORMS[form]), *batch, solver)
        for name, solver in SOLVERS.items()
    }
    (value, found), grads = answers["deer"]
    (expected, _), expected_grads = answers["diffrax"]
    assert 1 <= int(found["num_newton_steps"]) < 20
    assert int(found["num_fallback_steps"]) == 0
    assert_close(value, expected, rounding())
    # Within each, some entries are nothing but rounding: the knots of a raw control
    # have no influence of their own.
    for mine, theirs in zip(grads, expected_grads, strict=True):
        assert_close(ravel_pytree(mine)[0], ravel_pytree(theirs)[0], rounding())


@pytest.mark.slow(covered_by="test_loss_and_gradients")
def test_training(series, as_users_have_it):
    """The same losses for the first steps, and they fall."""
    data = batches(series, controls_of(series, "linear"), BATCH)
    _, log = train(classifier_of(), data, 60)
    losses = log["deer"]["losses"]
    # Adam divides by the size of the gradient: where that is small, rounding is not.
    np.testing.assert_allclose(
        losses[:10], log["diffrax"]["losses"][:10], rtol=10 * rounding()
    )
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 2
    assert log["num_fallback_steps"] == 0
    assert len(log["num_newton_steps"]) == 60


def test_unknown_control(series):
    with pytest.raises(ValueError, match="linear, cubic or rectilinear"):
        make_control("quadratic", jnp.asarray(series.ts[0]), jnp.asarray(series.xs[0]))


# --- with the spoken digits -----------------------------------------------------------


@pytest.fixture
def digits():
    path = _neural_cde.data_file()
    if not path.exists():
        pytest.skip(f"the spoken digits are not at {path}: set DEER_ODE_DATA")


def test_spoken_digits(digits):
    """What `load` promises."""
    num_steps = 96
    series = load(num_steps, 2)
    assert series.xs.shape == (300, num_steps + 1, BANDS)
    assert series.ts.shape == (300, num_steps + 1)
    assert np.all(np.diff(series.ts) > 0) and len(np.unique(np.diff(series.ts))) > 2
    missing = np.isnan(series.xs)
    # Five standard deviations of so many draws.
    assert abs(np.mean(missing) - MISSING) < 5 * 0.4 / missing.size**0.5
    assert np.sum(series.is_test) == 60 and set(series.labels) == {0, 1}


def test_missing_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEER_ODE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="DEER_ODE_DATA"):
        load(16, 2)
    assert _neural_cde.main(["--quick", "--one-flag"]) is None
    assert "Not measured" in capsys.readouterr().out


@pytest.mark.slow(covered_by="test_loss_and_gradients")
def test_real_series_train_as_in_diffrax(digits, as_users_have_it):
    # The sizes of the tests above, whose programs need not be compiled again.
    case = Case(steps=NUM_STEPS, batch=BATCH, num_classes=NUM_CLASSES)
    rows = run(case, "float64", repeats=1, train_steps=4)
    assert [row["work"] for row in rows] == ["forward", "training step"]
    # What is returned is what would be written.
    assert rows == json.loads(json.dumps(rows))
    for row in rows:
        assert set(row["times"]) == {"deer", "diffrax"}
        assert row["num_newton_steps"] >= 1 and row["num_fallback_steps"] == 0
        assert row["difference_all"] <= 10 * rounding()
    head, _, *lines = table(rows).splitlines()
    assert len(lines) == 2
    assert all(line.count("|") == head.count("|") for line in lines)
