"""What more steps cost: time, compilation and memory against their number."""

import functools as ft
from collections.abc import Callable

import numpy as np

import deer_ode

from . import _affine, _gru, _ode
from ._case import Case, Plan
from ._fields import PROBLEMS


LENGTHS = (10**3, 10**4, 10**5, 10**6, 10**7)

# A power of two, so that no time is rounded: the interval grows with the steps.
_STEP = 2.0**-7


def _gru_states(cell, h0, xs, states: Callable):
    return states(cell, h0, xs[0])


def cases(plan: Plan) -> list[Case]:
    lotka_volterra = PROBLEMS["Lotka-Volterra"]
    out = []
    for steps in plan.choose_steps(LENGTHS, LENGTHS, (100,)):
        gru = {k: f for k, f in _gru.RIVALS.items() if k != "plain DEER"}
        of = (lotka_volterra.field, _STEP * steps, steps)
        case = ft.partial(Case, family="length", steps=steps, work="forward")
        out += [
            case(
                name="affine_scan 4",
                n=4,
                dtype="float32",
                programs={"default": deer_ode.affine_scan, "lax.scan": _affine.loop},
                arguments=ft.partial(_affine.arguments, 4, steps, "float32", False),
                reference="lax.scan",
            ),
            case(
                name="GRU 4",
                n=4,
                dtype="float32",
                programs={k: ft.partial(_gru_states, states=f) for k, f in gru.items()},
                arguments=ft.partial(_gru.arguments, 4, steps, 1, "float32"),
                reference="lax.scan",
            ),
            case(
                name="Lotka-Volterra",
                n=2,
                # Single precision could not tell so many times apart.
                dtype="float64",
                programs={
                    "default": _ode.deer(*of),
                    "newton": _ode.deer(*of, _ode.NEWTON),
                    "loop": _ode.loop(*of),
                },
                arguments=ft.partial(_ode.arguments, lotka_volterra, "float64"),
                reference="loop",
            ),
        ]
    return out


def slopes(rows: list[dict], program: str) -> tuple[float | None, float | None]:
    """Of the logarithm of the time against that of the steps: over all of them, and
    over the three decades at the end; `None` where those are not there.
    """
    times = {
        row["steps"]: row["rivals"][program]["median"]
        for row in rows
        if "median" in row["rivals"].get(program, {})
    }
    last = {n: t for n, t in times.items() if n * 1000 >= max(times)}
    spans_three = last and max(last) >= 1000 * min(last)
    return _slope(times), _slope(last) if spans_three else None


def _slope(times: dict[int, float]) -> float | None:
    if len(times) < 2:
        return None
    return float(np.polyfit(np.log([*times]), np.log([*times.values()]), 1)[0])


def table(rows: list[dict]) -> str:
    """Seconds, seconds of compilation and megabytes by length; then the slopes."""
    lines = [
        "| problem | program | T | seconds | compile, s | temporary, MB |",
        "|---|---|---|---|---|---|",
    ]
    ends = ["| problem | program | slope | last three decades |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name]
        for program in of_name[0]["rivals"]:
            for row in of_name:
                found = row["rivals"].get(program, {})
                if "median" not in found:
                    continue
                size = found["temp_bytes"]
                lines.append(
                    f"| {name} | {program} | {row['steps']:,} | "
                    f"{found['median']:.3g} | {found['compile_s']:.1f} | "
                    f"{'-' if size is None else format(size / 1e6, '.3g')} |"
                )
            pair = ("-" if s is None else f"{s:.2f}" for s in slopes(of_name, program))
            ends.append(f"| {name} | {program} | {' | '.join(pair)} |")
    return "\n".join([*lines, "", *ends])
