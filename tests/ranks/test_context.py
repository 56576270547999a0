"""Two ranks that divide the tokens of each row have the numbers, the gradients and about half the bytes of one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from e3rl.cluster.parallel import make_ready
from e3rl.cluster.ranks import Ranks, join_ranks
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.plan.memory import make_plan
from tests.ranks.launch import ENVIRONMENT, TORCHRUN, alone, assert_same_run, succeed, torchrun
from tests.train.random_lab import lab_config, random_hybrid

pytestmark = pytest.mark.timeout(900)
ARCHITECTURES = ("llama", "gpt_oss", "deepseek_v3", "qwen3_moe", "gemma3n_text", "olmo3", "gpt2")
"""Heads in groups, sinks and windows, latent attention, experts, keys that layers share, learnt positions."""


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, Any]]:
    """What `tests.ranks.context` prints, by name."""
    command = [*TORCHRUN, "2", "-m", "tests.ranks.context", *ARCHITECTURES]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    succeed(done)
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_divided_row_has_the_numbers_of_the_whole_one(lines: dict[str, dict[str, Any]], name: str):
    found = lines[name]
    assert max(found[what] for what in ("logprobs", "entropies", "gradients")) < 1e-4, found
    assert found["shares"] < 1e-6
    assert found["gradients of a rank alone"] > 0.1, "each rank has a part"


def test_what_a_pass_takes_is_divided_and_planned(lines: dict[str, dict[str, Any]]):
    for way in ("kept", "checkpointed"):
        whole, divided = (lines["bytes"][f"{which}, {way}"] for which in ("whole", "divided"))
        print(f"\n| {way} | {whole} | {divided} |", end="")
        assert divided["peak"] < 0.55 * whole["peak"]
        assert divided["kept"] < 0.57 * whole["kept"]
        assert divided["peak"] == pytest.approx(divided["planned"], rel=0.05)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("context")
    alone(directory, "none_context")
    succeed(torchrun(directory, "ddp_context", "fsdp2_context"))
    return directory


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_ranks_that_divide_rows_train_what_one_process_trains(runs: Path, mode: str):
    assert_same_run(runs / f"{mode}_context", runs / "none_context", f"2, {mode}, context")


def test_what_cant_be_divided_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    divided = ("train.context_parallel=2", "train.parallel=ddp")
    with pytest.raises(UserError, match=r"set train\.parallel to ddp, zero1, zero2, fsdp2 \(it is 'deepspeed-zero2'\)"):
        lab_config(tmp_path, "train.context_parallel=2", "train.parallel=deepspeed-zero2")
    with pytest.raises(UserError, match=r"train\.router_loss is a product of means"):
        lab_config(tmp_path, *divided, "train.router_loss=0.1")
    with pytest.raises(UserError, match=r"divides every row among as many ranks, and 1 ranks are no multiple"):
        join_ranks(lab_config(tmp_path, *divided))
    with pytest.raises(UserError, match=r"divides rows among as many ranks, and 3 are no multiple of that: plan with"):
        make_plan(lab_config(tmp_path, *divided), 3)
    config = lab_config(tmp_path, *divided, f"model.path={random_hybrid()}")
    with pytest.raises(UserError, match=r"Qwen3_5ForCausalLM has layers that carry a state from token to token"):
        make_ready(load_policy(config.model), None, config.train, Ranks(0, 2), Ranks(0, 2))
