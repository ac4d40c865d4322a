"""Traced programs (jaxprs) from which the checks of the user are removed.

A check of the user (`equinox.error_if` in a vector field) must fail a solve exactly
when the answer trips it. Newton's method evaluates the field at iterates as well, which
mean nothing. So the iteration is traced as it is, and then the branches that would
raise are taken out of the traced program; the steps along the converged trajectory
keep theirs. No setting of the process is touched, so neither threads nor caches of
traced programs can see it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._foreign import (
    body_of,
    closed,
    constants_of,
    inner_programs,
    is_check,
    is_program,
    is_raise,
    passed,
    run_program,
)


def _raises(program: Any) -> bool:
    return any(
        is_raise(equation) or any(_raises(p) for p in inner_programs(equation))
        for equation in body_of(program).eqns
    )


def _without_checks(program: Any) -> Any:
    """The same program; where a check would raise, it goes on as if it had passed."""
    body = body_of(program)
    equations = []
    for equation in body.eqns:
        if not any(_raises(p) for p in inner_programs(equation)):
            equations.append(equation)
            continue
        if is_check(equation):
            equations.append(passed(equation))
            continue
        params = jtu.tree_map(
            lambda p: _without_checks(p) if is_program(p) else p,
            equation.params,
            is_leaf=lambda p: is_program(p) or not isinstance(p, dict | list | tuple),
        )
        equations.append(equation.replace(params=params))
    body = body.replace(eqns=equations)
    return body if program is body_of(program) else closed(body, constants_of(program))


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
        shapes, structure = jtu.tree_flatten(self._out_shapes)
        out = run_program(self._body, self._constants, *inputs)
        # Constants come as Python numbers.
        out = [
            x if eqx.is_array(x) else jnp.asarray(x, s.dtype)
            for x, s in zip(out, shapes, strict=True)
        ]
        out = jtu.tree_unflatten(structure, out)
        return eqx.combine(out, self._out_static)


def without_checks(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` that no `equinox.error_if` ends. Traced again in each call."""
    return lambda *args: Program.of(fn, *args)(*args)
