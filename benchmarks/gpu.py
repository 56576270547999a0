"""What one GPU does with e3rl: attention kernels, decoding, training, memory against the plan, new weights; vLLM and TRL beside.

python benchmarks/gpu.py [--json OUT]              (under 10 minutes on an H100; vLLM and TRL where they are installed)
python benchmarks/gpu.py --device cpu --small      (whether it runs, on any machine; the figures say nothing)

The model has Qwen3-1.7B's shape and random weights: nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scale_groups import tokenizer_and_ids
from torch.nn.attention import SDPBackend

from e3rl.config import Config, DataConfig, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.model_files import known_architecture
from e3rl.models import Policy
from e3rl.objectives import build
from e3rl.plan.memory import make_plan
from e3rl.train.learner import Learner
from e3rl.train.packing import group_sequences, packed_rows
from e3rl.types import Candidate, Draw, Group, Problem, Prompt, Reward, RewardedGroup, Segment, Trajectory

SIBLINGS = 8
PEAKS = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "B200": (8e12, 2250e12)}
"""Bytes/s of memory and dense bfloat16 operations/s, from data sheets."""


@dataclass(frozen=True)
class Sizes:
    """What is run."""

    rows: int = 128  # decoded together
    decoded: int = 512  # tokens of each
    prompt: int = 256
    groups: int = 4  # of 8 responses, to train on
    response: int = 2048
    micro_batch: int = 16384
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


SMALL = Sizes(rows=8, decoded=20, prompt=8, groups=1, response=24, micro_batch=64, dtype="float32")


def _model(sizes: Sizes, device: str, small: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(known_architecture("Qwen/Qwen3-1.7B") or {})
    if small:
        shape |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9000}
        shape |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, sizes.dtype))


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Of the second of two runs; the first warms up."""
    taken = 0.0
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
    return taken


