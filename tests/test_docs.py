"""What the site is made with, and the code of its pages."""

import importlib.util
import pathlib
import sys
import types

import pytest


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
