"""Makes the lab's models: supervised training on solutions of training-half problems, short on purpose.

It stops when the model solves about half of its training-level chains, or a third of its books, so that reinforcement
learning has something to do; mazes it learns from searches that often fail. Run ``python -m e3rl.lab.pretrain --output DIR``,
with ``--tools`` for the model that calls tools, ``--maze`` for the one that searches mazes. It trains in one thread, so that
one seed gives the same weights bit for bit on the same machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from e3rl.lab import lab_directory
from e3rl.lab.books import Books, conversation
from e3rl.lab.problems import demonstration, load, solution
from e3rl.lab.tokenizer import TURNS, build_tokenizer
from e3rl.types import Problem

CONTEXT = 512
ASSISTANT = TURNS[-1]
_POOL_SEED = 1  # other training problems than reinforcement learning sees first


@dataclass(frozen=True)
class Schedule:
    """The settings that make the shipped weights."""

    steps: int = 750
    mixture: Mapping[str, int] = field(default_factory=lambda: {"lab:path:1-4": 64, "lab:chain:1-4": 32})
    """Problems of each name in every batch. Paths take longer to learn than chains, so there are more of them."""
    learning_rate: float = 2e-3
    warmup: int = 50  # steps of linear warm-up; the learning rate is constant after them
    decay: int = 0  # last steps, over which it falls to zero on a straight line
    pool: int = 40_000  # problems of each name to draw batches from
    seed: int = 0
    tools: bool = False
    """Problems are conversations with tool calls."""
    extends: bool = False
    """The weights start from the shipped model, which can calculate and read graphs."""

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step, the first being 0."""
        risen = min(1.0, (step + 1) / self.warmup)
        return min(risen, (self.steps - step) / self.decay) if self.decay else risen


TOOLS = Schedule(
    steps=180, mixture={"lab:books:1-4": 32}, learning_rate=1e-3, warmup=10, pool=8_000, tools=True, extends=True
)
"""The settings that make the weights that call tools."""

_MAZES = {"lab:maze:2-5": 16}
MAZE = (
    Schedule(steps=300, mixture=_MAZES, learning_rate=1e-3, warmup=20, pool=8_000, extends=True),
    Schedule(steps=240, mixture=_MAZES, learning_rate=1.5e-3, warmup=10, decay=230, pool=8_000, seed=1),
)
"""The settings that make the weights that search mazes; the second goes on from the first's weights."""


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


def extend_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The shipped model with rows for the tokens that its own tokenizer lacks."""
    model = Qwen3ForCausalLM.from_pretrained(lab_directory(), dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, problem: Problem, *, tools: bool = False, response: str | None = None
) -> tuple[list[int], list[int]]:
    """A problem with a response (None: its solution) as ids, and the same with -100 outside the assistant's turns."""
    said = solution(problem) if response is None else response
    turns = [{"role": "user", "content": str(problem.prompt)}, {"role": "assistant", "content": said}]
    if tools:
        turns = conversation(problem)
    text = tokenizer.apply_chat_template(turns, tools=[Books().book] if tools else None, tokenize=False)
    ids = tokenizer.encode(str(text))
    labels, speaks, begin = list[int](), False, tokenizer.convert_tokens_to_ids(ASSISTANT)
    for token in ids:
        labels.append(token if speaks else -100)
        speaks = (speaks or token == begin) and token != tokenizer.eos_token_id
    return ids, labels


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels."""
    width = max(len(ids) for ids, _ in rows)
    padded = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for row, (ids, learned) in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(learned)
    return padded, labels


class _Batches:
    """Random batches from a pool of training problems."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str, schedule: Schedule) -> None:
        self._tokenizer, self._tools = tokenizer, schedule.tools
        self._rng = Random(f"{name}/{schedule.seed}")
        self._pool = load(name, "train", schedule.pool, _POOL_SEED)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        problems = self._rng.choices(self._pool, k=size)
        drawn = [encode(self._tokenizer, p, tools=self._tools, response=demonstration(p, self._rng)) for p in problems]
        return collate(drawn, self._tokenizer.pad_token_id)


def _losses(model: Qwen3ForCausalLM, schedule: Schedule, sources: Mapping[str, _Batches]) -> dict[str, float]:
    """Backpropagate the mean loss over one batch of each name; a forward pass each, since their lengths differ."""
    losses: dict[str, float] = {}
    for name, size in schedule.mixture.items():
        ids, labels = sources[name].draw(size)
        loss = model(input_ids=ids, attention_mask=ids != model.config.pad_token_id, labels=labels).loss
        (loss / len(sources)).backward()
        losses[name] = loss.item()
    return losses


def pretrain(
    schedule: Schedule,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    model: Qwen3ForCausalLM | None = None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer. ``report`` gets each step's loss by name; ``model``: train this one on."""
    torch.manual_seed(schedule.seed)
    tokenizer = build_tokenizer(CONTEXT, tools=schedule.tools)
    model = (model or (extend_model if schedule.extends else build_model)(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate)
    sources = {name: _Batches(tokenizer, name, schedule) for name in schedule.mixture}
    for step in range(1, schedule.steps + 1):
        losses = _losses(model, schedule, sources)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        report(step, losses)
    return model.eval(), tokenizer


def main() -> None:
    """Train and save an ordinary Hugging Face directory."""
    parser = argparse.ArgumentParser(prog="python -m e3rl.lab.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the model and its tokenizer")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--tools", dest="schedules", action="store_const", const=(TOOLS,), help="the model that calls tools"
    )
    kind.add_argument(
        "--maze", dest="schedules", action="store_const", const=MAZE, help="the model that searches mazes"
    )
    parser.set_defaults(schedules=(Schedule(),))
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()

    def report(step: int, losses: dict[str, float]) -> None:
        if step % 50 == 0:
            values = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            print(f"step {step:5d}  {time.perf_counter() - started:6.1f} s  {values}", flush=True)

    model, tokenizer = pretrain(options.schedules[0], report)
    for schedule in options.schedules[1:]:
        model, _ = pretrain(schedule, report, model)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{sum(p.numel() for p in model.parameters())} parameters saved in {options.output}")


if __name__ == "__main__":
    main()
