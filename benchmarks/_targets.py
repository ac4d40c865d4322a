"""What the package aims at, and whether the results say that it is reached."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from . import _affine, _gru, _hnn, _length, _ode
from ._case import Case, Plan, key_of
from ._runner import OURS
from ._tables import ratio


Rows = dict[tuple, dict]
Values = Iterator[float | None]
"""One of everything that is asked for; `None` where that was not measured."""


class Target(NamedTuple):
    text: str
    bound: float
    values: Callable[[Rows], Values]
    is_least: bool = True
    """Whether the bound is the least that will do; otherwise all have to be below."""

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.is_least else value < self.bound


class Verdict(NamedTuple):
    worst: float | None
    word: str

    def __str__(self) -> str:
        worst = "-" if self.worst is None else f"{self.worst:.3g}"
        return f"{worst} | {self.word}"


def judge(target: Target, rows: Rows) -> Verdict:
    """`met` only where everything was measured."""
    values = list(target.values(rows))
    known = [value for value in values if value is not None]
    missing = len(values) - len(known)
    # A rival that failed is beaten, but says nothing about speed.
    beaten = known.count(math.inf) if target.is_least else 0
    worst = (min if target.is_least else max)(known, default=None)
    if worst is None or beaten == len(known):
        return Verdict(None, "not measured")
    words = []
    if missed := sum(not target.holds(value) for value in known):
        words.append(f"missed in {missed} of {len(values)}")
    if missing:
        words.append(f"{missing} of {len(values)} not measured")
    words = words or [f"met in all {len(values)}"]
    if beaten:
        words.append(f"the rival failed in {beaten}")
    return Verdict(worst, "; ".join(words))


def _over(cases: Iterable[Case], value: Callable[[dict], float | None]):
    keys = [case.key for case in cases]

    def values(rows: Rows) -> Values:
        return (value(rows[key]) if key in rows else None for key in keys)

    return values


def _faster(than: str, ours: str = "default"):
    return lambda row: ratio(row, than, ours)


def _either(than: str):
    """The better of the two, `None` unless both were measured."""

    def value(row):
        found = [ratio(row, than, ours) for ours in ("default", "newton")]
        known = [x for x in found if x is not None]
        return max(known) if len(known) == len(found) else None

    return value


def _by_hand(row: dict) -> float | None:
    """Of the same steps."""
    return ratio(row, "lax.scan" if "lax.scan" in row["rivals"] else "loop", "default")


def _most(key: str):
    """The largest of a figure of our programs; infinite where one failed."""

    def value(row):
        found = [r.get(key, math.inf) for k, r in row["rivals"].items() if k in OURS]
        return None if not found or None in found else max(found)

    return value


def _megabytes(row: dict) -> float | None:
    size = _most("temp_bytes")(row)
    return None if size is None else size / 1e6


def _off_linear(rows: Rows) -> Values:
    """How far from one the slope of each program is, once all lengths are there."""
    cases = _length.cases(Plan())
    for name in dict.fromkeys(case.name for case in cases):
        of_name = [case for case in cases if case.name == name]
        found = [rows[case.key] for case in of_name if case.key in rows]
        for program in of_name[0].programs:
            if program in OURS:
                whole = len(found) == len(of_name)
                slope = _length.slopes(found, program)[1] if whole else None
                yield None if slope is None else abs(slope - 1)


def _published(rows: Rows) -> Values:
    """Our speed-up over the published one, in every cell of the table."""
    cases = _gru.cases(Plan(on_gpu=True))
    keys = {(c.n, c.steps, c.work): c.key for c in cases if c.batch == 16}
    for n, by_steps in _gru.PUBLISHED.items():
        for steps, pair in by_steps.items():
            for work, theirs in zip(("forward", "gradient"), pair, strict=True):
                if theirs is not None:
                    row = rows.get(keys.get((n, steps, work), ()))
                    ours = _either("lax.scan")(row) if row else None
                    yield None if ours is None else ours / theirs


def _of_copying(row: dict) -> float | None:
    if not {"default", "copy"} <= set(row["rivals"]):
        return None
    speeds = _affine.bandwidths(row)
    if "copy" not in speeds:
        return None
    return speeds.get("default", 0.0) / speeds["copy"]


def targets_on_cpu() -> list[Target]:
    plan = Plan()
    gru, ode, long_ode = (
        _gru.cases(plan),
        _ode.cases(plan),
        _ode.cases(Plan(steps=(2**16,))),
    )
    families = (_affine, _gru, _ode, _hnn, _length)
    every = [case for family in families for case in family.cases(plan)]
    some = lambda cases, n, work: [c for c in cases if c.n in n and c.work == work]
    stock = _faster(_ode.STOCK, "default, ts")
    plain = _faster("plain DEER", "newton")
    others = [c for c in gru if c.n != 4]
    wide = [c for c in gru if (c.n, c.steps, c.batch) == (32, 100_000, 1)]
    return [
        Target("default over a loop by hand", 0.9, _over(every, _by_hand)),
        Target("newton over plain DEER, GRU n = 4", 8, _over(_of_size(gru, 4), plain)),
        Target("newton over plain DEER, other GRUs", 2, _over(others, plain)),
        Target("newton over plain DEER, ODEs", 5, _over(ode, plain)),
        Target(
            "the better of ours over `lax.scan`, GRU gradients, n = 2 to 8",
            3,
            _over(some(gru, (2, 4, 8), "gradient"), _either("lax.scan")),
        ),
        Target(
            "default over stock Diffrax, both saving at `ts`, n = 2, forward",
            10,
            _over(some(ode, (2,), "forward"), stock),
        ),
        Target(
            "the same, n = 2 to 4, gradient, N = 65,536",
            15,
            _over(some(long_ode, (2, 3, 4), "gradient"), stock),
        ),
        Target("the same, n = 8, forward", 3, _over(some(ode, (8,), "forward"), stock)),
        Target(
            "the same, n = 8, gradient", 5, _over(some(ode, (8,), "gradient"), stock)
        ),
        Target("compilation of ours, s", 4, _over(every, _most("compile_s")), False),
        Target(
            "temporary memory of ours, MB, GRU n = 32, T = 100,000, float32",
            200,
            _over([c for c in wide if c.dtype == "float32"], _megabytes),
            False,
        ),
        Target(
            "slope of time by length, last three decades, off 1",
            0.1,
            _off_linear,
            False,
        ),
    ]


def _of_size(cases: list[Case], n: int) -> list[Case]:
    return [case for case in cases if case.n == n]


def targets_on_gpu() -> list[Target]:
    scans = [
        case
        for case in _affine.cases(Plan(on_gpu=True))
        # Shorter ones are through before the device is busy, and so is copying.
        if case.steps == 1_000_000 and (case.name.startswith("diagonal") or case.n <= 4)
    ]
    return [
        Target("speed-up over the published one, GRU", 1, _published),
        Target("`affine_scan` over copying", 0.6, _over(scans, _of_copying)),
    ]


def table(rows: list[dict]) -> str:
    """Markdown: the worst case and the verdict of each target."""
    on_cpu = [{key_of(r): r for r in rows if _is(r, flag)} for flag in (False, True)]
    on_gpu = {key_of(r): r for r in rows if r["device"] != "CPU"}
    lines = [
        "| on a CPU | wanted | worst | verdict | worst, compiled whole | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets_on_cpu():
        verdicts = " | ".join(str(judge(target, found)) for found in on_cpu)
        lines.append(f"| {target.text} | {_wanted(target)} | {verdicts} |")
    lines += ["", "| on a GPU | wanted | worst | verdict |", "|---|---|---|---|"]
    for target in targets_on_gpu():
        lines.append(f"| {target.text} | {_wanted(target)} | {judge(target, on_gpu)} |")
    return "\n".join(lines)


def _is(row: dict, cpu_flag: bool) -> bool:
    return row["device"] == "CPU" and row["cpu_flag"] == cpu_flag


def _wanted(target: Target) -> str:
    return f"{'at least' if target.is_least else 'below'} {target.bound:g}"
