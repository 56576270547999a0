"""The memory plan: counted from shapes alone, against what a real model has, saves and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from e3rl.cli.main import main
from e3rl.config import Config, ModelConfig
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.plan import memory as planning
from e3rl.plan.fit import plan_text
from e3rl.plan.memory import GIB, make_plan, shape_of
from tests.train.random_lab import lab_config


def _config(tmp_path: Path, *overrides: str) -> Config:
    return lab_config(tmp_path, *overrides)


def test_parameters_are_those_of_the_model_and_none_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = _config(tmp_path)
    model = load_policy(config.model).model

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    plan = make_plan(config)
    assert plan.parameters == plan.trainable == sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    assert plan.trainer.held["weights"] == plan.trainer.held["reference weights"] == weights
    assert plan.trainer.held["optimizer"] == 2 * weights
    assert plan.trainer.phases["training"]["gradients"] == weights


def test_activations_grow_with_the_tokens_of_a_micro_batch_and_shrink_when_recomputed(tmp_path: Path):
    def activations(*overrides: str) -> int:
        return make_plan(_config(tmp_path, "train.prompts_per_step=8", *overrides)).trainer.phases["training"][
            "activations"
        ]

    small, large = activations("train.micro_batch_tokens=30"), activations("train.micro_batch_tokens=60")
    assert large == pytest.approx(2 * small, rel=0.01)
    assert activations("train.micro_batch_tokens=60", "train.gradient_checkpointing=true") < large / 2


@pytest.mark.parametrize(
    ("overrides", "absent"),
    [
        (("objective.kl_coef=0",), "reference weights"),
        (("model.lora_r=2",), "reference weights"),
        (("objective.name=sft",), "KV cache"),
        (("objective.name=vanilla",), "optimizer"),
    ],
)
def test_what_a_run_does_not_need_takes_nothing(tmp_path: Path, overrides: tuple[str, ...], absent: str):
    assert make_plan(_config(tmp_path)).trainer.held[absent] > 0
    assert make_plan(_config(tmp_path, *overrides)).trainer.held.get(absent, 0) == 0


def test_adapters_alone_are_trained(tmp_path: Path):
    plan = make_plan(_config(tmp_path, "model.lora_r=2"))
    assert plan.trainable < plan.parameters / 10
    assert plan.trainer.held["optimizer"] == 8 * plan.trainable


def test_bfloat16_weights_have_a_float32_copy(tmp_path: Path):
    plan = make_plan(_config(tmp_path, "model.dtype=bfloat16"))
    assert plan.trainer.held["float32 copy of the weights"] == 2 * plan.trainer.held["weights"] == 4 * plan.parameters


def test_being_ahead_takes_the_weights_once_more(tmp_path: Path):
    plan = make_plan(_config(tmp_path, "rollout.staleness=1", "train.importance_correction=token_mask"))
    assert plan.trainer.held["weights the engine generates with"] == plan.trainer.held["weights"]


def test_the_kv_cache_is_the_engines(tmp_path: Path):
    from e3rl.engine.build import build_engine

    config = _config(tmp_path)
    plan, policy = make_plan(config), load_policy(config.model)
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, plan.prompt)
    engine.prefill([3, 4], 1)
    assert engine.stats.kv_bytes == pytest.approx(plan.trainer.held["KV cache"], rel=0.1)  # it may hold a slot to spare


@pytest.mark.parametrize(
    ("path", "parameters"),
    [("Qwen/Qwen3-4B", 4_022_468_096), ("Qwen/Qwen3-8B", 8_190_735_360), ("Qwen/Qwen2.5-7B", 7_615_616_512)],
)
def test_known_shapes_have_as_many_parameters_as_their_models(path: str, parameters: int):
    assert sum(p.numel() for p in shape_of(ModelConfig(path=path)).parameters()) == parameters


def test_steps_are_those_of_the_run(tmp_path: Path):
    plan = make_plan(_config(tmp_path, "train.steps=0", "train.epochs=2.0"))
    assert (plan.problems, plan.steps, plan.step_tokens) == (8, 8, 2 * 2 * 8)
    assert not plan.prompt_is_assumed


@pytest.mark.parametrize(("recipe", "ranks"), [("qwen3-4b", "1"), ("qwen3-8b", "8")])
def test_the_papers_recipes_are_planned_without_a_hub(recipe: str, ranks: str, capsys: pytest.CaptureFixture[str]):
    def told(*overrides: str) -> str:
        arguments = ["train", recipe, *overrides, "--plan", "--device-memory", "139", "--ranks", ranks]
        assert main(arguments) == 0
        return capsys.readouterr().out

    plan = told()
    assert "\nfits: " in plan
    assert "longest prompt    5120 tokens" in plan
    assert "796, at most" in plan
    unbounded = told("rollout.kv_budget=0")
    assert "does not fit" in unbounded
    [budget] = re.findall(r"fits with rollout\.kv_budget=(\d+): ", unbounded)
    assert "\nfits: " in told(f"rollout.kv_budget={budget}")


def test_decoding_on_a_cpu_copies_the_linear_layers(tmp_path: Path):
    config = _config(tmp_path)
    model = load_policy(config.model).model  # its output matrix is the embeddings', and is copied all the same
    assert make_plan(config).trainer.held["weights laid out for decoding"] == sum(
        p.nbytes for p in model.parameters() if p.dim() == 2
    )
    assert make_plan(config, on_cpu=False).trainer.held["weights laid out for decoding"] == 0


def test_a_bound_on_the_cache_is_kept(tmp_path: Path):
    bounded = _config(tmp_path, "rollout.kv_budget=1", "rollout.max_rows=4096")
    assert (
        make_plan(bounded).trainer.held["KV cache"]
        <= 2**20
        < make_plan(_config(tmp_path, "rollout.max_rows=4096")).trainer.held["KV cache"]
    )


def _parts(tmp_path: Path, parallel: str, ranks: int) -> dict[str, int]:
    plan = make_plan(_config(tmp_path, f"train.parallel={parallel}", "model.dtype=bfloat16"), ranks)
    return {**plan.trainer.held, **plan.trainer.phases["training"]}


def test_ranks_divide_what_their_setting_divides(tmp_path: Path):
    alone, ddp, zero1, zero2, fsdp2 = (
        _parts(tmp_path, parallel, ranks)
        for parallel, ranks in [("none", 1), ("ddp", 4), ("zero1", 4), ("zero2", 4), ("fsdp2", 4)]
    )
    assert alone == ddp
    for name in ("optimizer", "float32 copy of the weights"):
        assert zero1[name] == pytest.approx(alone[name] / 4, rel=0.01)
        assert zero2[name] == fsdp2[name] == pytest.approx(alone[name] / 4, rel=0.01)
    assert zero1["gradients"] == alone["gradients"] == 2 * alone["weights"]  # float32 sums of bfloat16 gradients
    assert zero2["gradients"] == fsdp2["gradients"] == pytest.approx(alone["gradients"] / 4, rel=0.01)
    assert zero1["weights"] == alone["weights"]
    assert zero2["weights"] == fsdp2["weights"] == pytest.approx(alone["weights"] / 4, rel=0.01)
    assert zero2["weights"] + zero2["weights brought together"] == alone["weights"]
    assert 0 < fsdp2["weights brought together"] < zero2["weights brought together"]
    assert (
        zero2["weights the engine generates with"] == alone["weights"] > zero1["weights the engine generates with"] == 0
    )


def test_deepspeed_divides_embeddings_too(tmp_path: Path):
    alone, zero2, zero3 = (
        _parts(tmp_path, parallel, ranks)
        for parallel, ranks in [("none", 1), ("deepspeed-zero2", 4), ("deepspeed-zero3", 4)]
    )
    for name in ("optimizer", "float32 copy of the weights"):
        assert zero2[name] == zero3[name] == pytest.approx(alone[name] / 4, rel=0.01)
    assert zero2["gradients"] == zero3["gradients"] == pytest.approx(2 * alone["weights"] / 4, rel=0.01)  # float32
    assert zero2["weights"] == alone["weights"] == pytest.approx(4 * zero3["weights"], rel=0.01)
    assert zero2["weights brought together"] == 0 < zero3["weights brought together"] < alone["weights"]
    assert zero2["weights the engine generates with"] == 0 < zero3["weights the engine generates with"]
    float32 = make_plan(_config(tmp_path, "train.parallel=deepspeed-zero2"), 4).trainer.held
    assert float32["float32 copy of the weights"] == pytest.approx(float32["weights"] / 4, rel=0.01)


def test_ranks_without_a_way_to_train_together_are_refused(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"train\.parallel: set it to one of ddp, zero1, zero2, fsdp2, deepspeed-zero2, deepspeed-zero3"
    ):
        make_plan(_config(tmp_path), ranks=2)


def test_it_says_whether_it_fits(tmp_path: Path):
    config = _config(tmp_path)
    plan = make_plan(config)
    assert "\nfits: " in plan_text(config, plan, plan.largest)
    assert "\ndoes not fit: " in plan_text(config, plan, plan.largest - 1)
    assert plan.largest == max(plan.trainer.peak(p) for p in plan.trainer.phases) < GIB


def test_a_model_that_is_not_there_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="the shape of model '/nowhere' can't be read"):
        make_plan(_config(tmp_path, "model.path=/nowhere"))


def test_a_device_has_memory():
    assert planning.device_bytes(ModelConfig()) > GIB
