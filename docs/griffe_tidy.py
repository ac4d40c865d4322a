"""Drop docstrings that inspection finds on objects which were never given one.

An inspected class attribute has the docstring of its value's type (that of `float`, for
a field with a default), and an undocumented `__init__` that of `object.__init__`.
"""

from typing import Any

import griffe


class Tidy(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        attr.docstring = None

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        inherited = object.__init__.__doc__
        if func.docstring is not None and func.docstring.value == inherited:
            func.docstring = None