def attention_kernels(model: Any, sizes: Sizes, device: str) -> dict[str, str]:
    """Which kernel PyTorch takes for what e3rl asks of it; 'MATH' holds a matrix of scores."""
    config, dtype = model.config, getattr(torch, sizes.dtype)
    heads, keys, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def taken(rows: int, heads: int, keys: int, queries: int, width: int, masked: bool) -> str:
        query = torch.zeros(rows, heads, queries, dim, device=device, dtype=dtype)
        key = torch.zeros(rows, keys, width, dim, device=device, dtype=dtype)
        mask = torch.zeros(rows, 1, 1, width, device=device, dtype=dtype) if masked else None
        options = {"is_causal": not masked, "enable_gqa": heads != keys}
        return SDPBackend(torch._fused_sdp_choice(query, key, key, mask, 0.0, **options)).name

    return {
        "training and prompts": taken(1, heads, keys, 256, 256, masked=False),
        "a decode step": taken(sizes.rows, keys, keys, heads // keys, 256, masked=True),
    }


def decoding(engine: TorchEngine, model: Any, sizes: Sizes, device: str) -> dict[str, float]:
    """Tokens/s of full decode batches, and the share of the memory's bandwidth that weights and keys need at that rate."""

    def run() -> None:
        rows = []
        for start in range(0, sizes.rows, SIBLINGS):
            rows += engine.prefill([2 + (start + i) % 1000 for i in range(sizes.prompt)], SIBLINGS)
        for number, row in enumerate(rows):
            engine.extend(row, sizes.decoded, Draw(0, 1, "gpu", number, 0, 0), Sampling())
        while engine.poll():
            pass
        for row in rows:
            engine.release(row)

    seconds = _seconds(device, run)
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    read = sum(p.nbytes for p in model.parameters()) + sizes.rows * kv * (sizes.prompt + sizes.decoded / 2)
    return {
        "tokens/s": sizes.rows * sizes.decoded / seconds,
        "GB/s": read * sizes.decoded / seconds / 1e9,
        "prompt tokens": sizes.rows * sizes.prompt / SIBLINGS,
    }


def _groups(sizes: Sizes) -> Iterator[RewardedGroup]:
    generator = torch.Generator().manual_seed(0)
    ones = (1.0,) * sizes.response
    for number in range(sizes.groups):
        prompt = Prompt(Problem(f"p{number}", "", answer="1"), tuple(range(2, 2 + sizes.prompt)))
        ids = torch.randint(2, 8000, (SIBLINGS, sizes.response), generator=generator).tolist()
        drawn = [
            Candidate(row, tuple(-x for x in ones), ones, ones, ones, (1,) * sizes.response, ended=True) for row in ids
        ]
        trajectories = tuple(
            Trajectory(prompt, i, (Segment(0, candidate, None),), (), "stop") for i, candidate in enumerate(drawn)
        )
        rewards = tuple(Reward(float(i % 2), {"math": float(i % 2)}) for i in range(SIBLINGS))
        yield RewardedGroup(Group(prompt, trajectories, 0), rewards)


def _config(directory: Path, sizes: Sizes) -> Config:
    return Config(
        model=ModelConfig(path=str(directory), dtype=sizes.dtype),
        data=DataConfig(train="none/none", max_prompt_length=sizes.prompt),
        objective=ObjectiveConfig("e3rl", {}),
        rollout=RolloutConfig(
            num_generations=SIBLINGS,
            segment_length=max(sizes.response, sizes.decoded),
            max_segments=1,
            max_rows=sizes.rows,
            cache_rows=sizes.rows,
            kv_budget=0,
        ),
        train=TrainConfig(
            steps=1, prompts_per_step=sizes.groups, micro_batch_tokens=sizes.micro_batch, gradient_checkpointing=True
        ),
    )


def training(policy: Policy, config: Config, sizes: Sizes, device: str) -> dict[str, float]:
    """Tokens/s of whole E³RL steps with KL, and operations/s: of the model alone (6 a weight and token), and all of them."""
    learner = Learner(policy, build(config.objective), config, updates=2)
    rewarded = list(_groups(sizes))
    sequences = group_sequences([item.group for item in rewarded], with_erased=False)
    tokens = sum(len(row.ids_N) for row in packed_rows(sequences, sizes.micro_batch, torch.device("cpu")))
    seconds = _seconds(device, lambda: learner.learn(rewarded, 0))
    weights = sum(p.numel() for p in policy.model.parameters())
    return {
        "tokens/s": tokens / seconds,
        "model TFLOP/s": 6 * weights * tokens / seconds / 1e12,
        "all TFLOP/s": 10 * weights * tokens / seconds / 1e12,
    }


def new_weights(engine: TorchEngine, model: Any, device: str) -> dict[str, float]:
    """Handing an engine on the same GPU weights of its own."""
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    seconds = _seconds(device, lambda: engine.load_weights(fresh, 1))
    return {"seconds": seconds, "GB/s": sum(t.nbytes for t in fresh.values()) / seconds / 1e9}


def peer(name: str, directory: Path, sizes: Sizes, device: str) -> dict[str, float] | str:
    """The same work by another library in a process of its own, or why there is no figure."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_peers.py")), name, str(directory), device]
    try:
        done = subprocess.run(
            [*command, json.dumps(asdict(sizes))], capture_output=True, text=True, timeout=240, check=False
        )
    except subprocess.TimeoutExpired:
        return "not done after 4 minutes"
    if done.returncode:
        return next(
            (line for line in reversed(done.stderr.splitlines()) if line.strip()), f"ended with {done.returncode}"
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _shares(found: dict[str, Any], device: str) -> None:
    """Add shares of what the data sheet says, where the GPU is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found["device"] = name
    known = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if known is not None:
        found["decoding"]["share of bandwidth"] = found["decoding"]["GB/s"] * 1e9 / known[0]
        found["training"]["MFU"] = found["training"]["model TFLOP/s"] * 1e12 / known[1]


def measure(sizes: Sizes, device: str, small: bool, peers: bool) -> dict[str, Any]:
    """All of it, by what is measured."""
    model, found = _model(sizes, device, small), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        tokenizer, _ = tokenizer_and_ids()
        tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        tokenizer.save_pretrained(place)
        config = _config(Path(place), sizes)
        longest = sizes.prompt + config.rollout.completion_limit
        plan = make_plan(config, on_cpu=device == "cpu")
        engine = TorchEngine(model, eos_ids=(), max_rows=sizes.rows, cache_rows=sizes.rows, max_length=longest)
        found["attention kernel"] = attention_kernels(model, sizes, device)
        found["decoding"] = decoding(engine, model, sizes, device)
        found["new weights"] = new_weights(engine, model, device)
        found["training"] = training(Policy(model, None, "gpu", (0,), longest), config, sizes, device)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else math.nan
        found["memory"] = {"peak GiB": peak / 2**30, "planned GiB": plan.trainer.largest / 2**30}
        _shares(found, device)
        del engine, model
        if device == "cuda":
            torch.cuda.empty_cache()
        for name in ("vllm", "trl") if peers else ():
            found[name] = peer(name, Path(place), sizes, device)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and little work")
    parser.add_argument("--no-peers", action="store_true", help="leave out vLLM and TRL")
    parser.add_argument("--json", metavar="OUT", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU is to be seen (torch.cuda.is_available() is False): run it on a machine with one, with PyTorch for CUDA; "
            "--device cpu --small shows here that it runs",
            file=sys.stderr,
        )
        return 2
    if options.device == "cpu" and not options.small:
        print("a model of 1.7 billion weights takes hours on a CPU: add --small", file=sys.stderr)
        return 2
    found = measure(SMALL if options.small else Sizes(), options.device, options.small, not options.no_peers)
    for name, figures in found.items():
        items = figures.items() if isinstance(figures, dict) else [("", figures)]
        shown = ", ".join(f"{key} {v:.4g}" if isinstance(v, float | int) else f"{key} {v}".strip() for key, v in items)
        print(f"{name}: {shown}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
