"""Runs a TRL script for two steps and writes what its trainer was: ``python run_script.py SCRIPT OUT.json``."""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any

import trl

SETTINGS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "seed", "num_iterations"),
    *("temperature", "top_p", "num_generations", "max_completion_length", "beta"),
)


class _Watched:
    """A trainer's first batch and what it was, written when its training ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[Any] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        made = super()._generate_and_score_completions(inputs)
        rows = zip(made["prompt_ids"], made["prompt_mask"], strict=True)
        self.batches.append([ids[mask.bool()].tolist() for ids, mask in rows])
        return made

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        trainable = {n: p.numel() for n, p in self.model.named_parameters() if p.requires_grad}
        found = {
            "settings": {name: getattr(self.args, name) for name in SETTINGS},
            "top_k": self.args.top_k or 0,
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "trainable": sum(trainable.values()),
            "adapted": sorted({n.split(".lora_A")[0].rpartition(".")[2] for n in trainable if ".lora_A" in n}),
            "scaling": next((m.scaling["default"] for m in self.model.modules() if hasattr(m, "scaling") and
                             isinstance(m.scaling, dict) and m.scaling), None),
            "first_batch": self.batches[0],
            "rates": [log["learning_rate"] for log in self.state.log_history if "learning_rate" in log],
            "updates_a_rollout": self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps,
        }  # fmt: skip
        with open(sys.argv[2], "w", encoding="utf-8") as file:
            json.dump(found, file)
        return result


class _Short:
    """The script's settings, on a CPU, for two updates that are logged."""

    def __post_init__(self) -> None:
        self.max_steps, self.logging_steps, self.save_strategy, self.report_to = 2, 1, "no", []
        self.use_cpu, self.bf16, self.disable_tqdm = True, False, True
        super().__post_init__()


trl.GRPOConfig = trl.trainer.grpo_trainer.GRPOConfig = type("GRPOConfig", (_Short, trl.GRPOConfig), {})
trl.RLOOConfig = trl.trainer.rloo_trainer.RLOOConfig = type("RLOOConfig", (_Short, trl.RLOOConfig), {})
trl.GRPOTrainer = type("GRPOTrainer", (_Watched, trl.GRPOTrainer), {})
trl.RLOOTrainer = type("RLOOTrainer", (_Watched, trl.RLOOTrainer), {})
sys.path.insert(0, ".")
runpy.run_path(sys.argv[1], run_name="__main__")
