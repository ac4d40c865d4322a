"""Which method: in parallel where that can win, one step after the other elsewhere."""

import equinox as eqx

from ._method import AbstractMethod, solve_sequentially
from ._misc import describe
from ._newton import Newton
from ._plan import Plan, prefers_sequential


class Auto(AbstractMethod):
    r"""Chooses between [`deer_ode.Newton`][] and [`deer_ode.Sequential`][] by itself.

    From the number of steps $T$, the size of the state $n$, the kind of the step and
    the platform that the program is compiled for:

    - On a CPU steps that are maps (Diffrax's solvers, recurrences) are sequential: one
        loop, differentiated by JAX itself. XLA compiles such a loop whole, and the
        iteration seldom takes less time. So are those of collocation methods
        ([`deer_ode.RadauIIA`][] and its like), since to check which solution of its
        equation each step has takes as long.
    - On accelerators, and with [`deer_ode.Obreshkov`][] everywhere, all steps are
        solved together; but maps are sequential as well where there are fewer than 64
        steps, or where $n \ge 64$ and the Jacobian has no structure.

    The answer is the same, and so are derivatives, which are exact either way.
    `stats["path"]` says which way it was, `"sequential"` or `"newton"`.

    ??? cite "Reference"

        Lim, Zhu, Selfridge, Kasim (2024), *Parallelizing non-linear sequential models
        over the sequence length*, figure 2.
    """

    newton: Newton = Newton()

    def __check_init__(self):
        if not isinstance(self.newton, Newton):
            raise ValueError(
                "`Auto(newton)` must be how to iterate, a `Newton(...)`; got "
                f"{describe(self.newton)}."
            )

    @property
    def fallback(self):
        return self.newton.fallback

    @property
    def exact_linearisation(self):
        return self.newton.exact_linearisation

    @property
    def guess(self):
        return self.newton.guess

    def start_from(self, guess):
        return eqx.tree_at(lambda m: m.newton, self, self.newton.start_from(guess))

    def report_to(self, meter):
        return Auto(self.newton.report_to(meter))

    def is_sequential(self, recurrence, platform):
        return prefers_sequential(recurrence, self.newton.linearisation, platform)

    def plan(self, recurrence, platform):
        if self.is_sequential(recurrence, platform):
            return Plan("sequential", platform)
        return self.newton.plan(recurrence, platform)

    def solve(self, recurrence, plan):
        if plan.path == "newton":
            return self.newton.solve(recurrence, plan)
        # Without a fallback a solution that is not finite is a failure.
        return solve_sequentially(recurrence, only_finite=not self.fallback)


Auto.__init__.__doc__ = """**Arguments:**

- `newton`: how to iterate where that is chosen.
"""
