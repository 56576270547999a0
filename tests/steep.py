"""Whether reading a text takes time that grows faster than the text's length times its logarithm."""

from __future__ import annotations

import ast
import importlib
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import e3rl

PIECES = (
    " ", "\n", "\t", "1", "1,", "1, ", "1/", "1 ", "-", "- ", "+", "(", ")", "[", "{", "}", "{}", "{,}", "|", "\\",
    "\\\\", "$", "$1", "\\(", "\\)", "\\[", "\\text{", "\\text{a}", "\\text {and}", "\\boxed", "\\boxed{",
    "\\boxed{1}", "\\boxed ", "\\boxed{1}, ", "and ", "or ", "a ", "a", "A", "A, ", "(A) ", "A: ", "answer ",
    "answer is ", "The answer is 1. ", "\\frac", "\\frac{", "\\frac{1}{", "\\frac1", "\\sqrt", "\\pm ", "=", "x=",
    "x = 1, ", "<", "x<", "\\le ", "\\cup ", "(1,2)\\cup", "^", "2^", "_", "a_", "1_", "!", "'", "%", "1%", "**",
    "**a** ", "^\\circ ", "cm ", "cm^2 ", " per ", "one ", ".", "1.", ". ", "; ", ":", "1:", "&", "\\begin{pmatrix}",
    "because ", ", not ", "final answer is ", "#### ", "maybe ", "é", "1 squared ", "$1$, ", "\\overline{", "√", "²",
    "</think>", "<think>", "²(", "¤", "\\ ", "\\!", "~", "10^", "10^{", "1e", "\\in ", "\\approx ", "\\mathrm{~",
    "\\left(", "x \\ne ", "f(", "sin", "sin ", "\\sin ",
)  # fmt: skip
AROUND = (("", ""), ("1", "!"), ("\\boxed{1}", "!\\boxed{2}"), ("answer is ", "!"))
AROUND_ANSWERS = (("", ""), ("x", "y"), ("(", "!)"))


def seconds_of(function: Callable[[str], Any], text: str) -> float:
    best = math.inf
    for _ in range(4):
        began = time.process_time()
        function(text)
        best = min(best, time.process_time() - began)
        if best < 2e-3:
            break
    return best


def too_steep(
    function: Callable[[str], Any],
    sizes: tuple[int, int],
    places: Sequence[tuple[str, str]] = AROUND,
    pieces: Sequence[str] = PIECES,
) -> list[str]:
    """Inputs for which eight times the length takes more than 24 times as long, and long enough to be measured."""
    steep = []
    for before, after in places:
        for piece in pieces:
            small, large = (before + piece * (size // len(piece)) + after for size in sizes)
            long = seconds_of(function, large)
            if long > 8e-3 and long > 3 * (sizes[1] / sizes[0]) * max(seconds_of(function, small), 3e-4):
                steep.append(f"{before!r} {piece!r} {after!r}: {long:.3f} s for {sizes[1]} characters")
    return steep


METHODS = {"match", "fullmatch", "search", "sub", "split", "findall", "finditer"}
PACKAGE = Path(e3rl.__file__).parent


def with_patterns(room: Path) -> list[Path]:
    """The files of a room that compile regular expressions."""
    return sorted(p for p in room.glob("*.py") if "re.compile" in p.read_text(encoding="utf-8"))


def _uses(path: Path) -> dict[str, tuple[re.Pattern[Any], set[str]]]:
    """The module's compiled patterns, and the methods that it calls on each."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in METHODS:
            called.setdefault(node.value.id, set()).add(node.attr)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    names = vars(importlib.import_module(name))
    found = {n: (p, called.get(n, {"search"})) for n, p in names.items() if isinstance(p, re.Pattern)}
    listed = [p for p, _ in names.get("_SPELLINGS", [])]
    return found | {f"_SPELLINGS[{i}]": (p, {"sub"}) for i, p in enumerate(listed)}


def _applied(pattern: re.Pattern[Any], method: str) -> Callable[[str], Any]:
    call = getattr(pattern, method)
    whole = (lambda t: call("" if isinstance(t, str) else b"", t)) if method == "sub" else call
    read = (lambda t: list(whole(t))) if method == "finditer" else whole
    return (lambda t: read(t.encode())) if isinstance(pattern.pattern, bytes) else read


def steep_patterns(
    path: Path, places: Sequence[tuple[str, str]], before: Callable[[str], str] = lambda text: text
) -> list[str]:
    """The patterns of a file that are steep, as the file uses them, on texts that went through ``before``."""
    uses = _uses(path)
    assert uses, path
    steep = []
    for name, (pattern, methods) in uses.items():
        for method in methods:
            read = _applied(pattern, method)
            found = too_steep(lambda t, read=read: read(before(t)), (250, 2_000), places)
            steep += [f"{path.name}: {name}.{method}: {text}" for text in found]
    return steep
