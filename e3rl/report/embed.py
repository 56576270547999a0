"""Embeds untrusted values in a page as data."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def to_json(value: Any) -> str:
    """Compact JSON that can neither end a script element nor open a comment in it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def data_element(name: str, json_text: str) -> str:
    """A data block: the page reads it by ``name``, the browser never runs it. ``json_text`` comes from `to_json`."""
    return f'<script type="application/json" id="{name}">{json_text}</script>'


def packed_element(name: str, packed: str) -> str:
    """A data block of gzip in base64, which is much smaller; the page unpacks it when it is shown."""
    return f'<script type="application/gzip" id="{name}">{packed}</script>'


def script_element(code: str) -> str:
    """An inline script. Only the project's own files may be given: nothing in them is escaped."""
    return f"<script>{code}</script>"


def sleeping_script_element(name: str, code: str) -> str:
    """A script that runs only when another one starts it, so that the page is shown before a large library is parsed."""
    return f'<script type="text/plain" id="{name}">{code}</script>'


def content_security_policy(scripts: list[str]) -> str:
    """Only these scripts may run; nothing is loaded from or sent to another host."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'"
    )
