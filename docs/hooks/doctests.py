"""Examples in docstrings are code to Markdown: a paragraph that begins with ``>>>`` is fenced."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """An extension of griffe, which reads the docstrings of the API's pages."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Once an object is read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """The docstring with its examples fenced, outside of any section."""
    paragraphs = docstring.split("\n\n")
    return "\n\n".join(f"```pycon\n{part}\n```" if part.startswith(">>>") else part for part in paragraphs)
