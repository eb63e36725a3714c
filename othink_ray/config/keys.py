"""Declaration of a configuration key, and a walk over all keys of the schema."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from othink_ray.config.bounds import Bound

_T = TypeVar("_T")
types_of = functools.cache(get_type_hints)  # dataclass -> its fields' names and types


@dataclass(frozen=True, slots=True)
class _Declared:
    comment: str
    bound: Bound | None
    common: bool


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of the schema: dotted name, type, default, bound and comment."""

    name: str
    kind: Any
    default: Any
    comment: str
    bound: Bound | None
    common: bool  # listed by --help


def key(default: _T, comment: str, bound: Bound | None = None, *, common: bool = False) -> _T:
    """Declare a key as a dataclass field; null values of optional keys are not checked against the bound."""
    return dataclasses.field(default=default, metadata={"key": _Declared(comment, bound, common)})


def unwrap(kind: Any) -> tuple[Any, bool]:
    """Split an annotation into its type and whether it is optional: `T | None` -> (T, True), `T` -> (T, False)."""
    if isinstance(kind, UnionType):
        (inner,) = (part for part in get_args(kind) if part is not type(None))
        return inner, True
    return kind, False


def section_of(kind: Any) -> Any:
    """Return the dataclass of a section's annotation; None for the annotation of a single value."""
    inner, _ = unwrap(kind)
    return inner if dataclasses.is_dataclass(inner) else None


def keys(section: Any, path: str = "") -> Iterator[ConfigKey]:
    """Yield every key of a section and the sections below it, in the order of the schema."""
    for field in dataclasses.fields(section):
        kind, name = types_of(section)[field.name], f"{path}{field.name}"
        below = section_of(kind)
        if below is not None:
            yield from keys(below, f"{name}.")
            continue
        declared: _Declared = field.metadata["key"]
        yield ConfigKey(name, kind, field.default, declared.comment, declared.bound, declared.common)


def sections(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the sections below a section as (dotted name, dataclass), each before those below it."""
    for name, kind in types_of(section).items():
        below = section_of(kind)
        if below is not None:
            yield f"{path}{name}", below
            yield from sections(below, f"{path}{name}.")


def default_tree(section: Any) -> dict[str, Any]:
    """Return the defaults of a section as a tree of plain values."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        if field.default is dataclasses.MISSING:
            tree[field.name] = default_tree(section_of(types_of(section)[field.name]))
        else:
            tree[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return tree
