"""What `e3rl decode` prints: a response's own characters, also where a segment ends within one; and how far long work is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from e3rl.cli.live import LiveCount, LiveText
from e3rl.generation import Generation
from e3rl.models import load_policy, resolve_model_path
from e3rl.rollout.calibrate import calibrate
from e3rl.rollout.companions import find_companions
from e3rl.rollout.metric import single_term, toy_candidate
from e3rl.rollout.orders import Committed, Erased
from e3rl.settings import ModelConfig
from e3rl.types import Erasure, Judgement, Problem, Prompt, Segment, Threshold, Trajectory

ERASED = Judgement(single_term(1.0), Threshold(0.5, 0.5, 1.0, 1.0), attempt=0, verdict="erase")


class Bytes:
    """A tokenizer with a token a byte."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode("utf-8", "replace")


def _printed(pieces: Sequence[tuple[str, bytes]], *, terminal: bool) -> str:
    """What is printed of a sample that was cut off behind these pieces, each kept or dropped."""
    out = io.StringIO()
    text = LiveText(Console(file=out, force_terminal=terminal, width=80), "prompt", Bytes())
    segments, erasures = [], []
    for what, piece in pieces:
        candidate = replace(toy_candidate((0.5,) * len(piece)), ids=tuple(piece))
        if what == "keep":
            segments.append(Segment(len(segments), candidate, None))
            text.observe(Committed("p", 0, segments[-1]))
        else:
            erasures.append(Erasure(len(segments), 0, candidate, ERASED))
            text.observe(Erased("p", 0, erasures[-1]))
    trajectory = Trajectory(Prompt(Problem("p", "prompt"), (1,)), 0, tuple(segments), tuple(erasures), "length")
    text.close([Generation("", trajectory)])
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_character_that_two_segments_share_is_whole(terminal: bool):
    whole = "né!".encode()
    assert "né!\n" in _printed([("keep", whole[:2]), ("keep", whole[2:])], terminal=terminal)


def test_what_was_erased_within_a_character_is_shown_with_the_half_before_it():
    whole = "né!".encode()
    shown = _printed([("keep", whole[:2]), ("drop", whole[2:]), ("keep", "è".encode()[1:])], terminal=False)
    assert "n~~é!~~è\n" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_a_character_that_never_completes_is_shown_at_the_end(terminal: bool):
    assert "n\ufffd\n" in _printed([("keep", b"n\xc3")], terminal=terminal)


def test_how_far_something_is_stands_in_a_log_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = [100.0]
    monkeypatch.setattr("e3rl.cli.live.time.monotonic", lambda: now[0])
    with LiveCount("calibrating") as live:
        for done in range(1, 8):
            now[0] += 12
            live.tell("plain rollouts", done, 7)
        now[0] += 31
        live.tell("decoding", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["plain rollouts, 3/7", "plain rollouts, 6/7", "decoding"]


def test_calibration_tells_how_far_it_is():
    said: list[tuple[str, int, int]] = []
    policy = load_policy(ModelConfig(path="lab"))
    config = find_companions(resolve_model_path("lab")).config([], ["rollout.num_generations=2"])
    calibrate(policy, "lab:chain:1", config, prompts=3, target=0.1, kappa0s=(1.0,), tell=lambda *a: said.append(a))
    assert [(a, d, of) for a, d, of in said] == [
        (activity, done, 3) for activity in ("plain rollouts", "with the recommended setting") for done in (1, 2, 3)
    ]
