"""`e3rl init`: a starter recipe for a model and a dataset, with the reason for each choice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from e3rl.errors import UserError

if TYPE_CHECKING:
    from e3rl.config import Config
    from e3rl.data.starter import Choice

_LORA_RANK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("data", help="problems to train on: a file, a directory, a hub id or lab:FAMILY[:LEVEL]")
    parser.add_argument("--output", type=Path, default=Path("recipe.toml"), metavar="FILE", help="default: recipe.toml")
    parser.add_argument(
        "--reward", default="", metavar="NAME", help="built-in or file.py:function; default: by the data"
    )
    parser.add_argument(
        "--length", type=int, default=0, metavar="TOKENS", help="longest response; default: by the data"
    )


def run(options: argparse.Namespace) -> int:
    from e3rl.model_files import require_model

    if options.output.exists():
        raise UserError(f"{options.output} exists already: name another file with --output")
    if options.output.suffix != ".toml":
        raise UserError(f"--output {options.output}: a recipe is a .toml file")
    if options.length < 0:
        raise UserError("--length must be at least 1")
    require_model(options.model)

    from e3rl.cli.opening import quiet_libraries
    from e3rl.config import ModelConfig, build_config
    from e3rl.data.starter import Choice, recipe_text, starter_choices, tables_of
    from e3rl.files import write_text
    from e3rl.models import load_outline, resolve_device

    quiet_libraries()
    outline = load_outline(ModelConfig(path=options.model))
    title, choices = starter_choices(options.data, outline, reward=options.reward, length=options.length)
    choices = [Choice("run", "name", options.output.stem), Choice("model", "path", options.model), *choices]
    if resolve_device("auto").type == "cuda":
        choices.append(
            Choice("model", "dtype", "bfloat16", "there is a GPU; optimizer and master weights stay float32")
        )
    choices += _fitting(build_config(tables_of(choices)))
    text = recipe_text(title, choices)
    write_text(options.output, text)
    print(text)
    print(f"written: {options.output}. Next:")
    print(f"  e3rl data {options.output}            # what the model will see")
    print(f"  e3rl train {options.output} --plan    # memory, before anything is loaded")
    print(f"  e3rl train {options.output}")
    return 0


def _fitting(config: Config) -> list[Choice]:
    """A smaller micro-batch, or adapters, where the defaults do not fit this machine's device."""
    from dataclasses import replace

    from e3rl.data.starter import Choice
    from e3rl.models import resolve_device
    from e3rl.plan.memory import GIB, device_bytes, make_plan

    available, on_cpu = device_bytes(config.model), resolve_device("auto").type == "cpu"

    def needed(tokens: int, rank: int = 0) -> int:
        train, model = replace(config.train, micro_batch_tokens=tokens), replace(config.model, lora_r=rank)
        return make_plan(replace(config, train=train, model=model), 1, on_cpu=on_cpu).largest

    tokens = config.train.micro_batch_tokens
    wanted = needed(tokens)
    if wanted <= available:
        return []
    why = f"the default of {tokens:,} needs {wanted / GIB:.0f} GiB, and there are {available / GIB:.0f}"
    for smaller in (8192, 4096, 2048):
        if needed(smaller) <= available:
            return [Choice("train", "micro_batch_tokens", smaller, why)]
    why = f"training all weights needs {needed(2048) / GIB:.0f} GiB, and there are {available / GIB:.0f}"
    return [
        Choice("model", "lora_r", _LORA_RANK, why),
        Choice("model", "lora_alpha", 2 * _LORA_RANK),
        Choice("train", "learning_rate", 1e-5, "adapters need a larger rate than full training"),
        Choice("train", "micro_batch_tokens", 2048),
    ]
