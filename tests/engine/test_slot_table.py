"""The table behind vLLM's sampler, without vLLM: requests come, move, are preempted and end, in slots that are used again."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from e3rl.engine.protocol import Sampling
from e3rl.engine.requests import uniforms
from e3rl.engine.sampling import SamplingRows, sample
from e3rl.engine.vllm.table import WIDTH, MeasuringWorker, SlotTable, VllmArguments, merged_measures
from e3rl.testing.reads import META, DeviceReads
from e3rl.types import Draw

VOCABULARY = 40
CPU = torch.device("cpu")
SAMPLING = [Sampling(), Sampling(temperature=0.7, top_p=0.9, top_k=5), Sampling(temperature=0.5, measured_at=1.0)]


def _request(name: str, tokens: int, continues: str = "") -> VllmArguments:
    number = int(name[1:])
    drawn = VllmArguments(name, uniforms(Draw(0, 0, name, 0, 0, 0), tokens), SAMPLING[number % 3], continues)
    return VllmArguments.read(drawn.packed()) or drawn


def _logits(name: str, position: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * int(name[1:]) + position)
    return torch.randn(VOCABULARY, generator=generator)


def _expected(request: VllmArguments, position: int) -> tuple[int, np.ndarray]:
    """What the sampler of every engine draws for the request's token, alone."""
    numbers = torch.tensor(request.numbers[position : position + 1])
    found = sample(_logits(request.key, position)[None], SamplingRows.of([request.sampling], CPU), numbers)
    return int(found.ids_S), found.measures()[0]


class _Worker:
    """Draws a token for requests, as a model runner would: by row the request's slot and position."""

    def __init__(self, slots: int) -> None:
        self.table, self.slots = SlotTable(slots, VOCABULARY, CPU), dict[str, int]()
        self.requests = dict[str, VllmArguments]()

    def add(self, slot: int, request: VllmArguments) -> None:
        self.slots[request.key], self.requests[request.key] = slot, request
        assert self.table.add(slot, request)
        self.table.flush()

    def step(self, positions: dict[str, int]) -> None:
        """``positions`` in the order of the rows; below 0 a prompt is not complete."""
        logits = torch.stack([_logits(name, max(position, 0)) for name, position in positions.items()])
        slots = np.array([self.slots[name] for name in positions])
        found = self.table.draw(logits.clone(), torch.from_numpy(slots), slots, torch.tensor([*positions.values()]))
        for row, (name, position) in enumerate(positions.items()):
            if position < 0:
                assert torch.equal(found[row], logits[row])
                continue
            token, _ = _expected(self.requests[name], position)
            assert int(found[row].argmax()) == token
            others = torch.arange(VOCABULARY) != token
            assert torch.equal(found[row][others], logits[row][others])

    def take(self, *finished: tuple[str, int], forgotten: tuple[str, ...] = ()) -> list[list[float]]:
        return np.frombuffer(self.table.take(finished, forgotten), np.float32).reshape(-1, WIDTH).tolist()

    def measures(self, name: str, tokens: int) -> list[list[float]]:
        return [_expected(self.requests[name], i)[1].tolist() for i in range(tokens)]


def test_tokens_and_measures_are_the_samplers_whatever_rows_they_come_in():
    worker = _Worker(4)
    for slot, name in ((2, "r0"), (0, "r1"), (3, "r2")):
        worker.add(slot, _request(name, 3))
    worker.step({"r0": 0, "r1": -5})
    worker.step({"r2": 0, "r0": 1, "r1": 0})
    worker.step({"r1": 1, "r2": 1, "r0": 2})
    assert worker.take(("r0", 3), ("r2", 2)) == worker.measures("r0", 3) + worker.measures("r2", 2)
    worker.step({"r1": 2})
    assert worker.take(("r1", 3)) == worker.measures("r1", 3)
    assert worker.take(("r1", 1)) == [[0.0] * WIDTH], "they leave once"


def test_measures_outlive_their_slot_until_they_are_taken_or_forgotten():
    worker = _Worker(1)
    for name in ("r0", "r1", "r2"):
        worker.add(0, _request(name, 2))
        worker.step({name: 0})
        worker.step({name: 1})
    assert worker.take(("r1", 2), forgotten=("r0",)) == worker.measures("r1", 2)
    assert not worker.table._kept
    assert worker.take(("r2", 2)) == worker.measures("r2", 2)
    assert not worker.table._slots


