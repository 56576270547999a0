"""Rows become problems: columns are mapped by name, and every value is checked here, where errors can name the row."""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from e3rl.config import DataConfig
from e3rl.data.readers import Row
from e3rl.errors import UserError, where_raised
from e3rl.plugins import load
from e3rl.types import Message, Problem

PROMPT_NAMES = ("problem", "question", "query", "instruction", "input", "messages", "text")
_ABSENT = object()


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """A row's value, None where it is absent; a dotted name (``reward_model.ground_truth``) goes into nested fields."""
    value = _lookup(row, column)
    return None if value is _ABSENT else value


def has_column(row: Mapping[str, Any], column: str) -> bool:
    """Whether the row has the (possibly dotted) column, whatever its value."""
    return _lookup(row, column) is not _ABSENT


def _lookup(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    head, dot, rest = column.partition(".")
    nested = row.get(head)
    return _lookup(nested, rest) if dot and isinstance(nested, Mapping) else _ABSENT


def missing_prompt(row: Mapping[str, Any], column: str, where: str) -> UserError:
    """The error for a row without its prompt column: lists the columns and names the setting to change."""
    columns = [str(name) for name in row]
    common = [name for name in PROMPT_NAMES if name in columns]
    nearest = common or difflib.get_close_matches(column, columns, n=1, cutoff=0.4)
    hint = f"Set data.prompt_column, perhaps to '{nearest[0]}'." if nearest else "Set data.prompt_column."
    return UserError(f"{where}: no column '{column}'. {hint} Columns found: {', '.join(columns) or 'none'}.")


def to_problem(row: Mapping[str, Any], config: DataConfig, where: str, number: int, *, encoded: bool) -> Problem:
    """The problem in a row. ``encoded``: in this file format a prompt string may be messages written as JSON."""
    if not has_column(row, config.prompt_column):
        raise missing_prompt(row, config.prompt_column, where)
    prompt = _prompt(lookup(row, config.prompt_column), f"{where}: {config.prompt_column}", encoded)
    answer = plain_text(lookup(row, config.answer_column), f"{where}: {config.answer_column}")
    id_ = plain_text(lookup(row, config.id_column), f"{where}: {config.id_column}")
    mapped = {config.prompt_column, config.id_column, "answer"}
    columns = {str(name): value for name, value in row.items() if name not in mapped}
    return Problem(id=id_ or str(number), prompt=prompt, answer=answer, columns=columns)


def transformed(rows: Iterable[Row], config: DataConfig) -> Iterator[Row]:
    """The rows that ``data.transform`` makes of them. UserError where it fails or gives no row."""
    if not config.transform:
        yield from rows
        return
    if ":" not in config.transform:
        raise UserError(f"data.transform = '{config.transform}' names no function: write file.py:name or module:name")
    function = load("data.transform", config.transform, {})
    for where, row in rows:
        try:
            found = function(dict(row))
        except Exception as error:  # the user's code may fail in any way
            what = f"{type(error).__name__}: {error}{where_raised(error)}"
            raise UserError(f"{where}: data.transform '{config.transform}' raised {what}") from None
        if found is not None and not isinstance(found, Mapping):
            kind = type(found).__name__
            raise UserError(f"{where}: data.transform '{config.transform}' gave {kind}; it must give a row, or None")
        if found is not None:
            yield where, dict(found)


def plain_text(value: Any, where: str) -> str | None:
    """A string or number as a string; None and blank strings are absent."""
    if value is None:
        return None
    if isinstance(value, str):
        return _text(value, where).strip() or None
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        raise UserError(f"{where}: expected a string or a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise UserError(f"{where}: {value} is not a number that can be checked")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: contains half of a surrogate pair, which is no character") from None
    return value


def _prompt(value: Any, where: str, encoded: bool) -> str | tuple[Message, ...]:
    if isinstance(value, str) and encoded:
        value = _decoded_messages(value)
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where}: the prompt is empty")
        return _text(value, where)
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a string or a list of chat messages, got {type(value).__name__}")
    if not value:
        raise UserError(f"{where}: the list of messages is empty")
    messages = tuple(_message(entry, f"{where}: message {number}") for number, entry in enumerate(value, 1))
    if not any(message.content.strip() for message in messages):
        raise UserError(f"{where}: every message of the prompt is empty")
    return messages


def _decoded_messages(text: str) -> Any:
    """The list of messages that ``text`` encodes as JSON, or ``text`` itself if it is ordinary text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    chat = isinstance(value, list) and value and all(isinstance(entry, dict) and "role" in entry for entry in value)
    return value if chat else text


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f'{where}: expected {{"role": …, "content": …}}, got {type(entry).__name__}')
    role, content = entry.get("role"), entry.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where}: 'role' must be a string such as 'user'")
    if not isinstance(content, str):
        raise UserError(f"{where}: 'content' must be a string, got {type(content).__name__}")
    extra = sorted(str(key) for key, value in entry.items() if key not in ("role", "content") and value is not None)
    if extra:
        raise UserError(f"{where}: only 'role' and 'content' are understood, found also: {', '.join(extra)}")
    return Message(_text(role, where), _text(content, where))
