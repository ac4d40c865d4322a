import gc
import os
from pathlib import Path


# On CPUs XLA compiles the parts of a program in threads, which only wait for each other
# where there is a process for each core. (Without LLVM's optimisation the tests would
# take 0.7 times as long, but JAX's own gradients of loops were NaN; JAX 0.12.) Before
# JAX is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")

import jax
import pytest
from jaxtyping import install_import_hook


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects that stay: to look through all of them as often as Python
# does by default is a tenth of the time of a long run. What is in cycles is released
# together with the compiled programs, below.
gc.set_threshold(50_000, 20, 100)

# Nothing above may import the package: the hook checks what is imported from here on.
_hook = install_import_hook("deer_ode", "beartype.beartype")
_hook.__enter__()


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--recurrences", type=int, default=2_000, help="random recurrences to solve"
    )


def pytest_configure(config):
    """Compiled programs are kept in pytest's cache: for the other processes of this run
    and for later ones, which take half as long.
    """
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    if cache is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("compiled")))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def function_of(item) -> str:
    """The node id without the row of the table."""
    return item.nodeid.split("[")[0]


def is_slow(item) -> bool:
    """By its markers: the keywords hold the names of folders as well."""
    return item.get_closest_marker("slow") is not None


def rows_of(items) -> dict[str, list[bool]]:
    """For each test function whether its rows are marked slow."""
    rows: dict[str, list[bool]] = {}
    for item in items:
        rows.setdefault(function_of(item), []).append(is_slow(item))
    return rows


def covers_of(items) -> dict[str, str]:
    """What tests are marked `slow(covered_by=...)`, and the test that stands for each:
    the name of one in the same file, or `test_file.py::test_name` of one beside it.
    """
    covers = {}
    for item in items:
        for marker in item.iter_markers("slow"):
            cover = marker.kwargs.get("covered_by")
            if cover is not None:
                name = function_of(item)
                file = name.split("::")[0]
                folder = file[: file.rfind("/") + 1]
                is_beside = "::" in cover
                covers[name] = folder + cover if is_beside else f"{file}::{cover}"
    return covers


def functions_without_a_row(items) -> list[str]:
    """The test functions of which all rows are marked slow, and that no other is said
    to stand for.
    """
    covers = covers_of(items)
    return [
        name for name, are_slow in rows_of(items).items()
        if all(are_slow) and name not in covers
    ]  # fmt: skip


def wrong_covers(items) -> list[str]:
    """What is said to be covered by a test that is not there, or is slow itself."""
    rows = rows_of(items)
    files = {name.split("::")[0] for name in rows}
    wrong = []
    for name, cover in covers_of(items).items():
        # A file that was not collected says nothing about its tests.
        if cover.split("::")[0] in files and all(rows.get(cover, [True])):
            wrong.append(f"{name}: covered by {cover}")
    return wrong


def has_whole_files(config) -> bool:
    """Whether all rows of each file that was collected are known."""
    is_whole = not any("::" in str(arg) for arg in config.args)
    return is_whole and not config.getoption("lf", False)


# Before the hooks that take items away, such as that of `-k`.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # The controller of pytest-xdist does not print usage errors of its workers.
    error = RuntimeError if hasattr(config, "workerinput") else pytest.UsageError
    is_whole = has_whole_files(config)
    faults = {
        "All rows of these tests are marked slow, so the ordinary run does not test "
        "them at all. Make one row of each cheap:": functions_without_a_row,
        "The ordinary run does not have the tests that are said to stand for these "
        "slow ones:": wrong_covers,
    }
    for message, find in faults.items():
        if is_whole and (names := find(items)):
            raise error("\n".join([message, *names]))
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow")
    for item in items:
        if is_slow(item):
            item.add_marker(skip)


#: Linux gives a process 65,530 mapped ranges of memory, and a large program takes
#: hundreds; XLA aborts where none is left.
_MOST_MAPS = 25_000
_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
