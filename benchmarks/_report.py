"""Puts the tables and pictures of the results there are into the documentation."""

import pathlib
import re

from . import FAMILIES, _affine, _gru, _length, _results, _tables, _targets
from ._plots import plot


DOCS = pathlib.Path(__file__).parents[1] / "docs"

#: What families show beside, or in place of, the common table.
_MORE = {"affine": _affine.table, "gru": _gru.table}
_INSTEAD = {"length": _length.table}


def family_text(family: str, rows: list[dict]) -> str:
    """All tables of one family."""
    parts = []
    for caption, found in _tables.captions(rows).items():
        parts.append(f"{caption}:")
        parts.append(_INSTEAD.get(family, _tables.table)(found))
        more = _MORE[family](found) if family in _MORE else ""
        if more:
            parts.append(more)
    failures = _failures(rows)
    return "\n\n".join([*parts, *([failures] if failures else [])])


def _failures(rows: list[dict]) -> str:
    """What the programs that failed said, each once."""
    said = {}
    for row in rows:
        for name, rival in row["rivals"].items():
            if "error" in rival:
                said.setdefault((name, rival["error"]), []).append(row)
    return "\n".join(
        f"- {name} failed in {len(found)} of these cases: {error}"
        for (name, error), found in said.items()
    )


def replace(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of table `name`."""
    start, end = f"<!-- table: {name} -->", "<!-- /table -->"
    pattern = re.escape(start) + r".*?" + re.escape(end)
    new = f"{start}\n\n{content}\n\n{end}"
    text, count = re.subn(pattern, lambda _: new, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{start} ... {end} is there {count} times, not once")
    return text


def report(
    results: pathlib.Path = _results.FOLDER, docs: pathlib.Path = DOCS
) -> dict[str, str]:
    """Rewrites `benchmarks.md` and the pictures in the folder `docs`; where a family
    was not measured its table stays. What was put in, by table.
    """
    rows = _results.read_all(results)
    page = docs / "benchmarks.md"
    text, tables = page.read_text(), {}
    for family in FAMILIES:
        of_family = [row for row in rows if row["family"] == family]
        if of_family:
            pictures = _pictures(family, of_family, docs)
            tables[family] = "\n\n".join([family_text(family, of_family), *pictures])
    if rows:
        tables["targets"] = _targets.table(rows)
        tables["devices"] = _devices(rows)
    for name, content in tables.items():
        text = replace(text, name, content)
    page.write_text(text)
    return tables


def _devices(rows: list[dict]) -> str:
    """What was measured on, at which commits."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        found = [row for row in rows if row["device"] == device]
        commits = sorted({row["commit"] or "unknown" for row in found})
        lines.append(f"- {device}: {len(found)} cases, commits {', '.join(commits)}")
    if all(row["device"] == "CPU" for row in rows):
        lines.append("- No GPU has been measured yet.")
    return "\n".join(lines)


def _pictures(family: str, rows: list[dict], docs: pathlib.Path) -> list[str]:
    links = []
    for device in dict.fromkeys(row["device"] for row in rows):
        slug = re.sub(r"\W+", "-", device.lower()).strip("-")
        end = "" if device == "CPU" else f"-{slug}"
        path = pathlib.Path("images") / f"bench-{family}{end}.png"
        found = [row for row in rows if row["device"] == device]
        if plot(found, docs / path):
            links.append(
                f"![Milliseconds against steps, {family}, {device}]({path.as_posix()})"
            )
    return links
