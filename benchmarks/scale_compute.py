"""Operations of a training step and reads of device values in a decode step: keys of `benchmarks/scale.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scale_figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from e3rl.config import Config, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.decode import READ_AFTER
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.vllm.table import SlotTable, VllmArguments
from e3rl.models import Policy
from e3rl.objectives import build
from e3rl.testing.reads import META, DeviceReads
from e3rl.train.learner import Learner
from e3rl.train.packing import group_sequences, packed_rows
from e3rl.types import Candidate, Draw, Group, Problem, Prompt, Reward, RewardedGroup, Segment, Trajectory

SIBLINGS, SEGMENTS, SEGMENT, PROMPT = 8, 4, 128, 32
"""An eleventh of the papers' recipes: 4,128 tokens a group where theirs have 46,000."""
MICRO_BATCH = 1472  # of 16,384 in theirs


def small_model() -> Any:
    """A model of Qwen3's architecture."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def _group() -> RewardedGroup:
    generator = torch.Generator().manual_seed(0)

    def candidate(last: bool) -> Candidate:
        ids = torch.randint(2, 512, (SEGMENT,), generator=generator).tolist()
        ones = (1.0,) * SEGMENT
        return Candidate(tuple(ids), tuple(-x for x in ones), ones, ones, ones, (1,) * SEGMENT, last)

    prompt = Prompt(Problem("one", "", answer="1"), tuple(range(2, 2 + PROMPT)))
    trajectories = tuple(
        Trajectory(
            prompt,
            sibling,
            tuple(Segment(n, candidate(n == SEGMENTS - 1), None) for n in range(SEGMENTS)),
            (),
            "stop",
        )
        for sibling in range(SIBLINGS)
    )
    rewards = tuple(Reward(float(n % 2), {"math": float(n % 2)}) for n in range(SIBLINGS))
    return RewardedGroup(Group(prompt, trajectories, 0), rewards)


def operations(objective: str, minibatches: int = 1, **options: object) -> float:
    """Multiplications and additions of matrix products with weights in a step, per weight and token; a group a minibatch."""
    model, rewarded = small_model(), _group()
    config = Config(
        objective=ObjectiveConfig(objective, options),
        rollout=RolloutConfig(segment_length=SEGMENT, max_segments=SEGMENTS, num_generations=SIBLINGS),
        train=TrainConfig(micro_batch_tokens=MICRO_BATCH, gradient_checkpointing=True, minibatches=minibatches),
    )
    learner = Learner(Policy(model, None, "small", (0,), 1024), build(config.objective), config, updates=1)
    with FlopCounterMode(display=False) as counter:
        learner.learn([rewarded] * minibatches, 0)
    products = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    found = sum(products.get(f"aten.{name}", 0) for name in ("mm", "addmm"))
    sequences = group_sequences([rewarded.group], with_erased=False)
    tokens = sum(len(row.ids_N) for row in packed_rows(sequences, MICRO_BATCH, torch.device("cpu")))
    head = model.lm_head.weight.numel()
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) - head
    return found / minibatches / (layers * tokens + head * SIBLINGS * SEGMENTS * SEGMENT)


def flops_per_param_token() -> Figure:
    """E³RL with its KL term, where a group is 2.8 micro-batches as in the papers' recipes; beside it GRPO without KL."""
    parts = {"GRPO without KL": operations("grpo", kl_coef=0.0), "ERPO": operations("erpo")}
    parts["E³RL, two minibatches"] = operations("e3rl", 2, kl_coef=0.04)
    return Figure(operations("e3rl", kl_coef=0.04), 10.0, parts)


def host_reads_per_step() -> Figure:
    """Reads of the torch engine in a poll of 64 tokens of 8 rows, counted on a stand-in device, per decode step."""
    with DeviceReads():  # its check compares values
        engine = TorchEngine(small_model().to(META), eos_ids=(1,), max_rows=8, cache_rows=8, max_length=256)
    rows = engine.prefill(list(range(2, 2 + PROMPT)), SIBLINGS)
    for segment in range(2):  # in the first one settings go to the device, which stay there
        for sibling, row in enumerate(rows):
            engine.extend(row, 64, Draw(0, 1, "one", sibling, segment, 0), Sampling())
        before = engine.stats.decode_steps
        with DeviceReads() as found:
            engine.poll()
    steps = engine.stats.decode_steps - before
    reads, copies = sum(found.reads.values()), sum(found.copies.values())
    return Figure(reads / steps, 1 / READ_AFTER + 1e-9, {"reads": reads, "copies in a poll": copies, "steps": steps})


def host_reads_in_vllm() -> Figure:
    """Reads and copies of our sampler inside vLLM's workers in 64 steps of 8 rows, counted on a stand-in device, per step."""
    table, steps = SlotTable(8, 1000, META), 64
    for slot in range(8):
        table.add(slot, VllmArguments(f"{slot}", np.full(steps, 0.5), Sampling(temperature=0.7, top_p=0.9, top_k=50)))
    table.flush()
    slots, slots_S = np.arange(8), torch.arange(8, device=META)
    logits_SV, positions_S = torch.randn(8, 1000, device=META), torch.zeros(8, dtype=torch.long, device=META)
    with DeviceReads() as found:
        for _ in range(steps):
            table.draw(logits_SV, slots_S, slots, positions_S)
    with DeviceReads() as taken:
        table.take([(f"{slot}", steps) for slot in range(8)], [])
    reads, copies = sum(found.reads.values()), sum(found.copies.values())
    parts = {"reads": reads, "copies": copies, "reads to take all measures": sum(taken.reads.values())}
    return Figure((reads + copies) / steps, 0, parts)
