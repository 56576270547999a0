"""Turns names in a config into objects: one table per kind, or ``module:name`` for code outside the package."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import locale
import os
import shlex
import signal
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from e3rl.config import Config, to_tables
from e3rl.errors import UserError, unknown
from e3rl.sections import toml_value


def _module_name(path: Path) -> str:
    """The name under which a file is imported: its own, unless another module has it, such as for a file torch.py."""
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        other = sys.modules.get(path.stem) or importlib.util.find_spec(path.stem)
        origin = getattr(other, "__file__", None) or getattr(other, "origin", None)
        if other is not None and (origin is None or Path(origin).resolve() != path):
            return f"plugin_{path.stem}"
    return path.stem


def _load_module(source: str, kind: str) -> ModuleType:
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        path = Path(source).resolve()
        name = _module_name(path)
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"{kind}: no such file {source}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:  # a plug-in may fail in any way while it is imported
        raise UserError(f"{kind} '{source}' can't be imported: {type(error).__name__}: {error}") from error


def own_python(module: str) -> list[str]:
    """The command that runs a module in its own process; append arguments to it.

    The working directory is on its import path only if it is on this process's, so that a torch.py there can't replace torch.
    """
    safely = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    return [sys.executable, *safely, "-m", module]


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


REMOTE_CODE = "model.trust_remote_code"


def foreign_code(config: Config) -> dict[str, str]:
    """The code that is not e3rl's and that a config would run: setting → plug-in, or the model that brings its own."""
    named = {
        "data.transform": config.data.transform,
        "rollout.engine": config.rollout.engine,
        "erasure.metric": config.erasure.metric,
        "objective.name": config.objective.name,
        "environments.factory": config.environments.factory,
        "environments.erase": config.environments.erase,
        **{f"rewards.functions[{i}]": name for i, name in enumerate(config.rewards.functions)},
    }
    found = {setting: name for setting, name in named.items() if ":" in name}
    return {**found, REMOTE_CODE: config.model.path} if config.model.trust_remote_code else found


def foreign_code_lines(code: Mapping[str, str]) -> list[str]:
    """What `foreign_code` found, a line each."""
    remote = "model.trust_remote_code = true: Python code that comes with "
    return [f"{remote}{name}" if setting == REMOTE_CODE else f"{setting} = {name}" for setting, name in code.items()]


def require_named(code: Mapping[str, str], config: Config, own: Mapping[str, Any], file: Path) -> None:
    """UserError unless the caller's ``own`` tables name all code that ``file`` names, since that may come from elsewhere."""
    tables = to_tables(config)
    for setting in code:
        section, _, key = setting.partition("[")[0].partition(".")
        if key not in own.get(section, {}):
            override = f"{section}.{key}={toml_value(tables[section][key])}"
            raise UserError(
                f"{file} names code: {section}.{key} = {tables[section][key]}. It may come from elsewhere, so it runs none; if "
                f"you trust that code, name it yourself: {shlex.quote(override)}"
            )


def require_trust(code: Mapping[str, str], file: Path, trusted: Collection[str]) -> None:
    """UserError unless all code that ``file`` names is ``trusted``."""
    left = {setting: name for setting, name in code.items() if name not in trusted}
    if left:
        lines = "; ".join(foreign_code_lines(left))
        arguments = " ".join(f"--trust {shlex.quote(name)}" for name in dict.fromkeys(left.values()))
        raise UserError(
            f"{file} names code: {lines}. It may come from elsewhere, so it runs none; if you trust that code, repeat the "
            f"command with {arguments}"
        )


# --- what code of other authors may not leave behind in the process it runs in


def working_directory() -> str:
    """The current directory, or a phrase for messages if it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return "a directory that is gone"


@dataclass(frozen=True)
class ProcessState:
    """What all of a process shares, as it was at some moment."""

    directory: str
    umask: int | None
    locale: str
    handlers: Mapping[int, Any]
    variables: Mapping[str, str]
    import_path: tuple[str, ...]

    @classmethod
    def now(cls) -> ProcessState:
        """The state at this moment; signal handlers are seen from the main thread alone, as they can be set there alone."""
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {s: signal.getsignal(s) for s in signal.Signals}
        return cls(
            working_directory(), _umask(), locale.setlocale(locale.LC_ALL), handlers, dict(os.environ), tuple(sys.path)
        )

    def restore(self) -> str | None:
        """Put back what changed; what is said of a changed directory. The rest is said once, on standard error.

        Variables and import path stay changed: libraries set them when they are first imported.
        """
        now = ProcessState.now()
        if now == self:
            return None
        undone = []
        if now.umask != self.umask and self.umask is not None:
            os.umask(self.umask)
            undone.append("the umask")
        if now.locale != self.locale:
            locale.setlocale(locale.LC_ALL, self.locale)
            undone.append("the locale")
        for number in [n for n in self.handlers.keys() & now.handlers.keys() if now.handlers[n] != self.handlers[n]]:
            if (before := self.handlers[number]) is not None:  # None: set by C code, which Python can't put back
                signal.signal(number, before)
                undone.append(f"the handler of {signal.Signals(number).name}")
        kept = [n for n in {**self.variables, **now.variables} if now.variables.get(n) != self.variables.get(n)]
        kept += ["sys.path"] * (now.import_path != self.import_path)
        if undone:
            _say_once(f"{', '.join(undone)} changed; put back")
        if kept:
            _say_once(f"{', '.join(sorted(kept))} changed; that stays")
        if now.directory == self.directory:
            return None
        os.chdir(self.directory)
        return f"changed the working directory to {now.directory}; it was changed back"


def _umask() -> int | None:
    """Read without setting it, which other threads would notice; None where the system doesn't say it."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), None)
    except OSError:
        return None


@functools.cache
def _say_once(what: str) -> None:
    sys.stderr.write(f"e3rl: while a reward function or a tool ran, {what}\n")
