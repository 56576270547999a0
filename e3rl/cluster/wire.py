"""Frozen dataclasses as JSON and back, strictly: what arrives is either exactly what was meant or an error that says where."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

_T = TypeVar("_T")


def to_plain(value: Any) -> Any:
    """The value in lists, dicts, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.metadata.get("local") and getattr(value, field.name) != field.default:
                raise ValueError(f"{type(value).__name__}.{field.name} can't be sent to another process")
        return {
            f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.metadata.get("local")
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def encode(value: Any) -> bytes:
    """The value as JSON. Floats come back bit by bit as they were."""
    return json.dumps(to_plain(value), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def decode(kind: type[_T], body: bytes) -> _T:
    """The ``kind`` that was encoded; ValueError, with the place, where it is anything else."""
    try:
        plain = json.loads(body.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error}): {body[:60]!r}") from None
    result: _T = from_plain(kind, plain, kind.__name__)
    return result


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """What `to_plain` made of a ``kind``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        return _checked(value in arguments, value, f"one of {arguments}", where)
    if origin is tuple:
        _checked(isinstance(value, list), value, "a list", where)
        return tuple(from_plain(arguments[0], v, where) for v in value)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is not None and issubclass(origin, Mapping):
        return _checked(isinstance(value, dict), value, "an object", where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(_checked(value in [e.value for e in kind], value, f"a {kind.__name__}", where))
    if kind is float:
        return float(_checked(type(value) in (int, float), value, "a number", where))
    return _checked(type(value) is kind, value, f"a {getattr(kind, '__name__', kind)}", where)


def _checked(right: bool, value: Any, wanted: str, where: str) -> Any:
    if not right:
        raise ValueError(f"{where} is {str(value)[:60]!r}, and must be {wanted}")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    [kind] = [k for k in kinds if k is not type(None)]
    return from_plain(kind, value, where)


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """The types of the fields that travel: all but those whose metadata says 'local'."""
    own = {f.name: f.type for f in dataclasses.fields(kind) if not f.metadata.get("local")}
    return typing.get_type_hints(type(kind.__name__, (), {"__annotations__": own, "__module__": kind.__module__}))


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    fields = _fields(kind)
    _checked(isinstance(value, dict) and value.keys() == fields.keys(), value, f"a {kind.__name__}", where)
    return kind(**{name: from_plain(hint, value[name], f"{where}.{name}") for name, hint in fields.items()})
