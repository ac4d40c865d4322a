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


#: Rows of tables that take from 10 to 45 seconds each; other rows test the like.
SLOW_ROWS = (
    "test_blocks.py::test_blocks_are_dense_matrices[contiguous-False]",
    "test_blocks.py::test_blocks_are_dense_matrices[one block-False]",
    "test_convergence.py::test_hard_dynamics[Lorenz, 50 Lyapunov times, Obreshkov]",
    "test_convergence.py::test_hard_dynamics[Robertson, RadauIIA]",
    "test_convergence.py::test_hard_dynamics[pendulum, 1,000 periods, Tsit5]",
    "test_daes.py::test_pendulum[index 2-2]",
    "test_daes.py::test_pendulum[index 3-1]",
    "test_daes.py::test_pendulum_has_no_spurious_solution[50]",
    "test_doors.py::test_closed_over_parameters[c]",
    "test_doors.py::test_derivatives_with_an_event_before_times_without_a_field[Obreshkov()-a]",  # noqa: E501
    "test_doors.py::test_derivatives_with_an_event_before_times_without_a_field[Tsit5()-a]",  # noqa: E501
    "test_doors.py::test_derivatives_with_an_event_before_times_without_a_field[Tsit5()-b]",  # noqa: E501
    "test_doors.py::test_derivatives_with_an_event_before_what_is_not_a_number[None-Newton()]",  # noqa: E501
    "test_doors.py::test_derivatives_with_an_event_before_what_is_not_a_number[root_finder1-Newton(fallback=False)]",  # noqa: E501
    "test_doors.py::test_derivatives_with_an_event_before_what_is_not_a_number[root_finder1-None]",  # noqa: E501
    "test_doors.py::test_events[never-b]",
    "test_doors.py::test_hessian[b]",
    "test_doors.py::test_no_time_at_all[b]",
    "test_doors.py::test_no_time_at_all[c]",
    "test_doors.py::test_step_to[c]",
    "test_doors.py::test_too_few_steps[c]",
    "test_doors.py::test_vmap[saveat-b]",
    "test_equations.py::test_controls_keep_the_order[2-linear]",
    "test_equations.py::test_controls_keep_the_order[3-cubic]",
    "test_equations.py::test_float32[RadauIIA(2)]",
    "test_equations.py::test_order[GaussLegendre(2)]",
    "test_equations.py::test_order[Obreshkov(3)]",
    "test_equations.py::test_order_of_interpolation[GaussLegendre(2)-3]",
    "test_equations.py::test_order_of_interpolation[RadauIIA(3)-4]",
    "test_equations.py::test_singular_equations_fail[twice the same-GaussLegendre(2)]",
    "test_equations.py::test_states[complex-RadauIIA(2)]",
    "test_equations.py::test_stiff_order_of_radau[3]",
    "test_equations.py::test_transformations[Obreshkov(2)]",
    "test_equations.py::test_values_and_gradients[Obreshkov(3)-b]",
    "test_equations.py::test_values_and_gradients[RadauIIA(2)-b]",
    "test_examples.py::test_last_states_save_newton_steps",
    "test_exponential.py::test_derivatives_of_phi[2]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-neural cde]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-pytree]",
    "test_exponential.py::test_parallel_is_sequential[Exprb43-stiff]",
    "test_neural_cde.py::test_loss_and_gradients[cubic-raw]",
    "test_neural_cde.py::test_loss_and_gradients[cubic-to_ode]",
    "test_neural_cde.py::test_loss_and_gradients[linear-raw]",
    "test_neural_cde.py::test_loss_and_gradients[linear-to_ode]",
    "test_nn.py::test_batches_of_padded_sequences[int32]",
    "test_nn.py::test_mask_of_a_prefix_is_a_length[strides]",
    "test_nn.py::test_multi_head_gru[(2, 1)-True]",
    "test_nn.py::test_padding_changes_nothing[LSTM backwards]",
    "test_nn.py::test_padding_changes_nothing[both directions]",
    "test_nn.py::test_padding_changes_nothing[own cell]",
    "test_nn.py::test_padding_changes_nothing[strides backwards]",
    "test_nn.py::test_padding_changes_nothing[strides]",
    "test_paired_diagonal.py::test_the_answer_is_the_sequential_one[0.0]",
    "test_references.py::test_reference[DETEST-B4]",
    "test_references.py::test_reference[DETEST-C4]",
    "test_references.py::test_reference[DETEST-D1]",
    "test_scan.py::test_guess[False]",
    "test_sdes.py::test_gradients_equal_those_of_diffrax[ShARK]",
    "test_sdes.py::test_gradients_equal_those_of_diffrax[StratonovichMilstein]",
    "test_sdes.py::test_same_path_as_diffrax[ShARK]",
    "test_sdes.py::test_same_path_as_diffrax[StratonovichMilstein]",
    "test_sdes.py::test_strong_order_against_the_exact_solution[Heun]",
    "test_sdes.py::test_strong_order_of_additive_noise",
    "test_shooting.py::test_differential_equation[100-None]",
    "test_shooting.py::test_differential_equation[100-Window(length=40)]",
    "test_shooting.py::test_differential_equation[123-Window(length=40)]",
    "test_situations.py::test_aim_by_newtons_method[b]",
    "test_situations.py::test_situation[fit of oscillators-b]",
    "test_situations.py::test_situation[forcing-b]",
    "test_situations.py::test_situation[forcing-c]",
    "test_situations.py::test_situation[latent ODE-c]",
    "test_situations.py::test_situation[neural CDE as an ODE-b]",
    "test_situations.py::test_situation[planet-c]",
    "test_situations.py::test_situation[stiff-b]",
    "test_situations.py::test_situation[stiff-c]",
    "test_situations.py::test_situation[two levels-b]",
    "test_situations.py::test_situation[two levels-c]",
    "test_solvers.py::test_float32[Heun]",
    "test_solvers.py::test_float32[Kvaerno3]",
    "test_solvers.py::test_values_and_gradients[Bosh3-b]",
    "test_solvers.py::test_values_and_gradients[Dopri5-b]",
    "test_solvers.py::test_values_and_gradients[Dopri8-b]",
    "test_solvers.py::test_values_and_gradients[EulerHeun-b]",
    "test_solvers.py::test_values_and_gradients[HalfSolver-b]",
    "test_solvers.py::test_values_and_gradients[Heun-b]",
    "test_solvers.py::test_values_and_gradients[ImplicitEuler-b]",
    "test_solvers.py::test_values_and_gradients[ImplicitEuler-c]",
    "test_solvers.py::test_values_and_gradients[ItoMilstein-b]",
    "test_solvers.py::test_values_and_gradients[KenCarp4-b]",
    "test_solvers.py::test_values_and_gradients[KenCarp4-c]",
    "test_solvers.py::test_values_and_gradients[Kvaerno3-c]",
    "test_solvers.py::test_values_and_gradients[Kvaerno5-b]",
    "test_solvers.py::test_values_and_gradients[Kvaerno5-c]",
    "test_solvers.py::test_values_and_gradients[Midpoint-b]",
    "test_solvers.py::test_values_and_gradients[Ralston-b]",
    "test_solvers.py::test_values_and_gradients[SPaRK-b]",
    "test_solvers.py::test_values_and_gradients[SemiImplicitEuler-c]",
    "test_solvers.py::test_values_and_gradients[ShARK-b]",
    "test_solvers.py::test_values_and_gradients[ShARK-c]",
    "test_solvers.py::test_values_and_gradients[Sil3-c]",
    "test_solvers.py::test_values_and_gradients[Tsit5 on a CDE-b]",
    "test_solvers.py::test_values_and_gradients[Tsit5-c]",
    "test_stiff.py::test_linear_system[solver1-modes1]",
    "test_stiff.py::test_linear_system[solver4-modes4]",
    "test_stiff.py::test_the_papers_field_on_few_points[None-300-5e-05]",
    "test_stiff.py::test_the_papers_field_on_few_points[solver2-100-0.01]",
    "test_symplectic.py::test_parallel_agrees_with_stock[BlanesMoan4]",
    "test_symplectic.py::test_parallel_agrees_with_stock[StormerVerlet]",
    "test_symplectic.py::test_parallel_agrees_with_stock[Yoshida4]",
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


#: Linux gives a process 65,530 mapped ranges of memory, and a large program takes
#: hundreds; XLA aborts where none is left.
_MOST_MAPS = 25_000
_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
