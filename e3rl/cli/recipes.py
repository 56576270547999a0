"""Recipes by name: those that come with the package, or any TOML or YAML file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from e3rl.errors import UserError, unknown
from e3rl.parsing import YAML_SUFFIXES

BUILT_IN = Path(__file__).parents[1] / "recipes"
RESEARCH = "e3rl_reproduce"
"""The package of `e3rl reproduce`, which has the papers' ablations."""


def _recipes() -> dict[str, Path]:
    found = importlib.util.find_spec(RESEARCH)
    roots = [BUILT_IN, *(Path(place) / "recipes" for place in (found and found.submodule_search_locations) or ())]
    return {str(p.relative_to(root).with_suffix("")): p for root in roots for p in sorted(root.rglob("*.toml"))}


def recipe_names() -> list[str]:
    """Names of the recipes of the package and of its research code."""
    return sorted(_recipes())


def find_recipe(name: str) -> Path:
    """A recipe file's path, or a built-in recipe's name."""
    if name.endswith((".toml", *YAML_SUFFIXES)):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no such recipe file: {name}")
        return path
    known = _recipes()
    if name not in known:
        if name.startswith("ablations/") and importlib.util.find_spec(RESEARCH) is None:
            raise UserError(f"the overlay {name} comes with e3rl's research code: pip install 'e3rl[reproduce]'")
        raise unknown("recipe", name, known)
    return known[name]


def find_recipes(names: Sequence[str]) -> list[Path]:
    """Each recipe of a list of files or names."""
    return [find_recipe(name) for name in names]
