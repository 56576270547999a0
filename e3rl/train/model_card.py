"""The model card of a trained model: what it is, how it was made, and with which figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from e3rl import __version__
from e3rl.config import Config, to_toml


def _figures(summary: Mapping[str, Any]) -> list[str]:
    rows = ["| held-out | decoding | Avg | 95 % interval | Pass | k |", "| --- | --- | --- | --- | --- | --- |"]
    for when in ("before", "after"):
        for mode, record in summary[when].items():
            k, (low, high) = record["samples"], record["ci95"]
            avg, passed = record[f"avg@{k}"], record[f"pass@{k}"]
            rows.append(f"| {when} | {mode} | {avg:.3f} | {low:.3f} to {high:.3f} | {passed:.3f} | {k} |")
    return rows if len(rows) > 2 else ["No held-out evaluation was made."]


def model_card(config: Config, summary: Mapping[str, Any], *, has_statistics: bool) -> str:
    """A Hugging Face model card. ``has_statistics``: calibration statistics are saved beside the model."""
    statistics = (
        "`e3rl_reference.json` beside it holds the statistics that erasable decoding of a single sample needs."
        if has_statistics
        else "Nothing was erased in training: erasable decoding of a single sample needs statistics that `e3rl calibrate` makes."
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [e3rl, reinforcement-learning]",
            "---",
            f"# {config.run.name}",
            "",
            f"Trained from `{config.model.path}` with {summary['method']} by e3rl {__version__}: {summary['steps']} steps, "
            f"{summary['tokens_generated']} generated tokens, {summary['train_seconds']:.0f} s.",
            "",
            *_figures(summary),
            "",
            f"It is an ordinary causal language model. {statistics}",
            "",
            "## Settings",
            "",
            "```toml",
            to_toml(config).strip(),
            "```",
            "",
        ]
    )
