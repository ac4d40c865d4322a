"""Newton steps by initial guess, and how far the answer is from the sequential one."""

import diffrax
import equinox as eqx
import jax.numpy as jnp

import deer_ode

from ._fixed_steps import _lotka_volterra


def _van_der_pol(t, y, mu):
    del t
    x, v = y
    return jnp.stack([v, mu * (1 - x**2) * v - x])


def run(quick: bool = False) -> list[dict]:
    """One row a problem, in float64."""
    lv = tuple(jnp.asarray(x, jnp.float64) for x in (1.1, 0.4, 0.4, 0.1))
    problems = [
        ("Lotka-Volterra", _lotka_volterra, lv, [10.0, 5.0], 160.0, 16_000),
        (
            "Van der Pol",
            _van_der_pol,
            jnp.float64(5.0),
            [2.0, 0.0],
            40.0,
            8_000,
        ),
    ]
    guesses = {
        "Coarse(8)": deer_ode.Coarse(),
        "Coarse(4)": deer_ode.Coarse(4),
        "Coarse(16)": deer_ode.Coarse(16),
        "Constant()": deer_ode.Constant(),
    }
    rows = []
    for name, field, args, y0, t1, num_steps in problems:
        if quick:
            t1, num_steps = t1 / 20, num_steps // 20
        term, y0 = diffrax.ODETerm(field), jnp.array(y0, jnp.float64)
        expected = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, t1, t1 / num_steps, y0, args,
            saveat=diffrax.SaveAt(steps=True), max_steps=num_steps,
        ).ys  # fmt: skip
        expected = jnp.asarray(expected)
        for guess_name, guess in guesses.items():
            method = deer_ode.Newton(guess=guess, newton_max_steps=300, window=None)
            sol = eqx.filter_jit(deer_ode.diffeqsolve)(
                term, deer_ode.DEER(diffrax.Tsit5(), method), 0.0, t1, t1 / num_steps,
                y0, args, saveat=diffrax.SaveAt(steps=True),
            )  # fmt: skip
            ys = jnp.asarray(sol.ys)
            error = jnp.max(jnp.abs(ys - expected)) / jnp.max(jnp.abs(expected))
            rows.append(
                {
                    "problem": name,
                    "t1": t1,
                    "steps": num_steps,
                    "guess": guess_name,
                    "num_newton_steps": int(sol.stats["num_newton_steps"]),
                    "num_fallback_steps": int(sol.stats["num_fallback_steps"]),
                    "difference": float(error),
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| problem | time units | steps | guess | Newton steps | finished sequentially "
        "| difference from stock Diffrax |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['problem']} | {row['t1']:g} | {row['steps']:,} | {row['guess']} | "
            f"{row['num_newton_steps']} | {row['num_fallback_steps']:,} | "
            f"{row['difference']:.1e} |"
        )
    return "\n".join(lines)
