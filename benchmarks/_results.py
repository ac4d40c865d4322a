"""Files of results: `{"environment": ..., "rows": [...]}`."""

import json
import pathlib

from ._case import key_of
from ._process import environment, has_cpu_flag, write


#: Where results are kept.
FOLDER = pathlib.Path(__file__).parent / "results"


def read(path: pathlib.Path) -> list[dict]:
    """The rows of a file; none of one that is not there, or of another kind."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    rows = found.get("rows", []) if isinstance(found, dict) else []
    return [row for row in rows if "family" in row and "rivals" in row]


def read_all(folder: pathlib.Path = FOLDER) -> list[dict]:
    """Those of every file; of rows for the same, that of the last file by name."""
    rows: dict[tuple, dict] = {}
    for path in sorted(folder.glob("*.json")):
        rows |= {_place(row): row for row in read(path)}
    return list(rows.values())


def _place(row: dict) -> tuple:
    return (row["device"], row["cpu_flag"], *key_of(row))


class Results:
    """A file, which each new row is put into at once, in place of an older one."""

    def __init__(self, out: pathlib.Path):
        self.out = out
        self.environment = environment()

    def add(self, row: dict) -> dict:
        row = row | {
            "device": self.environment["device"],
            "cpu_flag": has_cpu_flag(),
            "commit": self.environment["commit"],
        }
        rows = {_place(old): old for old in read(self.out)}
        rows[_place(row)] = row
        write({"environment": self.environment, "rows": [*rows.values()]}, self.out)
        return row
