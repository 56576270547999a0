"""A step divided among threads: the same bits, one pace, and a failure that ends all parts."""

from __future__ import annotations

import threading
from functools import partial
from unittest import mock

import pytest
import torch

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch import fused as fused_model
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.operations import _by_head, head_norm, norm
from e3rl.engine.torch.threads import Crew, Division, Pace, divided, division, operation_threads, passes
from e3rl.errors import NonFiniteLogits
from e3rl.types import Candidate, Draw
from tests.engine.models import ARCHITECTURES, EOS, tiny

ROWS = 29


def generate(name: str, threads: int, rows: int = ROWS) -> tuple[list[list[Candidate]], TorchEngine]:
    """Three candidates of each row, of lengths of their own, some ended by an end of sequence; threads sleep."""
    with operation_threads(threads), mock.patch.object(fused_model, "wake_seconds", return_value=8e-5):
        engine = TorchEngine(tiny(name), eos_ids=EOS, max_rows=rows, cache_rows=ROWS, max_length=64)
        numbers = {engine.prefill([5 + i, 9, 2], 1)[0]: i for i in range(ROWS)}
        found: list[list[Candidate]] = [[] for _ in range(ROWS)]
        for row, i in numbers.items():
            engine.extend(row, 5 + i % 7, Draw(0, 0, "p", i, 0, 0), Sampling(1.3))
        while delivered := engine.poll():
            for row, candidate in delivered:
                i = numbers[row]
                found[i].append(candidate)
                if len(found[i]) < 3:
                    engine.rollback(row, 0)
                    engine.extend(row, 4 + i % 5, Draw(0, 0, "p", i, 0, len(found[i])), Sampling(1.3))
    return found, engine


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_divided_step_gives_the_same_bits_in_the_same_order(name):
    whole, _ = generate(name, 1)
    apart, engine = generate(name, 2)
    assert apart == whole
    assert generate(name, 2, rows=26)[0] == whole
    assert engine._crew._helpers._threads  # it was divided


def test_what_is_done_does_not_depend_on_the_threads():
    assert generate("Qwen3", 1)[1].stats == generate("Qwen3", 2)[1].stats


@pytest.mark.parametrize(
    ("rows", "entries", "threads", "wake_s", "expected"),
    [
        (16, 170_000, 1, 0.0, Division(1, 1)),
        (16, 170_000, 2, 8e-5, Division(1, 1)),  # too few rows for two parts, products too short for two threads
        (16, 170_000, 2, 5e-6, Division(1, 2)),  # unless the second one is awake
        (4, 10_000, 2, 5e-6, Division(1, 1)),
        (16, 1_000_000, 2, 8e-5, Division(1, 2)),
        (24, 170_000, 2, 8e-5, Division(2, 1)),
        (64, 170_000, 2, 8e-5, Division(2, 1)),
        (64, 170_000, 2, 5e-6, Division(1, 2)),
        (64, 170_000, 64, 8e-5, Division(5, 1)),
        (1000, 170_000, 64, 8e-5, Division(8, 8)),
        (64, 1_000_000, 16, 8e-5, Division(5, 3)),
    ],
)
def test_how_a_step_is_divided(rows, entries, threads, wake_s, expected):
    assert division(rows, entries, threads, wake_s) == expected


@pytest.mark.parametrize("rows", [1, 4, 23, 24, 25, 29, 64, 97])
@pytest.mark.parametrize("parts", [1, 2, 5, 8])
def test_parts_hold_every_row_once_and_start_at_whole_packs(rows, parts):
    slices = divided(rows, parts)
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(rows))
    assert all(part.start % 4 == 0 for part in slices)
    assert 1 <= len(slices) <= parts


@pytest.mark.parametrize(
    ("lengths", "threads", "expected"),
    [
        ([70], 1, [1]),
        ([70, 70], 2, [1, 1]),
        ([70] * 3, 1, [3]),
        ([70] * 16, 2, [4, 4, 4, 4]),  # not 7, 7, 2
        ([50, 900, 50], 1, [1, 1, 1]),  # the long one alone
        ([30, 30, 60], 2, [2, 1]),
    ],
)
def test_in_which_passes_prompts_run(lengths, threads, expected):
    found = passes(lengths, threads, 500)
    assert [len(range(len(lengths))[each]) for each in found] == expected
    assert [i for each in found for i in range(len(lengths))[each]] == list(range(len(lengths)))


def test_all_parts_stop_after_the_step_in_which_one_ended():
    pace, fed = Pace(2, 9), [0, 0]

    def part(number: int) -> None:
        step = 1
        while not pace.over(step, ended=number == 1 and step == 3):
            step += 1
        fed[number] = step

    with Crew().beside([partial(part, 1)], 1):
        part(0)
    assert fed == [3, 3]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_part_that_fails_ends_the_others_and_is_heard(broken):
    pace, ended = Pace(2, 1_000_000), threading.Event()

    def part(number: int) -> None:
        step = 0
        try:
            with pace:
                while True:
                    step += 1
                    if number == broken and step == 3:
                        raise NonFiniteLogits(Draw(0, 0, "p", 7, 0, 0))
                    pace.over(step, ended=False)
        finally:
            if number != broken:
                ended.set()

    with pytest.raises(NonFiniteLogits, match="sibling 7"), Crew().beside([partial(part, 1)], 1):
        part(0)
    assert ended.is_set()


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with operation_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norms_are_those_of_torch(scale):
    torch.manual_seed(0)
    x_RHD, query_norm_D, key_norm_D = torch.randn(5, 6, 16) * scale, torch.rand(16) + 0.5, torch.rand(16) + 0.5
    expected = torch.nn.functional.rms_norm(x_RHD, (16,), query_norm_D, 1e-6)
    assert torch.allclose(norm(query_norm_D, 1e-6)(x_RHD), expected, rtol=2e-6)
    expected = torch.nn.functional.rms_norm(x_RHD, (16,), None, 1e-6) * _by_head(query_norm_D, key_norm_D, 4, 2)
    assert torch.allclose(head_norm(query_norm_D, key_norm_D, 4, 2, 1e-6)(x_RHD), expected, rtol=2e-6)


def test_half_precision_is_normalised_by_torch_itself():
    weight_D, x_RD = torch.rand(16).bfloat16(), torch.randn(4, 16).bfloat16()
    expected = torch.nn.functional.rms_norm(x_RD, (16,), weight_D, 1e-6)
    assert torch.equal(norm(weight_D, 1e-6)(x_RD), expected)