@pytest.mark.parametrize("later", [0, 1])
def test_a_preempted_request_keeps_what_was_measured_whatever_slot_it_comes_back_to(later: int):
    worker = _Worker(2)
    request = _request("r4", 4)
    worker.add(0, request)
    worker.step({"r4": 0})
    worker.step({"r4": 1})
    worker.add(0, _request("r5", 1))  # takes the slot meanwhile
    worker.step({"r5": 0})
    worker.add(later, request)
    worker.step({"r4": -1})  # prompt and tokens run again, in two chunks
    worker.step({"r4": 2})
    worker.step({"r4": 3})
    assert worker.take(("r4", 4)) == worker.measures("r4", 4)
    assert worker.take(("r5", 1)) == worker.measures("r5", 1)


def test_longer_requests_than_before_fit_and_shorter_ones_keep_theirs():
    worker = _Worker(2)
    worker.add(0, _request("r0", 2))
    worker.step({"r0": 0})
    worker.add(1, _request("r1", 50))
    worker.step({"r1": 0, "r0": 1})
    assert worker.take(("r0", 2)) == worker.measures("r0", 2)


def test_requests_that_are_not_ours_are_left_alone():
    table = SlotTable(2, VOCABULARY, CPU)
    assert not table.add(0, None)
    table.flush()
    logits = torch.randn(2, VOCABULARY)
    slots = np.array([0, table.nobody])
    assert torch.equal(table.draw(logits.clone(), torch.from_numpy(slots), slots, torch.zeros(2).long()), logits)


def test_drawing_reads_nothing_from_the_device_and_copies_nothing_to_it():
    table = SlotTable(3, VOCABULARY, META)
    for slot, name in enumerate(("r0", "r1", "r2")):
        table.add(slot, _request(name, 4))
    table.flush()
    slots, slots_S = np.arange(3), torch.arange(3, device=META)
    logits, positions_S = torch.randn(3, VOCABULARY, device=META), torch.zeros(3, dtype=torch.long, device=META)
    with DeviceReads() as found:
        for _ in range(4):
            table.draw(logits, slots_S, slots, positions_S)
    assert (found.reads, found.copies) == ({}, {})
    with DeviceReads() as taken:
        table.take([("r0", 4), ("r1", 2)], [])
    assert sum(taken.reads.values()) == 1, "all that is asked for in one copy"


def test_a_part_of_the_logits_is_refused():
    table = SlotTable(1, VOCABULARY, CPU)
    with pytest.raises(RuntimeError, match="20 of 40 logits"):
        table.draw(torch.zeros(1, 20), torch.zeros(1).long(), np.zeros(1, int), torch.zeros(1).long())


def _answers(divided: bool) -> list[bytes]:
    """Of two workers that drew three tokens of the same two requests; ``divided``: each the rows of a request of its own."""
    found = []
    for rank in (0, 1):
        worker = _Worker(2)
        for slot, name in enumerate(("r0", "r1")):
            worker.add(slot, _request(name, 3))
        for position in range(3):
            worker.step({name: position for n, name in enumerate(("r0", "r1")) if not divided or n == rank})
        vllms = MeasuringWorker()
        vllms.rank, vllms.parallel_config = rank, SimpleNamespace(enable_batch_sharded_sampling=divided)
        found.append(vllms.take_measures([("r0", 3), ("r1", 3)], []))
        assert not worker.table._slots
    return found


def test_the_first_of_several_workers_tells_what_all_drew():
    """20 bytes a token, however many workers divide a model; each tells its own where vLLM divides the rows among them."""
    alone, divided = _answers(divided=False), _answers(divided=True)
    assert [len(answer) for answer in alone] == [6 * 4 * WIDTH, 0]
    expected = [_expected(_request(name, 3), i)[1].tolist() for name in ("r0", "r1") for i in range(3)]
    assert merged_measures(alone).tolist() == merged_measures(divided).tolist() == expected


def test_what_several_workers_drew_is_put_together():
    one, other = np.zeros((3, WIDTH), np.float32), np.zeros((3, WIDTH), np.float32)
    one[0], other[1:] = (-1, 2, 3, 1, 1), (-4, 5, 6, 1, 7)
    found = merged_measures([one.tobytes(), other.tobytes()])
    assert found.tolist() == [[-1, 2, 3, 1, 1], [-4, 5, 6, 1, 7], [-4, 5, 6, 1, 7]]
