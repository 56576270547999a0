"""Groups of real sizes for `benchmarks/scale.py`, made of the documentation's text and random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from e3rl.types import (
    Candidate,
    Erasure,
    Group,
    Judgement,
    Problem,
    Prompt,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS, SEGMENTS, SEGMENT_LENGTH, ERASED = 8, 32, 128, 8
"""A group of 8 responses of 4,096 tokens; every 8th segment was erased once."""


def tokenizer_and_ids() -> tuple[Any, np.ndarray]:
    """A byte-level tokenizer trained on the documentation, and that text's ids: prose, code, tables, Greek and symbols."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ids = [i for text in texts for i in tokenizer.encode(text).ids]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), np.array(ids, np.int32)


def random_group(ids: np.ndarray, rng: np.random.Generator, name: str = "gsm8k-train-000001") -> Group:
    """A group whose text is cut from ``ids``."""

    def candidate() -> Candidate:
        start = rng.integers(len(ids) - SEGMENT_LENGTH)
        entropies, perturbations = rng.exponential(0.5, (2, SEGMENT_LENGTH))
        logprobs, mass, ranks = -entropies, np.ones(SEGMENT_LENGTH), rng.integers(1, 9, SEGMENT_LENGTH)
        taken = ids[start : start + SEGMENT_LENGTH]
        return Candidate(taken, logprobs, entropies, perturbations, mass, ranks, ended=False)

    def judgement(attempt: int, verdict: Verdict) -> Judgement:
        return Judgement(Uncertainty(*rng.random(6).tolist()), Threshold(*rng.random(4).tolist()), attempt, verdict)

    prompt = Prompt(Problem(name, "", answer="42"), tuple(ids[:300].tolist()))
    trajectories = []
    for sibling in range(SIBLINGS):
        erased = range(0, SEGMENTS, ERASED)
        segments = tuple(Segment(n, candidate(), judgement(int(n in erased), Verdict.COMMIT)) for n in range(SEGMENTS))
        erasures = tuple(Erasure(n, n * SEGMENT_LENGTH, candidate(), judgement(0, Verdict.ERASE)) for n in erased)
        trajectories.append(Trajectory(prompt, sibling, segments, erasures, "length"))
    return Group(prompt, tuple(trajectories), 0)
