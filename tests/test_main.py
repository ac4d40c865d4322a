import functools
import os
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from deer_ode import Newton
from deer_ode._demo import _fit
from deer_ode._demo._command_line import main, speed


def _numbers(pattern: str, text: str) -> list[float]:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern!r} not in:\n{text}"
    return [float(x) for x in match.groups()]


def test_run(tmp_path, capsys, monkeypatch):
    out = tmp_path / "picture.png"
    histories = {}
    residual_history = _fit.residual_history

    def record(*args):
        histories.update(residual_history(*args))
        return histories

    monkeypatch.setattr(_fit, "residual_history", record)
    # Without windows, which the fit needs none of.
    monkeypatch.setattr(_fit, "Newton", functools.partial(Newton, window=None))
    # A small solver, as several programs are made of it.
    options = ["--steps", "2", "--points", "200", "--solver", "bosh3"]
    options += ["--tolerance", "1e-5"]
    assert main([*options, "--out", str(out)]) == 0
    text = capsys.readouterr().out

    number = r"([\d.e+-]+)"
    first, last, truth = _numbers(
        f"loss .*  {number} first, {number} last, {number} for the truth", text
    )
    # Mean square of 800 unit normal numbers: five standard deviations of sqrt(2 / 800).
    assert abs(truth - 1) < 5 * (2 / 800) ** 0.5
    assert truth < last < first

    (loss,) = _numbers(f"stock, loss +{number}", text)
    gradient, tolerance = _numbers(
        rf"stock, gradient +{number} \(rounding allows {number}\)", text
    )
    # Each step is right to the 64 units of rounding of the acceptance test, and an
    # error grows at most 1000-fold over four orbits (the job itself measures how much:
    # about 170).
    (num_steps, same, adaptive) = _numbers(r"time steps +(\d+) +(\d+) +(\d+)", text)
    assert num_steps == same <= 1.1 * adaptive
    bound = 64 * float(jnp.finfo(float).eps) * num_steps * 1000
    assert max(loss, gradient) <= tolerance <= bound

    newton_steps = _numbers(r"per solve +(\d+) first, (\d+) most, (\d+) last", text)
    assert all(1 <= n <= 64 for n in newton_steps)
    assert _numbers(r"finished sequentially, in all solves +(\d+)", text) == [0]
    assert f"(JAX {jax.__version__}, " in text
    assert all(t > 0 for t in _numbers(r"step, ms +([\d.]+) +([\d.]+) +([\d.]+)", text))
    assert re.search(r"time steps per solve +\d+ first, \d+ last", text)
    for name in ("m1", "m2", "x(0)", "y(0)", "vx(0)", "vy(0)"):
        assert f"\n{name} " in text

    # From each guess the residuals fall to rounding.
    assert len(histories) == 3
    assert all(history[-1] <= 1e-13 for history in histories.values())

    picture = out.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.rstrip().endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    "ratio, said",
    (
        (0.62, "0.6 times the speed of stock Diffrax"),
        (5.61, "5.6 times as fast as stock Diffrax"),
    ),
)
def test_slower_is_not_called_faster(ratio, said):
    assert speed(ratio) == said


@pytest.mark.parametrize(
    "arguments, said",
    (
        (["--solver", "nonsense"], "nonsense"),
        # Carries memory from step to step.
        (["--solver", "leapfrogmidpoint"], "leapfrogmidpoint"),
        (["--points", "1"], "--points"),
        (["--points", "many"], "many"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--tolerance", "0"], "--tolerance"),
        (["--tolerance", "tight"], "tight"),
        (["--out", "picture.pdf"], ".png"),
        (["--out", os.path.join("no", "such", "folder", "a.png")], "No such file"),
        (["--nonsense"], "--nonsense"),
    ),
)
def test_bad_values(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as info:
        main(arguments)
    assert info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("deer_ode: error: ")
    assert said in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ("matplotlib", "optax", "tqdm"))
def test_missing_extra(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as info:
        main([])
    assert info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f'deer_ode: error: {name} is missing: pip install "deer_ode[demo]"\n'
    )


def test_picture_is_left_alone_until_it_is_drawn(tmp_path, capsys):
    out = tmp_path / "picture.png"
    out.write_bytes(b"something")
    with pytest.raises(SystemExit):
        main(["--solver", "nonsense", "--out", str(out)])
    capsys.readouterr()
    assert out.read_bytes() == b"something"
