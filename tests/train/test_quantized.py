"""Base weights in 4 and 8 bits: how far off they are, that engine and packed rows agree on them, and what a run leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from e3rl.config import ModelConfig
from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.errors import UserError
from e3rl.models import Policy, load_policy
from e3rl.plan.dry_run import micro_batch
from e3rl.plan.memory import make_plan, shape_of
from e3rl.testing.engine import check_oracle
from e3rl.testing.scripts import EngineContract
from e3rl.train.scoring import score_sequences
from e3rl.train.trainer import Trainer
from tests.train.packs import sequence
from tests.train.random_lab import lab_config, random_lab

KINDS = ("nf4", "int8")
IDS = torch.randint(3, 20, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=KINDS)
def policy(request: pytest.FixtureRequest) -> Policy:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'e3rl[8bit]'")
    torch.manual_seed(0)
    return load_policy(ModelConfig(path=random_lab(), lora_r=2, quantization=request.param))


def _logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    return found


def test_how_far_log_probabilities_are_off(policy: Policy):
    kind = policy.model.config.quantization_config.quant_method, policy.model.config.quantization_config.load_in_4bit
    off = (_logprobs(policy.model) - _logprobs(AutoModelForCausalLM.from_pretrained(random_lab()))).abs()
    print(f"\n{kind}: mean {off.mean():.4f}, largest {off.max():.4f}", end="")
    assert 1e-4 < off.mean() < (0.06 if kind[1] else 0.008)


def test_packed_rows_and_the_engine_have_its_numbers(policy: Policy):
    """Numbers don't depend on what else is in the pass."""
    ids = IDS[0].tolist()
    pair = [sequence(ids[:5], ids[5:19]), sequence(ids[:5], [*ids[5:9], *ids[20:27]])]
    packed = score_sequences(policy.model, pair, temperature=1.0, token_budget=100)
    for one, found in zip(pair, packed, strict=True):
        [alone] = score_sequences(policy.model, [one], temperature=1.0, token_budget=100)
        assert (found.logprobs_T - alone.logprobs_T).abs().max() < 1e-4
    eos, most = policy.eos_ids, {"cache_rows": 6, "max_length": 48}
    check_oracle(
        EngineContract(
            lambda: TorchEngine(policy.model, eos_ids=eos, max_rows=6, **most),
            lambda: RecomputeEngine(policy.model, eos_ids=eos, **most),
            policy.vocabulary,
            eos,
            tolerance=1e-4,
            scripts=3,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_adapters_and_a_model_in_full(kind: str, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'e3rl[8bit]'")
    from peft import PeftModel

    overrides = (f"model.quantization={kind}", "model.lora_r=2", "run.name=run", "objective.kl_coef=0.1")
    trainer = Trainer(lab_config(tmp_path, *overrides, 'rewards.functions=["tests.ranks.run:evenness"]'))
    before = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
    trainer.train()
    after = dict(trainer.policy.model.named_parameters())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all("lora_" in n for n in changed), sorted(changed)
    wanted = _logprobs(trainer.policy.model)
    base = load_policy(ModelConfig(path=random_lab(), quantization=kind)).model
    untrained = _logprobs(base)
    assert (_logprobs(PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")) - wanted).abs().max() < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    off = (_logprobs(model) - wanted).abs().max()
    assert off < 1e-4
    assert (untrained - wanted).abs().max() > 10 * off


def test_bytes_are_planned(policy: Policy, tmp_path: Path):
    kind = "nf4" if policy.model.config.quantization_config.load_in_4bit else "int8"
    config = lab_config(tmp_path, f"model.quantization={kind}", "model.lora_r=2")
    held = sum(p.nbytes for p in policy.model.parameters())
    for weight in policy.model.parameters():
        state, scales = getattr(weight, "quant_state", None), getattr(weight, "SCB", None)
        held += (0 if state is None else state.absmax.nbytes) + (0 if scales is None else scales.nbytes)
    assert make_plan(config).trainer.held["weights"] == held


def test_what_a_pass_unpacks_is_planned(tmp_path: Path):
    plans = {
        kind: make_plan(lab_config(tmp_path, f"model.quantization={kind}", "model.lora_r=2"))
        for kind in ("none", *KINDS)
    }
    assert len({plan.parameters for plan in plans.values()}) == 1
    weights = {kind: plan.trainer.held["weights"] for kind, plan in plans.items()}
    assert weights["nf4"] < weights["int8"] < weights["none"]
    passing = {
        kind: micro_batch(shape_of(ModelConfig(path=random_lab(), lora_r=2, quantization=kind)), 8, False).passing
        for kind in ("none", "nf4")
    }
    shape = shape_of(ModelConfig(path=random_lab()))
    smallest = min(p.nbytes for name, p in shape.named_parameters() if "proj" in name)
    assert passing["nf4"] >= passing["none"] + smallest // 2


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"leaves weights that can't be trained: set model\.lora_r too"):
        lab_config(tmp_path, "model.quantization=nf4")
    with pytest.raises(UserError, match=r"set train\.parallel to ddp or zero1 \(it is 'fsdp2'\)"):
        lab_config(tmp_path, "model.quantization=nf4", "model.lora_r=2", "train.parallel=fsdp2")
    with pytest.raises(UserError, match=r"vLLM would generate with other weights"):
        lab_config(tmp_path, "model.quantization=nf4", "model.lora_r=2", "rollout.engine=vllm")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes and accelerate .* pip install 'e3rl\[8bit\]'"):
        load_policy(lab_config(tmp_path, "model.quantization=nf4", "model.lora_r=2").model)
