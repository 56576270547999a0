"""Memory of a training pass against the length of the sequence: resident, each length in a process of its own.

python benchmarks/long_context.py                                       1k to 16k tokens
python benchmarks/long_context.py --lengths 1024,2048 --checkpointing    recomputed activations

A tiny Qwen3, or with --windows one whose layers see 1,024 places by turns; a row of a sequence, an erased candidate of 128
tokens near its end and a sibling of half the length behind a prompt of 512; e3rl's attention shares (L' = 64) with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from train_step_memory import PeakMemory

from e3rl.train.attribution import AttributionSettings, attribution_layers, packed_attention
from e3rl.train.packing import PackedRow, TrainSequence
from e3rl.train.scoring import score_row

PROMPT, ERASED = 512, 128


def model(windows: bool) -> Any:
    """Four layers of width 64."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] if windows else ["full_attention"] * 2
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        use_sliding_window=windows,
        sliding_window=1024 if windows else None,
        layer_types=kinds * 2,
        max_position_embeddings=2**16,
    )
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").train()


def _sequence(ids: list[int], erased: bool = False) -> TrainSequence:
    size = len(ids) - PROMPT
    zeros_T = torch.zeros(size)
    return TrainSequence(tuple(ids[:PROMPT]), tuple(ids[PROMPT:]), zeros_T.long(), zeros_T == 0, zeros_T, 0, 0, erased)


def measured(length: int, checkpointing: bool, windows: bool) -> dict[str, float]:
    """A forward and a backward pass; peak above what was resident before, MiB."""
    policy = model(windows)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    ids, other, erased = (torch.randint(256, (n,), generator=generator).tolist() for n in (length, length // 2, ERASED))
    sequences = [
        _sequence(ids),
        _sequence(ids[:PROMPT] + other),
        _sequence(ids[: length - 2 * ERASED] + erased, erased=True),
    ]
    row = PackedRow.of(sequences, torch.device("cpu"))
    settings = AttributionSettings(64, attribution_layers(policy, "last"))
    memory = PeakMemory()
    memory.start()
    began = time.perf_counter()
    with packed_attention(policy):
        score_row(policy, row, 1.0, settings).logprobs_ST().sum().backward()
    return {"length": length, "row": len(row.ids_N), "mib": memory.above(), "seconds": time.perf_counter() - began}


def main() -> None:
    """Print a line for each length, then MiB per thousand tokens of the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(options.alone, options.checkpointing, options.windows)))
        return
    flags = [f for f in ("--checkpointing", "--windows") if f in sys.argv]
    for length in map(int, options.lengths.split(",")):
        command = [sys.executable, __file__, "--alone", str(length), *flags]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found["mib_per_1000"] = 1000 * found["mib"] / found["row"]
        print(json.dumps({key: round(value, 2) for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
