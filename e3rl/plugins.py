"""Names in a config become objects: one explicit table per kind, or ``module:name`` for what lives outside the package."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from e3rl.errors import UserError, unknown


def _load_module(source: str, kind: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"{kind}: no such file {source}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # a plug-in may fail in any way while it is imported
        raise UserError(f"{kind} '{source}' can't be imported: {type(error).__name__}: {error}") from error


def load(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object that ``name`` stands for: an entry of ``table`` (its values are ``module:name``), or ``module:name``."""
    target = table.get(name, name)
    if ":" not in target:
        raise unknown(kind, name, table)
    source, _, attribute = target.rpartition(":")
    module = _load_module(source, kind)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise UserError(f"{kind} '{target}': {source} has no '{attribute}'") from None
