"""The research oracle knows the lab's answers exactly as well as its name says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from e3rl.config import ErasureConfig, ObjectiveConfig, RolloutConfig
from e3rl.errors import UserError
from e3rl.objectives import build
from e3rl.rollout.group import GroupRollout, GroupSettings
from e3rl.rollout.metric import CandidatePlace, siblings_metric, toy_candidate, toy_place
from e3rl.rollout.moments import Moments
from e3rl.testing.metric import check_metric
from e3rl.types import Candidate, Draw, Problem, Prompt
from e3rl_reproduce import oracle

_ERASURE = ErasureConfig(
    metric="e3rl_reproduce.oracle:oracle_perfect", baseline="static", static_baseline=0.5, eta=0.0, rho=0.0
)
_PATH = Prompt(
    Problem("graph", "ab;bc;ax;a>c:", "bc", {"family": "path", "level": 1, "question": "ab;bc;ax;a>c:"}), (2, 3)
)
_CHAIN = Prompt(Problem("sum", "47+5-8:", "44", {"family": "chain", "level": 1, "question": "47+5-8:"}), (2, 3))


def _said(text: str, *, ended: bool = False) -> Candidate:
    ids = oracle._tokenizer()(text, add_special_tokens=False)["input_ids"]
    end = [oracle._tokenizer().eos_token_id] if ended else []
    return replace(toy_candidate((0.5,) * (len(ids) + len(end))), ids=np.array([*ids, *end]), ended=ended)


def _errs(prompt: Prompt, before: str, text: str, *, ended: bool = False) -> bool:
    ids = _said(before).ids.tolist() if before else []
    return oracle.errs(CandidatePlace(prompt, ids, Draw(0, 0, "graph", 0, 0, 0)), _said(text, ended=ended))


@pytest.mark.parametrize("auroc", [0.7, 0.85, 0.95])
def test_a_wrong_candidate_is_above_a_right_one_as_often_as_the_name_says(auroc: float) -> None:
    """10,000 draws; the standard error of the AUROC is below 0.006."""
    draws = [Draw(seed, 3, "p", sibling, 1, 0) for seed in range(625) for sibling in range(16)]
    u = np.array([oracle.suspicion(auroc, draw.sibling % 2 == 1, draw) for draw in draws])
    wrong = np.array([draw.sibling % 2 == 1 for draw in draws])
    below = np.searchsorted(np.sort(u[~wrong]), u[wrong])
    assert below.mean() / (~wrong).sum() == pytest.approx(auroc, abs=0.015)
    assert (u[wrong] > 0.5).mean() == pytest.approx((u[~wrong] < 0.5).mean(), abs=0.03)  # equal errors at even odds


def test_noise_is_the_draw_s_own() -> None:
    """The same draw has the same noise, every field of it counts, and a retry is measured afresh."""
    draw = Draw(1, 2, "p", 3, 4, 5)
    others = [
        replace(draw, seed=0),
        replace(draw, step=0),
        replace(draw, prompt_id="q"),
        replace(draw, sibling=0),
        replace(draw, segment=0),
        replace(draw, attempt=0),
    ]
    assert oracle.suspicion(0.85, True, draw) == oracle.suspicion(0.85, True, replace(draw))
    assert len({oracle.suspicion(0.85, True, d) for d in (draw, *others)}) == 7


def test_only_the_first_mistake_is_wrong() -> None:
    assert not _errs(_PATH, "", "b")
    assert _errs(_PATH, "", "x")
    assert not _errs(_PATH, "x", "c")  # nothing can mend it any more
    assert _errs(_PATH, "", "b", ended=True)  # stops short of the target
    assert not _errs(_PATH, "b", "c", ended=True)


def test_a_step_that_may_go_on_is_not_judged() -> None:
    assert not _errs(_CHAIN, "", "47+5=5")
    assert not _errs(_CHAIN, "", "47+5=52;")
    assert _errs(_CHAIN, "", "47+5=53;")
    assert not _errs(_CHAIN, "47+5=52;52-8=44;", "A:4")
    assert _errs(_CHAIN, "47+5=52;52-8=44;", "A:4", ended=True)
    assert not _errs(_CHAIN, "47+5=52;52-8=44;", "A:44", ended=True)


@pytest.mark.parametrize("name", ["oracle_70", "oracle_85", "oracle_95", "oracle_perfect"])
def test_it_keeps_the_contract_of_metrics(name: str) -> None:
    check_metric(getattr(oracle, name), name)


def test_other_problems_are_refused() -> None:
    place = replace(toy_place(), prompt=Prompt(Problem("mine", "2+2", "4"), (2,)))
    with pytest.raises(UserError, match=r"lab problems alone.*'mine'"):
        siblings_metric("e3rl_reproduce.oracle:oracle_95")(
            [toy_candidate()], [()], Moments(), ErasureConfig(), lambda: [place]
        )


def test_the_perfect_one_erases_the_wrong_turn_of_each_sibling_behind_its_own_prefix() -> None:
    """Both siblings begin rightly, then one goes wrong; its retry is judged behind the same prefix and is committed."""
    rollout = RolloutConfig(erase=True, num_generations=2, segment_length=1, max_segments=3)
    group = GroupRollout(_PATH, GroupSettings(rollout, _ERASURE, seed=0), lambda event: None)
    group.start()
    for sibling, text in ((0, "b"), (1, "b"), (0, "c"), (1, "x"), (1, "c")):
        group.deliver(sibling, _said(text))
    end = _said("", ended=True)
    for sibling in (0, 1):
        group.deliver(sibling, end)
    erased = [[e.candidate.ids.tolist() for e in t.erasures] for t in group.group().trajectories]
    assert erased == [[], [_said("x").ids.tolist()]]
    assert [group.committed_ids(n) for n in (0, 1)] == [_said("bc", ended=True).ids.tolist()] * 2


def test_the_objective_that_became_a_setting_is_refused_with_that_setting() -> None:
    config = ObjectiveConfig(name="e3rl_reproduce.oracle:StepCredit")
    with pytest.raises(UserError, match=r"is now objective\.name = 'e3rl' with objective\.credit_weight = 1"):
        build(config)
