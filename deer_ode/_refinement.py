r"""Solves to a tolerance: the mesh is refined with all of its steps at once.

An adaptive solve at a loose tolerance is near enough to the solution for the *local*
errors of the base solver's steps: they are taken from it all at once, and their error
estimates give the mesh (`_mesh`). All steps of that mesh are solved together. Those
whose error is above one are divided, and the mesh is solved again from the interpolated
solution, until there are none. Where sequential steps are faster, Diffrax's controller
makes the mesh instead.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._custom_types import Mask, Trajectory
from ._discretisation import (
    AdaptiveSolution,
    AdaptiveSteps,
    Discretised,
    Grid,
    Steps,
    solve_adaptively,
)
from ._foreign import LoopState
from ._grid import LoopInputs
from ._implicit import solve_trajectory
from ._mesh import Mesh, MeshRefinement, redistribute, tightened, wanted_lengths
from ._method import AbstractMethod, TrajectorySolution, sequential_solution
from ._misc import for_both_parts, leading_true, previous_states, without_gradient
from ._plan import (
    FEWEST_GUESS_STEPS,
    MESH_CUTS,
    MESH_MOST_PARTS,
    MESH_PERTURBATION,
    MESH_UNIFORM,
    guess_tolerance,
    most_attempts,
)
from ._predictor import Trajectory as GivenTrajectory
from ._programs import Program


def scaled_errors(
    controller: MeshRefinement, discretised: Discretised, ys: Trajectory, steps: Steps
) -> Float[Array, " steps"]:
    """The error estimate of each step in units of the tolerance, as Diffrax has it."""
    if steps.y_error is None:
        raise ValueError(
            f"`{type(discretised.solver).__name__}` has no error estimate, so it can "
            "meet no tolerance. Use a solver that has one, such as `diffrax.Tsit5()`, "
            "or steps of a given length (`diffrax.ConstantStepSize()`)."
        )
    recurrence = discretised.recurrence
    y0 = recurrence.states(recurrence.y0[None])[0]
    ends = recurrence.states(ys)
    unflatten = recurrence.flattener.unflatten

    def scaled(start, end, error):
        start, end = unflatten(start), unflatten(end)

        def scale(a, b, e):
            b = jnp.where(jnp.any(jnp.isnan(b)), a, b)
            size = jnp.maximum(jnp.abs(a), jnp.abs(b))
            with jax.numpy_dtype_promotion("standard"):
                return e / (controller.atol + size * controller.rtol)

        return controller.norm(jtu.tree_map(scale, start, end, error))

    return jax.vmap(scaled)(previous_states(y0, ends), ends, steps.y_error)


def _scaled_to(parts: Float[Array, " steps"], capacity: int) -> Array:
    """No more in all than there is room for."""
    return parts * jnp.minimum(1, capacity / jnp.maximum(jnp.sum(parts), 1))


class Sequential(NamedTuple):
    """Where sequential steps led, one by one and in the end."""

    states: PyTree[Array]
    """After each step, as the user has them."""
    after: tuple[PyTree[Array], Int[Array, " steps"]] | None
    """The controller's state after each step, and how many had been tried; `None` where
    no event can end the solve there.
    """
    controller_state: PyTree[Array]
    """After the last step."""


class Refined(NamedTuple):
    """A mesh that meets the tolerance."""

    grid: Grid
    solution: TrajectorySolution | None
    """If it was solved for."""
    num_accurate: Int[Array, ""]
    """How many steps, from the first on, meet the tolerance."""
    num_meshes: Int[Array, ""]
    num_mesh_steps: Int[Array, ""]
    """Of the mesh that was wanted last: more than there is room for is cut off."""
    num_guess_steps: Int[Array, ""]
    """Sequential steps that were tried."""
    sequential: "Sequential | None" = None
    """Of sequential steps."""


class _Progress(NamedTuple):
    mesh: Mesh
    ys: Trajectory
    """The guess at the solution on `mesh`."""
    solved: Mesh
    solution: TrajectorySolution
    num_accurate: Int[Array, ""]
    num_meshes: Int[Array, ""]
    is_done: Bool[Array, ""]


class Refinement(eqx.Module):
    """Everything that stays the same while a mesh is refined."""

    controller: MeshRefinement
    discretised: Discretised
    method: AbstractMethod
    order: Any
    until_event: Callable[[Grid, Any], Mask] | None
    """Where the conditions of an event are met, which ends the solve."""

    @property
    def _fixed(self) -> Float[Array, " fixed"]:
        """Points of every mesh: the given ones within the interval, and its end."""
        t0, t1 = self._ends
        those = jnp.append(self.controller.given(t1.dtype), t1)
        return jnp.sort(jnp.where((those > t0) & (those < t1), those, t1))

    @property
    def _ends(self):
        grid = self.discretised.grid
        return grid.tprev[0], grid.tnext[-1]

    def _guess(self) -> AdaptiveSolution | None:
        recurrence, (t0, t1) = self.discretised.recurrence, self._ends
        threshold = recurrence.threshold
        if recurrence.ode is None or threshold is None:
            return None
        y0 = recurrence.states(recurrence.y0[None])[0]
        rtol = guess_tolerance(None, y0.dtype)
        most = most_attempts(self.discretised.grid.num_steps)
        with jax.default_matmul_precision("highest"):
            return solve_adaptively(
                recurrence.ode,
                *(t0, t1, (t1 - t0) / MESH_UNIFORM, y0, rtol, recurrence.is_stiff),
                *(most, FEWEST_GUESS_STEPS),
                self._fixed if self._fixed.size > 1 else None,
                jnp.min(threshold, initial=jnp.inf),
            )

    def _on(self, mesh: Mesh) -> Discretised:
        return self.discretised.on(mesh.grid(self.controller.jump_ts))

    def _equidistributed(
        self, mesh: Mesh, errors: Float[Array, " steps"], fits: Bool[Array, ""] | bool
    ) -> Mesh:
        """With `fits` no more steps than there is room for, over the whole interval."""
        lengths = jnp.diff(mesh.points)
        wanted = wanted_lengths(self.controller, mesh.points, errors, self.order)
        parts = jnp.where(mesh.active & (lengths > 0), lengths / wanted, 0)
        parts = jnp.where(fits, _scaled_to(parts, mesh.capacity), parts)
        return redistribute(mesh.points, parts, self._fixed, mesh.capacity)

    def _divided(self, mesh: Mesh, errors: Float[Array, " steps"], good: Mask) -> Mesh:
        """Each step that is not good by itself; what is good stays as it is."""
        lengths = jnp.diff(mesh.points)
        parts = jnp.ceil(errors ** (1 / self.order) / self.controller.safety)
        parts = jnp.where(jnp.isfinite(errors), parts, 10.0)
        parts = jnp.clip(parts, 2.0, MESH_MOST_PARTS).astype(lengths.dtype)
        if self.controller.dtmin is not None:
            most = jnp.ceil(lengths / self.controller.dtmin)
            parts = jnp.minimum(parts, jnp.maximum(most, 1))
        parts = jnp.where(good, 1, parts)
        parts = jnp.where(mesh.active & (lengths > 0), parts, 0)
        # Every point is kept: whole numbers of parts.
        return redistribute(mesh.points, parts, self._fixed, mesh.capacity)

    def _first_mesh(self, guess: AdaptiveSolution | None) -> Mesh:
        (t0, t1), fixed = self._ends, self._fixed
        capacity = self.discretised.grid.num_steps
        if guess is None:
            inner = jnp.linspace(t0, t1, MESH_UNIFORM + 1, dtype=t1.dtype)
            cuts = 1.0
        else:
            inner = jnp.concatenate([t0[None], jnp.minimum(guess.ts, t1)])
            cuts = float(MESH_CUTS)
        points = jnp.sort(jnp.concatenate([inner, fixed]))
        # Slivers between points that differ by rounding are no steps.
        sliver = 64 * jnp.finfo(t1.dtype).eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
        parts = jnp.where(jnp.diff(points) > sliver, jnp.asarray(cuts, t1.dtype), 0)
        return redistribute(points, _scaled_to(parts, capacity), fixed, capacity)

    def _solve(self, mesh: Mesh, ys: Trajectory | None):
        discretised = self._on(mesh)
        method = self.method
        if ys is not None:
            method = method.start_from(GivenTrajectory(discretised.states(ys)))
        solution = solve_trajectory(discretised.recurrence, method, is_checked=False)
        steps = discretised.take_steps(solution.ys)
        errors = scaled_errors(self.controller, discretised, solution.ys, steps)
        return discretised, solution, steps, errors

    def _between(self, mesh: Mesh, discretised, ys: Trajectory, steps) -> Trajectory:
        """The solution at the points of another mesh."""
        recurrence = discretised.recurrence
        ts = mesh.points[1:]
        index = jnp.searchsorted(discretised.grid.tnext, ts).astype(jnp.int32)
        index = jnp.minimum(index, discretised.grid.num_steps - 1)
        states = discretised.evaluate(ys, steps, ts, index)
        return recurrence.flatten(states)

    def _perturbed(self, ys: Trajectory) -> Trajectory:
        """By about as much as the smallest entry's tolerance, in no particular
        direction. The guess is smooth: from there, steps too long to be stable look
        accurate.
        """
        flattener = self.discretised.recurrence.flattener
        rtol, atol = self.controller.rtol, self.controller.atol

        def tolerances(y):
            of = lambda y: for_both_parts(atol + rtol * jnp.abs(y), y)
            with jax.numpy_dtype_promotion("standard"):
                return flattener.flatten(jtu.tree_map(of, flattener.unflatten(y)))

        each = jax.vmap(tolerances)(ys)
        smallest = jnp.min(each, axis=1, keepdims=True, initial=jnp.inf)
        # As good as random.
        signs = jnp.sin(1e4 * jnp.arange(1, ys.size + 1, dtype=ys.dtype) ** 2)
        # The same for each mode of the field, over which it is spread out.
        size = MESH_PERTURBATION * ys.shape[1] ** 0.5
        change = size * smallest * signs.reshape(ys.shape)
        # Where an entry is exactly zero its field may have no derivative.
        return ys + jnp.where(ys == 0, 0, change)

    def _candidate(self) -> tuple[Mesh, Trajectory, Int[Array, ""]]:
        """The first mesh that is solved for the answer, with a guess."""
        guess = self._guess()
        mesh = self._first_mesh(guess)
        recurrence = self.discretised.recurrence
        none = jnp.asarray(0, jnp.int32)
        if guess is None or not recurrence.is_map:
            # Errors of equations are estimated from a solution of them only.
            ys = None
            if guess is not None:
                states = jax.vmap(recurrence.flattener.unflatten)(
                    guess(mesh.points[1:])
                )
                ys = recurrence.flatten(states)
            discretised, solution, steps, errors = self._solve(mesh, ys)
            new = self._equidistributed(mesh, errors, False)
            ys = self._between(new, discretised, solution.ys, steps)
            return new, ys, none if guess is None else guess.num_attempts

        def equidistribute(i, mesh):
            discretised, ys = self._on(mesh), guess(mesh.points[1:])

            def errors_at(ys):
                steps = discretised.take_steps(ys)
                return scaled_errors(self.controller, discretised, ys, steps)

            # Perturbed states may lie where the field is not defined.
            perturbed, plain = jax.vmap(errors_at)(jnp.stack([self._perturbed(ys), ys]))
            errors = jnp.where(jnp.isfinite(perturbed), perturbed, plain)
            return self._equidistributed(mesh, errors, i == 0)

        mesh = lax.fori_loop(0, 2, equidistribute, mesh)
        return mesh, guess(mesh.points[1:]), guess.num_attempts

    def _is_good(self, discretised, solution, errors: Float[Array, " steps"]) -> Mask:
        """Which steps need not be divided: accurate, padding, or beyond the end."""
        good = errors <= 1
        if self.controller.dtmin is not None and self.controller.force_dtmin:
            grid = discretised.grid
            shortest = self.controller.dtmin * (1 + 1e-6)
            is_shortest = grid.tnext - grid.tprev <= shortest
            good = good | (is_shortest & jnp.isfinite(errors))
        num_relevant = leading_true(jnp.all(jnp.isfinite(solution.ys), axis=-1)) + 1
        if self.until_event is not None:
            happened = self.until_event(
                discretised.grid, discretised.states(solution.ys)
            )
            num_relevant = jnp.minimum(num_relevant, leading_true(~happened) + 1)
        steps = jnp.arange(errors.shape[0], dtype=jnp.int32)
        return good | ~discretised.grid.active | (steps >= num_relevant)

    def _refine(self, now: _Progress) -> _Progress:
        discretised, solution, steps, errors = self._solve(now.mesh, now.ys)
        good = self._is_good(discretised, solution, errors)
        mesh = self._divided(now.mesh, errors, good)
        before = now.solution.num_newton_steps
        return _Progress(
            mesh=mesh,
            ys=self._between(mesh, discretised, solution.ys, steps),
            solved=now.mesh,
            solution=solution._replace(
                num_newton_steps=before + solution.num_newton_steps
            ),
            num_accurate=leading_true(good),
            num_meshes=now.num_meshes + 1,
            # Or there is room for all of it, and nothing can be divided further.
            is_done=jnp.all(good)
            | (mesh.num_steps <= jnp.minimum(now.mesh.num_steps, mesh.capacity)),
        )

    def __call__(self) -> Refined:
        mesh, ys, num_guess_steps = self._candidate()
        zero = jnp.asarray(0, jnp.int32)
        none, no = sequential_solution(jnp.zeros_like(ys)), jnp.asarray(False)
        begin = _Progress(mesh, ys, mesh, none, zero, zero, no)
        most = self.controller.max_refinements + 1
        end = lax.while_loop(
            lambda now: ~now.is_done & (now.num_meshes < most),
            lambda now: self._refine(now),  # Equinox's bound methods have no hash
            begin,
        )
        grid = end.solved.grid(self.controller.jump_ts)
        num_mesh_steps = jnp.where(
            end.is_done, end.solved.num_steps, end.mesh.num_steps
        )
        return Refined(
            grid=grid,
            solution=end.solution,
            num_accurate=end.num_accurate,
            num_meshes=end.num_meshes,
            num_mesh_steps=num_mesh_steps,
            num_guess_steps=num_guess_steps,
        )


def sequential_mesh(
    inputs: LoopInputs, state: LoopState, order: Any, max_steps: int
) -> Refined:
    """The steps that Diffrax's own loop would make over the whole interval, by its own
    controller. Events are not looked at.
    """

    def to_store(after, info):
        ends_before = inputs.event is not None
        how = (after.controller_state, after.num_attempts) if ends_before else None
        return after.y, how

    def run(terms, args, controller, order, state, t1):
        steps = AdaptiveSteps(
            *(inputs.solver.solver, terms, args, controller, order, t1, max_steps),
            to_store=to_store,
        )
        start = jnp.asarray(state.tprev), jnp.asarray(state.tnext)
        end = steps.run(state.y, state.controller_state, *start)
        num_steps = end.num_accepted
        is_end = end.tprev >= t1
        # The step at which the controller gave up is the last one of the grid, and not
        # counted as accurate, so that the solve ends there with `dt_min_reached`.
        gave_up = end.is_too_short | (~is_end & (end.num_attempts < max_steps))
        num_active = num_steps + jnp.where(gave_up, 1, 0)
        steps = jnp.arange(max_steps, dtype=jnp.int32)
        hold = lambda x: jnp.where(steps < num_steps, x, end.tprev)
        tnext = jnp.where(steps == num_steps, end.tnext, hold(end.ends))
        last = jnp.minimum(steps, jnp.maximum(num_steps - 1, 0))
        states, after = end.stored
        states = jtu.tree_map(
            lambda x, y0: jnp.where(num_steps > 0, x[last], y0), states, state.y
        )
        return Refined(
            grid=Grid(hold(end.starts), tnext, steps < num_active),
            solution=None,
            num_accurate=num_steps,
            num_meshes=jnp.asarray(1, jnp.int32),
            num_mesh_steps=jnp.where(is_end | gave_up, num_steps, 4 * max_steps),
            num_guess_steps=end.num_attempts,
            sequential=Sequential(states, after, end.controller_state),
        )

    traced = (
        *(inputs.terms, inputs.args, inputs.stepsize_controller, order, state),
        jnp.asarray(inputs.t1),
    )
    program = Program.of(run, *traced)
    return without_gradient(program)(*without_gradient(traced))


def refine(refinement: Refinement) -> Refined:
    """Refines the mesh. Nothing of it has a derivative, and no check of the user's is
    made: it is made along the answer.
    """
    refinement = eqx.tree_at(
        lambda r: r.controller, refinement, tightened(refinement.controller)
    )
    run = Program.of(lambda refinement: refinement(), refinement)
    return without_gradient(run)(without_gradient(refinement))
