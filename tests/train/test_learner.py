"""From rewarded groups to gradients: nothing about batching may matter, and missing rewards teach nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from e3rl.config import Config, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.models import Policy, add_lora
from e3rl.objectives import build
from e3rl.objectives.base import Totals
from e3rl.train.learner import Learner
from e3rl.train.lessons import totals_of
from e3rl.train.metrics import Means
from e3rl.train.packing import group_sequences
from e3rl.types import RewardedGroup
from tests.engine.models import EOS, tiny
from tests.train.rollouts import rewarded_group

GROUPS = [
    rewarded_group("first", [1.0, 0.0, 1.0], [[4, 2], [4, 4, 1], [3]], [[0], [1], []]),
    rewarded_group("second", [0.0, 1.0, 0.5], [[4], [4, 3], [2]]),
]


def _learner(
    objective: str = "e3rl", train: TrainConfig | None = None, lora: bool = False, **options: object
) -> Learner:
    model = copy.deepcopy(tiny("Qwen3"))
    if lora:
        model = add_lora(model, ModelConfig(lora_r=2))
    config = Config(
        objective=ObjectiveConfig(objective, options),
        rollout=RolloutConfig(segment_length=4, max_segments=3),
        train=train or TrainConfig(learning_rate=0.1, warmup_ratio=0.0),
    )
    return Learner(Policy(model, None, "tiny", EOS, 256), build(config.objective), config, updates=6)


def _gradients(learner: Learner, groups: list[RewardedGroup]) -> torch.Tensor:
    lessons = learner.prepare(groups)
    learner._policy.model.train()
    learner._accumulate(lessons, Means())
    return torch.cat([p.grad.flatten() for p in learner._policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("options", [{}, {"erased": "contrast"}, {"allocation": "sequence", "ratio": "segment_mean"}])
def test_gradients_do_not_depend_on_micro_batches(options: dict[str, object]):
    whole = _gradients(_learner(train=TrainConfig(micro_batch_tokens=10_000), **options), GROUPS)
    small = _gradients(_learner(train=TrainConfig(micro_batch_tokens=20), **options), GROUPS)
    torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)
    assert whole.abs().max() > 1e-3


def test_the_gradient_is_that_of_the_formula_at_the_old_policy():
    """Eq 21. At ratio 1 the gradient is -mean over groups of 1/G sum_i sum_n A_n grad log pi(s_n), without KL."""
    learner = _learner(kl_coef=0.0, allocation="sequence")
    found = _gradients(learner, GROUPS)
    model = copy.deepcopy(tiny("Qwen3"))
    total = torch.zeros(())
    for item in GROUPS:
        rewards = torch.tensor([r.value for r in item.rewards])
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
        for trajectory, advantage in zip(item.group.trajectories, advantages, strict=True):
            ids = torch.tensor([[*trajectory.prompt.ids, *trajectory.ids.tolist()]])
            logp = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
            total = total - advantage * logp[len(trajectory.prompt.ids) - 1 :].sum() / 3 / 2
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_trajectory_without_a_reward_teaches_nothing_and_counts_in_no_statistics():
    missing = [rewarded_group("first", [1.0, None, 0.0], [[4, 2], [4, 4, 1], [3]])]
    learner = _learner(kl_coef=0.0, allocation="sequence")
    lessons = learner.prepare(missing)
    assert [lesson.sequence.sibling for lesson in lessons] == [0, 2]
    assert [float(lesson.advantages_T[0]) for lesson in lessons] == pytest.approx([1.0, -1.0], abs=1e-3)
    assert {lesson.group_size for lesson in lessons} == {2}
    assert learner.prepare([rewarded_group("x", [None, None], [[2], [2]])]) == []


def test_contrast_teaches_erased_candidates_of_rewarded_trajectories_only():
    lessons = _learner(erased="contrast", contrast_weight=0.5).prepare(GROUPS)
    erased = [lesson for lesson in lessons if lesson.sequence.erased]
    assert [(x.sequence.sibling, x.sequence.mask_T.tolist()) for x in erased] == [
        (0, [True] * 4),
        (1, [False] * 4 + [True] * 4),
    ]
    assert erased[0].advantages_T.tolist() == [-0.5] * 4
    assert erased[1].advantages_T.tolist() == [0.0] * 8
    assert {x.group_size for x in lessons} == {3}, "erased candidates are no siblings"
    assert [x.sequence.segments_T.tolist() for x in erased] == [[0] * 4, [-1] * 4 + [1] * 4]
    prefix = GROUPS[0].group.trajectories[1].ids[:4].tolist()
    assert erased[1].sequence.response_ids[:4] == tuple(prefix)


def test_a_steps_totals_are_of_trajectories_alone():
    sequences = group_sequences([item.group for item in GROUPS], with_erased=True)
    assert sum(s.erased for s in sequences) == 2
    assert totals_of(sequences, 12) == Totals(groups=2, sequences=6, tokens=6 + 9 + 3 + 4 + 7 + 2, completion_limit=12)


def test_dropped_erasures_are_no_lessons():
    assert not any(lesson.sequence.erased for lesson in _learner().prepare(GROUPS))


def test_an_update_moves_rewarded_text_up_and_the_kl_holds_it_back():
    def gain(kl_coef: float) -> float:
        learner = _learner(
            kl_coef=kl_coef, allocation="sequence", train=TrainConfig(learning_rate=3e-3, warmup_ratio=0.0)
        )
        before = learner.prepare(GROUPS)
        for update in range(4):
            learner.update(learner.prepare(GROUPS), update)
        after = learner.prepare(GROUPS)
        signed = [
            float((b.scores.logprobs_T - a.scores.logprobs_T).sum() * a.advantages_T[0].sign())
            for a, b in zip(before, after, strict=True)
        ]
        return sum(signed)

    free, held = gain(0.0), gain(30.0)
    assert free > 1.0
    assert held < free / 2


def test_minibatches_and_iterations_are_optimizer_updates():
    train = TrainConfig(learning_rate=0.001, warmup_ratio=0.0, num_iterations=2, minibatches=2)
    learner = _learner(train=train)
    learner.update(learner.prepare(GROUPS), 0)
    steps = {float(v) for k, v in learner.optimizer.state().items() if k.endswith("/step")}
    assert (learner.updates_per_step(), steps) == (4, {4.0})


def test_the_rate_follows_the_planned_updates_where_a_minibatch_has_no_group():
    """Two groups in three minibatches, twice: four updates are made, and the last of six planned has the full rate."""
    train = TrainConfig(learning_rate=0.006, warmup_ratio=1.0, num_iterations=2, minibatches=3)
    learner = _learner(train=train)
    rates: list[float] = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda rate: (rates.append(rate), step(rate))[1]  # type: ignore[method-assign]
    update = learner.update(learner.prepare(GROUPS), 0)
    assert rates == pytest.approx([0.001, 0.002, 0.004, 0.005])
    assert update.learning_rate == pytest.approx(0.006)


def test_with_adapters_the_reference_is_the_model_without_them():
    learner = _learner(lora=True, kl_coef=0.1)
    lessons = learner.prepare(GROUPS)
    learner.update(lessons, 0)
    moved = learner.prepare(GROUPS)
    for before, after in zip(lessons, moved, strict=True):
        torch.testing.assert_close(before.reference_logprobs_T, after.reference_logprobs_T)
    assert any(
        not torch.allclose(a.scores.logprobs_T, b.scores.logprobs_T) for a, b in zip(lessons, moved, strict=True)
    )
    names = {name.split(".")[-2] for name, _ in learner._policy.trainable()}
    assert all("lora" in n or n == "default" for n in names)


def test_a_non_finite_gradient_stops_the_run_with_the_weights_untouched():
    learner = _learner(kl_coef=0.0, allocation="sequence")
    lessons = learner.prepare(GROUPS)
    broken = [replace(lessons[0], advantages_T=torch.full_like(lessons[0].advantages_T, float("nan")))]
    before = {k: v.detach().clone() for k, v in learner.optimizer.weights().items()}
    place = "group 0, sibling 0, segment 0, response token 0, at optimizer update 7"
    with pytest.raises(UserError, match=f"the advantage is nan at {place}"):
        learner.update(broken, 7)
    assert all(torch.equal(before[k], v) for k, v in learner.optimizer.weights().items())


OBJECTIVES_TO_COMPARE = [
    ("e3rl", {}),
    ("e3rl", {"erased": "contrast", "allocation": "anchored", "attribution_layers": "all"}),
    ("grpo", {}),
    ("dapo", {}),
    ("gspo", {}),
    ("sapo", {}),
    ("cispo", {}),
    ("rloo", {}),
    ("erpo", {}),
]


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        (10_000, {}),
        (30, {}),
        (8, {}),
        (8, {"gradient_checkpointing": True}),
        (8, {"importance_correction": "token_mask", "importance_cap": 1.1}),
        (30, {"minibatches": 2}),
    ],
    ids=["one row", "a group a row", "groups in parts", "passes kept", "importance weights", "minibatches"],
)
@pytest.mark.parametrize(("objective", "options"), OBJECTIVES_TO_COMPARE)
def test_one_pass_learns_what_scoring_first_learns(
    objective: str, options: dict[str, object], budget: int, settings: dict[str, Any]
):
    """Lessons, metrics and the updated weights are the same, whatever the rows."""
    train = TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, **settings)
    apart = _learner(objective, train, **options)
    expected = apart.prepare(GROUPS)
    expected_update = apart.update(expected, 0)
    together = _learner(objective, replace(train, micro_batch_tokens=budget), **options)
    lessons, update = together.learn(GROUPS, 0)
    assert update.means == pytest.approx(expected_update.means, rel=1e-4, abs=1e-5)
    assert (update.grad_norm, update.learning_rate) == pytest.approx(
        (expected_update.grad_norm, expected_update.learning_rate), rel=1e-5
    )
    for mine, theirs in zip(lessons, expected, strict=True):
        assert (mine.sequence.sibling, mine.sequence.erased) == (theirs.sequence.sibling, theirs.sequence.erased)
        torch.testing.assert_close(mine.scores.logprobs_T, theirs.scores.logprobs_T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.scores.entropies_T, theirs.scores.entropies_T, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine.advantages_T, theirs.advantages_T, atol=1e-4, rtol=1e-4)


def _forward_passes(learner: Learner, monkeypatch: pytest.MonkeyPatch, step: Callable[[], object]) -> int:
    """Passes of the trained model, each of one row, while ``step`` runs."""
    model, count = learner._policy.model, [0]
    run = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **kw: (count.__setitem__(0, count[0] + 1), run(*a, **kw))[1])
    step()
    return count[0]


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 1),
        ({"micro_batch_tokens": 30}, 2),  # a group each
        ({"num_iterations": 2}, 3),
        ({"minibatches": 2}, 3),
        ({"minibatches": 2, "micro_batch_tokens": 30}, 3),  # the second alone, before the first one's update
        ({"importance_correction": "token_truncate"}, 1),
        ({"micro_batch_tokens": 8}, 12),  # six sequences: all scored before the first backward pass
        ({"micro_batch_tokens": 8, "gradient_checkpointing": True}, 6),
    ],
)
def test_the_old_policy_is_scored_apart_only_where_it_is_another_one(
    settings: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
):
    learner = _learner(train=TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, **settings))
    assert _forward_passes(learner, monkeypatch, lambda: learner.learn(GROUPS, 0)) == passes


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "sapo", "bapo", "sft", "luspo", "vespo"])
def test_advantages_of_rewards_alone_need_no_pass_of_their_own(objective: str, monkeypatch: pytest.MonkeyPatch):
    """Six sequences in six rows, whatever the memory that the passes would keep."""
    learner = _learner(objective, TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, micro_batch_tokens=8))
    assert _forward_passes(learner, monkeypatch, lambda: learner.learn(GROUPS, 0)) == 6


@pytest.mark.parametrize(("objective", "settings"), [("grpo", {}), ("e3rl", {"gradient_checkpointing": True})])
def test_one_pass_of_a_large_group_has_the_bits_of_two(objective: str, settings: dict[str, Any]):
    """The same rows in the same order: losses, gradients and weights are those of scoring first, to the last bit."""
    train = TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, micro_batch_tokens=12, **settings)
    apart, together = _learner(objective, train), _learner(objective, train)
    expected = apart.update(apart.prepare(GROUPS[:1]), 0)
    _, found = together.learn(GROUPS[:1], 0)
    assert (found.means["loss"], found.grad_norm) == (expected.means["loss"], expected.grad_norm)
    before, after = apart.optimizer.weights(), together.optimizer.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dropout_is_no_measure_of_the_policy(monkeypatch: pytest.MonkeyPatch):
    learner = _learner()
    learner._policy.model.config.attention_dropout = 0.1
    again = Learner(learner._policy, learner._objective, learner._config, 4)
    assert _forward_passes(again, monkeypatch, lambda: again.learn(GROUPS, 0)) == 2


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_kl_term_there_is_no_reference_model(lora: bool):
    assert _learner("grpo", lora=lora, kl_coef=0.0).reference is None


def test_with_adapters_no_weights_are_copied_for_the_reference():
    learner = _learner("grpo", lora=True, kl_coef=0.1)
    with learner.reference.model() as model:
        assert model is learner._policy.model


def test_a_step_of_groups_without_rewards_changes_nothing():
    learner = _learner()
    before = {k: v.detach().clone() for k, v in learner.optimizer.weights().items()}
    lessons, update = learner.learn([rewarded_group("x", [None, None], [[2], [2]])], 3)
    assert (lessons, update.means, update.grad_norm) == ([], {}, 0.0)
    assert all(torch.equal(before[k], v) for k, v in learner.optimizer.weights().items())


STREAMED = {
    "e3rl": [{}, {"erased": "contrast"}, {"allocation": "sequence"}],
    "grpo": [{}, {"average": "sequence"}],
    "dr_grpo": [{}],
    "dapo": [{"kl_coef": 0.1}],
    "gspo": [{}],
    "sapo": [{}],
    "cispo": [{}],
    "rloo": [{}],
    "luspo": [{}],
    "vespo": [{}],
    "erpo": [{}],
}


@pytest.mark.parametrize(
    ("objective", "options"), [(name, options) for name, each in STREAMED.items() for options in each], ids=str
)
def test_groups_that_arrive_one_by_one_give_the_update_of_all_at_once(objective: str, options: dict[str, object]):
    _compare_arriving(_learner(objective, _STILL, **options))


def test_the_sums_of_bfloat16_gradients_are_scaled_too():
    """Micro-batches of one group, and counts of 4 and 2 groups: so both ways round the same."""
    learner = _learner("e3rl", replace(_STILL, micro_batch_tokens=20, prompts_per_step=4))
    learner._policy.model.to(torch.bfloat16)
    _compare_arriving(learner)


_STILL = TrainConfig(learning_rate=0.0, warmup_ratio=0.0, prompts_per_step=5)


def _compare_arriving(learner: Learner) -> None:
    """Gradients before they are clipped, and what is reported. The groups differ in every count that a loss divides by."""
    found = []
    for arriving in (False, True):
        policy = replace(learner._policy, model=copy.deepcopy(learner._policy.model))
        again = Learner(policy, learner._objective, learner._config, updates=6)
        gradients = _kept_gradients(again)
        way = again.learn_arriving(([group] for group in GROUPS), 0) if arriving else again.learn(GROUPS, 0)
        found.append((gradients, *way))
    (one, lessons, expected), (other, streamed, got) = found
    scale = max(float(g.abs().max()) for g in one.values())
    assert learner.streams
    assert one.keys() == other.keys()
    assert scale > 1e-3
    for name in one:
        torch.testing.assert_close(other[name] / scale, one[name] / scale, atol=1e-6, rtol=0)
    assert [s.sequence.group for s in streamed] == [s.sequence.group for s in lessons]
    assert got.means == pytest.approx(expected.means, rel=1e-5, abs=1e-6)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert got.learning_rate == expected.learning_rate


def _kept_gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """What the optimizer is given, by name; filled when it steps."""
    kept: dict[str, torch.Tensor] = {}
    optimizer: Any = learner.optimizer
    clip = optimizer._clip

    def keep() -> float:
        kept.update((n, p.grad.clone()) for n, p in optimizer.weights().items() if p.grad is not None)
        return float(clip())

    optimizer._clip = keep
    return kept


def test_what_a_sum_of_groups_cannot_give_waits_for_all_groups():
    assert _learner("e3rl").streams
    assert not _learner("bapo").streams  # its bounds are of a micro-batch
    assert not _learner("disco").streams  # divides by two counts
    assert not _learner("e3rl", TrainConfig(minibatches=2, prompts_per_step=4)).streams
    assert not _learner("e3rl", TrainConfig(num_iterations=2)).streams


def test_a_step_of_which_no_group_arrives_changes_nothing():
    learner = _learner()
    before = {name: p.clone() for name, p in learner.optimizer.weights().items()}
    lessons, update = learner.learn_arriving(iter(()), 0)
    assert (lessons, update.means, update.grad_norm) == ([], {}, 0.0)
    assert all(torch.equal(before[name], p) for name, p in learner.optimizer.weights().items())
