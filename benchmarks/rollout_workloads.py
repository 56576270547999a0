"""What `benchmarks/rollout.py` measures: models, prompts, and the same generation by each of the peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from e3rl.config import ModelConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.models import load_policy
from e3rl.types import Draw, Problem, Prompt

PROMPT, LIMIT, SIBLINGS = 32, 128, 8


def qwen3_3m(positions: int = 4352) -> Any:
    """A random Qwen3 of 3.0 million parameters: hidden 256, 4 layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        initializer_range=0.1,  # distributions that are neither flat nor certain
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config).eval()


def load(name: str) -> Any:
    """A model of the benchmark by name."""
    return qwen3_3m() if name == "qwen3-3m" else load_policy(ModelConfig(path=name, device="cpu")).model.eval()


@dataclass(frozen=True)
class Workload:
    """Sequences in groups of `SIBLINGS` that share a prompt, how many new tokens each has, and how many go together."""

    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]
    batch: int

    @classmethod
    def of(cls, vocabulary: int, batch: int, ragged: bool, limit: int = LIMIT) -> Workload:
        """As many sequences as go together, of the full length; or twice as many, of any length from limit / 16 on."""
        generator = torch.Generator().manual_seed(1)
        sequences = 2 * batch if ragged else batch
        prompts = torch.randint(3, vocabulary, (sequences // SIBLINGS, PROMPT), generator=generator).tolist()
        lengths = [limit] * sequences
        if ragged:
            lengths = torch.randint(limit // 16, limit + 1, (sequences,), generator=generator).tolist()
        return cls([prompt for prompt in prompts for _ in range(SIBLINGS)], lengths, batch)

    @property
    def useful_tokens(self) -> int:
        return sum(self.lengths)


class _AtOwnLength(StoppingCriteria):
    def __init__(self, lengths: Sequence[int]) -> None:
        self._ends = torch.tensor(lengths) + PROMPT

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] >= self._ends


def by_generate(model: Any, work: Workload) -> None:
    """``model.generate``, batch by batch; no entropy, no log-probabilities."""
    for start in range(0, len(work.prompts), work.batch):
        ids = torch.tensor(work.prompts[start : start + work.batch])
        lengths = work.lengths[start : start + work.batch]
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(lengths),
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_AtOwnLength(lengths)]),
            )


@dataclass(frozen=True)
class Batching:
    """Settings of continuous batching: tokens in a page of its cache, and tokens of a forward pass over the batch."""

    page_size: int
    tokens_per_request: int


BATCHINGS = tuple(Batching(page, tokens) for page in (16, 64) for tokens in (1, 4))


def by_continuous_batching(model: Any, work: Workload, batching: Batching) -> None:
    """What ``model.generate_batch`` does, with a length for each request; started and stopped by the caller's clock."""
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LIMIT, eos_token_id=-1, pad_token_id=0
    )
    settings = ContinuousBatchingConfig(
        page_size=batching.page_size,
        num_blocks=2 * work.batch * -(-(PROMPT + LIMIT) // batching.page_size),
        max_batch_tokens=batching.tokens_per_request * work.batch,
        max_requests_per_batch=work.batch,
    )
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, timeout=5, warmup=False
    ) as manager:
        for prompt, length in zip(work.prompts, work.lengths, strict=True):
            manager.add_request(list(prompt), max_new_tokens=length)
        tokens, left = 0, len(work.prompts)
        while left:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens, left = tokens + len(result.generated_tokens), left - 1
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself")
    if tokens != work.useful_tokens:
        raise RuntimeError(f"continuous batching generated {tokens} tokens instead of {work.useful_tokens}")


def by_engine(engine: TorchEngine, work: Workload) -> None:
    """Our engine: log-probability, entropy, perturbation and rank of every token."""
    rows = [row for prompt in work.prompts[::SIBLINGS] for row in engine.prefill(prompt, SIBLINGS)]
    for number, (row, length) in enumerate(zip(rows, work.lengths, strict=True)):
        engine.extend(row, length, Draw(0, 0, "benchmark", number, 0, 0), Sampling())
    tokens = 0
    while delivered := engine.poll():
        for row, candidate in delivered:
            tokens += len(candidate.entropies)
            engine.release(row)
    if tokens != work.useful_tokens:
        raise RuntimeError(f"the engine generated {tokens} tokens instead of {work.useful_tokens}")


def engine_for(model: Any, batch: int, limit: int = LIMIT) -> TorchEngine:
    """An engine with room for two batches, as a run has by default."""
    return TorchEngine(model, eos_ids=(), max_rows=batch, cache_rows=2 * batch, max_length=PROMPT + limit)


def random_prompts(vocabulary: int, count: int) -> list[Prompt]:
    """Prompts of random tokens."""
    ids = torch.randint(3, vocabulary, (count, PROMPT), generator=torch.Generator().manual_seed(2)).tolist()
    return [Prompt(Problem(str(number), ""), tuple(row)) for number, row in enumerate(ids)]
