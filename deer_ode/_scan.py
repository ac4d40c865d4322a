r"""The discrete mode: `jax.lax.scan`, with all its steps at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.lax as lax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from ._auto import Auto
from ._foreign import body_of
from ._implicit import solve_trajectory
from ._method import (
    AbstractMethod,
    Sequential,
    StaticString,
    TrajectorySolution,
    sequential_solution,
)
from ._misc import (
    StateFlattener,
    describe,
    previous_states,
    rows_where,
    without_gradient,
)
from ._plan import default_platform
from ._predictor import AbstractPredictor, Trajectory
from ._recurrence import Recurrence


class RecurrenceSolution(NamedTuple):
    r"""What [`deer_ode.solve_recurrence`][] returns.

    **Fields:**

    - `carry`: after the last step (after the first one, if `reverse`).
    - `ys`: what each step put out, stacked.
    - `carries`: after each step, stacked, in the order of `xs`. It is what `guess=`
        takes: the next solve of a problem nearby starts from here.
    - `result`: an `optimistix.RESULTS`.
    - `stats`: `path` (`"sequential"` or `"newton"`), `num_steps`, `num_good_steps` (how
        many steps are the answer: all of them with a fallback; without one `carries`
        and `ys` are infinite from there on), `num_newton_steps`, `newton_residual` (the
        largest residual, in units of the carry, before the last correction),
        `newton_damping` (the largest $\lambda$), `num_windows` (how often a window
        moved on, and one), `num_fallback_steps` (how many steps were taken
        sequentially) and `first_nonfinite_step` (the first of `xs` after which the
        carry is not finite, in the order of solving; -1 if there is none). For
        layers of several solves (`MultiHeadGRU`, `Bidirectional`) there are only the
        counts of steps and `newton_residual`.
    """

    carry: PyTree[Array]
    ys: PyTree[Array]
    carries: PyTree[Array]
    result: optx.RESULTS
    stats: dict[str, Any]


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    method: AbstractMethod = Auto(),
    guess: PyTree = None,
    throw: bool = True,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
) -> tuple[PyTree[Array], PyTree[Array]]:
    r"""`jax.lax.scan`, solved in parallel over the sequence.

    $$c_i, y_i = f(c_{i-1}, x_i), \qquad i = 1, \dots, T.$$

    The arguments up to `reverse`, and what is returned, are those of `jax.lax.scan`,
    and so is the answer, up to rounding: all carries are found together by Newton's
    method ([`deer_ode.Newton`][]), and what does not converge is taken sequentially;
    or, where that is faster (on a CPU), all of it, which then is `jax.lax.scan` itself
    ([`deer_ode.Auto`][]). Derivatives of any order, forward and reverse, are exact and
    cost one more affine scan each; no iteration is stored for them.

    It pays where the carry is small, or falls apart into small blocks, and the sequence
    is long; see [how to choose](how-to-choose.md).

    `f` must be a pure function, and where steps are solved for in parallel one with
    derivatives in forward mode (so no `jax.custom_vjp`, but `jax.custom_jvp`). There it
    is called at all steps together, also on carries that are not the answer yet, so
    what it prints it prints for those too; only its checks (`equinox.error_if`) are
    made on the answer alone. Call `scan` under `jax.jit`, or each call compiles again.

    **Arguments:**

    - `f`: one step, `(carry, x) -> (carry, y)`.
    - `init`: the carry before the first step: any pytree of floating or complex arrays.
    - `xs`: what the steps read: any pytree of arrays with a leading axis of `T` steps,
        or `None`.
    - `length`: $T$; needed where `xs` is `None`.
    - `reverse`: whether to go from the last step to the first.
    - `method`: [`deer_ode.Auto`][], [`deer_ode.Newton`][] with its options, or
        [`deer_ode.Sequential`][].
    - `guess`: where the iteration starts from: the carries after each step, stacked
        in the order of `xs` (`carries` of a problem nearby), or a predictor. By
        default that of `method`, which for a recurrence is `init` everywhere. A loop
        has no use for it.
    - `unroll`, `_split_transpose`: as `jax.lax.scan`; used where steps are sequential.
    - `throw`: whether to raise an error where the solve fails. It can fail only with
        `Newton(fallback=False)`; with `throw=False` use
        [`deer_ode.solve_recurrence`][], which says how it ended.

    **Returns:**

    The last carry and the stacked outputs.

    **Raises:**

    - `TypeError`: where a leaf of the carry is an integer or a boolean, which has no
        derivative, or `f` has none in forward mode; and what `jax.lax.scan` raises.
    - `ValueError`: for a guess of another shape, and where `f` joins what is mapped
        side by side (`jax.lax.psum`).
    - `RuntimeError`: if `throw=True` and the solve fails at run time.

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode import scan
        >>> def logistic(y, rate):
        ...     y = rate * y * (1 - y)
        ...     return y, y
        >>> last, ys = scan(logistic, jnp.array(0.5), jnp.array([2.0, 2.0, 1.0]))
        >>> [round(float(y), 4) for y in ys]
        [0.5, 0.5, 0.25]

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, section 3.4.
    """
    sol = solve_recurrence(
        f,
        init,
        xs,
        length,
        reverse,
        method=method,
        guess=guess,
        throw=throw,
        unroll=unroll,
        _split_transpose=_split_transpose,
    )
    return sol.carry, sol.ys


def solve_recurrence(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    method: AbstractMethod = Auto(),
    guess: PyTree = None,
    throw: bool = True,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
) -> RecurrenceSolution:
    """As [`deer_ode.scan`][], and says how it went.

    **Arguments:** as [`deer_ode.scan`][].

    **Returns:**

    A [`deer_ode.RecurrenceSolution`][].

    **Raises:** as [`deer_ode.scan`][].

    !!! example

        >>> import jax.numpy as jnp
        >>> from deer_ode import Newton, solve_recurrence
        >>> def relax(y, x):
        ...     y = 0.5 * jnp.tanh(y) + x
        ...     return y, None
        >>> problem = (relax, jnp.zeros(2), jnp.ones((100, 2)))
        >>> sol = solve_recurrence(*problem, method=Newton())
        >>> int(sol.stats["num_fallback_steps"]), sol.carries.shape
        (0, (100, 2))
        >>> again = solve_recurrence(*problem, method=Newton(), guess=sol.carries)
        >>> int(again.stats["num_newton_steps"])
        1
    """
    if not isinstance(method, AbstractMethod):
        raise TypeError(
            "`method` must be `Auto()`, `Newton(...)` or `Sequential()`; got "
            f"{describe(method)}."
        )
    options: dict[str, Any] = dict(unroll=unroll, _split_transpose=_split_transpose)
    # The contract is that of `lax.scan` because it is `lax.scan` that checks it.
    structure = jax.eval_shape(
        lambda init: lax.scan(f, init, xs, length, reverse, **options), init
    )
    _check_carry(structure[0])
    # As `lax.scan` does, so that a Python number may stand for an array.
    init = jtu.tree_map(lambda x, s: jnp.asarray(x, s.dtype), init, structure[0])
    xs = jtu.tree_map(jnp.asarray, xs)
    num_steps = jtu.tree_leaves(xs)[0].shape[0] if length is None else int(length)
    guess = method.guess if guess is None else guess
    if not isinstance(guess, AbstractPredictor):
        _check_guess(guess, init, num_steps)
        guess = Trajectory(guess)
    is_default = isinstance(method, Auto) and method.fallback
    is_loop = isinstance(method, Sequential) or (
        is_default and default_platform() == "cpu"
    )
    if is_loop or num_steps == 0 or len(jtu.tree_leaves(init)) == 0:
        return _sequential(f, init, xs, num_steps, reverse, options)
    if reverse:
        xs = _flip(xs)
        guess = _flip(guess) if isinstance(guess, Trajectory) else guess
    method = method.start_from(without_gradient(guess))

    carries, solution, path = _solve_carries(f, init, xs, num_steps, method)
    carry = jtu.tree_map(lambda x: x[-1], carries)
    num_good = None if method.fallback else solution.num_good_steps
    ys = _outputs(f, init, xs, carries, num_good, structure[1])
    if reverse:
        ys, carries = _flip(ys), _flip(carries)
    result = method.result(solution, num_steps)
    # With a sequential finish nothing fails.
    if throw and not method.fallback:
        carry, ys, carries = result.error_if(
            (carry, ys, carries), result != optx.RESULTS.successful
        )
    stats = _stats(solution, path, reverse)
    return RecurrenceSolution(carry, ys, carries, result, stats)


def _stats(
    solution: TrajectorySolution, path: StaticString, reverse: bool
) -> dict[str, Any]:
    num_steps, nonfinite = solution.ys.shape[0], solution.first_nonfinite_step
    if reverse:
        nonfinite = jnp.where(nonfinite < 0, nonfinite, num_steps - 1 - nonfinite)
    return dict(
        path=path,
        num_steps=num_steps,
        num_good_steps=solution.num_good_steps,
        num_fallback_steps=solution.num_fallback_steps,
        first_nonfinite_step=nonfinite,
        **solution.stats(),
    )


def _flip(tree):
    return jtu.tree_map(lambda x: x[::-1], tree)


def _check_carry(structure) -> None:
    for path, leaf in jtu.tree_leaves_with_path(structure):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                "The carry is solved for by Newton's method, which needs derivatives, "
                "so it must hold floating or complex arrays only; "
                f"`init{jtu.keystr(path)}` is {leaf.dtype}. A counter or a random key "
                "that does not depend on the rest belongs into `xs` "
                "(`jnp.arange(length)`, `jax.random.split(key, length)`); where the "
                "next integer depends on the state, use `jax.lax.scan`."
            )


def _check_guess(guess, init, num_steps: int) -> None:
    got, wanted = jtu.tree_structure(guess), jtu.tree_structure(init)
    shapes = [jnp.shape(x) for x in jtu.tree_leaves(guess)]
    needed = [(num_steps, *x.shape) for x in jtu.tree_leaves(init)]
    if got != wanted or shapes != needed:
        raise ValueError(
            "`guess` must hold the carry after each step, stacked: a pytree like "
            f"`init` ({wanted}) of arrays of shapes {needed}; got {got} of shapes "
            f"{shapes}."
        )


def _one_of(xs):
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def make_recurrence(
    f: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, num_steps: int
) -> Recurrence:
    """What `jax.lax.scan` takes, as a recurrence of flat vectors."""
    flattener = StateFlattener(init)
    y0 = flattener.flatten(init)
    # The second input counts the steps where `xs` holds nothing.
    inputs = (xs, jnp.zeros((num_steps, 0), y0.dtype))

    def step(y, inputs):
        carry, _ = f(flattener.unflatten(y), inputs[0])
        return flattener.flatten(carry)

    return Recurrence(step, y0, inputs, flattener)


def _solve_carries(f, init, xs, num_steps: int, method: AbstractMethod):
    recurrence = make_recurrence(f, init, xs, num_steps)
    solution = solve_trajectory(recurrence, method)
    ys = solution.ys
    if not method.fallback:
        steps = jnp.arange(num_steps, dtype=jnp.int32)[:, None]
        ys = jnp.where(steps < solution.num_good_steps, ys, jnp.inf)
    carries = jax.vmap(recurrence.flattener.unflatten)(ys)
    return carries, solution, method.path(recurrence)


def _outputs(f, init, xs, carries, num_good, structure):
    """What the steps put out, all at once, from carries that are known: of the first
    `num_good` steps if not of all.
    """
    if len(jtu.tree_leaves(structure)) == 0:
        return structure
    before, is_good = jtu.tree_map(previous_states, init, carries), None
    if num_good is not None:
        # What comes after it means nothing, so no check may see it.
        num_steps = jtu.tree_leaves(carries)[0].shape[0]
        is_good = jnp.arange(num_steps, dtype=jnp.int32) < num_good
        before = rows_where(is_good, before, init)
    shapes = jtu.tree_leaves(structure)
    with jax.default_matmul_precision("highest"):
        program = body_of(jax.make_jaxpr(f)(init, _one_of(xs)))
        _, computed = jax.vmap(f)(before, xs)
    known = jtu.tree_leaves(carries)
    new_carry, put_out = program.outvars[: len(known)], program.outvars[len(known) :]
    leaves = []
    for var, leaf, shape in zip(
        put_out, jtu.tree_leaves(computed), shapes, strict=True
    ):
        # A carry that is put out need not be worked out again.
        same = [k for k, carry in enumerate(new_carry) if carry is var]
        leaf = (known[same[0]] if same else leaf).astype(shape.dtype)
        if is_good is not None and jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaf = rows_where(is_good, leaf, jnp.inf)
        leaves.append(leaf)
    return jtu.tree_unflatten(jtu.tree_structure(structure), leaves)


def _sequential(
    f, init, xs, num_steps: int, reverse: bool, options: dict[str, Any]
) -> RecurrenceSolution:
    def step(carry, x):
        carry, y = f(carry, x)
        return carry, (carry, y)

    # The products as accurate as those of the other method.
    with jax.default_matmul_precision("highest"):
        carry, (carries, ys) = lax.scan(step, init, xs, num_steps, reverse, **options)
    states = jnp.zeros((num_steps, 0), jnp.result_type(float))
    if num_steps > 0 and len(jtu.tree_leaves(init)) > 0:
        states = jax.vmap(StateFlattener(init).flatten)(carries)
    # In the order in which they were found.
    states = states[::-1] if reverse else states
    stats = _stats(sequential_solution(states), StaticString("sequential"), reverse)
    return RecurrenceSolution(carry, ys, carries, optx.RESULTS.successful, stats)
