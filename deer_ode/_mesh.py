r"""Meshes for a tolerance: the controller, and the division of steps.

With error estimates $e_i$, in units of the tolerance, the steps of a mesh should be

$$h_i \leftarrow 0.9 \, e_i^{-1/p} \, h_i$$

long. Between points that are kept, parts of steps add up to new steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, Int, PyTree

from ._custom_types import Mask, Y
from ._discretisation import Grid
from ._foreign import nextafter, prevbefore
from ._misc import for_both_parts, running
from ._plan import MESH_GROWTH, MESH_LOOSEST


def _sorted_times(ts: Any) -> Any:
    if ts is None:
        return None
    ts = jnp.asarray(ts)
    is_float = jnp.issubdtype(ts.dtype, jnp.floating)
    return jnp.sort(ts if is_float else ts.astype(float))


def _shared(controller: Any) -> dict[str, Any]:
    """The options that `MeshRefinement` has in common with `diffrax.PIDController`."""
    names = "rtol atol norm dtmin dtmax force_dtmin safety error_order".split()
    return {name: getattr(controller, name) for name in names}


class MeshRefinement(diffrax.AbstractAdaptiveStepSizeController):
    r"""Chooses all steps for a tolerance at once, for parallel solves.

    What `diffrax.PIDController` is for sequential steps. Where the method iterates (on
    accelerators, by [`deer_ode.Newton`][], with [`deer_ode.Obreshkov`][]) all steps are
    chosen and solved for together, and a step is accepted when

    $$\left\| \frac{e}{\text{atol} + \text{rtol} \, \max(|y_{i-1}|, |y_i|)} \right\|
    \le 1,$$

    with the base solver's own error estimate $e$. The steps are solved for to rounding,
    relative to entries of at least $\text{atol} / \text{rtol}$.

    In [`deer_ode.diffeqsolve`][] and with [`deer_ode.ParallelAdjoint`][] a
    `PIDController`, or a `ClipStepSizeController` around one, is translated to this by
    itself; its coefficients `pcoeff`, `icoeff`, `dcoeff`, `factormin`, `factormax`, and
    `dt0`, have no meaning there. Stochastic equations are not solved to a tolerance in
    parallel, and the steps of Diffrax's implicit solvers are chosen as below.

    Where steps are sequential (by default on a CPU, where that is faster) they are
    those of Diffrax, by any of its controllers, for stochastic equations as well; this
    one is a `PIDController` there, as it is under any other adjoint. So are those of an
    interval that only an event ends (`t1=jnp.inf`), of which 4096 are tried unless
    `max_steps` is given.

    Derivatives are those of the solution on the mesh, whose points stay where they are
    relative to the times that were given: `t0`, `t1`, `step_ts` and `jump_ts`.

    Costs one adaptive solve to a relative tolerance of 1e-6 (100 to 300 sequential
    steps, however tight the tolerance is; [`deer_ode.Adaptive`][]), two error estimates
    of all steps, and a parallel solve for each mesh: one or two at most on the usual
    test problems. Relative tolerances above 1e-4 are met by meshes for 1e-4: coarser
    ones cannot be guessed from the loose solve.

    `max_steps` is the room for steps. Outside of JAX's transformations it follows by
    itself, in powers of two; within `jit`, `grad` and `vmap` it is Diffrax's 4096
    unless given, and `RESULTS.max_steps_reached` says where that is not enough. `stats`
    also hold `num_meshes`, how many were solved; `num_mesh_steps`, how many steps the
    last one should have had, at least; and `num_guess_steps`, the sequential steps that
    were tried.

    !!! example

        >>> import diffrax
        >>> import jax.numpy as jnp
        >>> from deer_ode import DEER, MeshRefinement, diffeqsolve
        >>> decay = diffrax.ODETerm(lambda t, y, args: -y)
        >>> tight = MeshRefinement(rtol=1e-8, atol=1e-10)
        >>> solver, y0 = DEER(diffrax.Tsit5()), jnp.array(1.0)
        >>> sol = diffeqsolve(decay, solver, 0, 1, None, y0, stepsize_controller=tight)
        >>> round(float(sol.ys[0]), 6), int(sol.stats["num_meshes"])
        (0.367879, 1)

    ??? cite "References"

        de Boor (1974), *Good approximation by splines with variable knots II*, for
        meshes that distribute the error equally.

        Ascher, Mattheij, Russell (1995), *Numerical Solution of Boundary Value Problems
        for Ordinary Differential Equations*, section 9.1, for mesh selection.
    """

    rtol: Any
    atol: Any
    norm: Callable[[PyTree], Any] = optx.rms_norm
    dtmin: Any = None
    dtmax: Any = None
    force_dtmin: bool = True
    safety: Any = 0.9
    error_order: Any = None
    step_ts: Any = eqx.field(converter=_sorted_times, default=None)
    jump_ts: Any = eqx.field(converter=_sorted_times, default=None)
    max_refinements: int = eqx.field(static=True, default=20)

    def _sequential(self) -> Any:
        """The same for sequential steps."""
        pid = diffrax.PIDController(**_shared(self))
        if self.step_ts is None and self.jump_ts is None:
            return pid
        return diffrax.ClipStepSizeController(pid, self.step_ts, self.jump_ts)

    def given(self, dtype: Any) -> Float[Array, " given"]:
        """The times at which a step has to end."""
        times = [ts for ts in (self.step_ts, self.jump_ts) if ts is not None]
        return jnp.concatenate([jnp.zeros(0, dtype), *(t.astype(dtype) for t in times)])

    def threshold(self, y: Y) -> Y:
        """Entries of a state `y` below it are asked for in absolute terms. Steps are
        solved for far more accurately than the tolerance, if it is absolute as well.
        """

        def of(y):
            dtype = jnp.finfo(y.dtype).dtype
            least = float(jnp.finfo(dtype).eps) ** 0.5
            rtol = jnp.maximum(jnp.asarray(self.rtol, dtype), least)
            ratio = jnp.asarray(self.atol, dtype) / rtol
            return for_both_parts(jnp.broadcast_to(ratio, y.shape), y)

        return jtu.tree_map(of, y)

    def wrap(self, direction):
        turn = lambda ts: None if ts is None else jnp.sort(ts * direction)
        return eqx.tree_at(
            lambda c: (c.step_ts, c.jump_ts),
            self,
            (turn(self.step_ts), turn(self.jump_ts)),
            is_leaf=lambda x: x is None,
        )

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self._sequential().init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        return self._sequential().adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        )


MeshRefinement.__init__.__doc__ = """**Arguments:**

