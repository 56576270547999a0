"""Stand-ins for weights, tokenizer and data in a rehearsal, where the real ones are too large or can't be read."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from e3rl.config import Config, DataConfig, ModelConfig
from e3rl.data.benchmarks import BENCHMARKS, load_benchmark
from e3rl.data.loading import load_problems
from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.model_files import hub_silent, known_architecture, require_fetchable, resolve_model_path

WIDTH, FORWARD, LAYERS, HEADS, VOCABULARY = 128, 256, 2, 4, 512  # heads of 32: the smallest that vLLM supports on CPUs
LONGEST_PROMPT, LONGEST_REAL_PROMPT = 512, 8192
"""Longest prompt that a rollout server accepts, in byte tokens: of stand-ins and of real problems."""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def architecture(model: ModelConfig) -> dict[str, Any]:
    """The model's own config.json: from its directory, from the package, or from the hub."""
    known = known_architecture(model.path)
    if known is not None:
        return known
    from transformers import AutoConfig

    source = resolve_model_path(model.path)
    require_fetchable(source)
    try:
        return dict(AutoConfig.from_pretrained(source).to_dict())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"the architecture of '{model.path}' can't be read ({reason[0] if reason else error!r}); those of the papers' "
            "models come with the package"
        ) from None


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, narrow and shallow. Every kind of layer is kept."""
    kinds = config.get("layer_types") or []
    layers = max(LAYERS, len(set(kinds)))
    ratio = max(1, config["num_attention_heads"] // config.get("num_key_value_heads", config["num_attention_heads"]))
    small = {
        **config,
        "hidden_size": WIDTH,
        "intermediate_size": FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(1, HEADS // ratio),
        "head_dim": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
        "max_window_layers": layers,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    if kinds:
        small["layer_types"] = [*dict.fromkeys(kinds), *kinds][:layers]
    return small


def make_model(config: Config, directory: Path) -> dict[str, tuple[int, int]]:
    """Write a model of random weights with a byte tokenizer; returns the sizes that shrank, before and after."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    real = architecture(config.model)
    small = shrunk(real)
    kind = small.pop("model_type")
    small = {key: value for key, value in small.items() if key not in ("transformers_version", "dtype", "torch_dtype")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **small), dtype=getattr(torch, config.model.dtype)
    )
    model.generation_config.eos_token_id = [256, 258]
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return {key: (real[key], small[key]) for key in small if isinstance(real.get(key), int) and real[key] > small[key]}


def byte_tokenizer() -> Any:
    """One token per byte, with special tokens and a chat template like Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(_SPECIAL))
    found = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found.chat_template = _TEMPLATE
    return found


def has_problems(data: DataConfig) -> bool:
    """Whether training rows can be read: of a file, a directory, or a hub that answers."""
    if not Path(data.train).exists() and hub_silent():
        return False
    try:
        return bool(load_problems(data.train, config=replace(data, train_limit=1), split="train"))
    except UserError:
        if Path(data.train).exists():
            raise
        return False


def has_benchmarks(names: Sequence[str], data: DataConfig) -> bool:
    """Whether all of them can be read: from ``data.directory``, or from a hub that answers."""
    if not data.directory and hub_silent():
        return False
    try:
        return all(load_benchmark(name, data.directory).problems for name in names)
    except UserError:
        if data.directory:
            raise
        return False


def make_problems(path: Path, rows: int, prompt_column: str, answer_column: str) -> None:
    """Sums under the column names of the real data."""
    numbers = random.Random(zlib.crc32(path.name.encode()))
    lines = []
    for i in range(rows):
        a, b = numbers.randrange(1000), numbers.randrange(1000)
        lines.append(json.dumps({"id": str(i), prompt_column: f"What is {a} + {b}?", answer_column: str(a + b)}))
    write_text(path, "\n".join(lines) + "\n")


def make_benchmarks(directory: Path, names: Sequence[str]) -> None:
    """A file for each benchmark, with as many rows as the real one has."""
    for name in names:
        make_problems(directory / f"{BENCHMARKS[name].files[0]}.jsonl", BENCHMARKS[name].count, "problem", "answer")


def coin(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Replaces the answer checker in training: random weights are never right, and equal rewards give no gradient."""
    return [float(zlib.crc32(repr(one).encode("utf-8", "surrogatepass")) & 1) for one in completions]
