"""Clients' own grammars are tried first; Lark ones are followed in a process, and what hangs there ends its own answers."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.rewards.pool import Outcome
from e3rl.serve import free_grammars
from e3rl.serve import grammar as grammar_module
from e3rl.serve.errors import ApiError
from e3rl.serve.free_grammars import Grammars
from e3rl.serve.grammar import Grammar, GrammarMatcher
from e3rl.serve.service import Service
from tests.serve.conftest import serving
from tests.serve.test_server import HELLO, TEXT, post

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


def test_one_that_hangs_later_ends_the_answers_of_its_address_alone(
    grammars: Grammars, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars._trials, "map", lambda _: [Outcome(1)])  # the trial finds this one
    other = grammars.matcher(Grammar("lark", SUM, free=True), "good")
    before = other.allowed(ids(policy, "1+"))
    hangs, twin = (grammars.matcher(Grammar("lark", LATER, free=True), "bad") for _ in range(2))
    allowed_V = hangs.allowed(ids(policy, "1"))
    assert "took longer than 0.5 s" in (hangs.error or "")
    assert allowed_V.nonzero().flatten().tolist() == sorted(policy.eos_ids)
    restarts = grammars._steps.restarts
    twin.allowed(ids(policy, "1"))
    assert "hung and held up everybody" in (twin.error or "")
    with pytest.raises(ApiError, match="hung and held up everybody") as refused:
        grammars.matcher(Grammar("lark", SUM, free=True), "bad")
    assert (refused.value.status, grammars._steps.restarts) == (429, restarts), "nobody waited for it again"
    assert torch.equal(other.allowed(ids(policy, "1+")), before)
    assert other.error is None
    monkeypatch.setattr(free_grammars.time, "monotonic", lambda: 10.0**9)
    grammars.matcher(Grammar("lark", SUM, free=True), "bad")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json", '{"type": "integer", "multipleOf": 1000003}'),
        Grammar("lark", 'start: call\ncall: %json {"type": "integer", "multipleOf": 1000003}'),
    ],
    ids=["schema", "schema of a forced call"],
)
def test_one_that_takes_seconds_and_much_memory_to_compile_is_refused(grammars: Grammars, grammar: Grammar) -> None:
    with pytest.raises(ApiError, match="took longer than 1 s"):
        grammars.matcher(grammar)


def test_grammars_take_so_much_memory_together(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are copied from counts, too, and gives way where nobody uses it."""
    monkeypatch.setattr(free_grammars, "HELD_BYTES", 4 * 2**20)
    monkeypatch.setattr(grammars._trials, "map", lambda _: [Outcome(2**20)])
    held = [grammars.matcher(Grammar("regex", "a+")) for _ in range(3)]
    with pytest.raises(ApiError, match="take all memory"):
        grammars.matcher(Grammar("regex", "b+"))
    held.pop()
    grammars.matcher(Grammar("regex", "b+"))


def test_two_that_are_made_at_a_time_share_the_memory_that_is_left(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, over, make = threading.Event(), threading.Event(), grammars._here.matcher

    def slowly(grammar: Grammar) -> GrammarMatcher:
        begun.set()
        over.wait(60)
        return make(grammar)

    monkeypatch.setattr(free_grammars, "HELD_BYTES", 3 * 2**20)
    monkeypatch.setattr(grammars._trials, "map", lambda _: [Outcome(2 * 2**20)])
    monkeypatch.setattr(grammars._here, "matcher", slowly)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(grammars.try_out, Grammar("regex", "a+"))
        assert begun.wait(60)
        try:
            with pytest.raises(ApiError, match="take all memory"):
                grammars.try_out(Grammar("regex", "b+"))
        finally:
            over.set()
        first.result()
    grammars.try_out(Grammar("regex", "b+"))


def test_a_matcher_may_end_at_any_moment(grammars: Grammars) -> None:
    """The collector frees those in a circle in whatever thread it runs, in the middle of these calls, too."""
    circle: list[object] = [grammars.matcher(Grammar("regex", "a+"))]
    circle.append(circle)

    def collect() -> None:
        nonlocal circle
        with grammars._lock:
            del circle
            gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert len(grammars._held) == 1, "of the original"


def test_samples_are_copies_of_what_is_compiled_once(
    grammars: Grammars, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = list[str](), grammar_module.compiled

    def compiling(grammar: Grammar, tokenizer: Any) -> Any:
        made.append(grammar.text)
        return real(grammar, tokenizer)

    monkeypatch.setattr(grammar_module, "compiled", compiling)
    several = [grammars.matcher(Grammar("regex", "(12|34)+")) for _ in range(4)]
    assert made == ["(12|34)+"]
    for matcher, text in zip(several, ("1", "12", "3", ""), strict=True):  # each goes its own way
        alone = grammars._here.matcher(Grammar("regex", "(12|34)+"))
        assert torch.equal(matcher.allowed(ids(policy, text)), alone.allowed(ids(policy, text))), text
    made.clear()
    follow = free_grammars.follower(json.dumps([str(policy.tokenizer.name_or_path), policy.eos_ids, policy.vocabulary]))
    masks = [follow(name, SUM, ids(policy, text))[0] for name, text in (("a", "1+"), ("b", "1"), ("c", "1+"))]
    assert (made, masks[0] == masks[2], masks[0] == masks[1]) == ([SUM], True, False)


def test_one_that_takes_long_to_compile_holds_up_no_steps(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_grammars, "COMPILE_SECONDS", -1.0)
    with pytest.raises(UserError, match="took longer than -1 s to compile"):
        free_grammars.try_grammar("lark", SUM, True)
    assert free_grammars.try_grammar("lark", SUM, False) >= 0


def test_a_trial_measures_memory() -> None:
    def memory(kind: str, text: str) -> int:  # of a new process: memory that one has had is given again
        code = f"from e3rl.serve.free_grammars import try_grammar; print(try_grammar({kind!r}, {text!r}, False))"
        return int(subprocess.check_output([sys.executable, "-c", code]))

    small, large = memory("regex", "a+"), memory("json", '{"type": "integer", "multipleOf": 30011}')
    assert small < 2**20 < 2**21 < large


def test_trials_hold_up_nobody_without_a_grammar(make_service: Callable[..., Service], monkeypatch) -> None:
    service, over, trials = make_service(), threading.Event(), list[str]()

    def slow(grammar: Grammar) -> int:
        trials.append(grammar.text)
        over.wait(60)
        raise ApiError(400, "refused at last")

    monkeypatch.setattr(service.grammars, "try_out", slow)
    with serving(service) as url, ThreadPoolExecutor(40) as threads:
        try:
            asked = [{**HELLO, "structured_outputs": {"regex": f"a{{{i}}}"}} for i in range(40)]
            waiting = [threads.submit(post, url, TEXT, body) for body in asked]
            while not trials:
                time.sleep(0.01)
            assert post(url, TEXT, HELLO)[0] == 200
            assert (len(trials), any(found.done() for found in waiting)) == (1, False)
        finally:
            over.set()
        assert {found.result()[0] for found in waiting} == {400}
    assert sorted(trials) == sorted(body["structured_outputs"]["regex"] for body in asked)
