"""Typed fields of a component, read from its constructor's signature."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from registry.errors import UsageError

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Field:
    """One hyper-parameter: its name, type and default (``REQUIRED`` if it has none)."""

    name: str
    type: Any
    default: Any


@cache
def fields_of(component: Callable[..., Any]) -> dict[str, Field]:
    """The hyper-parameters of a component by name, in order. Underscored and variadic parameters are not fields."""
    target = component.__init__ if inspect.isclass(component) else component
    hints = typing.get_type_hints(target)
    found = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if name.startswith("_") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        found[name] = Field(name, hints.get(name, Any), parameter.default)
    return found


def parse_value(text: str, kind: Any, where: str) -> Any:
    """``text`` from a command line as a value of type ``kind``; raises ``UsageError`` naming ``where``."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, args, where)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if origin in (tuple, list):
            parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
            return origin(parse_value(part.strip(), args[0] if args else str, where) for part in parts)
        return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError):
        name = getattr(kind, "__name__", str(kind))
        raise UsageError(f"{where}={text!r} is not a valid {name}") from None


def _parse_union(text: str, options: tuple[Any, ...], where: str) -> Any:
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    problem = None
    for option in options:
        if option is type(None):
            continue
        try:
            return parse_value(text, option, where)
        except UsageError as error:
            problem = error
    raise problem or UsageError(f"{where}={text!r} is not valid")
