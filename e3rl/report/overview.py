"""A run as a whole, read from its directory: settings, curves, evaluations and health, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from e3rl.config import Config, to_tables
from e3rl.errors import UserError
from e3rl.evaluate.figures import evaluated_name
from e3rl.parsing import read_json
from e3rl.report.health import Logs, examine
from e3rl.train.metrics import METRICS
from e3rl.train.run_directory import read_config, read_lines

GRADERS = frozenset({"math", "code", "lab"})
"""Built-in reward functions that give 1 for a right answer. With others, accuracy is known if problems have answers."""


def read_overview(run: Path) -> dict[str, Any]:
    """Everything about the run except its rollouts."""
    config = read_config(run)
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    summary = _read_json(run / "summary.json")
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "method": _method(config),
        "facts": facts(config) + [[k, str(v)] for k, v in _read_json(run / "environment.json").items()],
        "step": metrics[-1]["step"] if metrics else 0,
        "steps": config.train.steps,
        "graded": bool(GRADERS.intersection(config.rewards.functions[:1])),
        "finished": bool(summary),
        "health": [asdict(f) for f in examine(Logs(metrics, evaluations, config))],
        "metrics": columns(metrics),
        "meanings": METRICS,
        "evaluations": [evaluation_point(e, metrics) for e in evaluations],
        "settings": to_tables(config),
    }


def _method(config: Config) -> str:
    from e3rl.objectives import method_name

    return method_name(config)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or incomplete."""
    try:
        value = read_json(path, finite=False)
    except (FileNotFoundError, UserError):
        return {}
    return value if isinstance(value, dict) else {}


def columns(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Records as one list for each metric; None for a step without a value."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [_short(record.get(name)) for record in records] for name in names}


def _short(value: Any) -> Any:
    """Rounded to six significant digits, more than a chart can show."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_short(v) for v in value]
    return value


def evaluation_point(record: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An evaluation under names that do not depend on k, and the training tokens spent before it."""
    k = record["samples"]
    spent = [m["tokens_total"] for m in metrics if m["step"] <= record["step"]]
    return {
        "step": record["step"],
        "tokens_total": spent[-1] if spent else 0,
        "mode": evaluated_name(record),
        "k": k,
        "avg": record[f"avg@{k}"],
        "avg_interval": record["ci95"],
        "pass": record[f"pass@{k}"],
        "pass_interval": record["pass_ci95"],
        "problems": record["problems"],
        "tokens": record["tokens"],
        "r": record["r"],
        "erase_rate": record["erase_rate"],
        "finish_ratio": record["finish_ratio"],
        "length": record["length"],
    }


def mixture_text(sources: Mapping[str, float]) -> str:
    """The training data, in words."""
    if len(sources) == 1:
        return next(iter(sources))
    return ", ".join(f"{100 * share:.3g} % {source}" for source, share in sources.items())


def facts(config: Config) -> list[list[str]]:
    """The settings of the run, as label and value."""
    rollout, train, erasure = config.rollout, config.train, config.erasure
    learned = f"{train.prompts_per_step} prompts × {rollout.num_generations} siblings a step"
    ending = "" if rollout.max_segments == 1 else "s"
    if rollout.erase:
        name = erasure.strictness
        chosen = f"{name.replace('kappa0', 'κ₀')} = {getattr(erasure, name):g}"
        erasing = f"up to {erasure.max_erasures} a segment, {chosen}, {erasure.baseline} baseline"
    else:
        erasing = "off: plain rollouts"
    return [
        ["Method", _method(config)],
        ["Model", config.model.path + (f", LoRA r = {config.model.lora_r}" if config.model.lora_r else "")],
        ["Training data", mixture_text(config.data.sources)],
        ["Rewards", ", ".join(config.rewards.functions)],
        ["Batch", learned],
        ["Response", f"up to {rollout.max_segments} segment{ending} of {rollout.segment_length} tokens"],
        ["Sampling", f"temperature {rollout.temperature:g}, top-p {rollout.top_p:g}, top-k {rollout.top_k or 'off'}"],
        ["Erasures", erasing],
        ["Learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"],
        ["Seed", str(config.run.seed)],
    ]
