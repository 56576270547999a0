"""The simulation by value, where the answer can be worked out by hand, and against the real driver's rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from e3rl.cli.main import main
from e3rl.cli.recipes import find_recipe
from e3rl.config import load_config
from e3rl.errors import UserError
from e3rl.plan.simulation import (
    Costs,
    Gpu,
    Work,
    fitting_rows,
    operations,
    read_context,
    roofline,
    simulate_rollouts,
    simulate_step,
)

COSTS = Costs(step=1.0, row=0.25, prompt=2.0, train_token=0.01, sync=3.0, reward=1.0)
WORK = Work(groups=4, siblings=2, segment_length=10, segments=3, erase=0.0, end=0.0, prompt_tokens=5)


def test_one_worker_without_erasing_takes_what_arithmetic_says():
    found = simulate_rollouts(WORK, COSTS, workers=1, rows=8)
    # 4 prompts, then 30 steps of 8 rows
    assert found.seconds == pytest.approx(4 * 2.0 + 30 * (1.0 + 0.25 * 8))
    assert (found.tokens, found.erased_tokens, found.idle) == (4 * 2 * 30, 0, 0.0)


def test_a_candidate_has_a_cost_of_its_own():
    found = simulate_rollouts(WORK, replace(COSTS, candidate=0.5), workers=1, rows=8)
    assert found.seconds == pytest.approx(4 * 2.0 + 30 * (1.0 + 0.25 * 8) + 4 * 2 * 3 * 0.5)


def test_groups_that_find_no_room_come_after():
    found = simulate_rollouts(WORK, COSTS, workers=1, rows=4)
    assert found.seconds == pytest.approx(2 * (2 * 2.0 + 30 * (1.0 + 0.25 * 4)))


def test_workers_divide_the_groups():
    found = simulate_rollouts(WORK, COSTS, workers=2, rows=8)
    assert found.seconds == pytest.approx(2 * 2.0 + 30 * (1.0 + 0.25 * 4))
    assert simulate_rollouts(WORK, COSTS, workers=8, rows=8).idle == pytest.approx(0.5)


def test_everything_erased_takes_all_attempts_and_the_last_is_kept():
    work = replace(WORK, groups=1, erase=1.0, max_erasures=2)
    found = simulate_rollouts(work, COSTS, workers=1, rows=2)
    assert found.erased_tokens == 2 * 2 * 30
    assert found.seconds == pytest.approx(2.0 + 90 * 1.5)


def test_a_barrier_costs_time_where_chance_divides_the_siblings():
    work = replace(WORK, groups=1, siblings=8, segments=8, erase=0.3)
    found = simulate_rollouts(work, COSTS, workers=1, rows=8)
    assert found.waiting > 0.05
    free = simulate_rollouts(replace(work, erase=0.0), COSTS, workers=1, rows=8)
    assert free.waiting == 0.0
    assert found.tokens / found.seconds < free.tokens / free.seconds


def test_many_groups_hide_the_barrier():
    work = replace(WORK, siblings=8, segments=8, erase=0.3)

    def lost(groups: int) -> float:
        some, rows = replace(work, groups=groups), 8 * groups
        plain = replace(COSTS, row=0.0, prompt=0.0)  # a step costs the same however many rows it has
        found = simulate_rollouts(some, plain, 1, rows)
        return found.seconds / (8 * 10)

    assert lost(1) < lost(16)  # the step of all waits for the longest chain of retries


def test_a_step_adds_up_and_ahead_takes_the_longer_part():
    step = simulate_step(WORK, COSTS, workers=1, rows=8, trainers=2)
    rollout, train = 4 * 2.0 + 30 * 3.0, (240 + 8 * 5) * 0.01 / 2
    assert step.seconds == pytest.approx(rollout + 1.0 + train + 3.0)
    assert step.bottleneck == "rollout"
    assert replace(step, ahead=True).seconds == pytest.approx(rollout + 1.0 + 3.0)
    slow = simulate_step(WORK, replace(COSTS, train_token=10.0), workers=1, rows=8, trainers=1, ahead=True)
    assert slow.bottleneck == "training"
    assert slow.seconds == pytest.approx(280 * 10.0 + 3.0)


def test_what_was_erased_is_not_trained_on():
    work = replace(WORK, groups=1, erase=1.0, max_erasures=2)
    assert simulate_step(work, COSTS, workers=1, rows=2, trainers=1).train == pytest.approx((2 * 30 + 2 * 5) * 0.01)


def test_costs_of_a_data_sheet():
    costs = roofline(parameters=4e9, kv_bytes=147456, context=4096, operations=10)
    assert costs.step == pytest.approx(8e9 / (3.35e12 * 0.7))
    assert costs.row == pytest.approx(147456 * 4096 / (3.35e12 * 0.7) + 8e9 / (989e12 * 0.4))
    assert costs.train_token == pytest.approx(10 * 4e9 / (989e12 * 0.36))
    assert costs.sync == pytest.approx(8e9 / 8.6e9)


def test_pythons_share_is_part_of_the_step():
    step = simulate_step(WORK, replace(COSTS, python_token=0.1), workers=1, rows=8, trainers=1)
    assert step.seconds == pytest.approx(simulate_step(WORK, COSTS, workers=1, rows=8, trainers=1).seconds + 24.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.name=e3rl"], 10),
        (["objective.name=grpo", "objective.kl_coef=0.0"], 8),
        (["objective.name=grpo", "objective.kl_coef=0.0", "train.gradient_checkpointing=false"], 6),
        (["objective.name=e3rl", "train.gradient_checkpointing=false"], 10),
        (["objective.name=e3rl", "train.parallel=deepspeed-zero2"], 12),
        (["objective.name=e3rl", "train.minibatches=4"], 12),
        (["objective.name=grpo", "objective.kl_coef=0.0", "train.minibatches=4"], 9.5),  # the first is not scored apart
        (["objective.name=e3rl", "train.minibatches=4", "train.num_iterations=2"], 20),
        (["objective.name=erpo"], 10),
        (["objective.name=vanilla"], 0),
    ],
)
def test_operations_of_a_step(overrides: list[str], expected: float):
    config = load_config(
        find_recipe("lab"),
        [],
        ["train.gradient_checkpointing=true", "train.minibatches=1", "train.num_iterations=1", *overrides],
    )
    assert operations(config) == expected


def test_rows_that_fit():
    """80 GB hold 72; 8 of weights and 4 of others leave 60, and a row takes 1."""
    gpu = Gpu(memory=80e9)
    assert fitting_rows(256, 4e9, 1e5, 1e4, 4e9, gpu) == 60
    assert fitting_rows(32, 4e9, 1e5, 1e4, 4e9, gpu) == 32
    assert fitting_rows(256, 40e9, 1e5, 1e4, 0.0, gpu) == 0


def test_the_torch_engine_reads_padded_widths():
    assert read_context(8192, "vllm") == 4096
    assert read_context(8100, "torch") == 8192


@pytest.mark.parametrize(("field", "value"), [("groups", 0), ("segments", 0), ("erase", 1.5), ("end", -0.1)])
def test_impossible_work_is_refused(field: str, value: float):
    with pytest.raises(UserError, match="must"):
        replace(WORK, **{field: value})


def test_a_worker_without_room_for_a_group_is_refused():
    with pytest.raises(UserError, match="room for a group of 2"):
        simulate_rollouts(WORK, COSTS, workers=1, rows=1)


def test_the_command_prints_a_line_for_each_number_of_gpus(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "demo", "--simulate", "--gpus", "1", "16"]) == 0
    said = capsys.readouterr().out
    assert "10 operations" in said
    assert "weights" in said, "the demo's few tokens take less time than new weights of 4 billion parameters"
    assert "16" in said
    assert main(["plan", "demo"]) == 2
    assert "e3rl train RECIPE --plan" in capsys.readouterr().err
