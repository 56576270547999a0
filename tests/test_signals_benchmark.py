"""`benchmarks/signals.py` and `one_answer.py`: what they measure of samples, against numbers worked by hand."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from e3rl.engine.sampling import SamplingRows
from e3rl.types import Candidate, Problem, Prompt, Segment, Trajectory

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def ruler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("signals")


@pytest.fixture
def one_answer(ruler: ModuleType) -> ModuleType:
    return importlib.import_module("one_answer")


def _group(*samples: tuple[bool, float, str | None]) -> list[dict[str, Any]]:
    return [
        {"problem": "p", "right": right, "answer": answer, "signals": {"calm": value, "length": 10.0}}
        for right, value, answer in samples
    ]


def _rows(count: int, temperature: float) -> SamplingRows:
    column = torch.full((count, 1), temperature)
    zeros = torch.zeros(count, 1)
    return SamplingRows(
        temperature_S1=column, measured_at_S1=column, top_k_S1=zeros.long(), top_p_S1=zeros + 1, min_p_S1=zeros,
        truncates_S1=zeros.bool(), ranks_S1=zeros.bool(), truncated_entropy_S=zeros.bool().squeeze(1), depth=0,
        any_min_p=False, any_truncated_entropy=False, any_measured_apart=False,
    )  # fmt: skip


def test_self_certainty_is_the_distance_from_where_all_tokens_are_alike(ruler: ModuleType):
    logits_SV = torch.tensor([[1.0, 1.0, 1.0, 1.0], [math.log(4), 0.0, 0.0, math.log(2)]])
    found = ruler.with_certainty(logits_SV.clone(), _rows(2, 1.0), torch.tensor([0.1, 0.1]))
    by_hand = -sum(math.log(4 * p) for p in (4 / 8, 1 / 8, 1 / 8, 2 / 8)) / 4
    assert found.kept_mass_S.tolist() == pytest.approx([0.0, by_hand], abs=1e-6)
    colder = ruler.with_certainty(logits_SV.clone(), _rows(2, 0.5), torch.tensor([0.1, 0.1]))
    assert colder.kept_mass_S[1] == pytest.approx(-sum(math.log(4 * p) for p in (16 / 22, 1 / 22, 1 / 22, 4 / 22)) / 4)


def test_signals_of_a_response_by_hand(ruler: ModuleType):
    halves = (([5, 6, 7], [0.1, 0.2, 0.6]), ([5, 6, 7, 5, 6, 7], [0.0, 0.0, 0.3, 0.0, 0.0, 0.6]))
    segments = tuple(
        Segment(
            n, Candidate(ids, [-1.0] * len(ids), h, [0.5] * len(ids), [3.0] * len(ids), [1] * len(ids), n == 1), None
        )
        for n, (ids, h) in enumerate(halves)
    )
    trajectory = Trajectory(Prompt(Problem("p", "?"), (1,)), 0, segments, (), "stop")
    measured = [dict.fromkeys(ruler.TERMS.values(), value) for value in (2.0, 1.0)]
    found = ruler.signals(trajectory, measured, width=2)
    assert found["entropy"] == pytest.approx(1.8 / 9, rel=1e-6)
    assert found["entropy, worst window"] == pytest.approx(0.4) == found["entropy, largest"] - 0.2
    assert found["entropy, tail"] == pytest.approx(0.3)
    assert found["entropy, second half"] == pytest.approx(0.9 / 5)
    assert found["self-certainty, less of it"] == -3.0
    assert found["repeats"] == pytest.approx(1 - 3 / 6)  # 5675 6756 7567 and the same again
    assert (found["U, first"], found["U, last"], found["U, worst"]) == (2.0, 1.0, 2.0)


def test_auroc_compares_samples_of_one_problem_and_kind_alone(ruler: ModuleType):
    first = _group((True, 0.1, "7"), (False, 0.3, "8"), (False, 0.1, None))
    second = _group((True, 9.0, "7"), (False, 8.0, "8"))
    value, _, _, pairs = ruler._auroc([first, second], "calm")
    assert (value, pairs) == ((1 + 0.5 + 0) / 3, 3)
    value, _, _, pairs = ruler._auroc([first, second], "calm", lambda r: r["answer"] is None)
    assert (value, pairs) == (1 / 2, 2)


def test_agreement_counts_the_siblings_that_gave_the_same_answer(ruler: ModuleType):
    group = _group((True, 0.1, "7"), (True, 0.1, "7"), (False, 0.1, "8"), (False, 0.1, None), (False, 0.1, None))
    ruler._agreed(group)
    assert [r["signals"]["siblings with another answer"] for r in group] == [0.75, 0.75, 1, 1, 1]


def test_one_of_n_is_the_mean_over_all_choices(one_answer: ModuleType):
    group = _group((False, 0.1, "8"), (True, 0.2, "7"), (True, 0.5, "7"), (False, 0.9, None), (False, 0.7, "8"))
    for n in (1, 2, 3, 5):
        chosen = list(itertools.combinations(group, n))
        calmest = np.mean([min(rows, key=lambda r: r["signals"]["calm"])["right"] for rows in chosen])
        assert one_answer._calmest(group, n, "calm") == pytest.approx(calmest)
    assert one_answer._commonest(group, 5) == 0.5  # two sevens, two eights
    assert one_answer._commonest(group[:4], 4) == 1.0
    right, tokens = one_answer._erased(group[1:3], calm=0.3, retries=1, name="calm")
    assert right == 1.0
    assert 10 < tokens < 20  # the calm one stays at once, before the other one it is drawn


def test_samples_are_drawn_once_and_reported(tmp_path: Path):
    out = tmp_path / "chain.jsonl"
    command = [
        "sample",
        "lab",
        "lab:chain:2",
        str(out),
        "rollout.num_generations=4",
        "--problems",
        "6",
        "--together",
        "4",
    ]
    for _ in range(2):
        subprocess.run([sys.executable, FOLDER / "signals.py", *command], check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24
    assert len({row["problem"] for row in rows}) == 6
    assert all(-20 < row["signals"]["self-certainty, less of it"] < -1 for row in rows)  # kept mass would be −1
    for name, words, line in (
        ("signals.py", ["report"], "| U, first | "),
        ("one_answer.py", ["--colder", str(out)], "| plain, T = 1 | 1.00 | "),  # the same samples: no difference
    ):
        told = subprocess.run(
            [sys.executable, FOLDER / name, *words, str(out)], check=True, capture_output=True, text=True
        )
        assert line in told.stdout
    [cold] = [line for line in told.stdout.splitlines() if line.startswith("| plain, T = 1 |")]
    assert cold.count("+0.000 (+0.000 to +0.000)") == 2
