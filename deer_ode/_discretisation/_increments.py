r"""Brownian increments, drawn once for all steps of a grid.

A virtual Brownian tree descends from its root to the step for every increment, which
costs far more than the step that uses it. What a step asks of a path depends on its
times, not on the state: so it is asked for once, for all steps together, and given to
every copy of the step that Newton's method takes.

What that is no solver has to say. One step is traced with paths that note what they are
asked, in order; later copies of the step find the answers in that order. A solver that
takes half steps gets the increments of those.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._custom_types import State
from .._foreign import Literal, body_of, constants_of, run_program


class _Request(NamedTuple):
    """What a path was asked, apart from the times."""

    path: int
    options: tuple


class AbstractStandIn(diffrax.AbstractBrownianPath):
    """Takes the place of a Brownian path while a step is traced."""

    path: eqx.AbstractVar[diffrax.AbstractBrownianPath]

    @property
    def t0(self):
        return self.path.t0

    @property
    def t1(self):
        return self.path.t1

    @property
    def levy_area(self):
        return self.path.levy_area

    def __getattr__(self, name):
        # Whatever else someone's own vector field wants of its path.
        if name.startswith("__") or name == "path":
            raise AttributeError(name)
        return getattr(self.path, name)


class _Tape:
    """What all paths of a step were asked, in order. Known by its identity."""

    def __init__(self):
        self.requests = []
        self.increments = []
        self.position = 0


class _Recorder(AbstractStandIn):
    """Notes what it is asked and what the path says."""

    path: diffrax.AbstractBrownianPath
    index: int = eqx.field(static=True)
    tape: _Tape = eqx.field(static=True)

    def evaluate(self, t0, t1=None, *args, **kwargs):
        value = self.path.evaluate(t0, t1, *args, **kwargs)
        if t1 is not None:
            options = (args, tuple(sorted(kwargs.items())))
            self.tape.requests.append(_Request(self.index, options))
            self.tape.increments.append(value)
        return value


class _Player(AbstractStandIn):
    """Gives what is stored, as long as it is asked the same as the recorder was."""

    path: diffrax.AbstractBrownianPath
    increments: list
    index: int = eqx.field(static=True)
    tape: _Tape = eqx.field(static=True)

    def evaluate(self, t0, t1=None, *args, **kwargs):
        tape = self.tape
        position = tape.position
        request = _Request(self.index, (args, tuple(sorted(kwargs.items()))))
        if t1 is not None and tape.requests[position : position + 1] == [request]:
            tape.position += 1
            return self.increments[position]
        # Not the step that was recorded: nothing stored may be trusted from here on.
        if t1 is not None:
            tape.position = len(tape.requests)
        return self.path.evaluate(t0, t1, *args, **kwargs)


def _is_brownian(x) -> bool:
    return isinstance(x, diffrax.AbstractBrownianPath)


def _replace_paths(terms, stand_in: Callable):
    """`terms` with `stand_in(path, index)` for each of their Brownian paths."""
    leaves, structure = jtu.tree_flatten(terms, is_leaf=_is_brownian)
    leaves = [stand_in(x, i) if _is_brownian(x) else x for i, x in enumerate(leaves)]
    return jtu.tree_unflatten(structure, leaves)


def _accumulate(increment):
    r"""Increments from the start of each block, by Chen's relation.

    With $\bar H = h H$ and $\bar K = h^2 K$, the interval $(0, s)$ followed by one of
    length $h$ has

    $$\bar H + \bar H' + \tfrac12 B, \quad
    \bar K + \bar K' + \tfrac h2 \bar H - \tfrac s2 \bar H' + \tfrac{h - s}{12} B,
    \quad B = h W - s W'.$$

    In backward time the intervals come in the other order, and $B$ has the other sign,
    which is not allowed for: the sums make a first guess, and Levy areas are the
    smallest part of it.
    """
    if not isinstance(increment, diffrax.AbstractBrownianIncrement):
        return jtu.tree_map(lambda w: jnp.cumsum(w, axis=1), increment)
    if type(increment) not in _INCREMENTS:
        return None
    names = ("W", "H", "K")[: 1 + _INCREMENTS.index(type(increment))]

    def add_up(h, w, hh=None, kk=None):
        total = jnp.cumsum(h, axis=1)
        widen = lambda x: x.reshape(x.shape + (1,) * (w.ndim - x.ndim))
        # Where nothing has passed yet all areas are zero.
        length = widen(jnp.where(total == 0, 1, total))
        s, h = widen(total - h), widen(h)
        sums = [jnp.cumsum(w, axis=1)]
        if hh is not None:
            bridge = h * (sums[0] - w) - s * w
            bar_h = jnp.cumsum(h * hh + bridge / 2, axis=1)
            sums.append(bar_h / length)
            if kk is not None:
                before = bar_h - (h * hh + bridge / 2)
                bar_k = h**2 * kk + h / 2 * before - s / 2 * (h * hh)
                bar_k = jnp.cumsum(bar_k + (h - s) / 12 * bridge, axis=1)
                sums.append(bar_k / length**2)
        return total, *sums

    sums = jtu.tree_map(add_up, increment.dt, *(getattr(increment, n) for n in names))
    structure = jtu.tree_structure(increment.W)
    dt, *rest = jtu.tree_transpose(
        structure, jtu.tree_structure((0,) * (1 + len(names))), sums
    )
    return type(increment)(dt=dt, **dict(zip(names, rest, strict=True)))


_INCREMENTS = (
    diffrax.BrownianIncrement,
    diffrax.SpaceTimeLevyArea,
    diffrax.SpaceTimeTimeLevyArea,
)


class Draw(eqx.Module):
    """The increments that one step uses, from the inputs `x` of that step."""

    _consts: list
    _jaxpr: Any = eqx.field(static=True)
    _state: Any = eqx.field(static=True)
    _structure: Any = eqx.field(static=True)
    _requests: tuple = eqx.field(static=True)

    def __call__(self, x: PyTree[Array]) -> list[PyTree[Array]]:
        if self._jaxpr is None:
            return []
        # It was made sure that the state makes no difference.
        state = jnp.zeros(self._state.shape, self._state.dtype)
        out = run_program(self._jaxpr, self._consts, state, *jtu.tree_leaves(x))
        return jtu.tree_unflatten(self._structure, out)

    def use(self, terms, increments: list[PyTree[Array]]):
        """`terms` for one step whose increments have been drawn."""
        if self._jaxpr is None:
            return terms
        tape = _Tape()
        tape.requests = list(self._requests)
        player = lambda path, i: _Player(path, increments, i, tape)  # pyright: ignore
        return _replace_paths(terms, player)

    def accumulate(self, increments: list[PyTree[Array]]) -> list[PyTree[Array]] | None:
        """Increments from the start of each block, of shape `(blocks, steps, ...)`.

        `None` where it is not known how: a path that a step asks more than once was
        asked for parts of the step.
        """
        paths = [request.path for request in self._requests]
        sums = [_accumulate(increment) for increment in increments]
        if not sums or len(set(paths)) < len(paths):
            return None
        if any(total is None for total in sums):
            return None
        return sums


_NOTHING = Draw([], None, None, None, ())


def _needed(jaxpr, outputs) -> tuple[list, set]:
    """The equations that `outputs` rest on, and all variables in those."""
    variables = lambda atoms: {x for x in atoms if not isinstance(x, Literal)}
    needed = variables(outputs)
    equations = []
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            equations.append(equation)
            needed |= variables(equation.invars)
    return equations[::-1], needed


def record_draw(step: Callable, terms, y: State, x: PyTree[Array]) -> Draw:
    """What `step(terms, y, x)` asks of the Brownian paths in `terms`.

    There is nothing to draw where increments depend on the state, or where a path is
    asked from within a loop of the solver: such steps ask the paths themselves.
    """
    leaves = jtu.tree_leaves(terms, is_leaf=_is_brownian)
    if not any(_is_brownian(leaf) for leaf in leaves):
        return _NOTHING
    tape = _Tape()
    recorder = lambda path, i: _Recorder(path, i, tape)  # pyright: ignore

    def draw(y, x):
        step(_replace_paths(terms, recorder), y, x)
        return tape.increments

    program, out, static = eqx.filter_make_jaxpr(draw)(y, x)
    jaxpr = body_of(program)
    # From within a loop a value of no meaning outside gets here, as a constant.
    made = {v for equation in jaxpr.eqns for v in equation.outvars}
    is_plain = all(
        not isinstance(v, Literal) and v in made and not v.aval.weak_type
        for v in jaxpr.outvars
    )
    if not is_plain or jtu.tree_leaves(static):
        return _NOTHING
    equations, needed = _needed(jaxpr, jaxpr.outvars)
    if jaxpr.invars[0] in needed:
        return _NOTHING
    consts = [
        (v, c)
        for v, c in zip(jaxpr.constvars, constants_of(program), strict=True)
        if v in needed
    ]
    jaxpr = jaxpr.replace(eqns=equations, constvars=[v for v, _ in consts])
    return Draw(
        [c for _, c in consts],
        jaxpr,
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        jtu.tree_structure(out),
        tuple(tape.requests),
    )
