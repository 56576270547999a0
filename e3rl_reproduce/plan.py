"""What a study would need: cells, tokens, memory, hardware and data, and what of it is missing here."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from e3rl.config import Config, load_config
from e3rl.data.benchmarks import load_benchmark
from e3rl.errors import UserError
from e3rl_reproduce.cells import Cell, merged, missing
from e3rl_reproduce.scales import Scale
from e3rl_reproduce.study import Study

PARAMETERS = {"Qwen3-4B": 4.0e9, "Qwen3-8B": 8.2e9, "Qwen2.5-1.5B": 1.5e9, "Qwen2.5-3B": 3.1e9, "Qwen2.5-7B": 7.6e9}
"""Of the papers' models, for estimates."""

_BYTES = {"full": 18, "lora": 4}
"""A parameter's memory in training, activations aside: bfloat16 weights and reference, float32 master, gradient and Adam's
two moments; or, under LoRA, the weights alone (the reference is the model without its adapters) with room to work."""


def _prompts(config: Config) -> int:
    """Problems that a training goes through; 0 where only the data would tell."""
    if config.train.steps:
        return config.train.steps * config.train.prompts_per_step
    return int(config.train.epochs * config.data.train_limit)


def training_tokens(config: Config) -> int:
    """Most tokens that a training generates, were nothing erased; 0 where only the data would tell."""
    return _prompts(config) * config.rollout.num_generations * config.rollout.completion_limit


def requirements(config: Config) -> list[str]:
    """What is missing here to run a config, in words."""
    found = []
    if config.model.path not in ("lab", "smollm2"):
        if not Path(config.model.path).is_dir():
            found.append(f"the model {config.model.path}: a local directory (model.path=DIR), or a hub to load it from")
        import torch

        if not torch.cuda.is_available():
            found.append("GPUs: PyTorch sees none here")
    source = config.data.train
    if not source.startswith("lab:") and not Path(source).exists():
        found.append(f"the training data {source}: a local file (data.train=FILE), or a hub to load it from")
    if config.model.lora_r and importlib.util.find_spec("peft") is None:
        found.append("PEFT: pip install 'e3rl[lora]'")
    return found


def missing_benchmarks(scale: Scale) -> list[str]:
    """Benchmarks of the papers that are in no directory of files (data.directory=DIR), so that a hub must give them."""
    if all(source.startswith("lab:") for source in scale.benchmarks.values()):
        return []
    directory = load_config(overrides=scale.overrides).data.directory
    if not directory:
        return ["the benchmarks: a directory with their files (data.directory=DIR), or a hub to load them from"]
    found = []
    for source in scale.benchmarks.values():
        try:
            load_benchmark(source, directory)
        except UserError as error:
            found.append(str(error))
    return found


def _size(count: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} "


def plan(study: Study, scale: Scale, cells: Mapping[str, Sequence[Cell]], out: Path) -> list[str]:
    """Lines for the terminal, a block a model."""
    lines = [f"{study.title}, scale {scale.name}: {len(scale.seeds)} seeds, {len(scale.benchmarks)} benchmarks"]
    for model, wanted in cells.items():
        together = merged(wanted)
        left = [cell for cell in together if missing(cell, out)]
        trained = [cell for cell in left if cell.trained]
        lines += ["", f"{model}: {len(together)} cells, {len(together) - len(left)} done; {len(trained)} to train"]
        tokens = sum(training_tokens(cell.config) for cell in trained)
        known = f"at most {_size(tokens)}tokens" if tokens else "as many tokens as the data ask for"
        lines.append(f"  generate {known} in training, were nothing erased")
        if model in PARAMETERS:
            config = together[0].config
            kind = "lora" if config.model.lora_r else "full"
            memory = PARAMETERS[model] * _BYTES[kind] / 2**30
            lines.append(
                f"  memory: about {memory:.0f} GiB for weights, gradients and optimizer, beside caches and activations"
            )
            if tokens:
                lines.append(
                    f"  arithmetic: about {10 * PARAMETERS[model] * tokens:.1e} operations (generate, score, learn)"
                )
        for need in requirements(together[0].config):
            lines.append(f"  missing: {need}")
    lines += [f"  missing: {need}" for need in missing_benchmarks(scale)]
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free / 2**30
    lines += ["", f"results go to {out} ({free:.0f} GiB free)"]
    return lines
