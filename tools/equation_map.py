"""Writes docs/equations.md: where every equation of the two papers is implemented, and where it is tested.

A function, method or class implements an equation, and a test covers it, by naming it at the start of its docstring:
``Eq 13.``, ``Eq 14-15.`` or ``Eq 9, 21-22.`` for E³RL, ``ERPO eq 8.`` for ERPO. Sources are parsed, never imported.

    python tools/equation_map.py            write the page
    python tools/equation_map.py --check    exit 1 if an equation has no function or no test, or the page is stale
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path("docs/equations.md")
CITATION = re.compile(r"(Eq|ERPO eq) (\d+(?:-\d+)?(?:, \d+(?:-\d+)?)*)\. ?")
PAPERS = {"Eq": "E3RL", "ERPO eq": "ERPO"}

MEANINGS = {
    "E3RL": (
        "probability of a sequence, token by token",
        "next-token distribution with temperature",
        "hidden state from the decoder",
        "greedy token",
        "perturbation: log-probability gap to the greedy token",
        "cumulative perturbation of a prefix",
        "later distributions that a token affects",
        "segments of a response",
        "probability of a segment",
        "token entropy and its mean over a segment",
        "smoothing over neighbouring segments",
        "largest entropy and entropy variation of a segment",
        "segment uncertainty U",
        "a group's uncertainties at a segment",
        "their mean and standard deviation",
        "macro baseline B and its adaptive offset",
        "attempt penalty and threshold Θ",
        "history modulation φ",
        "attention attribution and segment rewards",
        "segment advantages",
        "clipped segment objective with KL term",
        "segment probability ratio",
        "erasure operator",
        "erasure trigger",
        "state transition: commit, erase, forced accept",
        "redraw and its threshold",
        "cost of the language model",
        "cost of GRPO",
        "cost of entropy",
        "cost of segment statistics",
        "regeneration ratio r",
        "cost of erasing",
        "cost of E³RL",
        "cost of E³RL relative to GRPO",
        "memory",
    ),
    "ERPO": (
        "probability of a sequence, token by token",
        "expected reward",
        "GRPO's advantage",
        "KL estimate against the reference policy",
        "GRPO's loss",
        "token entropy",
        "implicit progress signal of a token",
        "entropy-aware gate",
        "implicit advantage, normalised within buckets of relative position",
        "outcome-anchored final advantage",
        "gradient: GRPO's plus a potential's",
        "policy gradient of the combined advantage",
        "the added gradient, spelled out",
        "the added gradient, as that of a square",
        "the potential: entropy-weighted squared log-ratio",
        "final advantages have mean 0 and variance 1 in a group",
    ),
}

Equation = tuple[str, int]
REQUIRED: frozenset[Equation] = frozenset(("E3RL", number) for number in range(1, 36))


class Place(NamedTuple):
    """A definition that names an equation."""

    path: str
    name: str


def cited(docstring: str) -> Iterator[Equation]:
    """The equations that a docstring starts with."""
    match = CITATION.match(docstring)
    if not match:
        return
    paper = PAPERS[match[1]]
    for part in match[2].split(", "):
        first, _, last = part.partition("-")
        yield from ((paper, number) for number in range(int(first), int(last or first) + 1))


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of the functions, classes and methods directly in ``node`` and in its classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = prefix + child.name
            yield name, ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{name}.")


def places(root: Path, folder: str) -> dict[Equation, list[Place]]:
    """Every equation named under ``folder``, with where; in ``tests`` only test functions count."""
    found: dict[Equation, list[Place]] = {}
    for path in sorted((root / folder).rglob("*.py")):
        for name, docstring in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if folder == "tests" and not name.rpartition(".")[2].startswith("test"):
                continue
            for equation in cited(docstring):
                found.setdefault(equation, []).append(Place(path.relative_to(root).as_posix(), name))
    return found


def problems(functions: dict[Equation, list[Place]], tests: dict[Equation, list[Place]]) -> list[str]:
    """What keeps the map from being complete, in words."""
    lines = []
    for kind, found in (("function", functions), ("test", tests)):
        lines += [f"{paper} eq {number} has no {kind}" for paper, number in sorted(REQUIRED - found.keys())]
        strangers = [(e, at) for e, at in found.items() if not 1 <= e[1] <= len(MEANINGS[e[0]])]
        lines += [f"{p.path}: {p.name} names {e[0]} eq {e[1]}, which does not exist" for e, at in strangers for p in at]
    return lines


def links(found: list[Place], *, full_name: bool) -> str:
    """Links from the page; a test, which has a long name, is shown as its file, once."""
    shown = {f"[{p.name if full_name else Path(p.path).stem}](../{p.path})": None for p in found}
    return "<br>".join(shown) or "–"


def render(functions: dict[Equation, list[Place]], tests: dict[Equation, list[Place]]) -> str:
    """The page. No line numbers: it changes only when a definition comes, goes or moves to another file."""
    lines = [
        "# Equations",
        "",
        "Where each equation of the papers lives and where it is tested. Written by `python tools/equation_map.py`",
        "from the first words of docstrings (`Eq 13.`, `ERPO eq 8.`); do not edit.",
    ]
    for paper, title in (
        ("E3RL", "E³RL (arXiv 2606.17735)"),
        ("ERPO", "ERPO (token-level entropy-regulated policy optimization)"),
    ):
        rows = [
            f"| {number} | {meaning} | {links(functions.get((paper, number), []), full_name=True)} "
            f"| {links(tests.get((paper, number), []), full_name=False)} |"
            for number, meaning in enumerate(MEANINGS[paper], 1)
            if {(paper, number)} & (REQUIRED | functions.keys() | tests.keys())
        ]
        if rows:
            lines += ["", f"## {title}", "", "| eq | meaning | functions | tests |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Map the papers' equations to functions and tests.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 on a gap or a stale page")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    options = parser.parse_args(arguments)
    functions, tests = places(options.root, "e3rl"), places(options.root, "tests")
    found, page, path = problems(functions, tests), render(functions, tests), options.root / PAGE
    if not options.check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != page:
        found.append(f"{PAGE} is stale: run python tools/equation_map.py")
    print("\n".join(found) or "every required equation has a function and a test", file=sys.stderr if found else None)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
