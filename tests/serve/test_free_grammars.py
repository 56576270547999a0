"""Clients' own Lark grammars: the same masks from the other process, and one that hangs ends its own answer alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from e3rl.models import Policy
from e3rl.rewards.pool import Outcome
from e3rl.serve import free_grammars
from e3rl.serve.errors import ApiError
from e3rl.serve.free_grammars import Grammars
from e3rl.serve.grammar import Grammar

SUM = 'start: e\ne: e "+" t | t\nt: /[0-9]/ | "(" e ")"'
LATER = 'start: "1" r | "2" "3"\nr: /x*/ r'
"""Hangs in llguidance once a 1 was generated."""


@pytest.fixture
def grammars(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grammars]:
    monkeypatch.setattr(free_grammars, "TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(free_grammars, "STEP_SECONDS", 0.5)
    made = Grammars(policy.tokenizer, policy.eos_ids, policy.vocabulary)
    yield made
    made.close()


def ids(policy: Policy, text: str) -> list[int]:
    return [policy.tokenizer.convert_tokens_to_ids(c) for c in text]


def test_masks_are_those_of_a_matcher_here_also_after_an_erasure(grammars: Grammars, policy: Policy) -> None:
    far, here = (grammars.matcher(Grammar("lark", SUM, free=free)) for free in (True, False))
    for generated in ("", "1", "1+", "1+(", "1+(2)", "1+", "1+3", ""):
        assert torch.equal(far.allowed(ids(policy, generated)), here.allowed(ids(policy, generated))), generated
    assert 0 < int(far.allowed(ids(policy, "1")).sum()) < policy.vocabulary


def test_one_that_never_returns_is_refused_by_its_trial(grammars: Grammars) -> None:
    with pytest.raises(ApiError, match="took longer than 1 s"):
        grammars.matcher(Grammar("lark", "start: /x*/ start", free=True))


def test_one_that_hangs_later_ends_its_own_answer_alone(
    grammars: Grammars, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars._trials, "map", lambda _: [Outcome()])  # the trial finds this one
    other = grammars.matcher(Grammar("lark", SUM, free=True))
    before = other.allowed(ids(policy, "1+"))
    hangs = grammars.matcher(Grammar("lark", LATER, free=True))
    allowed_V = hangs.allowed(ids(policy, "1"))
    assert "took longer than 0.5 s" in (hangs.error or "")
    assert allowed_V.nonzero().flatten().tolist() == sorted(policy.eos_ids)
    assert torch.equal(other.allowed(ids(policy, "1+")), before)
    assert other.error is None
