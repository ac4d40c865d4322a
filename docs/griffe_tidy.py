"""What the API page needs done to docstrings before they are Markdown.

Docstrings that inspection finds on objects which were never given one are dropped: an
inspected class attribute has the docstring of its value's type (that of `float`, for a
field with a default), and an undocumented `__init__` that of `object.__init__`.

Examples of the form `>>> ...` are fenced. Markdown reads `>` as the start of a
quotation, so without a fence the example becomes three nested quotations.
"""

from __future__ import annotations

from typing import Any

import griffe


_PROMPT = ">>>"


def fence_examples(text: str) -> str:
    """Puts a `pycon` fence around each example, at the indentation of the example.

    An example starts at a line with the prompt `>>>` and ends before the first blank
    line, as in `doctest`. Blank lines between two examples of the same indentation
    belong to one fence. Examples that are fenced already are left as they are.
    """
    lines = text.split("\n")
    fenced: list[str] = []
    is_fenced = False
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.lstrip().startswith(("```", "~~~")):
            is_fenced = not is_fenced
        if is_fenced or not line.lstrip().startswith(_PROMPT):
            fenced.append(line)
            i += 1
            continue
        indent = line[: len(line) - len(line.lstrip())]
        end = i
        while end < len(lines) and lines[end].strip():
            end += 1
            following = end
            while following < len(lines) and not lines[following].strip():
                following += 1
            if following < len(lines) and lines[following].startswith(indent + _PROMPT):
                end = following
        fenced += [indent + "```pycon", *lines[i:end], indent + "```"]
        i = end
    return "\n".join(fenced)


class Tidy(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        # A property has a docstring of its own.
        if "property" not in attr.labels:
            attr.docstring = None

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        _fence(cls)

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        inherited = object.__init__.__doc__
        if func.docstring is not None and func.docstring.value == inherited:
            func.docstring = None
        _fence(func)


def _fence(documented: griffe.Object) -> None:
    if documented.docstring is not None:
        documented.docstring.value = fence_examples(documented.docstring.value)
