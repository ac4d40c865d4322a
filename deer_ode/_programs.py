"""Traced programs (jaxprs): what JAX versions call differently, and checks removed.

A check of the user (`equinox.error_if` in a vector field) must fail a solve exactly
when the answer trips it. Newton's method evaluates the field at iterates as well, which
mean nothing. So the iteration is traced as it is, and then the branches that would
raise are taken out of the traced program; the steps along the converged trajectory
keep theirs. No setting of the process is touched, so neither threads nor caches of
traced programs can see it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax.extend.core as jexc
import jax.tree_util as jtu
import numpy as np


# From JAX 0.11 on one class with the other.
_ClosedJaxpr: Any = jexc.ClosedJaxpr  # pyright: ignore
_PROGRAMS = jexc.Jaxpr | _ClosedJaxpr

# The module whose callbacks raise the errors of `equinox.error_if`.
_RAISES = "equinox._errors"


def body_of(program: Any) -> Any:
    """The equations. Before JAX 0.11 a closed program holds them and its constants."""
    return getattr(program, "jaxpr", program)


def constants_of(program: Any) -> list:
    return list(getattr(program, "consts", ()))


def closed(body: Any, constants: list) -> Any:
    return _ClosedJaxpr(body, constants)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many constants and how many carries a `scan` equation has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


def is_program(x: Any) -> bool:
    return isinstance(x, _PROGRAMS)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for leaf in jtu.tree_leaves(list(params.values()), is_leaf=is_program):
        if is_program(leaf):
            yield leaf


def _is_raise(equation: Any) -> bool:
    callback = equation.params.get("callback")
    callback = getattr(callback, "callback_func", callback)
    return (
        equation.primitive.name == "pure_callback"
        and getattr(callback, "__module__", None) == _RAISES
    )


def _raises(program: Any) -> bool:
    return any(
        _is_raise(equation) or any(_raises(p) for p in _inner(equation.params))
        for equation in body_of(program).eqns
    )


def _without_checks(program: Any) -> Any:
    """The same program; where a check would raise, it goes on as if it had passed."""
    body = body_of(program)
    equations = []
    for equation in body.eqns:
        params = equation.params
        if not any(_raises(p) for p in _inner(params)):
            equations.append(equation)
            continue
        if equation.primitive.name == "cond" and any(
            _is_raise(e) for branch in params["branches"] for e in body_of(branch).eqns
        ):
            # Equinox has what passes first.
            index, *operands = equation.invars
            passes = jexc.Literal(np.asarray(0, index.aval.dtype), index.aval)
            equations.append(equation.replace(invars=[passes, *operands]))
            continue
        params = jtu.tree_map(
            lambda p: _without_checks(p) if is_program(p) else p,
            params,
            is_leaf=lambda p: is_program(p) or not isinstance(p, dict | list | tuple),
        )
        equations.append(equation.replace(params=params))
    body = body.replace(eqns=equations)
    return body if program is body_of(program) else closed(body, program.consts)


class Program(eqx.Module):
    """A function as traced once, without the checks of the user."""

    _constants: list
    _body: Any = eqx.field(static=True)
    _out_shapes: Any = eqx.field(static=True)
    _out_static: Any = eqx.field(static=True)
    has_checks: bool = eqx.field(static=True)

    @classmethod
    def of(cls, fn: Callable[..., Any], *args: Any) -> "Program":
        # Within a function: Equinox warns of attributes that are transformed callables.
        call = lambda *args: fn(*args)
        program, out_shapes, out_static = eqx.filter_make_jaxpr(call)(*args)
        constants, has_checks = constants_of(program), _raises(program)
        if has_checks:
            program = _without_checks(program)
        return cls(constants, body_of(program), out_shapes, out_static, has_checks)

    def __call__(self, *args: Any) -> Any:
        inputs = jtu.tree_leaves(eqx.filter(args, eqx.is_array))
        program = closed(self._body, self._constants)
        out = jexc.jaxpr_as_fun(program)(*inputs)
        out = jtu.tree_unflatten(jtu.tree_structure(self._out_shapes), out)
        return eqx.combine(out, self._out_static)


def without_checks(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` that no `equinox.error_if` ends. Traced again in each call."""
    return lambda *args: Program.of(fn, *args)(*args)
