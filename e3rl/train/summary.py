"""Written at the end and start of a run: summary.json, the model card, environment.json (versions, machine, commit)."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from e3rl import __version__
from e3rl.config import Config, to_toml
from e3rl.errors import UserError
from e3rl.evaluate.figures import evaluated_name, overall
from e3rl.objectives import method_name
from e3rl.train.run_directory import read_lines


def run_summary(run: Path, config: Config, *, step: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Before and after, r, erase rate and cost of a run that has done ``step`` steps."""
    records = read_lines(run / "evaluations.jsonl")
    lines = read_lines(run / "metrics.jsonl")

    def at(step: int) -> dict[str, Any]:
        """By mode; with several sources the mean, then each of them."""
        here = [r for r in records if r["step"] == step]
        ordered = [*overall(here), *(r for r in here if r not in overall(here))]
        return {evaluated_name(r): {k: v for k, v in r.items() if k != "step"} for r in ordered}

    def over_all(part: str, whole: str) -> float:
        return sum(line[part] for line in lines) / max(1, sum(line[whole] for line in lines))

    return {
        "method": method_name(config),
        "before": at(0),
        "after": at(step),
        "r": over_all("erased_tokens", "committed_tokens"),
        "erase_rate": over_all("erasures", "candidates"),
        "steps": step,
        "train_seconds": seconds,
        "tokens_generated": tokens,
    }


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
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", config.model.path) and not Path(config.model.path).exists()
    base = [f"base_model: {config.model.path}"] if hub else []
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            *base,
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


def require_hub(repository: str) -> None:
    """UserError, before a run starts, where its model could not be uploaded at its end."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"train.push_to_hub = '{repository}' is no repository: write OWNER/NAME")
    if get_token() is None:
        raise UserError("train.push_to_hub needs a login: run 'hf auth login', or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # no network, no such token: the library documents no closed list
        raise UserError(f"train.push_to_hub: the hub does not let us in: {str(error).splitlines()[0]}") from None


def upload(model: Path, adapter: Path, repository: str) -> str:
    """Upload a finished model, adapters as its folder adapter/; what became of it, for a note. The run is whole without."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=model, commit_message="Trained with e3rl")
        if adapter.is_dir():
            api.upload_folder(
                repo_id=repository, folder_path=adapter, path_in_repo="adapter", commit_message="Adapters"
            )
    except Exception as error:
        causes = [error] if error.__cause__ is None else [error, error.__cause__]
        reason = ": ".join((str(cause).strip().splitlines() or [repr(cause)])[0].rstrip(".") for cause in causes)
        return f"the model was not uploaded: {reason}. It is saved; try again with: hf upload {repository} {model}"
    return f"uploaded to {repository}"


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, marked where the tree differs from it."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, str]:
    """Name to value, in the order a reader wants them."""
    facts = {
        "e3rl": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {name: value for name, value in facts.items() if value is not None}
