"""The notebooks run, and what they say is true. Their cells are run as one program."""

import json
import pathlib
import sys

import jax
import pytest

from .helpers import slow


FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


def run(name: str) -> dict:
    cells = json.loads((FOLDER / name).read_text())["cells"]
    source = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert source
    namespace = {}
    # As users have it, without the strictness of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile("\n".join(source), name, "exec"), namespace)
    return namespace


def first_solve(monkeypatch):
    monkeypatch.setenv("DEER_ODE_NOTEBOOK_STEPS", "200")
    found = run("first_solve.ipynb")
    # Populations of up to about 30, in float64.
    assert found["difference"] < 1e3 * 2**-52 * 30
    assert found["fallback_steps"] == 0
    assert abs(float(found["rate"]) - 1.1) < 1e-8
    assert found["warm_steps"] == 1


def recurrent_networks(monkeypatch):
    datasets = pytest.importorskip("examples.datasets")
    if not (datasets.data_folder() / "spoken_digits_8khz.npz").exists():
        pytest.skip("the spoken digits are not in the folder that DEER_ODE_DATA names")
    monkeypatch.setenv("DEER_ODE_NOTEBOOK_EPOCHS", "2")
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("sys.path", [*sys.path])
    with jax.enable_x64(False):
        found = run("recurrent_networks.ipynb")
    # States of at most one, in float32.
    assert found["difference"] < 1e3 * 2**-23
    steps = found["newton_steps"]
    assert steps["Exact"] == steps["Dense"] < steps["Diagonal"]
    # Of ten digits, after two epochs of forty.
    assert found["history"]["accuracy"][-1] > 0.3
    assert len(found["history"]["accuracy"]) == 2


NOTEBOOKS = {"first_solve": first_solve, "recurrent_networks": recurrent_networks}


@pytest.mark.parametrize(
    "name", slow(NOTEBOOKS, lambda name: name == "recurrent_networks")
)
def test_notebook(name, monkeypatch):
    NOTEBOOKS[name](monkeypatch)


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.name)
def test_no_outputs_are_stored(path):
    cells = json.loads(path.read_text())["cells"]
    assert all(not c.get("outputs") for c in cells)
