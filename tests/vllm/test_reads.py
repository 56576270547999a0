"""The taps inside vLLM's sampler read nothing from the device: counted on a stand-in device, without starting vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from e3rl.engine.protocol import Sampling
from e3rl.engine.vllm.table import VllmArguments
from e3rl.testing.reads import META, DeviceReads

VOCABULARY, ROWS, STEPS = 50, 3, 5


def _params(row: int) -> SimpleNamespace:
    numbers = np.linspace(0.1, 0.9, STEPS)
    return SimpleNamespace(extra_args=VllmArguments(f"{row}", numbers, Sampling(temperature=0.7, top_p=0.9)).packed())


def test_the_second_runners_tap_reads_and_copies_nothing():
    taps = pytest.importorskip("e3rl.engine.vllm.taps")
    lengths = SimpleNamespace(gpu=torch.full((ROWS,), 4, dtype=torch.int32, device=META))
    states = SimpleNamespace(prompt_len=lengths, max_num_reqs=ROWS, vocab_size=VOCABULARY, device=META)
    tap = taps.SecondRunnerTap(SimpleNamespace(speculative_config=None), states)
    for row in range(ROWS):
        assert tap.add_request(row, _params(row))
    tap.apply_staged_writes()
    rows = torch.arange(ROWS, dtype=torch.int32, device=META)
    ctx = SimpleNamespace(expanded_idx_mapping=rows, idx_mapping_np=np.arange(ROWS), pos=rows + 4)
    logits = torch.randn(ROWS, VOCABULARY, device=META)
    with DeviceReads() as found:
        for _ in range(STEPS):
            tap.apply(logits, ctx)
    assert (found.reads, found.copies) == ({}, {})


def test_the_first_runners_tap_reads_nothing_and_copies_positions():
    taps = pytest.importorskip("e3rl.engine.vllm.taps")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=ROWS),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCABULARY),
    )
    tap = taps.FirstRunnerTap(config, META, False)
    generated = [list[int]() for _ in range(ROWS)]
    added = [(row, _params(row), None, generated[row]) for row in range(ROWS)]
    tap.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    logits = torch.randn(ROWS, VOCABULARY, device=META)
    tap.apply(logits)
    with DeviceReads() as found:
        for _ in range(STEPS):
            tap.apply(logits)
    assert found.reads == {}
    assert sum(found.copies.values()) == STEPS
