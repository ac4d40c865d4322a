"""Markdown of rows of results."""

import math

from ._case import WORKS


#: Programs that are of use by themselves only.
_APART = ("copy", "drawing")


def captions(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by device and flags."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        flags = "with loops compiled whole" if row["cpu_flag"] else "default XLA flags"
        is_cpu = row["device"] == "CPU"
        caption = f"{row['device']}, {flags}" if is_cpu else row["device"]
        groups.setdefault(caption, []).append(row)
    return groups


def table(rows: list[dict]) -> str:
    """A line a case: milliseconds of `default`, and how many times as long the others
    take. Two figures are forward / gradient.
    """
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        place = tuple(row[k] for k in ("name", "batch", "steps", "dtype"))
        cases.setdefault(place, {})[row["work"]] = row
    programs = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    base = "default" if "default" in programs else programs[0]
    others = [name for name in programs if name != base and name not in _APART]
    head = ["problem", "batch", "steps", "dtype", f"{base}, ms", *others]
    head += ["Newton steps", "sequential", "compile, s", "temporary, MB", "difference"]
    lines = [head, ["---"] * len(head)]
    for (name, batch, steps, dtype), works in cases.items():
        both = [works[work] for work in WORKS if work in works]
        line = [name, str(batch), f"{steps:,}", dtype]
        line.append(_pair(both, lambda r: _milliseconds(r["rivals"].get(base))))
        for other in others:
            line.append(_pair(both, lambda r, other=other: _times(r, base, other)))
        line.append(_pair(both, lambda r: _number(r["newton_steps"])))
        line.append(_pair(both, lambda r: _number(r["fallback_steps"])))
        for key, unit in (("compile_s", 1), ("temp_bytes", 1e6)):
            line.append(
                _pair(both, lambda r, key=key, unit=unit: _most(r, base, key, unit))
            )
        differences = [r["difference"] for r in both if r["difference"] is not None]
        line.append(f"{max(differences):.1e}" if differences else "-")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(rows: list[dict], cell) -> str:
    return " / ".join(cell(row) for row in rows)


def _number(x: int | None) -> str:
    return "-" if x is None else f"{x:,}"


def _milliseconds(rival: dict | None) -> str:
    if rival is None:
        return "-"
    return f"{1e3 * rival['median']:.3g}" if "median" in rival else "failed"


def ratio(row: dict, numerator: str, denominator: str) -> float | None:
    """Of two medians: infinite where only the first one failed and zero where the
    second did; `None` where one is not there.
    """
    rivals = row["rivals"]
    if numerator not in rivals or denominator not in rivals:
        return None
    if "median" not in rivals[denominator]:
        return 0.0
    if "median" not in rivals[numerator]:
        return math.inf
    return rivals[numerator]["median"] / rivals[denominator]["median"]


def _times(row: dict, base: str, other: str) -> str:
    found = ratio(row, other, base)
    if found is None:
        return "-"
    if math.isinf(found):
        return "failed"
    return f"{found:.2g}x" if found else "?"


def _most(row: dict, base: str, key: str, unit: float) -> str:
    """Of the default and of Newton's method, where both are there."""
    found = [row["rivals"].get(name, {}).get(key) for name in (base, "newton")]
    known = [x / unit for x in found if x is not None]
    return f"{max(known):.2g}" if known else "-"
