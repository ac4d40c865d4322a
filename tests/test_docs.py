"""What the site is made with, and the code of its pages."""

import importlib.util
import pathlib
import re
import sys
import types

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from .test_nn import drawn


ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def fence_examples(monkeypatch):
    # The site's tools need not be installed: the base class is all that is imported.
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object))
    spec = importlib.util.spec_from_file_location(
        "griffe_tidy", ROOT / "docs" / "griffe_tidy.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fence_examples


def test_examples_are_fenced_where_they_stand(fence_examples):
    text = (
        "One line.\n\n!!! example\n\n    >>> def f(x):\n    ...     return x\n"
        "    >>> f(1)\n    1\n\n    >>> f(2)\n    2\n\nAfter.\n\n>>> 3\n3"
    )
    assert fence_examples(text) == (
        "One line.\n\n!!! example\n\n    ```pycon\n    >>> def f(x):\n"
        "    ...     return x\n    >>> f(1)\n    1\n\n    >>> f(2)\n    2\n    ```\n\n"
        "After.\n\n```pycon\n>>> 3\n3\n```"
    )


@pytest.mark.parametrize(
    "text",
    (
        "",
        "No example: $a >>> b$.",
        "```pycon\n>>> 1\n1\n```\n\n> A quotation.",
    ),
)
def test_all_else_is_left_alone(fence_examples, text):
    assert fence_examples(text) == text


def test_fences_are_fenced_once(fence_examples):
    once = fence_examples("!!! example\n\n    >>> 1\n    1\n")
    assert fence_examples(once) == once


def blocks(page: str) -> list[str]:
    """The Python of a page, block by block."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(code: str, namespace: dict) -> dict:
    # As users have it, without the strictness of the tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(code, namespace)
    return namespace


class Model(eqx.Module):
    """What the code of the page on neural CDEs calls."""

    first: eqx.nn.Linear
    field: eqx.nn.MLP
    last: eqx.nn.Linear

    def __init__(self, key):
        first, field, last = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(3, 4, key=first)
        self.field = eqx.nn.MLP(4, 12, 8, 1, jnp.tanh, jnp.tanh, key=field)
        self.last = eqx.nn.Linear(4, 2, key=last)


def test_the_first_program():
    """That of the first page of the documentation: in parallel, and right."""
    code, *_ = blocks("docs/index.md")
    found = run(code, {})
    sol, field = found["sol"], diffrax.ODETerm(found["field"])
    assert sol.stats["path"] == "newton" and sol.stats["num_fallback_steps"] == 0
    expected = diffrax.diffeqsolve(
        *(field, diffrax.Tsit5(), 0.0, 10.0, 0.01, jnp.array([10.0, 5.0])),
        (1.1, 0.4, 0.4, 0.1),
        saveat=diffrax.SaveAt(ts=sol.ts),
    )
    np.testing.assert_allclose(sol.ys, expected.ys, rtol=1e-12)


def test_neural_cde_page_with_missing_values():
    """Also in the first row and the last; and a channel without any is an error."""
    (code,) = blocks("docs/neural-cde.md")
    classify = run(code, {})["classify"]
    rng = np.random.default_rng(0)
    ts = jnp.asarray(np.cumsum(rng.uniform(0.1, 0.3, (4, 30)), axis=1))
    xs = rng.normal(size=(4, 30, 2))
    xs[rng.random(xs.shape) < 0.2] = np.nan
    xs[:, 0, 0] = xs[:, -1, 1] = xs[1, :3] = np.nan
    labels = jnp.arange(4) % 2

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, ts, xs):
        logits = jax.vmap(lambda ts, xs: classify(model, ts, xs))(ts, xs)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), labels])

    model = drawn(Model, 0)
    value, gradient = loss(model, ts, jnp.asarray(xs))
    assert jnp.isfinite(value)
    leaves = jax.tree_util.tree_leaves(gradient)
    assert all(jnp.all(jnp.isfinite(x)) and jnp.any(x != 0) for x in leaves)
    xs[2, :, 1] = np.nan
    with pytest.raises(RuntimeError, match="channel without any value"):
        loss(model, ts, jnp.asarray(xs))


def test_dense_data_by_few_long_steps():
    """The code of the page on how to choose, and the error that it names."""
    (code,) = blocks("docs/how-to-choose.md")
    found = run(code, {})
    assert jnp.isfinite(found["value"]) and found["gradient"] > 0
    # A pendulum let go at an angle of one, by Jacobi's elliptic functions.
    k = np.sin(0.5)
    _, cn, dn, _ = scipy.special.ellipj(np.asarray(found["ts"]), k**2)
    exact = 2 * np.arcsin(k * cn / dn)
    # The page says 5e-10.
    assert jnp.max(jnp.abs(found["data"] - exact)) < 1e-9
