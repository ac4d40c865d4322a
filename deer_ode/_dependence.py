r"""Which entries of a map's value depend on which entries of its argument.

The program that computes the map's *derivative* is traced and followed, one operation
after the other, with a mask for each array in it: entry $(i, j)$ says whether its
$i$-th number may depend on the $j$-th number of the tangent. Of the derivative and not
of the map, so that rules of one's own (`jax.custom_jvp`) have been replaced by what
they do, and what has no derivative (a comparison, a rounding) depends on nothing.

Nothing is evaluated: where a number is zero only by chance it counts as a dependence,
and an operation that is not known here makes all its values depend on all its
arguments. So a structure that is found is there for every argument.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ._custom_types import State
from ._foreign import (
    Literal,
    body_of,
    called_program,
    constants_of,
    is_program,
    is_ref,
    run_program,
    scan_parts,
    while_parts,
)


# An array of booleans, or `None` where there is no dependence, so that most of a
# program costs nothing.
_Mask = Any

# A mask of more entries is not made; the map then counts as dense.
_MAX_MASK = 2**27

_ELEMENTWISE = frozenset(
    "add add_any atan2 complex conj convert_element_type copy copy_p div imag max min "
    "mul neg pow real reduce_precision rem select_n sub".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod".split())
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
# They only move numbers about, by their parameters and by integers.
_MOVES = frozenset("gather dynamic_slice dynamic_update_slice scatter pad".split())


# Programs that are called with their arguments, and no more.
_CALLS = frozenset("pjit jit closed_call core_call remat checkpoint remat2".split())

# They join what is mapped side by side, so that a step is not one of its own state.
_COLLECTIVES = frozenset(
    "psum psum2 psum_invariant pmax pmin ppermute pbroadcast all_gather all_to_all "
    "all_gather_invariant reduce_scatter psum_scatter".split()
)


NO_FORWARD_MODE = (
    "The step calls a function with a `jax.custom_vjp` rule, which has no derivatives "
    "in forward mode; Newton's method needs them. Give it a `jax.custom_jvp` rule, or "
    "go step by step: `jax.lax.scan`, or `method=Sequential()`."
)


class _Unknown(Exception):
    """It would take too much memory, or arrays are changed in place."""


def dependence(
    step: Callable[..., State], y: jax.ShapeDtypeStruct, *inputs: Any
) -> Bool[np.ndarray, "state state"] | None:
    """Row $i$, column $j$: whether entry $i$ of `step(y, *inputs)` may depend on entry
    $j$ of `y`. `None` where that would take too much memory to find out, or where
    arrays are changed in place.

    Needs shapes and dtypes only, so that it works on traced values.

    **Raises:**

    - `TypeError`: where the step has no derivatives in forward mode.
    - `ValueError`: where the step joins what is mapped side by side (`jax.lax.psum`).
    """
    (size,) = y.shape

    def tangent(t_y, y, inputs):
        return jax.jvp(lambda y: step(y, *inputs), (y,), (t_y,))[1]

    program = jax.make_jaxpr(tangent)(y, y, inputs)
    # After the trace, whose errors are raised for a state of any size.
    if size**2 > _MAX_MASK:
        return None
    num_others = len(body_of(program).invars) - 1
    masks = [np.eye(size, dtype=bool), *[None] * num_others]
    try:
        (out,) = _follow(program, masks, size)
    except _Unknown:
        return None
    return np.zeros((size, size), bool) if out is None else out


def _follow(program, masks: list[_Mask], size: int, values=None):
    """The masks of the outputs of a program, from those of its inputs.

    `values` are those of the inputs that are known beforehand, small integers, which
    tell where numbers are moved to.
    """
    jaxpr, const_values = body_of(program), constants_of(program)
    mask_of: dict[Any, _Mask] = dict(zip(jaxpr.invars, masks, strict=True))
    value_of: dict[Any, Any] = dict(
        zip(jaxpr.invars, values or [None] * len(masks), strict=True)
    )
    for var, const in zip(jaxpr.constvars, const_values, strict=True):
        value_of[var] = None if isinstance(const, jax.core.Tracer) else const

    def mask(atom):
        return None if isinstance(atom, Literal) else mask_of.get(atom)

    def value(atom):
        return atom.val if isinstance(atom, Literal) else value_of.get(atom)

    last_use = {
        atom: k
        for k, eqn in enumerate(jaxpr.eqns)
        for atom in eqn.invars
        if not isinstance(atom, Literal)
    }
    last_use |= {a: -1 for a in jaxpr.outvars if not isinstance(a, Literal)}
    for k, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive.name in _COLLECTIVES:
            raise ValueError(
                f"The step calls `{eqn.primitive.name}`, which joins what is mapped "
                "side by side: its states can then not be solved for one by one. Map "
                "within the step instead, or use `jax.lax.scan`."
            )
        if eqn.primitive.name == "custom_lin":
            raise TypeError(NO_FORWARD_MODE)
        if any(is_ref(atom) for atom in eqn.invars):
            raise _Unknown
        ins = [mask(atom) for atom in eqn.invars]
        if any(m is not None for m in ins):
            for var in eqn.outvars:
                if int(np.prod(var.aval.shape)) * size > _MAX_MASK:
                    raise _Unknown
            outs = _apply_rule(eqn, ins, [value(a) for a in eqn.invars], size)
            mask_of |= dict(zip(eqn.outvars, outs, strict=True))
            for atom in eqn.invars:
                if not isinstance(atom, Literal) and last_use[atom] == k:
                    mask_of.pop(atom, None)
        elif known := _known_integers(eqn, [value(a) for a in eqn.invars]):
            value_of |= dict(zip(eqn.outvars, known, strict=True))
    return [mask(atom) for atom in jaxpr.outvars]


def _known_integers(eqn, values):
    """Indices are worked out where they do not depend on run-time values."""
    small = all(
        hasattr(v.aval, "dtype")
        and not jnp.issubdtype(v.aval.dtype, jnp.inexact)
        and not jnp.issubdtype(v.aval.dtype, jax.dtypes.extended)
        and int(np.prod(v.aval.shape)) <= 2**16
        for v in eqn.outvars
    )
    if not small or any(v is None for v in values) or eqn.effects:
        return None
    with jax.ensure_compile_time_eval():
        program = eqn.params.get("jaxpr")
        if eqn.primitive.name in _CALLS and is_program(program):
            out = run_program(body_of(program), constants_of(program), *values)
        elif any(is_program(p) for p in eqn.params.values()):
            return None
        else:
            out = eqn.primitive.bind(*map(jnp.asarray, values), **eqn.params)
    return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]


def _apply_rule(eqn, ins: list[_Mask], values, size: int) -> list[_Mask]:
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    (shape, *_) = [v.aval.shape for v in eqn.outvars]
    first = ins[0]
    if name in _ELEMENTWISE:
        # A scalar may meet an array; masks broadcast as what they belong to does.
        lift = lambda m: m.reshape((1,) * (len(shape) + 1 - m.ndim) + m.shape)
        present = [lift(m) for m in ins if m is not None]
        return [np.broadcast_to(_either(present), (*shape, size))]
    if name in ("reshape", "squeeze"):
        if name == "reshape" and params["dimensions"] is not None:
            axes = params["dimensions"]  # the order in which numbers are read
            first = first.transpose(*axes, *range(len(axes), first.ndim))
        return [first.reshape(*shape, size)]
    if name == "transpose":
        return [first.transpose(*params["permutation"], first.ndim - 1)]
    if name == "rev":
        return [np.flip(first, params["dimensions"])]
    if name == "broadcast_in_dim":
        kept = [1] * len(shape)
        for axis, length in zip(params["broadcast_dimensions"], shapes[0], strict=True):
            kept[axis] = length
        return [np.broadcast_to(first.reshape(*kept, size), (*shape, size))]
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        ends = (params["start_indices"], params["limit_indices"], strides)
        return [first[tuple(slice(*cut) for cut in zip(*ends, strict=True))]]
    if name == "split":
        ends = np.cumsum(params["sizes"])[:-1]
        return list(np.split(first, ends, axis=params["axis"]))
    if name == "concatenate":
        full = [_filled(m, s, size) for m, s in zip(ins, shapes, strict=True)]
        return [np.concatenate(full, axis=params["dimension"])]
    if name == "stack":
        full = [_filled(m, s, size) for m, s in zip(ins, shapes, strict=True)]
        return [np.stack(full, axis=params["axis"])]
    if name == "tile":
        return [np.tile(first, (*params["reps"], 1))]
    if name in _REDUCTIONS:
        return [first.any(axis=tuple(params["axes"]))]
    if name in _CUMULATIVE:
        axis = params["axis"]
        turn = lambda m: np.flip(m, axis) if params["reverse"] else m
        return [turn(np.logical_or.accumulate(turn(first), axis=axis))]
    if name == "dot_general":
        return [_dot_general(ins, shapes, shape, params["dimension_numbers"], size)]
    if name in _MOVES:
        moved = _move(eqn, ins, values, shapes, size)
        if moved is not None:
            return [moved]
    if name == "scan":
        return _scan(params, ins, size)
    if name == "while":
        return _while(params, ins, size)
    if name == "cond":
        branches = [_follow(b, ins[1:], size) for b in params["branches"]]
        return [_union(masks) for masks in zip(*branches, strict=True)]
    inner = called_program(params)
    is_call = inner is not None and len(body_of(inner).invars) == len(ins)
    if is_call and name in _CALLS:
        return _follow(inner, ins, size, values)
    return _all_on_all(eqn, ins, size)


def _all_on_all(eqn, ins, size):
    rows = [m.reshape(-1, size).any(axis=0) for m in ins if m is not None]
    return [np.broadcast_to(_either(rows), (*v.aval.shape, size)) for v in eqn.outvars]


def _filled(mask: _Mask, shape, size) -> _Mask:
    return np.zeros((*shape, size), bool) if mask is None else mask


def _either(masks: list[_Mask]) -> _Mask:
    out = masks[0]
    for mask in masks[1:]:
        out = out | mask
    return out


def _union(masks) -> _Mask:
    present = [m for m in masks if m is not None]
    return _either(present) if present else None


def _dot_general(ins, shapes, out_shape, dimension_numbers, size) -> _Mask:
    (contracting, batch) = dimension_numbers
    out = np.zeros((1,) * (len(out_shape) + 1), bool)
    num_batch = len(batch[0])
    num_free = [
        len(s) - len(c) - num_batch for s, c in zip(shapes, contracting, strict=True)
    ]
    for side, mask in enumerate(ins):
        if mask is None:
            continue
        ndim = len(shapes[side])
        gone = (*contracting[side], *batch[side])
        free = [axis for axis in range(ndim) if axis not in gone]
        mask = mask.transpose(*batch[side], *free, *contracting[side], ndim)
        num_kept = num_batch + len(free)
        mask = mask.any(axis=tuple(range(num_kept, ndim)))
        # The dimensions of a product: the batch's, the left's own, the right's own.
        own = (slice(None),) * num_free[side]
        other = (None,) * num_free[1 - side]
        ends = (*own, *other) if side == 0 else (*other, *own)
        out = out | mask[(*[slice(None)] * num_batch, *ends)]
    return np.broadcast_to(out, (*out_shape, size))


def _move(eqn, ins, values, shapes, size) -> _Mask:
    """What is only moved about is, in a program of the places that numbers are at."""
    is_index = [jnp.issubdtype(v.aval.dtype, jnp.integer) for v in eqn.invars]
    if any(i and v is None for i, v in zip(is_index, values, strict=True)):
        return None
    places, masks, start = [], [], 0
    for k, shape in enumerate(shapes):
        count = int(np.prod(shape))
        if not is_index[k]:
            places.append(
                np.arange(start, start + count, dtype=np.int32).reshape(shape)
            )
            masks.append(_filled(ins[k], shape, size).reshape(count, size))
            start += count
        else:
            places.append(np.asarray(values[k]))
    params = dict(eqn.params)
    if "fill_value" in params:
        params["fill_value"] = -1
    with jax.ensure_compile_time_eval():
        moved = np.asarray(eqn.primitive.bind(*map(jnp.asarray, places), **params))
    table = np.concatenate(masks)
    # What a gather outside of its array is filled with is not a place.
    inside = (moved >= 0) & (moved < start)
    return table[np.where(inside, moved, 0)] & inside[..., None]


def _fixed_point(body, carry: list[_Mask]) -> list[_Mask]:
    """A loop may hand on at its next turn what it has got at this one."""
    while True:
        after = [_union(pair) for pair in zip(carry, body(carry), strict=True)]
        same = all(
            (a is None and c is None)
            or (a is not None and c is not None and np.array_equal(a, c))
            for a, c in zip(after, carry, strict=True)
        )
        if same:
            return carry
        carry = after


def _while(params, ins, size) -> list[_Mask]:
    body, num_skipped, num_consts = while_parts(params)
    consts = ins[num_skipped : num_skipped + num_consts]
    return _fixed_point(
        lambda carry: _follow(body, [*consts, *carry], size),
        ins[num_skipped + num_consts :],
    )


def _scan(params, ins, size) -> list[_Mask]:
    body, num_consts, num_carry = scan_parts(params)
    consts = ins[:num_consts]
    xs = [None if m is None else m.any(axis=0) for m in ins[num_consts + num_carry :]]

    def once(carry):
        return _follow(body, [*consts, *carry, *xs], size)

    carry = _fixed_point(
        lambda carry: once(carry)[:num_carry],
        ins[num_consts : num_consts + num_carry],
    )
    ys = [
        m if m is None else np.broadcast_to(m, (params["length"], *m.shape))
        for m in once(carry)[num_carry:]
    ]
    return [*carry, *ys]
