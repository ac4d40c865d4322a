"""What is measured: one problem, and the programs that solve it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


#: What tells rows of one device and one set of flags apart.
KEY = ("family", "name", "n", "steps", "batch", "dtype", "work")


class Plan(NamedTuple):
    """Which cases of a family are wanted."""

    quick: bool = False
    on_gpu: bool = False
    steps: tuple[int, ...] | None = None
    """In place of the family's own numbers of steps."""

    def choose_steps(self, cpu, gpu, quick) -> tuple[int, ...]:
        return self.steps or (quick if self.quick else gpu if self.on_gpu else cpu)


class Counted(NamedTuple):
    """An answer, and how it was found."""

    answer: Any
    newton_steps: Array
    fallback_steps: Array

    @staticmethod
    def of(answer, stats) -> "Counted":
        return Counted(answer, stats["num_newton_steps"], stats["num_fallback_steps"])


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of results.

    `programs` are functions of the same `arguments()`, which return the same answer, or
    a `Counted` one. Nothing is allocated before `arguments` is called. The answer of
    `reference` is what the others are compared with, and that of `not_compared` is
    another.
    """

    family: str
    name: str
    n: int
    steps: int
    dtype: str
    work: str
    programs: dict[str, Callable]
    arguments: Callable[[], tuple]
    reference: str
    batch: int = 1
    not_compared: tuple[str, ...] = ()

    @property
    def key(self) -> tuple:
        return tuple(getattr(self, name) for name in KEY)


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def gradient(solve: Callable) -> Callable:
    """The mean square of an answer, and its derivatives by the first argument."""

    def loss(params, *others):
        answer, *counts = _counted(solve(params, *others))
        return jnp.mean(answer**2), counts

    def program(params, *others):
        (value, counts), slopes = jax.value_and_grad(loss, has_aux=True)(
            params, *others
        )
        return Counted((value, slopes), *counts) if counts else (value, slopes)

    return program


def _counted(output) -> tuple:
    return tuple(output) if isinstance(output, Counted) else (output,)


#: The programs of each kind of work, from those of the forward pass.
WORKS: dict[str, Callable[[Callable], Callable]] = {
    "forward": lambda solve: solve,
    "gradient": gradient,
}
