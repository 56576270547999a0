"""Two ranks on gloo train the model that one process trains; what they save, any number of ranks takes up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from e3rl.train.run_directory import read_lines
from tests.ranks.launch import (
    ANOTHER_LAUNCH,
    DEEPSPEED,
    MODES,
    alone,
    assert_same_run,
    copy_run,
    curve,
    succeed,
    torchrun,
    weights,
)
from tests.ranks.run import STEPS

ARRIVING = ("ddp", "zero1", "zero2", "fsdp2")
LOCKSTEP = ("zero2", "fsdp2", *DEEPSPEED)
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs, and two ranks' runs of the same."""
    directory = tmp_path_factory.mktemp("runs")
    for name in ("none", "none_several", "none_stale", "none_half", "none_kept", "none_reference"):
        alone(directory, name)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("collect", "loop"):
            patch.setattr(f"e3rl.train.{module}.streams", lambda run: False)
        alone(directory, "none_arriving")
    succeed(
        torchrun(
            directory,
            *MODES,
            "ddp_several",
            "ddp_kept",
            "ddp_stale",
            "fsdp2_stale",
            *(f"{mode}_arriving" for mode in ARRIVING),
            *(f"{mode}_kept" for mode in LOCKSTEP),
            *(f"{mode}_reference" for mode in LOCKSTEP),
            *(f"{mode}_half" for mode in MODES),
        )
    )
    print("\n| ranks, train.parallel | loss of step 1 | 2 | 3 | 4 | largest difference of loss or norm | of weights |")
    print("| --- | --- | --- | --- | --- | --- | --- |", end="")
    return directory


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_two_ranks_train_what_one_process_trains(runs: Path, mode: str):
    assert_same_run(runs / mode, runs / "none", "1, none" if mode == "none" else f"2, {mode}")


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_evaluate_what_one_process_evaluates(runs: Path, mode: str):
    """Each draws and grades a share; on the first weights, which are the same, the figures are the same."""
    alone, together = (read_lines(runs / name / "evaluations.jsonl") for name in ("none", mode))
    assert [(r["step"], r["mode"]) for r in together] == [(s, m) for s in (0, STEPS) for m in ("plain", "erasable")]
    assert together[:2] == alone[:2]
    assert together[0]["problems"] == 3


def test_several_updates_of_a_step_too(runs: Path):
    """Four updates a step, a learning rate that rises and falls, gradients scaled down to norm 1."""
    assert_same_run(runs / "ddp_several", runs / "none_several", "2, ddp, four updates a step")


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_rollouts_beside_the_training_too(runs: Path, mode: str):
    """Each rank generates the next step's share in a thread of its own, which exchanges apart from the training."""
    assert_same_run(runs / f"{mode}_stale", runs / "none_stale", f"2, {mode}, staleness 1")
    assert curve(runs / "none_stale") != curve(runs / "none")


@pytest.mark.parametrize("mode", ARRIVING)
def test_groups_that_are_learnt_from_as_they_finish_too(runs: Path, mode: str):
    """One process waits for whole steps; two ranks learn from one group of each at a time."""
    assert_same_run(runs / f"{mode}_arriving", runs / "none_arriving", f"2, {mode}, groups as they finish")
    one, other = ((runs / f"rounds-{rank}.txt").read_text().split("\n") for rank in (0, 1))
    assert one == other
    assert set(one) == {"2 2 1", ""}, "steps of five groups, in rounds"
    assert len(one) > len(ARRIVING)


@pytest.mark.parametrize("mode", ["ddp", *LOCKSTEP])
def test_groups_larger_than_a_micro_batch_too(runs: Path, mode: str):
    """Their passes wait for their backward passes, under FSDP2 at the pace of the rank that has most."""
    assert_same_run(runs / f"{mode}_kept", runs / "none_kept", f"2, {mode}, groups in parts")


@pytest.mark.parametrize("mode", LOCKSTEP)
def test_a_divided_reference_model_too(runs: Path, mode: str):
    assert_same_run(runs / f"{mode}_reference", runs / "none_reference", f"2, {mode}, with a reference model")


@pytest.mark.parametrize("mode", MODES)
def test_what_two_ranks_saved_one_process_takes_up(runs: Path, mode: str, tmp_path: Path):
    saved = sorted(file.name for file in (runs / f"{mode}_half" / "checkpoints" / "step-000002").glob("weights*"))
    assert saved == ["weights-00001-of-00002.safetensors", "weights-00002-of-00002.safetensors"]
    copy_run(runs / f"{mode}_half", tmp_path / "none_half")
    alone(tmp_path, "none_half+", resume=True)
    assert_same_run(tmp_path / "none_half", runs / "none", f"2, then 1, {mode}")


def test_a_part_that_is_missing_is_noticed(runs: Path, tmp_path: Path):
    """The checkpoint before is taken, and the steps after it are done again."""
    copy_run(runs / "zero1_half", tmp_path / "none_half")
    (tmp_path / "none_half" / "checkpoints" / "step-000002" / "weights-00002-of-00002.safetensors").unlink()
    alone(tmp_path, "none_half+", resume=True)
    assert_same_run(tmp_path / "none_half", runs / "none", "2, then 1, a part missing")


@pytest.fixture(scope="module")
def more(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks take up what two ranks saved, in place, and what one process saved; and harder cases of theirs."""
    directory = tmp_path_factory.mktemp("more")
    for name in ("none_several", "none_adapters"):
        alone(directory, name)
    again = tmp_path_factory.mktemp("again")
    for mode in MODES:
        copy_run(runs / "none_half", directory / f"{mode}_half")
        copy_run(runs / f"{mode}_half", again / f"{mode}_half")
    lockstep = [f"{mode}_{kind}" for mode in ("fsdp2", *DEEPSPEED) for kind in ("several", "adapters")]
    succeed(torchrun(directory, *(f"{mode}_half+" for mode in MODES), *lockstep))
    succeed(torchrun(again, *(f"{mode}_half+" for mode in MODES)))
    for mode in MODES:
        (again / f"{mode}_half").rename(directory / f"{mode}_again")
    return directory


@ANOTHER_LAUNCH
@pytest.mark.parametrize("mode", MODES)
def test_what_one_process_saved_two_ranks_take_up(runs: Path, more: Path, mode: str):
    assert_same_run(more / f"{mode}_half", runs / "none", f"1, then 2, {mode}")


@ANOTHER_LAUNCH
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_taken_up_by_as_many_ranks_is_the_same_to_the_bit(runs: Path, more: Path, mode: str):
    assert curve(more / f"{mode}_again") == curve(runs / mode)
    ours, theirs = weights(more / f"{mode}_again"), weights(runs / mode)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@ANOTHER_LAUNCH
@pytest.mark.parametrize("mode", ["fsdp2", *DEEPSPEED])
@pytest.mark.parametrize("kind", ["several", "adapters"])
def test_harder_cases_where_ranks_run_in_lockstep(more: Path, mode: str, kind: str):
    """Several updates a step; adapters, whose reference policy is the divided model with the adapters switched off."""
    assert_same_run(more / f"{mode}_{kind}", more / f"none_{kind}", f"2, {mode}, {kind}")
