"""Writes docs/equations.md: which function implements an equation of the two papers, what calls it, and where it is tested.

A function of ``e3rl/equations`` implements an equation, and a test covers it, by naming it at the start of its docstring:
``Eq 13.``, ``Eq 14-15.``, ``Eq 9, 21-22.`` for E³RL, ``ERPO eq 8.`` for ERPO, ``Eq 21; ERPO eq 4.`` for both. What calls it is
found by following names through imports, from modules that training (`e3rl.train.loop`) or an engine imports. Sources are
parsed, never imported.

    python tools/equation_map.py            write the page
    python tools/equation_map.py --check    exit 1 if an equation lacks a function, caller or test, or the page is stale
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path("docs/equations.md")
_NUMBERS = r"(\d+(?:-\d+)?(?:, \d+(?:-\d+)?)*)"
CITATION = re.compile(rf"(?:Eq {_NUMBERS})?(?:; )?(?:ERPO eq {_NUMBERS})?\. ?")
_PLUG_IN = re.compile(r"e3rl[\w.]*:\w+")
ROOTS = ("e3rl.train.loop", "e3rl.engine")
"""Modules whose imports, and the imports of those, are what trains and decodes."""

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

FORMULAS = tomllib.loads(Path(__file__).with_name("equations.toml").read_text(encoding="utf-8"))
"""The equations themselves, in LaTeX, by paper and number."""

Equation = tuple[str, int]
REQUIRED: frozenset[Equation] = frozenset(
    [("E3RL", number) for number in range(1, 36)] + [("ERPO", number) for number in range(1, 17)]
)

DEFINITIONS: dict[Equation, str] = {
    ("E3RL", 3): "definition; the model's own forward pass, used in eq 2",
    ("E3RL", 7): "definition; the model's causal attention, weighed in eq 19",
    ("E3RL", 27): "definition; counted in eq 28",
    ("E3RL", 28): "definition; counted in eq 32–34",
    ("E3RL", 29): "definition; counted in eq 33",
    ("E3RL", 30): "definition; counted in eq 33",
    ("E3RL", 32): "definition; counted in eq 33",
    ("E3RL", 33): "definition; divided by eq 28 in eq 34",
    ("E3RL", 34): "definition; 1 + r but for a rest below 0.1 %, so a run measures r, eq 31",
    ("E3RL", 35): "definition; the KV cache is allocated once, whatever the erasure budget",
    ("ERPO", 2): "definition; what eq 3–5 maximise, logged as `reward`",
    **{("ERPO", number): "derivation of what eq 10 adds to the gradient" for number in range(11, 16)},
}
"""Equations that nothing computes, and what stands for them. Their tests are those of what is claimed here."""


class Place(NamedTuple):
    """A definition that names an equation, or that calls one that does."""

    path: str
    name: str


def cited(docstring: str) -> Iterator[Equation]:
    """The equations that a docstring starts with."""
    match = CITATION.match(docstring)
    for paper, numbers in zip(("E3RL", "ERPO"), match.groups() if match else (), strict=False):
        for part in numbers.split(", ") if numbers else ():
            first, _, last = part.partition("-")
            yield from ((paper, number) for number in range(int(first), int(last or first) + 1))


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(dotted name, node) of the functions, methods and classes directly in ``node`` and in its classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


def places(root: Path, folder: str) -> dict[Equation, list[Place]]:
    """Every equation named under ``folder``, with where; in ``tests`` only test functions count."""
    found: dict[Equation, list[Place]] = {}
    for path in sorted((root / folder).rglob("*.py")):
        for name, node in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if folder == "tests" and not name.rpartition(".")[2].startswith("test"):
                continue
            for equation in cited(ast.get_docstring(node) or ""):  # type: ignore[arg-type]
                found.setdefault(equation, []).append(Place(path.relative_to(root).as_posix(), name))
    return found


class Source:
    """The package's modules, what each imports, and which functions name which others."""

    def __init__(self, root: Path) -> None:
        paths = sorted((root / "e3rl").rglob("*.py"))
        self._trees = {_module(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
        self._paths = {_module(path.relative_to(root)): path.relative_to(root).as_posix() for path in paths}
        self._imports = {module: self._imported(tree) for module, tree in self._trees.items()}
        self._running = self._reached()
        self._callers: dict[str, set[tuple[str, str]]] = {}
        for module in self._running:
            self._note_callers(module)

    def functions(self) -> list[tuple[str, str]]:
        """(module, name) of the functions of ``equations``."""
        rooms = [m for m in self._trees if m.startswith("e3rl.equations.")]
        return [(m, n.name) for m in rooms for n in self._trees[m].body if isinstance(n, ast.FunctionDef)]

    def path(self, module: str) -> str:
        """The module's file."""
        return self._paths[module]

    def callers(self, module: str, name: str) -> list[Place]:
        """Functions outside ``equations`` that name it, directly or through another function of ``equations``."""
        found: set[tuple[str, str]] = set()
        todo, seen = [(module, name)], set[tuple[str, str]]()
        while todo:
            here = todo.pop()
            if here in seen:
                continue
            seen.add(here)
            for caller in self._callers.get(".".join(here), ()):
                (todo.append if caller[0].startswith("e3rl.equations.") else found.add)(caller)
        return [Place(self._paths[m], n) for m, n in sorted(found)]

    def _imported(self, tree: ast.AST) -> dict[str, str]:
        """What each imported name stands for; "module:name" strings of plug-in tables count as imports too."""
        names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Import):
                names |= {a.asname or a.name: a.name for a in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _PLUG_IN.fullmatch(node.value):
                names[node.value] = node.value.replace(":", ".")
        return names

    def _reached(self) -> list[str]:
        todo = [m for m in self._trees if any(m == root or m.startswith(f"{root}.") for root in ROOTS)]
        seen: set[str] = set()
        while todo:
            module = todo.pop()
            if module in seen:
                continue
            seen.add(module)
            for target in self._imports[module].values():
                todo += [m for m in (target, target.rpartition(".")[0]) if m in self._trees]
        return sorted(seen)

    def _note_callers(self, module: str) -> None:
        tree, imports = self._trees[module], self._imports[module]
        own = {name: f"{module}.{name}" for name, _ in definitions(tree) if "." not in name}
        known = imports | own
        for name, node in definitions(tree):
            if isinstance(node, ast.ClassDef):
                continue
            for inner in ast.walk(node):
                target = None
                if isinstance(inner, ast.Name):
                    target = known.get(inner.id)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                    target = f"{known.get(inner.value.id)}.{inner.attr}"
                if target and target != f"{module}.{name}":
                    self._callers.setdefault(target, set()).add((module, name))


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def problems(functions: dict[Equation, list[Place]], tests: dict[Equation, list[Place]], source: Source) -> list[str]:
    """What keeps the map from being complete, in words."""
    gaps = {"function": REQUIRED - functions.keys() - DEFINITIONS.keys(), "test": REQUIRED - tests.keys()}
    lines = [f"{paper} eq {n} has no {kind}" for kind, missing in gaps.items() for paper, n in sorted(missing)]
    both = sorted(functions.keys() & DEFINITIONS.keys())
    lines += [f"{paper} eq {number} has a function and is listed as a definition" for paper, number in both]
    for found in (functions, tests):
        strangers = [(e, at) for e, at in found.items() if not 1 <= e[1] <= len(MEANINGS[e[0]])]
        lines += [f"{p.path}: {p.name} names {e[0]} eq {e[1]}, which does not exist" for e, at in strangers for p in at]
    for module, name in source.functions():
        if not source.callers(module, name):
            lines.append(f"{source.path(module)}: {name} is called by nothing that trains or decodes")
    return lines


def links(found: list[Place], *, full_name: bool) -> str:
    """Links from the page; a test, which has a long name, is shown as its file, once."""
    shown = {f"[{p.name if full_name else Path(p.path).stem}](../{p.path})": None for p in found}
    return "<br>".join(shown) or "–"


def called_by(found: list[Place], source: Source) -> str:
    """Links to what calls these functions: file and function."""
    callers = sorted({c for p in found for c in source.callers(_module(Path(p.path)), p.name)})
    return "<br>".join(f"[{Path(c.path).stem}.{c.name}](../{c.path})" for c in callers) or "–"


def render(functions: dict[Equation, list[Place]], tests: dict[Equation, list[Place]], source: Source) -> str:
    """The page. No line numbers: it changes only when a definition comes, goes or moves to another file."""
    lines = [
        "# Equations",
        "",
        "Which function implements each equation of the papers, what calls it in training and decoding, and where it is",
        "tested. Written by `python tools/equation_map.py` from the first words of docstrings (`Eq 13.`, `ERPO eq 8.`) and from",
        "imports; do not edit. A changed term, coefficient or function in any of them changes a rollout or a loss",
        "([test_mutations](../tests/equations/test_mutations.py)).",
    ]
    for paper, title in (
        ("E3RL", "E³RL (arXiv 2606.17735)"),
        ("ERPO", "ERPO (token-level entropy-regulated policy optimization)"),
    ):
        lines += ["", f"## {title}", "", "| eq | | functions | called by | tests |", "|---|---|---|---|---|"]
        for number, meaning in enumerate(MEANINGS[paper], 1):
            found, tested = functions.get((paper, number), []), tests.get((paper, number), [])
            shown = DEFINITIONS.get((paper, number)) or links(found, full_name=True)
            said = f"{meaning}<br>$`{FORMULAS[paper][str(number)]}`$"
            lines.append(
                f"| {number} | {said} | {shown} | {called_by(found, source)} | {links(tested, full_name=False)} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Map the papers' equations to functions and tests.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 on a gap or a stale page")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    options = parser.parse_args(arguments)
    functions, tests = places(options.root, "e3rl/equations"), places(options.root, "tests")
    source = Source(options.root)
    found, page, path = problems(functions, tests, source), render(functions, tests, source), options.root / PAGE
    if not options.check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != page:
        found.append(f"{PAGE} is stale: run python tools/equation_map.py")
    print("\n".join(found) or "every equation has a function that runs and a test", file=sys.stderr if found else None)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
