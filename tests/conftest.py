from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Nothing above may import the package: the hook checks what is imported from here on.
_hook = install_import_hook("deer_ode", "beartype.beartype")
_hook.__enter__()


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--recurrences", type=int, default=10_000, help="random recurrences to solve"
    )


def functions_without_a_row(items) -> list[str]:
    """The test functions of which all rows are marked slow."""
    rows: dict[str, list[bool]] = {}
    for item in items:
        name = item.nodeid.split("[")[0]
        rows.setdefault(name, []).append("slow" in item.keywords)
    return [name for name, are_slow in rows.items() if all(are_slow)]


def has_whole_files(config) -> bool:
    """Whether all rows of each file that was collected are known."""
    is_whole = not any("::" in str(arg) for arg in config.args)
    return is_whole and not config.getoption("lf", False)


# Before the hooks that take items away, such as that of `-k`.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    empty = functions_without_a_row(items) if has_whole_files(config) else []
    if empty:
        names = "\n".join(empty)
        # The controller of pytest-xdist does not print usage errors of its workers.
        error = RuntimeError if hasattr(config, "workerinput") else pytest.UsageError
        raise error(
            "All rows of these tests are marked slow, so the ordinary run does not "
            f"test them at all. Make one row of each cheap:\n{names}"
        )
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow")
    for item in items:
        if "slow" in item.keywords:
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
