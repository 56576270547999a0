"""A table of plain values as a settings dataclass: typed, bounded, and every problem named with its section and field."""

from __future__ import annotations

import collections.abc
import contextlib
import math
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from e3rl.errors import UserError, unknown
from e3rl.parsing import is_text

_T = TypeVar("_T")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(kind))
    if typing.get_origin(kind) is collections.abc.Mapping:
        return "a table such as {key = value}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {_type_name(typing.get_args(kind)[0]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(kind, str(kind))


def convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` as a ``kind``: an int may become a float, and a string a list of one; nothing else changes type."""
    origin = typing.get_origin(kind)
    if isinstance(value, str) and ("\0" in value or not is_text(value)):
        raise UserError(f"{where}: {shown(value)} is no text: it holds a null byte, or bytes that are not UTF-8")
    if origin is Literal:
        if value in typing.get_args(kind):
            return value
    elif origin is collections.abc.Mapping:
        if isinstance(value, dict):
            return value
    elif origin is tuple:
        if isinstance(value, str) and typing.get_args(kind)[0] is str:
            return (value,) if value else ()
        if isinstance(value, list | tuple):
            return tuple(_ranged(convert(v, typing.get_args(kind)[0], where), {}, where) for v in value)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {_type_name(kind)}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value for a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number with more digits than Python writes out
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _ranged(value: Any, limits: Mapping[str, Any], where: str) -> Any:
    """The value; UserError if it is a number outside its limits, or not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{where} = {shown(value)} is out of range: it has more than 64 bits")
    low, high, above = limits.get("min"), limits.get("max"), limits.get("above")
    bounds = [f"at least {low:g}" if low is not None else "", f"above {above:g}" if above is not None else ""]
    bounds += [f"at most {high:g}" if high is not None else ""]
    inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    if not (inside and math.isfinite(value)):  # NaN fails every comparison
        wanted = " and ".join(b for b in bounds if b) or "a finite number"
        raise UserError(f"{where} = {shown(value)} is out of range: it must be {wanted}")
    return value


RENAMED = {"rollout.ahead": "staleness"}
"""Old names of fields: recipes and run directories that have them can still be read."""


def current_names(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The section's table with the names that fields have now."""
    return {RENAMED.get(f"{where}.{key}", key): value for key, value in table.items()}


def build_section(kind: type[_T], table: Mapping[str, Any], where: str) -> _T:
    """A settings dataclass from a table of plain values; every problem names ``where`` and the field."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in current_names(table, where).items():
        if key not in known:
            raise UserError(f"[{where}] {unknown('key', key, known)}")
        name = f"{where}.{key}"
        values[key] = _ranged(convert(value, hints[key], name), known[key].metadata, name)
    return kind(**values)


def toml_value(value: Any) -> str:
    """A plain value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_value(str(k))} = {toml_value(v)}" for k, v in value.items()) + "}"
    return repr(value)
