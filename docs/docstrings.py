"""How docstrings become pages: the package's own ways, in words that Griffe knows; see mkdocs.yml."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import griffe

if TYPE_CHECKING:
    from collections.abc import Iterator


class Headings(griffe.Extension):
    """Writes ``Example:`` as Google's ``Examples:``; sets ``Cancellation:`` and ``Telemetry:`` in bold."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(Cancellation|Telemetry):", r"**\1**:", text, flags=re.MULTILINE)


class Options(griffe.Extension):
    """Lays out ``**options: Unpack[...]`` where the docstring describes each option.

    Griffe's own extension for this reads the docstring before it has changed the signature, and complains.
    """

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called for each function and method."""
        if func.docstring is None or "**options" in func.docstring.value:
            return
        for parameter in list(func.parameters):
            if parameter.kind is griffe.ParameterKind.var_keyword and "Unpack[" in str(parameter.annotation):
                del func.parameters[parameter.name]
                self._lay_out(func, func.modules_collection[parameter.annotation.slice.canonical_path])

    def _lay_out(self, func: griffe.Function, options: griffe.Class) -> None:
        kind = griffe.ParameterKind.keyword_only
        for name, annotation in _fields(options):
            if name not in func.parameters:
                func.parameters.add(griffe.Parameter(name, annotation=annotation, kind=kind, default="..."))


def _fields(typed_dict: griffe.Class) -> Iterator[tuple[str, Any]]:
    for base in typed_dict.bases:
        if str(base) in typed_dict.parent.classes:
            yield from _fields(typed_dict.parent.classes[str(base)])
    for name, attribute in typed_dict.attributes.items():
        yield name, attribute.annotation
