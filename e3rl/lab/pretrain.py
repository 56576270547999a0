"""Makes the lab's model: supervised training on solutions of training-half problems, short on purpose.

It stops where the model solves about half of its training-level chains, so that reinforcement learning has something
to do. Run ``python -m e3rl.lab.pretrain --output DIR``. It trains in one thread, so that one seed gives the same
weights bit for bit on the same machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from e3rl.lab.problems import load, solution
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.types import Problem

CONTEXT = 512
_POOL_SEED = 1  # other training problems than reinforcement learning sees first


@dataclass(frozen=True)
class Schedule:
    """How the shipped weights are made."""

    steps: int = 1000
    batch: int = 32  # of each name in ``mixture``
    learning_rate: float = 2e-3
    warmup: int = 50
    mixture: tuple[str, ...] = ("lab:chain:1-4", "lab:path:1-4")
    pool: int = 40_000  # problems of each name in ``mixture``
    seed: int = 0


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The model with random weights: four layers of width 128, grouped-query attention, tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=True, bos_token_id=config.bos_token_id, **ends)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem) -> tuple[list[int], list[int]]:
    """A problem's prompt and its solution, with the end-of-turn mark, as ids."""
    turns = [{"role": "user", "content": str(problem.prompt)}]
    prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return tokenizer.encode(prompt), tokenizer.encode(solution(problem) + str(tokenizer.eos_token))


def collate(pairs: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels; only solution tokens have a label."""
    width = max(len(prompt) + len(target) for prompt, target in pairs)
    ids = torch.full((len(pairs), width), pad)
    labels = torch.full((len(pairs), width), -100)
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        labels[row, len(prompt) : end] = torch.tensor(target)
    return ids, labels


def _batches(tokenizer: PreTrainedTokenizerFast, name: str, schedule: Schedule) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches from a pool of training problems."""
    rng = Random(f"{name}/{schedule.seed}")
    pool = load(name, "train", schedule.pool, _POOL_SEED)
    while True:
        drawn = [encode(tokenizer, problem) for problem in rng.choices(pool, k=schedule.batch)]
        yield collate(drawn, tokenizer.pad_token_id)


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def pretrain(
    schedule: Schedule, report: Callable[[int, list[float]], None] = lambda step, losses: None
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer. ``report`` gets each step's loss by name of the mixture."""
    torch.manual_seed(schedule.seed)
    tokenizer = build_tokenizer(CONTEXT)
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, schedule))
    streams = [_batches(tokenizer, name, schedule) for name in schedule.mixture]
    for step in range(schedule.steps):
        losses = []
        for stream in streams:  # a batch a family: their lengths differ, and padding would cost more than it saves
            ids, labels = next(stream)
            loss = model(input_ids=ids, attention_mask=ids != tokenizer.pad_token_id, labels=labels).loss
            (loss / len(streams)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        report(step, losses)
    return model.eval(), tokenizer


def main() -> None:
    """Train and save an ordinary Hugging Face directory."""
    parser = argparse.ArgumentParser(prog="python -m e3rl.lab.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schedule, started = Schedule(steps=arguments.steps), time.perf_counter()

    def report(step: int, losses: list[float]) -> None:
        if step % 50 == 0 or step == schedule.steps - 1:
            values = "  ".join(f"{n} {v:.4f}" for n, v in zip(schedule.mixture, losses, strict=True))
            print(f"step {step:5d}  {time.perf_counter() - started:6.1f} s  {values}", flush=True)

    model, tokenizer = pretrain(schedule, report)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{sum(p.numel() for p in model.parameters())} parameters saved in {arguments.output}")


if __name__ == "__main__":
    main()
