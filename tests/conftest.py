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


#: Rows of tables that take from 15 to 45 seconds each; other rows test the like.
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
    "test_solvers.py::test_values_and_gradients[KenCarp4-b]",
    "test_solvers.py::test_values_and_gradients[Kvaerno5-b]",
    "test_solvers.py::test_values_and_gradients[SPaRK-b]",
    "test_solvers.py::test_values_and_gradients[ShARK-c]",
    "test_solvers.py::test_values_and_gradients[Dopri8-b]",
    "test_solvers.py::test_values_and_gradients[Dopri5-b]",
    "test_solvers.py::test_values_and_gradients[ImplicitEuler-b]",
    "test_solvers.py::test_values_and_gradients[ItoMilstein-b]",
    "test_solvers.py::test_float32[Kvaerno3]",
    "test_symplectic.py::test_parallel_agrees_with_stock[StormerVerlet]",
    "test_symplectic.py::test_parallel_agrees_with_stock[BlanesMoan4]",
    "test_sdes.py::test_gradients_equal_those_of_diffrax[ShARK]",
    "test_sdes.py::test_same_path_as_diffrax[ShARK]",
    "test_stiff.py::test_the_papers_field_on_few_points[None-300-5e-05]",
    "test_neural_cde.py::test_loss_and_gradients[linear-raw]",
    "test_neural_cde.py::test_loss_and_gradients[cubic-to_ode]",
    "test_equations.py::test_controls_keep_the_order[3-cubic]",
    "test_equations.py::test_float32[RadauIIA(2)]",
    "test_doors.py::test_no_time_at_all[c]",
    "test_doors.py::test_closed_over_parameters[c]",
    "test_shooting.py::test_differential_equation[100-None]",
    "test_shooting.py::test_differential_equation[123-Window(length=40)]",
    "test_nn.py::test_padding_changes_nothing[strides]",
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
