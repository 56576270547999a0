"""Reads untrusted JSON, TOML and YAML: plain values within limits, else a UserError that names the place."""

from __future__ import annotations

import functools
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

from e3rl.errors import UserError

MAX_DEPTH = 64
"""Most lists and tables inside each other. Code may walk the values by recursion."""
MAX_DIGITS = 300
"""Most digits of a whole number: more would not fit a float, and Python refuses to print thousands."""
MAX_TOML_BYTES = 2**18
_MAX_KEY_PARTS = 256  # of a dotted key; the parser takes time that grows with their square


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; {MAX_DIGITS} are allowed")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def parse_json(text: str | bytes, where: object, *, finite: bool = True) -> Any:
    """A JSON value. UserError if it is malformed or too deep, or holds lone surrogates, numbers with too many digits or, with
    ``finite``, NaN or infinity."""
    only_finite: dict[str, Any] = {"parse_float": _finite, "parse_constant": _constant} if finite else {}
    try:
        value = json.loads(text, parse_int=_whole, **only_finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: malformed JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: JSON is nested too deeply to read") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    _check(value, where)
    return value


def parse_toml(text: str, where: object) -> dict[str, Any]:
    """The tables of a TOML text; as `parse_json`, but floats may be infinite or NaN: the settings' ranges refuse those."""
    if len(text) > MAX_TOML_BYTES:
        raise UserError(f"{where} has {len(text)} characters, and a recipe at most {MAX_TOML_BYTES}")
    if "." * _MAX_KEY_PARTS in re.sub(r"[^.\n=,\[\]{}]+", "", text):
        raise UserError(f"{where}: a key of hundreds of parts")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{where}: TOML is nested too deeply to read") from None
    except ValueError as error:  # malformed, or a whole number with more digits than Python converts
        raise UserError(f"{where} is not valid TOML: {error}") from None
    _check(tables, where)
    return tables


def read_text(path: Path, most: int | None = None) -> str:
    """A UTF-8 file of at most ``most`` bytes; UserError if it can't be read. FileNotFoundError is left to the caller."""
    try:
        if most is not None and path.stat().st_size > most:
            raise UserError(f"{path} has {path.stat().st_size} bytes, and at most {most} are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} can't be read: it is not valid UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def read_json(path: Path, *, finite: bool = True) -> Any:
    """The JSON value of a file, as `parse_json`. FileNotFoundError is left to the caller."""
    return parse_json(read_text(path), path, finite=finite)


def parse_yaml(text: str, where: object) -> dict[str, Any]:
    """The tables of a YAML text: plain values, no anchors (a small text could expand to a huge one); limits of `parse_toml`."""
    import yaml

    if len(text) > MAX_TOML_BYTES:
        raise UserError(f"{where} has {len(text)} characters, and a recipe at most {MAX_TOML_BYTES}")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{where}: YAML anchors (&, *) are not read: write the value where it is meant")
        tables = _plain_loader()(text).get_single_data()
    except RecursionError:
        raise UserError(f"{where}: YAML is nested too deeply to read") from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not valid YAML: {reason[:200]}") from None
    if not isinstance(tables, dict) or not all(isinstance(key, str) for key in tables):
        raise UserError(f"{where} holds no sections: write SECTION: and its fields, indented, below it")
    _check(tables, where)
    return tables


_YAML_BOOL = re.compile(r"^(true|false)$", re.IGNORECASE)
_YAML_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?([eE][-+]?\d+)|\d+\.\d*|\.\d+([eE][-+]?\d+)?|\.(inf|nan))$")


@functools.cache
def _plain_loader() -> Any:
    """PyYAML's safe loader, but 1e-6 is a number, and on, off, yes, no and dates are texts."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """YAML 1.2's plain values."""

    wanted = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    PlainLoader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in wanted]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _YAML_BOOL, list("tTfF"))
    PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_FLOAT, list("-+.0123456789"))
    return PlainLoader


YAML_SUFFIXES = (".yaml", ".yml")


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a recipe: TOML, or YAML by its name, within the same limits."""
    parse = parse_yaml if path.suffix.lower() in YAML_SUFFIXES else parse_toml
    try:
        return parse(read_text(path, MAX_TOML_BYTES), path)
    except FileNotFoundError:
        raise UserError(f"no such recipe: {path}") from None
    except UserError:
        if path.is_dir():
            raise UserError(f"{path} is a directory, not a recipe file") from None
        raise


def _check(value: Any, where: object) -> None:
    """UserError for too deep nesting, too many digits of a whole number (TOML's may be hexadecimal) and lone surrogates."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
                inner += item.keys()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                if not is_text(item):
                    raise UserError(f"{where}: contains half of a surrogate pair, which is no character")
            elif isinstance(item, int) and item.bit_length() > 1000:
                raise UserError(f"{where}: a whole number of more than {MAX_DIGITS} digits")
        level, depth = inner, depth + 1


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: it has no lone surrogate, which stands for an undecodable byte."""
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
