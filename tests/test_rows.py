"""The check of `conftest.py` that no table is empty in the ordinary run."""

import types

import pytest

from .conftest import (
    functions_without_a_row,
    has_whole_files,
    pytest_collection_modifyitems,
    wrong_covers,
)


def item(nodeid, *keywords, **of_slow):
    markers = []
    return types.SimpleNamespace(
        nodeid=nodeid, keywords=keywords, add_marker=markers.append, markers=markers,
        get_closest_marker=lambda name: name if name in keywords else None,
        iter_markers=lambda name: [types.SimpleNamespace(kwargs=of_slow)],
    )  # fmt: skip


FULL = (
    item("test_a.py::test_table[x[0]-1]"),
    item("test_a.py::test_table[x[1]-1]", "slow"),
    item("test_b.py::test_table", "parametrize"),
)
EMPTY = (
    item("test_a.py::test_other[1]", "slow"),
    item("test_a.py::test_other[2]", "slow"),
    item("test_a.py::TestClass::test_table", "slow"),
)


def config(*args, **options):
    return types.SimpleNamespace(
        args=args, getoption=lambda name, default=None: options.get(name, default)
    )


def test_tables_without_a_row_are_found():
    assert functions_without_a_row(FULL) == []
    empty = ["test_a.py::test_other", "test_a.py::TestClass::test_table"]
    assert functions_without_a_row([*FULL, *EMPTY]) == empty


def covered_by(cover):
    return item("tests/test_a.py::test_dear[1]", "slow", covered_by=cover)


CHEAP = item("tests/test_a.py::test_cheap")
BESIDE = (
    item("tests/test_b.py::test_table[1]", "slow"),
    item("tests/test_b.py::test_table[2]"),
)
ALSO_DEAR = item("tests/test_b.py::test_dear", "slow", covered_by="test_table")


@pytest.mark.parametrize("cover", ("test_cheap", "test_b.py::test_table"))
def test_another_test_may_stand_for_a_slow_one(cover):
    items = [covered_by(cover), CHEAP, *BESIDE, ALSO_DEAR]
    assert functions_without_a_row(items) == wrong_covers(items) == []
    pytest_collection_modifyitems(config("tests", **{"--runslow": False}), items)


def test_nothing_is_known_of_files_that_were_not_collected():
    items = [covered_by("test_b.py::test_nothing"), CHEAP]
    assert functions_without_a_row(items) == wrong_covers(items) == []


@pytest.mark.parametrize(
    "cover", ("test_nothing", "test_b.py::test_nothing", "test_b.py::test_dear")
)
@pytest.mark.parametrize("runslow", (False, True))
def test_what_stands_for_a_slow_test_is_in_the_ordinary_run(cover, runslow):
    items = [covered_by(cover), CHEAP, *BESIDE, ALSO_DEAR]
    whole = config("tests", **{"--runslow": runslow})
    with pytest.raises(pytest.UsageError, match=f"test_dear: covered by .*{cover}"):
        pytest_collection_modifyitems(whole, items)


@pytest.mark.parametrize("args", (("tests",), ("tests/test_a.py", "tests/test_b.py")))
@pytest.mark.parametrize("runslow", (False, True))
def test_collection_fails(args, runslow):
    whole = config(*args, **{"--runslow": runslow})
    pytest_collection_modifyitems(whole, [*FULL])
    with pytest.raises(pytest.UsageError, match="test_other\n.*TestClass::test_table"):
        pytest_collection_modifyitems(whole, [*FULL, *EMPTY])


def test_a_selection_of_rows_is_fine():
    some = config("tests/test_a.py::test_other[1]", **{"--runslow": False})
    assert not has_whole_files(some) and not has_whole_files(config("tests", lf=True))
    rows = [item("test_a.py::test_other[1]", "slow")]
    pytest_collection_modifyitems(some, rows)
    assert [marker.name for marker in rows[0].markers] == ["skip"]


def test_slow_rows_are_skipped_without_the_option():
    for runslow in (False, True):
        rows = [item("test_a.py::test[1]"), item("test_a.py::test[2]", "slow")]
        pytest_collection_modifyitems(config("tests", **{"--runslow": runslow}), rows)
        assert [len(row.markers) for row in rows] == [0, 0 if runslow else 1]
