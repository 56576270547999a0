"""Recipes by name: those that come with the package, or any TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from e3rl.errors import UserError, unknown

BUILT_IN = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(str(p.relative_to(BUILT_IN).with_suffix("")) for p in BUILT_IN.rglob("*.toml"))


def find_recipe(name: str) -> Path:
    """A recipe file's path, or a built-in recipe's name."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"no such recipe file: {name}")
        return path
    if name not in recipe_names():
        raise unknown("recipe", name, recipe_names())
    return BUILT_IN / f"{name}.toml"


def find_recipes(names: Sequence[str]) -> list[Path]:
    """Each recipe of a list of files or names."""
    return [find_recipe(name) for name in names]
