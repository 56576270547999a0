"""Groups as record batches come back number by number; what is damaged or made up is a sentence, whatever its bytes are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.rollout.columns import SCHEMA, decode, decode_drawn, encode, encode_drawn
from e3rl.rollout.ipc import check, from_ipc, read_batch, to_ipc
from e3rl.types import (
    Candidate,
    Draw,
    Erasure,
    Group,
    Judgement,
    Problem,
    Prompt,
    Reward,
    RewardedGroup,
    Segment,
    Threshold,
    Trajectory,
    Uncertainty,
    Verdict,
)

_NUMBER = st.floats(width=32)
_COUNT = st.integers(0, 2**31 - 1)


@st.composite
def _candidates(draw: st.DrawFn) -> Candidate:
    size = draw(st.integers(1, 5))
    floats = [draw(st.lists(_NUMBER, min_size=size, max_size=size)) for _ in range(4)]
    ids, ranks = (draw(st.lists(_COUNT, min_size=size, max_size=size)) for _ in range(2))
    return Candidate(ids, *floats, ranks, draw(st.booleans()), draw(st.none() | _COUNT))


_FINITE = st.floats(allow_nan=False)
_JUDGEMENTS = st.builds(
    Judgement,
    st.builds(Uncertainty, *[_FINITE] * 6),
    st.builds(Threshold, *[_FINITE] * 4),
    st.integers(0, 9),
    st.sampled_from(Verdict),
)
_REWARDS = st.builds(
    Reward,
    st.none() | _FINITE,
    st.dictionaries(st.text(max_size=3), st.none() | _FINITE, max_size=2),
    st.none() | st.text(max_size=5),
)


@st.composite
def _groups(draw: st.DrawFn) -> RewardedGroup:
    prompt = Prompt(Problem(draw(st.text(max_size=4)), ""), tuple(draw(st.lists(_COUNT, max_size=4))))
    trajectories = []
    for sibling in range(draw(st.integers(1, 3))):
        made = [(draw(_candidates()), draw(st.none() | _JUDGEMENTS)) for _ in range(draw(st.integers(0, 3)))]
        segments = tuple(Segment(n, candidate, judgement) for n, (candidate, judgement) in enumerate(made))
        erased = [(draw(_candidates()), draw(_JUDGEMENTS)) for _ in range(draw(st.integers(0, 2)))]
        erasures = tuple(Erasure(n, 7 * n, candidate, judgement) for n, (candidate, judgement) in enumerate(erased))
        trajectories.append(Trajectory(prompt, sibling, segments, erasures, draw(st.sampled_from(["stop", "length"]))))
    version = draw(st.none() | _COUNT)
    return RewardedGroup(Group(prompt, tuple(trajectories), version), tuple(draw(_REWARDS) for _ in trajectories))


def prompt_of(name: str, ids: np.ndarray) -> Prompt:
    return Prompt(Problem(name, ""), tuple(ids.tolist()))


@settings(max_examples=50)
@given(st.lists(_groups(), max_size=3))
def test_groups_come_back_as_they_were(groups: list[RewardedGroup]):
    for n, item in enumerate(groups):  # a problem stands once in a step
        groups[n] = _renamed(item, f"{n} {item.group.prompt.problem.id}")
    batches = from_ipc(to_ipc([encode(groups), encode([])]))
    found = [item for batch in batches for item in decode(batch, prompt_of)]
    assert found == groups
    assert _versions(found) == _versions(groups)


def _versions(groups: list[RewardedGroup]) -> list[int | None]:
    """No part of what is compared."""
    return [c.candidate.version for g in groups for t in g.group.trajectories for c in (*t.segments, *t.erasures)]


def _renamed(item: RewardedGroup, name: str) -> RewardedGroup:
    prompt = Prompt(Problem(name, ""), item.group.prompt.ids)
    old = item.group
    trajectories = tuple(Trajectory(prompt, t.sibling, t.segments, t.erasures, t.finish) for t in old.trajectories)
    return RewardedGroup(Group(prompt, trajectories, old.policy_version), item.rewards)


def candidate(size: int = 3) -> Candidate:
    return Candidate(range(size), [-0.5] * size, [1.5] * size, [0.25] * size, [1.0] * size, [1] * size, False)


def judgement(verdict: Verdict) -> Judgement:
    return Judgement(Uncertainty(1, 2, 3, 4, 5, 6), Threshold(7, 8, 9, 10), 1, verdict)


def group() -> Group:
    prompt = Prompt(Problem("p", "", answer="4"), (5, 6))
    segments = tuple(Segment(n, candidate(), judgement(Verdict.FORCED)) for n in range(2))
    erasures = (Erasure(1, 3, candidate(2).drawn_by(6), judgement(Verdict.ERASE)),)
    return Group(prompt, tuple(Trajectory(prompt, n, segments, erasures, "stop") for n in range(2)), 8)


def test_a_row_reads_as_its_columns_say():
    row = encode([group()]).to_pylist()[1]
    assert {k: v for k, v in row.items() if k not in ("segments", "erasures")} == {
        "problem_id": "p", "sibling": 1, "policy_version": 8, "prompt_ids": [5, 6], "finish": "stop",
        "reward": None, "reward_parts": None, "reward_error": None,
    }  # fmt: skip
    assert [s["start"] for s in row["segments"]] == [0, 3]
    assert row["erasures"] == [
        {"index": 1, "start": 3, "ids": [0, 1], "logprobs": [-0.5, -0.5], "entropies": [1.5, 1.5],
         "perturbations": [0.25, 0.25], "kept_mass": [1.0, 1.0], "ranks": [1, 1], "ended": False, "version": 6,
         "observation": None, "attempt": 1,
         "verdict": "erase", "uncertainty": 1, "base": 2, "gradient": 3, "extremum": 4, "perturbation": 5,
         "smoothed": 6, "threshold": 7, "baseline": 8, "penalty": 9, "modulation": 10}
    ]  # fmt: skip


def test_what_was_decoded_are_read_only_views_of_one_buffer():
    [item] = decode(encode([group()]), prompt_of)
    columns = [s.candidate.entropies for t in item.group.trajectories for s in t.segments]
    assert len({id(c.base) for c in columns}) == 1
    assert not any(
        c.flags.writeable for t in item.group.trajectories for s in t.segments for c in s.candidate.columns()
    )


def _with(name: str, value: object) -> Callable[[], pa.RecordBatch]:
    def made() -> pa.RecordBatch:
        rows = encode([group()]).to_pylist()
        for row in rows:
            target = row if name in SCHEMA.names else row["segments"][0]
            target[name] = value
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMA)

    return made


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (_with("problem_id", None), "column problem_id has nulls"),
        (_with("sibling", None), "column sibling has nulls"),
        (_with("finish", "tired"), "end in another way than 'stop' or 'length'"),
        (_with("prompt_ids", [1, None]), "column prompt_ids has nulls"),
        (_with("segments", [None]), "column segments has nulls"),
        (_with("index", None), "column segments.index has nulls"),
        (_with("ids", [1, None, 3]), "column segments.ids has nulls"),
        (_with("ranks", [1]), "other numbers of ranks than tokens"),
        (_with("entropies", [1.0] * 4), "other numbers of entropies than tokens"),
        (_with("threshold", None), "judgements that are incomplete"),
        (_with("attempt", None), "judgements that are incomplete"),
        (_with("verdict", None), "judgements that are incomplete"),
        (_with("verdict", "maybe"), "verdicts that are none"),
    ],
)
def test_a_batch_that_is_inconsistent_is_refused(batch: Callable[[], pa.RecordBatch], message: str):
    with pytest.raises(ValueError, match=message):
        from_ipc(to_ipc([batch()]))


def test_a_response_under_way_is_no_group():
    drawn = [(Draw(7, 3, "p", 1, 4, 2), candidate()), (Draw(7, 3, "q", 0, 0, 0), candidate(2).drawn_by(5))]
    batch = encode_drawn(drawn)
    check(batch)
    assert batch["finish"].null_count == 2
    found = decode_drawn(batch, 7, 3)
    assert found == drawn
    assert [c.version for _, c in found] == [None, 5]
    with pytest.raises(ValueError, match="problem 'p': a response that is not complete"):
        decode(batch, prompt_of)


def test_other_columns_are_refused():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("x", pa.int32())])) as writer:
        writer.write_batch(pa.record_batch({"x": pa.array([1], pa.int32())}))
    with pytest.raises(ValueError, match="its columns are not those of this version's groups"):
        from_ipc(bytes(sink.getvalue()))
    for content in (b"", b"{}", b"\xff" * 64):
        with pytest.raises(ValueError, match="no groups in Arrow's format"):
            from_ipc(content)
        with pytest.raises(ValueError, match="no record batch"):
            read_batch(content)


@pytest.mark.parametrize("read", ["stream", "batch"])
def test_damaged_bytes_are_a_sentence_and_never_a_crash(read: str):
    """Cut anywhere, or with any few bytes changed, it is refused with a ValueError or it is some other group."""
    batch = encode([group()])
    whole = to_ipc([batch]) if read == "stream" else batch.serialize().to_pybytes()
    rng, refused = random.Random(0), 0
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(150)]
    for _ in range(1500):
        changed = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4, 32])):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        damaged.append(bytes(changed))
    for content in damaged:
        try:
            batches = from_ipc(content) if read == "stream" else [read_batch(content)]
            for found in batches:
                decode(found, prompt_of)
        except ValueError:
            refused += 1
    assert refused > 150


def test_what_engines_did_not_measure_stays_so():
    nothing = Candidate([1], [math.nan], [math.nan], [math.nan], [math.nan], [0], True)
    prompt = Prompt(Problem("p", ""), (1,))
    shown = Group(prompt, (Trajectory(prompt, 0, (Segment(0, nothing, None),), (), "stop"),), None)
    [back] = decode(encode([RewardedGroup(shown, (Reward(None, {}),))]), prompt_of)
    assert back == RewardedGroup(shown, (Reward(None, {}),))

    assert np.isnan(back.group.trajectories[0].entropies).all()
