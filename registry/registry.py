"""The registry: register by decorator, make by id, list by pattern."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from registry.errors import UnknownField, UnknownName, UsageError
from registry.fields import check_number, fields_of

ENTRY_POINT_GROUP = "nested_reft"
_PLUGINS_LOADED = False

C = TypeVar("C", bound=type)


def load_plugins() -> None:
    """Import every module of the entry-point group, once. The project's own components come through the same door."""
    global _PLUGINS_LOADED
    if _PLUGINS_LOADED:
        return
    _PLUGINS_LOADED = True
    from importlib.metadata import entry_points  # when a name is first looked up, rather than by import envs

    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            entry.load()
        except Exception as error:
            raise UsageError(
                f"plug-in {entry.name!r} ({entry.value}) failed to import: {error!r}; mend it or uninstall it"
            ) from error


@dataclass(frozen=True)
class Registered:
    """A component and, for ids that compose (``agent/sampler/correction``), the registry of each further part."""

    component: type
    parts: dict[str, Registry]
    fixed: dict[str, Any]


class Registry:
    """Components of one kind by name.

    >>> colours = Registry("colour")
    >>> @colours.register("grey")
    ... @dataclass(frozen=True)
    ... class Grey:
    ...     level: float = 0.5
    >>> colours.make("grey", level=0.2)
    Grey(level=0.2)
    >>> colours.build({"id": "grey"})
    Grey(level=0.5)

    Args:
        kind: what the components are, in the words of an error message.
        product: ids such as ``a*b`` make ``Product`` of both (corrections multiply).
    """

    def __init__(self, kind: str, product: bool = False) -> None:
        self.kind = kind
        self.product = product
        self._known: dict[str, Registered] = {}
        self._combine: Callable[[tuple[Any, ...]], Any] | None = None

    def register(
        self, name: str, parts: dict[str, Registry] | None = None, fixed: dict[str, Any] | None = None
    ) -> Callable[[C], C]:
        """Decorator. ``parts`` maps a field to the registry its id segment comes from, in the order of the segments;
        ``fixed`` are fields that this name sets. Registering a taken name for another class is an error."""
        if not name or set(name) & set("/*? "):
            raise UsageError(f"{self.kind} name {name!r} may not be empty or hold any of '/', '*', '?' and space")

        def decorate(component: C) -> C:
            taken = self._known.get(name)
            if taken and taken.component.__qualname__ != component.__qualname__:
                raise UsageError(f"{self.kind} {name!r} is already registered by {taken.component!r}; choose another")
            self._known[name] = Registered(component, parts or {}, fixed or {})
            return component

        return decorate

    def combine_with(self, combine: Callable[[tuple[Any, ...]], Any]) -> Callable[[tuple[Any, ...]], Any]:
        """Decorator: how a product id's factors become one component."""
        self._combine = combine
        return combine

    def __contains__(self, id: object) -> bool:
        try:
            self.resolve(str(id))
        except UsageError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._known))

    def get(self, name: str) -> type:
        """The class registered under a plain name."""
        return self._entry(name).component

    def form(self, name: str) -> str:
        """How ids with a plain name are written in full, such as ``nested-reft/<sampler>/<correction>``."""
        return "/".join([name, *(f"<{part}>" for part in self._entry(name).parts)])

    def resolve(self, id: str) -> tuple[type, dict[str, Any]]:
        """The class that a (composed) id names, and the fields that the id sets."""
        name, *segments = id.split("/")
        entry = self._entry(name)
        if len(segments) > len(entry.parts):
            raise UsageError(f"{self.kind} id {id!r} has too many parts: the form is {self.form(name)!r}")
        fields = dict(entry.fixed)
        for (field, registry), segment in zip(entry.parts.items(), segments, strict=False):
            registry.check(segment)
            fields[field] = segment
        return entry.component, fields

    def replace_part(self, id: str, field: str, part: str) -> str:
        """``id`` with another part for ``field``; as it is where the id does not name that part."""
        name, *segments = id.split("/")
        for n, known in enumerate(list(self._entry(name).parts)[: len(segments)]):
            if known == field:
                segments[n] = part
        return "/".join((name, *segments))

    def check(self, id: str) -> None:
        """Raise ``UnknownName`` unless ``id`` can be made."""
        for factor in self._factors(id):
            self.resolve(factor)

    def make(self, id: str, /, *args: Any, **fields: Any) -> Any:
        """The component that ``id`` names, with ``fields`` over its defaults. A field of a product goes to the one
        factor that has it."""
        factors = self._factors(id)
        if len(factors) == 1:
            component, fixed = self.resolve(id)
            known = fields_of(component)
            for field, value in fields.items():
                if field not in known:
                    raise UnknownField(f"{self.kind} {id!r}", field, known)
                check_number(value, known[field].type, f"{self.kind} {id!r}: {field}")
            return component(*args, **{**fixed, **fields})
        shares: list[dict[str, Any]] = [{} for _ in factors]
        for field, value in fields.items():
            owners = [n for n, factor in enumerate(factors) if field in fields_of(self.get(factor))]
            if not owners:
                everywhere = [f for factor in factors for f in fields_of(self.get(factor))]
                raise UnknownField(f"{self.kind} {id!r}", field, everywhere)
            if len(owners) > 1:
                raise UsageError(f"field {field!r} is in {len(owners)} factors of {id!r}; a product cannot set it")
            shares[owners[0]][field] = value
        assert self._combine is not None
        return self._combine(tuple(self.make(factor, **share) for factor, share in zip(factors, shares, strict=True)))

    def build(self, given: Any) -> Any:
        """A component from an id, from ``{"id": ..., field: value}`` (how a run's spec holds it), or itself."""
        if isinstance(given, str):
            return self.make(given)
        if isinstance(given, Mapping):
            fields = dict(given)
            if "id" not in fields:
                raise UsageError(f"{self.kind} {given!r} has no 'id'")
            return self.make(fields.pop("id"), **fields)
        return given

    def fields(self, id: str) -> dict[str, Any]:
        """All fields of an id by name (of every factor of a product)."""
        return {
            name: field for factor in self._factors(id) for name, field in fields_of(self.resolve(factor)[0]).items()
        }

    def ids(self, pattern: str = "*") -> list[str]:
        """All ids, composed ones with every part, that match a shell pattern (``*`` also matches ``/``)."""
        load_plugins()
        every = []
        for name, entry in sorted(self._known.items()):
            every.append(name)
            choices = [sorted(registry) for registry in entry.parts.values()]
            if choices:
                every.extend("/".join((name, *segments)) for segments in itertools.product(*choices))
        return [id for id in every if fnmatchcase(id, pattern)]

    def _factors(self, id: str) -> list[str]:
        if not isinstance(id, str):
            raise UsageError(f"{self.kind} {id!r} is {type(id).__name__}: give a name, one of {', '.join(self)}")
        return id.split("*") if self.product else [id]

    def _entry(self, name: str) -> Registered:
        if name not in self._known:
            load_plugins()
        if name not in self._known:
            raise UnknownName(self.kind, name, self._known)
        return self._known[name]
