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


#: Rows of tables that take half a minute each, and whose like a shorter row tests.
SLOW_ROWS = (
    "test_equations.py::test_values_and_gradients[Obreshkov(3)-b]",
    "test_equations.py::test_values_and_gradients[RadauIIA(2)-b]",
    "test_equations.py::test_transformations[Obreshkov(2)]",
    "test_situations.py::test_situation[stiff-c]",
    "test_solvers.py::test_values_and_gradients[ImplicitEuler-c]",
    "test_solvers.py::test_values_and_gradients[KenCarp4-c]",
    "test_solvers.py::test_values_and_gradients[Kvaerno3-c]",
    "test_solvers.py::test_values_and_gradients[Kvaerno5-c]",
    "test_solvers.py::test_values_and_gradients[Sil3-c]",
    "test_stiff.py::test_the_papers_field_on_few_points[solver2-100-0.01]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-pytree]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-stiff]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-neural cde]",
    "test_nn.py::test_padding_changes_nothing[strides backwards]",
    "test_nn.py::test_padding_changes_nothing[LSTM backwards]",
    "test_nn.py::test_multi_head_gru[(2, 1)-True]",
    "test_nn.py::test_batches_of_padded_sequences[int32]",
)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.nodeid.endswith(SLOW_ROWS):
            item.add_marker(pytest.mark.slow)
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _forget_compiled_programs(request):
    """Hundreds of compiled programs would fill the memory of a small machine."""
    yield
    if request.node.get_closest_marker("parametrize") is None:
        return
    _forget_compiled_programs.count += 1
    if _forget_compiled_programs.count % 100 == 0:
        jax.clear_caches()


_forget_compiled_programs.count = 0
