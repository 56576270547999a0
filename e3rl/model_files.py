"""Resolves a model's path and checks its directory before any library reads it. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.lab import lab_directory, mazes_directory, tools_directory
from e3rl.lab.smollm2 import smollm2_directory
from e3rl.parsing import read_json
from e3rl.sections import shown

BUILT_IN: Mapping[str, Callable[[], Path]] = {
    "lab": lab_directory,
    "lab-tools": tools_directory,
    "lab-maze": mazes_directory,
    "smollm2": smollm2_directory,
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LONGEST_HUB_ID = 96
_HUB_SECONDS = 5.0
_MERGED = "adapters have to be merged into their model first (PEFT: merge_and_unload, then save_pretrained)"


ARCHITECTURES = Path(__file__).parent / "recipes" / "architectures.json"
"""The config.json of each model that a recipe names, so that it can be planned and rehearsed without a hub."""


def known_architecture(path: str) -> dict[str, Any] | None:
    """The config.json of a model that comes with the package; None for others."""
    found: dict[str, Any] | None = json.loads(ARCHITECTURES.read_text(encoding="utf-8")).get(path)
    return found


def resolve_model_path(path: str) -> str:
    """A directory or hub id; the names of the built-in models become their directories."""
    return str(BUILT_IN[path]()) if path in BUILT_IN else path


def require_model(path: str) -> None:
    """UserError where ``path`` is no built-in model, no hub id and no directory that holds a model. Looks at no weights."""
    if path in BUILT_IN:
        return
    directory = Path(path)
    if os.path.isdir(path):  # unlike Path's, these accept names too long for a file system
        _check_directory(directory)
    elif os.path.isfile(path):
        kind = (
            "GGUF files can't be trained" if path.endswith(".gguf") else "it holds config.json, a tokenizer and weights"
        )
        raise UserError(f"{shown(path)} is a file, and a model is a directory: {kind}")
    elif _is_local(path) or difflib.get_close_matches(path, BUILT_IN, n=1, cutoff=0.75):
        names = [*BUILT_IN, *_beside(directory)]
        nearest = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise UserError(f"no such directory: {shown(path)}, and it is no built-in model ({', '.join(BUILT_IN)}).{hint}")


@functools.cache
def hub_silent() -> str:
    """Why nothing can be fetched from the hub, '' where it answers; asked once, and not where HF_HUB_OFFLINE is set.

    Where it is silent, this process and those that it starts use their cache alone, as with HF_HUB_OFFLINE=1: the library
    would ask six times in 23 seconds for every file.
    """
    import huggingface_hub

    hub = huggingface_hub.constants
    if hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    if os.environ.get("HF_HUB_OFFLINE"):
        return ""
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # of whichever library it uses for HTTP
        os.environ["HF_HUB_OFFLINE"], hub.HF_HUB_OFFLINE = "1", True
        if "datasets" in sys.modules:  # it copied the setting
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        why = (str(error).strip() or repr(error)).splitlines()[0]
        return f"{hub.ENDPOINT} can't be reached ({why}; HF_HUB_OFFLINE=0 tries for longer)"
    return ""


def require_fetchable(source: str) -> None:
    """UserError where ``source`` names a model of the hub that is neither in this machine's cache nor to be had."""
    if os.path.isdir(source) or _is_local(source) or not hub_silent():
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(source, "config.json"), str):
        raise UserError(
            f"model '{source}' is not on this machine, and {hub_silent()}: name a directory, or run 'hf download {source}' "
            "where there is a network"
        )


def _is_local(path: str) -> bool:
    """Whether it can only be a path on this machine."""
    owner, slash, _ = path.partition("/")
    return (
        not _HUB_ID.fullmatch(path)
        or len(path) > _LONGEST_HUB_ID
        or path.startswith(".")
        or (bool(slash) and os.path.isdir(owner))
    )


def _beside(directory: Path) -> list[str]:
    if not os.path.isdir(directory.parent):
        return []
    return sorted(str(p) for p in directory.parent.iterdir() if p.is_dir())


def _check_directory(directory: Path) -> None:
    if (directory / "adapter_config.json").is_file():
        merged = directory.parent / "model"  # as a run leaves it
        hint = f" Did you mean {merged}?" if (merged / "config.json").is_file() else ""
        raise UserError(f"{directory} holds an adapter, which loads its weights from elsewhere: {_MERGED}{hint}")
    try:
        config = read_json(directory / "config.json", finite=False)
    except FileNotFoundError:
        hint = f" Did you mean {directory / 'model'}?" if (directory / "model" / "config.json").is_file() else ""
        raise UserError(f"{directory} is no model: it holds no config.json.{hint}") from None
    if not isinstance(config, dict):
        raise UserError(f"{directory / 'config.json'} holds no table")
    refuse_kernels(config, str(directory / "config.json"))
    _check_weights(directory)


def refuse_kernels(config: Mapping[str, Any], where: str) -> None:
    """UserError where a model's config names kernels of the hub: compiled code that transformers would fetch and run."""
    for key, value in _named(config):
        if any(word in key.lower() for word in ("implementation", "kernel")) and re.search("[/:]", value):
            raise UserError(
                f"{where} names code of the hub: {key} = {value!r}. A model's config runs none here: remove that key"
            )


def _named(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested tables and lists, with the keys that lead to it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _named(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, key)
    elif isinstance(value, str):
        yield key, value


def _check_weights(directory: Path) -> None:
    """UserError for a safetensors file that is cut short or damaged; reads only headers."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from None


@contextlib.contextmanager
def no_bars_of_tensors() -> Iterator[None]:
    """Switches off transformers' bar over a model's tensors; bars of a download, and afterwards all, stay as they were."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    shown, downloads = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's too
    try:
        if downloads:
            hub.enable_progress_bars()
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()
