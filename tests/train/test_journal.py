"""What was generated before a kill is taken from the disk, and the rollout ends as if nothing had happened."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Engine
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.rollout.batches import run_groups
from e3rl.rollout.columns import decode
from e3rl.rollout.group import GroupSettings
from e3rl.train.journal import FORMAT, Journal, StepJournal, fingerprint, frame, pack, records, survey, unpack
from e3rl.types import Candidate, Draw, Group, Problem, Prompt
from tests.engine.models import EOS, build, tiny

ROLLOUT = RolloutConfig(num_generations=3, segment_length=5, max_segments=4, max_completion_length=18)
ERASURE = ErasureConfig(kappa0=-0.5, max_erasures=2, perturbation_weight=0.5, on_exhausted="least_uncertain")
PROMPTS = [Prompt(Problem(f"p{i}", ""), tuple(range(5 + i, 9 + 3 * i))) for i in range(3)]
HEADER = {"format": FORMAT, "step": 1, "weights": "w"}

NUMBERS = st.floats(width=32)


@st.composite
def _candidates(draw: st.DrawFn) -> Candidate:
    size = draw(st.integers(1, 6))
    floats = [tuple(draw(st.lists(NUMBERS, min_size=size, max_size=size))) for _ in range(4)]
    ids, ranks = (tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=size, max_size=size))) for _ in range(2))
    return Candidate(ids, *floats, ranks, draw(st.booleans()))


_DRAWS = st.builds(
    Draw, st.integers(0), st.integers(1), st.text(), st.integers(0, 99), st.integers(0, 99), st.integers(0, 9)
)


@given(st.lists(st.tuples(_DRAWS, _candidates()), max_size=4))
def test_records_give_back_every_bit(drawn: list[tuple[Draw, Candidate]]):
    found = [pair for record in pack(drawn) for pair in unpack(record)]
    assert sorted(found, key=repr) == sorted(drawn, key=repr)
    for (_, back), (_, made) in zip(sorted(found, key=repr), sorted(drawn, key=repr), strict=True):
        assert [np.signbit(x).tolist() for x in back.columns()] == [np.signbit(x).tolist() for x in made.columns()]


class Killed(Exception):
    """The process ends here."""


class Dying:
    """An engine that dies at its nth poll, and counts what it generates."""

    def __init__(self, engine: Engine, polls: int | None, append: bool = True) -> None:
        self._engine, self._left, self.generated = engine, polls, 0
        if append and hasattr(engine, "append"):
            self.append = engine.append

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def poll(self):
        if self._left == 0:
            raise Killed
        if self._left is not None:
            self._left -= 1
        done = self._engine.poll()
        self.generated += len(done)
        return done


def _torch() -> Engine:
    return TorchEngine(tiny("Qwen3"), eos_ids=EOS, max_rows=7, cache_rows=9, max_length=64)


def _oracle() -> Engine:
    return RecomputeEngine(tiny("Qwen3"), eos_ids=EOS, cache_rows=9, max_length=64)


def _groups(engine: Engine, journal: StepJournal | None = None) -> list[Group]:
    found = run_groups(engine, PROMPTS, GroupSettings(ROLLOUT, ERASURE, seed=1, step=1), memory=journal)
    return sorted(found, key=lambda g: g.prompt.problem.id)


@functools.cache
def _undisturbed(kind: str) -> tuple[list[Group], int]:
    engine = Dying(_torch() if kind == "torch" else _oracle(), None)
    return _groups(engine), engine.generated


def _killed_then_resumed(path: Path, kind: str, polls: list[int], append: bool = True) -> tuple[list[Group], list[int]]:
    """The groups after a death at each of these polls, and what each life generated."""
    lives = []
    for left in (*polls, None):
        engine = Dying(_torch() if kind == "torch" else _oracle(), left, append)
        journal = StepJournal(path, HEADER, lambda _: None)
        try:
            groups = _groups(engine, journal)
        except Killed:
            pass
        finally:
            lives.append(engine.generated)
            journal.close()
        assert engine.free_rows() == 9
    return groups, lives


@pytest.mark.parametrize("kind", ["torch", "recompute"])
@pytest.mark.parametrize("polls", [[0], [1], [4], [11], [20], [2, 3, 1, 7, 5], [400]])
def test_a_rollout_killed_anywhere_ends_in_the_same_bits(tmp_path: Path, kind: str, polls: list[int]):
    expected, count = _undisturbed(kind)
    groups, lives = _killed_then_resumed(tmp_path / "j", kind, polls)
    assert groups == expected
    if polls == [400]:  # it was complete, and nothing is generated again
        assert lives == [count, 0]
    else:
        assert sum(lives) == count


def test_an_engine_that_can_not_append_goes_on_with_the_same_decisions(tmp_path: Path):
    expected, count = _undisturbed("torch")
    groups, lives = _killed_then_resumed(tmp_path / "j", "torch", [6, 9], append=False)
    assert [t.ids.tolist() for g in groups for t in g.trajectories] == [
        t.ids.tolist() for g in expected for t in g.trajectories
    ]
    assert sum(lives) == count


def test_a_torn_file_gives_what_is_whole_and_is_written_on(tmp_path: Path):
    _killed_then_resumed(tmp_path / "whole", "torch", [8])
    content = (tmp_path / "whole").read_bytes()
    ends = [end for end, _ in records(content)]
    assert ends[-1] == len(content)
    expected, count = _undisturbed("torch")
    held = [len(unpack(payload)) for _, payload in list(records(content))[1:]]
    for cut in (3, ends[0], ends[3] + 9, len(content) - 1):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(content[:cut])
        whole = sum(count for end, count in zip(ends[1:], held, strict=True) if end <= cut)
        assert survey(content[:cut])[0] == f"{whole} candidates"
        said: list[str] = []
        engine = Dying(_torch(), None)
        journal = StepJournal(path, HEADER, said.append)
        assert _groups(engine, journal) == expected
        journal.close()
        assert engine.generated == count - whole
        assert any("incomplete" in s for s in said) == (cut not in ends)
        assert survey(path.read_bytes()) == survey(content)


@given(st.integers(0, 20_000), st.integers(0, 7))
def test_a_flipped_bit_never_becomes_a_candidate(position: int, bit: int):
    candidate = Candidate((1, 2), (0.5, 0.25), (1.0, 2.0), (0.0, 0.5), (1.0, 1.0), (1, 2), False)
    content = bytearray(b"".join(frame(r) for i in range(6) for r in pack([(Draw(0, 1, "p", i, 0, 0), candidate)])))
    true = [payload for _, payload in records(bytes(content))]
    content[position % len(content)] ^= 1 << bit
    found = [payload for _, payload in records(bytes(content))]
    assert found == true[: len(found)]
    assert len(found) < 6


def test_candidates_of_other_weights_are_not_used(tmp_path: Path):
    said: list[str] = []
    journal = StepJournal(tmp_path / "j", HEADER, said.append)
    candidate = Candidate((1,), (0.5,), (1.0,), (0.0,), (1.0,), (1,), False)
    journal.add(Draw(0, 1, "p", 0, 0, 0), candidate)
    journal.close()
    assert StepJournal(tmp_path / "j", HEADER, said.append).known
    assert not StepJournal(tmp_path / "j", {**HEADER, "weights": "others"}, said.append).known
    assert [s.partition(" ")[2] for s in said] == [
        "candidates of step 1 were on disk and are not generated again",
        "was made by other weights or another version: its rollout is made again",
    ]
    assert not StepJournal(tmp_path / "j", HEADER, said.append).known, "what was refused is gone"


def test_a_journal_of_the_format_before_is_not_used(tmp_path: Path):
    old = frame(json.dumps({**HEADER, "format": 1}).encode()) + frame(
        b'c[[0, 1, "p", 0, 0, 0], false, 1, "<f4"]\n' + bytes(24)
    )
    (tmp_path / "j").write_bytes(old)
    assert survey(old) == ("of another version: not used", 0)
    said: list[str] = []
    assert not StepJournal(tmp_path / "j", HEADER, said.append).known
    assert said == [f"{tmp_path / 'j'} was made by other weights or another version: its rollout is made again"]


def test_a_group_that_a_worker_sent_is_kept(tmp_path: Path):
    group = _undisturbed("torch")[0][0]
    journal = StepJournal(tmp_path / "j", HEADER, print)
    journal.add_group(group)
    journal.close()
    assert survey((tmp_path / "j").read_bytes()) == ("1 groups", 0)
    again = StepJournal(tmp_path / "j", HEADER, lambda _: None)
    [item] = decode(again.groups[group.prompt.problem.id], lambda *_: group.prompt)
    assert item.group == group


def test_a_candidate_drawn_twice_is_kept_twice_in_order(tmp_path: Path):
    draw = Draw(0, 1, "p", 0, 0, 0)
    made = [Candidate((i,), (0.5,), (1.0,), (0.0,), (1.0,), (1,), False) for i in (1, 2)]
    journal = StepJournal(tmp_path / "j", HEADER, print)
    for candidate in made:
        journal.add(draw, candidate)
    journal.close()
    again = StepJournal(tmp_path / "j", HEADER, lambda _: None)
    assert [again.take(draw), again.take(draw), again.take(draw)] == [*made, None]


def test_a_fingerprint_tells_weights_apart():
    model = build("Qwen3", head_dim=8)
    before = fingerprint(model)
    assert fingerprint(build("Qwen3", head_dim=8)) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 1e-6
    assert fingerprint(model) != before


def test_a_checkpoint_ends_the_journals_that_it_holds(tmp_path: Path):
    journal = Journal(tmp_path, lambda: "w", print)
    for step in (1, 2, 3):
        assert journal.of(step) is journal.of(step)
    journal.drop_through(2)
    assert [p.name for p in (tmp_path / "journal").iterdir()] == ["step-000003.journal"]
