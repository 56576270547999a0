"""Packed rows: what is shared is there once, every sequence finds its tokens, and numbers are those of it alone."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e3rl.objectives.base import GroupSignals, Need
from e3rl.train.attribution import packed_attention
from e3rl.train.lessons import group_lessons, unscored
from e3rl.train.packing import Branch, PackedRow, group_sequences, packed_size, plan_rows
from e3rl.train.scoring import score_row, score_sequences
from e3rl.types import Reward, RewardedGroup, Verdict
from tests.engine.models import build, tiny
from tests.train.packs import sequence
from tests.train.rollouts import judgement, rewarded_group

CPU = torch.device("cpu")


def test_siblings_share_their_prompt_and_an_erased_candidate_the_text_before_it():
    kept, sibling = sequence([2, 3], [4, 5, 6]), sequence([2, 3], [7])
    erased, other = sequence([2, 3], [4, 8], masked=1, erased=True), sequence([9], [4])
    row = PackedRow.of([kept, sibling, erased, other], CPU)
    assert row.ids_N.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 4]
    assert row.positions_N.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1]
    assert row.before_N.tolist() == [-1, 0, 1, 2, 3, 1, 2, -1, 7]
    assert row.branches == (Branch((), 5), Branch(((0, 0, 2),), 1), Branch(((0, 0, 3),), 1), Branch((), 2))
    assert [p.tolist() for p in row.paths] == [[0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 2, 6], [7, 8]]


def test_a_sequence_that_is_there_already_brings_nothing():
    twins = [sequence([2], [3, 4]), sequence([2], [3, 4]), sequence([2], [3])]
    assert packed_size(twins) == 3
    assert len(PackedRow.of(twins, CPU).branches) == 1


def test_a_row_may_be_as_long_as_the_budget():
    """Two siblings of 2 and 3 tokens behind a prompt of 2 make a row of 7."""
    parts = [[sequence([2, 3], [4, 5])], [sequence([2, 3], [6, 7, 8])]]
    assert plan_rows(parts, 7) == [[0, 1]]
    assert plan_rows(parts, 6) == [[0], [1]]


def test_a_context_may_lie_in_several_branches():
    row = PackedRow.of([sequence([2], [3, 4]), sequence([2], [3, 5, 6]), sequence([2], [3, 5, 7])], CPU)
    assert row.branches[2] == Branch(((0, 0, 2), (1, 0, 1)), 1)


ids = st.lists(st.integers(2, 4), min_size=1, max_size=6)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=8))
def test_every_sequence_finds_its_tokens_and_what_stands_before_each(texts: list[tuple[list[int], list[int]]]):
    row = PackedRow.of([sequence(p, r) for p, r in texts], CPU)
    prefixes = {tuple((p + r)[: n + 1]) for p, r in texts for n in range(len(p + r))}
    assert len(row.ids_N) == len(prefixes) == sum(b.size for b in row.branches)
    for (prompt, response), path in zip(texts, row.paths, strict=True):
        assert row.ids_N[path].tolist() == prompt + response
        assert row.positions_N[path].tolist() == list(range(len(path)))
        assert row.before_N[path].tolist() == [-1, *path[:-1].tolist()]


@given(st.lists(st.lists(st.tuples(ids, ids), min_size=1, max_size=3), max_size=8), st.integers(1, 30))
def test_rows_hold_every_part_once_in_order_and_within_the_budget(parts: list[list], budget: int):
    made = [[sequence(p, r) for p, r in part] for part in parts]
    rows = plan_rows(made, budget)
    assert [i for row in rows for i in row] == list(range(len(parts)))
    for row in rows:
        assert len(row) == 1 or packed_size([s for i in row for s in made[i]]) <= budget


def _texts(rng: random.Random, count: int) -> list:
    """Sequences that share prompts and beginnings, as siblings and erased candidates do."""
    prompts = [[rng.randrange(2, 50) for _ in range(rng.randint(1, 5))] for _ in range(2)]
    made: list = []
    for _ in range(count):
        prompt, response = rng.choice(prompts), [rng.randrange(2, 50) for _ in range(rng.randint(1, 9))]
        start = list(rng.choice(made).response_ids[: rng.randint(0, 4)]) if made and rng.random() < 0.4 else []
        made.append(sequence(prompt, start + response))
    return made


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from(["Qwen3", "Llama"]), st.integers(8, 60))
def test_log_probabilities_and_gradients_do_not_depend_on_the_packing(seed: int, name: str, budget: int):
    texts = _texts(random.Random(seed), 6)
    weights = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))

    def gradient(parts: list[list[int]]) -> torch.Tensor:
        model = copy.deepcopy(tiny(name))
        with packed_attention(model):
            for part in parts:
                found_ST = score_row(model, PackedRow.of([texts[i] for i in part], CPU), 0.8).logprobs_ST()
                (found_ST * weights[part, : found_ST.shape[1]]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    alone = gradient([[i] for i in range(6)])
    assert alone.abs().max() > 1e-2
    rounding = 1e-6 * float(alone.abs().max())  # of sums in which the largest entries, of about 40, take part
    torch.testing.assert_close(gradient(plan_rows([[t] for t in texts], budget)), alone, atol=rounding, rtol=1e-4)


def test_recomputed_activations_give_the_same_gradients():
    texts = _texts(random.Random(1), 6)

    def gradient(recompute: bool) -> torch.Tensor:
        model = copy.deepcopy(tiny("Llama")).train()
        if recompute:
            model.gradient_checkpointing_enable()
        with packed_attention(model):
            score_row(model, PackedRow.of(texts, CPU), 1.0).logprobs_ST().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradient(True), gradient(False))


@torch.no_grad()
def test_a_sliding_window_is_respected():
    model = build("Mistral", sliding_window=4)
    texts = [sequence([2, 3, 4], [5, 6, 7, 8, 9]), sequence([2, 3, 4], [5, 9, 9, 9])]
    for text, found in zip(texts, score_sequences(model, texts, temperature=1, token_budget=99), strict=True):
        whole = torch.tensor([text.prompt_ids + text.response_ids])
        expected = model(input_ids=whole).logits[0, 2:-1].log_softmax(-1).gather(1, whole[0, 3:, None]).squeeze(1)
        torch.testing.assert_close(found.logprobs_T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types_of_weights_are_scored_in_float32(dtype: torch.dtype):
    found = score_sequences(tiny("Qwen3", dtype=dtype), _texts(random.Random(2), 3), temperature=1, token_budget=99)
    exact = score_sequences(tiny("Qwen3"), _texts(random.Random(2), 3), temperature=1, token_budget=99)
    for f, e in zip(found, exact, strict=True):
        assert f.logprobs_T.dtype == torch.float32
        torch.testing.assert_close(f.logprobs_T, e.logprobs_T, atol=0.5, rtol=0.1)


class Told:
    """Keeps the signals that it is given."""

    def __init__(self, *needs: Need) -> None:
        self.needs = frozenset(needs)

    def advantages(self, signals: GroupSignals) -> torch.Tensor:
        self.signals = signals
        return torch.zeros(signals.mask_GT.shape)


def test_an_objective_that_needs_u_is_told_it_of_the_segment_that_each_token_lies_in():
    """-1 in padding and where a segment was not judged; nothing where a sibling has no judgements, or where it isn't needed."""
    group = rewarded_group("p", [1.0, 0.0], [[2, 1], [1, 3]]).group
    first, second = group.trajectories

    def judged(trajectory, *totals):
        verdicts = [None if u is None else judgement(Verdict.COMMIT, 0, u=u) for u in totals]
        pairs = zip(trajectory.segments, verdicts, strict=True)
        return replace(trajectory, segments=tuple(replace(s, judgement=j) for s, j in pairs))

    def told(*trajectories, needs=("uncertainties",), rewards=(1.0, 0.0)):
        made, objective = replace(group, trajectories=trajectories), Told(*needs)
        scored = [(s, unscored(s), None) for s in group_sequences([made], False) if rewards[s.sibling] is not None]
        group_lessons(objective, scored, RewardedGroup(made, tuple(Reward(r, {}) for r in rewards)))
        return objective.signals.uncertainties_GT

    expected = torch.tensor([[0.25, 0.25, 0.5, -1.0], [-1.0, 2.0, 2.0, 2.0]])
    both = judged(first, 0.25, 0.5), judged(second, None, 2.0)
    torch.testing.assert_close(told(*both), expected)
    torch.testing.assert_close(told(*both, rewards=(None, 0.0)), expected[1:])
    assert told(judged(first, 0.25, 0.5), judged(second, None, None)) is None
    assert told(*both, needs=("rewards_only",)) is None
