"""Methods by name: a plan-file entry, a command-line option and a Python call all end here.

A registry maps a name to the place of a frozen dataclass; the module is imported when the name is first
used. pydantic checks the options, so an unknown or out-of-range field is reported with what is allowed.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

from untrojan.errors import UntrojanError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of method, each the place (``module:attribute``) of a frozen dataclass."""

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)

    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def get(self, name: str) -> type[T]:
        """The dataclass registered as ``name``. Raises UntrojanError that lists the known names."""
        if name not in self._places:
            raise UntrojanError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self._places)}")
        module, attribute = self._places[name].split(":")
        return cast("type[T]", getattr(importlib.import_module(module), attribute))

    def build(self, name: str, options: Mapping[str, Any] | None = None) -> T:
        """A validated instance. Raises UntrojanError naming the wrong option and what is allowed."""
        return validated(self.get(name), options or {}, f"{self.kind} {name!r}")

    def build_with(self, name: str, settings: Mapping[str, Any]) -> T:
        """An instance with those of ``settings`` that the method has; raises as :meth:`build`."""
        known = self.options(name)
        return self.build(name, {key: value for key, value in settings.items() if key in known})

    def options(self, name: str) -> tuple[str, ...]:
        """What options a method takes."""
        return tuple(each.name for each in dataclasses.fields(cast("Any", self.get(name))) if each.init)

    def name_of(self, method: object) -> str:
        """The name under which a method's class is registered."""
        place = f"{type(method).__module__}:{type(method).__qualname__}"
        for name, known in self._places.items():
            if known == place:
                return name
        raise KeyError(f"{place} is not a registered {self.kind}")

    def describe(self, method: object) -> dict[str, Any]:
        """The plan-file entry that builds ``method`` again: its name and all its options."""
        return {"name": self.name_of(method), **options_of(method)}


def options_of(method: object) -> dict[str, Any]:
    """The hyper-parameters of a method, as JSON types."""
    from pydantic import TypeAdapter

    return cast("dict[str, Any]", TypeAdapter(type(method)).dump_python(method, mode="json"))


def validated(cls: type[T], options: Mapping[str, Any], what: str) -> T:
    """Build a dataclass from untrusted options, or say in one line what is wrong with them."""
    from pydantic import TypeAdapter, ValidationError

    allowed = [field.name for field in dataclasses.fields(cast("Any", cls)) if field.init]
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise UntrojanError(f"{what} has no option {unknown[0]!r}: it takes {', '.join(allowed) or 'none'}")
    try:
        made = TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "options"
        given = first.get("input")
        raise UntrojanError(f"{what}: {place} = {given!r} is not valid: {first['msg']}") from None
    for key, given in options.items():
        # pydantic takes true for 1.
        if isinstance(given, bool) and not isinstance(getattr(made, key), bool):
            raise UntrojanError(f"{what}: {key} = {str(given).lower()} is not valid: give it a number")
    return made