- `rtol`, `atol`: the relative tolerance, and the absolute one in units of the state.
- `norm`: how the scaled error of one step becomes one number.
- `dtmin`, `dtmax`: the shortest and the longest step, in units of time; by default any.
- `force_dtmin`: whether a step of `dtmin` is accepted whatever its error. If `False`
    such a solve fails with `RESULTS.dt_min_reached`.
- `safety`: how much shorter than the error estimate allows steps are.
- `error_order`: the order of the error estimate; by default the base solver's.
- `step_ts`: times at which a step has to end.
- `jump_ts`: times at which, moreover, the vector field may jump.
- `max_refinements`: how often the mesh is refined after it was solved. What is then
    still not accurate is a failure, `RESULTS.dt_min_reached`.
"""


def as_mesh_refinement(
    controller: diffrax.AbstractStepSizeController,
) -> MeshRefinement | None:
    """The same tolerance as a mesh; `None` for controllers of any other kind."""
    if isinstance(controller, MeshRefinement):
        return controller
    if isinstance(controller, diffrax.ClipStepSizeController):
        inner = as_mesh_refinement(controller.controller)
        if inner is None:
            return None
        both = lambda a, b: a if b is None else b if a is None else jnp.append(a, b)
        step_ts = both(inner.step_ts, controller.step_ts)
        jump_ts = both(inner.jump_ts, controller.jump_ts)
        return dataclasses.replace(inner, step_ts=step_ts, jump_ts=jump_ts)
    if type(controller) is not diffrax.PIDController:
        return None
    return MeshRefinement(**_shared(controller))


def _interval(ends: Float[Array, " ends"], x: Float[Array, " x"]) -> Int[Array, " x"]:
    """Between which two of a few `ends`, which ascend, each `x` is.

    A binary search would be the faster one for many, but compiles for ten times as
    long.
    """
    index = jnp.searchsorted(ends, x, side="right", method="compare_all") - 1
    return jnp.clip(index, 0, ends.shape[0] - 2)


def moved_with(
    mesh: MeshRefinement | None, t0, t1, times: Float[Array, " times"]
) -> Float[Array, " times"]:
    """`times`, with derivatives: those at an end of the interval move with it, as in
    Diffrax. The others stay where they are, relative to the times (as far as the
    controller is known) at which a step has to end before and after them.
    """
    ends = [jnp.asarray(t, times.dtype) for t in (t0, t1)]
    given = lax.stop_gradient(jnp.stack(ends))
    if mesh is not None:
        given = jnp.sort(jnp.concatenate([given, mesh.given(times.dtype)]))
    known = lax.stop_gradient(given)
    change = jnp.where(jnp.isfinite(known), given - known, 0)
    before = _interval(known, times)
    after = before + 1
    length = known[after] - known[before]
    share = (times - known[before]) / jnp.where(length > 0, length, 1)
    share = jnp.clip(share, 0, 1)
    moved = times + (1 - share) * change[before] + share * change[after]
    for end in ends:
        moved = jnp.where(times == end, end, moved)
    return moved


class Mesh(NamedTuple):
    """Points of a mesh that grows: those after the last step repeat the end."""

    points: Float[Array, " points"]
    num_steps: Int[Array, ""]
    """How many steps there should be; more than there is room for is cut off."""

    @property
    def capacity(self) -> int:
        return self.points.shape[0] - 1

    @property
    def active(self) -> Mask:
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.num_steps

    def grid(self, jump_ts: Float[Array, " jumps"] | None) -> Grid:
        tprev, tnext = self.points[:-1], self.points[1:]
        if jump_ts is not None:
            # The field is evaluated on the step's own side.
            jump_ts, end = jump_ts.astype(tprev.dtype), self.points[-1]
            is_jump = lambda ts: jnp.isin(ts, jump_ts) & (ts < end)
            tprev = jnp.where(is_jump(tprev), nextafter(tprev), tprev)
            tnext = jnp.where(is_jump(tnext), prevbefore(tnext), tnext)
        return Grid(tprev, tnext, self.active, has_jumps=jump_ts is not None)


def redistribute(
    points: Float[Array, " points"],
    parts: Float[Array, " steps"],
    fixed: Float[Array, " fixed"],
    capacity: int,
) -> Mesh:
    """Divides each step into so many `parts`, which need not be whole numbers: between
    two of the points of `fixed`, which ascend and are kept, the numbers of parts of
    several steps add up, rounded upwards.
    """
    none = jnp.zeros(1, points.dtype)
    up_to = lambda x: jnp.concatenate([none, running(lax.cumsum, x)])
    reached = up_to(parts)
    last = jnp.searchsorted(points, fixed, side="right", method="compare_all") - 1
    at_fixed = reached[last]
    at_fixed = jnp.concatenate([none, at_fixed])
    wanted = jnp.diff(at_fixed)
    # Rounding of a sum makes no step more.
    count = jnp.ceil(wanted * (1 - 64 * jnp.finfo(points.dtype).eps))
    steps = up_to(jnp.where(wanted > 0, jnp.maximum(count, 1), 0))
    # Exact at both ends of an interval, so these points are kept to the last digit.
    before = _interval(at_fixed, reached)
    length = jnp.where(wanted > 0, wanted, 1)[before]
    share = (reached - at_fixed[before]) / length
    index = steps[before] + share * jnp.diff(steps)[before]
    new = jnp.arange(capacity + 1, dtype=points.dtype)
    num_steps = jnp.minimum(steps[-1], float(jnp.iinfo(jnp.int32).max))
    return Mesh(
        jnp.where(new < num_steps, jnp.interp(new, index, points), points[-1]),
        num_steps.astype(jnp.int32),
    )


def wanted_lengths(
    controller: MeshRefinement,
    points: Float[Array, " points"],
    errors: Float[Array, " steps"],
    order: Any,
) -> Float[Array, " steps"]:
    """How long the steps that replace each step should be, by its error estimate."""
    lengths = jnp.diff(points)
    factor = controller.safety * errors ** (-1 / order)
    factor = jnp.clip(jnp.where(jnp.isfinite(errors), factor, 0), 0.2, 10.0)
    wanted = lengths * factor.astype(lengths.dtype)
    if controller.dtmax is not None:
        wanted = jnp.minimum(wanted, controller.dtmax)
    # Padding has no length, and limits no other.
    limit = jnp.where(lengths > 0, wanted, jnp.inf)
    distance = MESH_GROWTH * (points[:-1] + lengths / 2)
    for sign, is_reverse in ((1, False), (-1, True)):
        reached = running(lax.cummin, limit - sign * distance, reverse=is_reverse)
        limit = jnp.minimum(limit, reached + sign * distance)
    wanted = jnp.where(lengths > 0, limit, 1)
    if controller.dtmin is not None:
        wanted = jnp.maximum(wanted, controller.dtmin)
    return wanted


def tightened(controller: MeshRefinement) -> MeshRefinement:
    """The tolerance that is aimed at, which may be tighter than the given one."""
    factor = MESH_LOOSEST / jnp.maximum(controller.rtol, MESH_LOOSEST)
    return eqx.tree_at(
        lambda c: (c.rtol, c.atol),
        controller,
        (controller.rtol * factor, controller.atol * factor),
    )
