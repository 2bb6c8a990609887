"""Typed fields of a component, read from its constructor's signature."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isnan
from numbers import Integral, Real
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


def check_number(value: Any, kind: Any, where: str) -> None:
    """Raise ``UsageError`` unless ``value`` is such a number (truth value, None, tuple of numbers) as ``kind``, the
    annotation of a field, says. Fields of other kinds are not looked at."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args and args[0] in _NUMBERS:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UsageError(f"{where}={value!r} must be a tuple, {_NUMBERS[args[0]][0]} each")
        for item in value:
            check_number(item, args[0], where)
        return
    options = args if origin in (typing.Union, types.UnionType) else (kind,)
    if not all(option in _NUMBERS for option in options) or any(_NUMBERS[option][1](value) for option in options):
        return
    raise UsageError(f"{where}={value!r} must be {' or '.join(_NUMBERS[option][0] for option in options)}")


def check_at_least(value: Any, least: int, where: str) -> None:
    """Raise ``UsageError`` unless ``value`` is an integer, of Python or numpy, of at least ``least``."""
    if not _is_whole(value) or value < least:
        raise UsageError(f"{where}={value!r} must be an integer of at least {least}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= MOST


def _is_real(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not isnan(value)
    except OverflowError:
        return False


MOST = 2**63 - 1
_NUMBERS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", _is_whole),
    float: ("a number", _is_real),
    bool: ("True or False", lambda value: isinstance(value, bool) or type(value).__name__ == "bool"),
    types.NoneType: ("None", lambda value: value is None),
}
"""Of each kind of field: what its values are called, and whether a value is one."""


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
