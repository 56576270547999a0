"""rollout.kv_budget: memory is bounded, work waits, and what can never fit is refused with the numbers."""

from __future__ import annotations

import pytest

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.build import build_engine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.storage import MIB, physical_slots, rows_within
from e3rl.errors import UserError
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Problem, Prompt
from tests.engine.models import EOS, build, tiny

PROMPTS = [Prompt(Problem(str(i), ""), (4, 5, 6 + i)) for i in range(5)]
WIDE = {"num_key_value_heads": 4, "head_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 512}


def rollouts(config: RolloutConfig, engine) -> dict[str, object]:
    groups = run_groups(engine, PROMPTS, GroupSettings(config, ErasureConfig(), seed=0))
    return {group.prompt.problem.id: group for group in groups}


@pytest.mark.parametrize("budget", [5, 6, 9, 10, 11, 13, 100])
def test_as_many_rows_as_fit(budget):
    rows = rows_within(budget * MIB, MIB, wanted=40, group=3, positions=8)
    assert physical_slots(rows) <= budget
    assert rows == 40 or physical_slots(rows + 1) > budget


def test_no_budget_is_no_bound():
    assert rows_within(0, MIB, wanted=40, group=3, positions=8) == 40


def test_a_group_that_can_never_fit_is_refused_with_the_numbers():
    with pytest.raises(
        UserError, match=r"kv_budget = 7 MiB holds 3 rows of 8 tokens \(1.5 .* of 6 siblings needs 12 MiB"
    ):
        rows_within(7 * MIB, MIB + MIB // 2, wanted=40, group=6, positions=8)


def test_a_run_is_refused_before_anything_is_generated():
    config = RolloutConfig(num_generations=4, segment_length=64, max_segments=4, kv_budget=1)
    with pytest.raises(UserError, match=r"rollout\.kv_budget = 1 MiB holds"):
        build_engine(config, build("Qwen3", **WIDE), EOS, 3)


def test_what_does_not_fit_waits_and_comes_out_the_same():
    model = build("Qwen3", **WIDE)
    config = RolloutConfig(num_generations=3, segment_length=8, max_segments=4, max_rows=12)
    free = build_engine(config, model, EOS, 3)
    bounded_config = RolloutConfig(num_generations=3, segment_length=8, max_segments=4, max_rows=12, kv_budget=2)
    bounded = build_engine(bounded_config, model, EOS, 3)
    assert isinstance(free, TorchEngine)
    assert isinstance(bounded, TorchEngine)
    assert rollouts(bounded_config, bounded) == rollouts(config, free)
    assert bounded.stats.kv_bytes <= 2 * MIB < free.stats.kv_bytes
    assert 3 <= bounded.free_rows() < 12


def test_the_bound_holds_for_models_that_run_by_their_own_forward_pass():
    engine = TorchEngine(
        tiny("Llama", "eager"), eos_ids=EOS, max_rows=64, cache_rows=128, max_length=200, kv_budget=MIB, group=2
    )
    engine.prefill([4, 5, 6], 2)
    assert 0.8 * MIB < engine.stats.kv_bytes <= MIB
