"""Says which code that is not e3rl's a config is about to run."""

from __future__ import annotations

import sys

from e3rl.config import Config


def foreign_code(config: Config) -> list[str]:
    """The plug-ins that the config names, and the model's own code where that is allowed, a line each."""
    named = {
        "rollout.engine": config.rollout.engine,
        "erasure.metric": config.erasure.metric,
        "objective.name": config.objective.name,
        **{f"rewards.functions[{i}]": name for i, name in enumerate(config.rewards.functions)},
    }
    lines = [f"{setting} = {name}" for setting, name in named.items() if ":" in name]
    if config.model.trust_remote_code:
        lines.append(f"model.trust_remote_code = true: Python code that comes with {config.model.path}")
    return lines


def announce_foreign_code(config: Config) -> None:
    """Name it on stderr before any of it runs."""
    lines = foreign_code(config)
    if lines:
        print("This config runs code that is not e3rl's:", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
