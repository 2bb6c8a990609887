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
    fields = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if name.startswith("_") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        fields[name] = Field(name, hints.get(name, Any), parameter.default)
    return fields


def parse_value(value: Any, kind: Any, where: str) -> Any:
    """``value`` as a value of type ``kind``; raises ``UsageError`` naming ``where``.

    Text is read as a command line gives it. Anything else, such as a file's number or list, has to be of the type
    already; an integer serves as a float, and a list, or one element alone, as a tuple."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, args, where)
    try:
        if origin in (tuple, list):
            return origin(parse_value(part, args[0] if args else str, where) for part in _parts(value))
        return _parse_text(value, kind) if isinstance(value, str) else _check(value, origin or kind)
    except (KeyError, ValueError, SyntaxError):
        name = getattr(kind, "__name__", str(kind))
        raise UsageError(f"{where}={value!r} is not a valid {name}") from None


def _parse_text(text: str, kind: Any) -> Any:
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    return kind(text) if kind in (int, float, str) else ast.literal_eval(text)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _check(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is not Any and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ValueError
    return value


def _parse_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    is_none = value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if type(None) in options and is_none:
        return None
    problem = None
    for option in options:
        if option is type(None):
            continue
        try:
            return parse_value(value, option, where)
        except UsageError as error:
            problem = error
    raise problem or UsageError(f"{where}={value!r} is not valid")
