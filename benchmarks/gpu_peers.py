"""The peers of `gpu.py`, each in a process of its own: vLLM decodes, TRL trains on given completions.

python benchmarks/gpu_peers.py vllm|trl DIRECTORY DEVICE SIZES
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from typing import Any

SIBLINGS = 8


def vllm(directory: str, device: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of its own sampler, at temperature 1, of the second of two runs."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    length = sizes["prompt"] + sizes["decoded"]
    engine = LLM(directory, dtype=sizes["dtype"], max_model_len=length, max_num_seqs=sizes["rows"])
    settings = SamplingParams(temperature=1.0, max_tokens=sizes["decoded"], ignore_eos=True, detokenize=False)
    groups = range(0, sizes["rows"], SIBLINGS)
    prompts = [[2 + (start + i) % 1000 for i in range(sizes["prompt"])] for start in groups for _ in range(SIBLINGS)]
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        seconds = time.perf_counter() - began
    return {"tokens/s": len(prompts) * sizes["decoded"] / seconds}


def trl(directory: str, device: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of GRPO steps with KL on given completions, of the second of two steps; prompts count once a group."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def rollout(asked: list[str], trainer: Any) -> dict[str, Any]:
        completions = [[2 + (n * 7 + i) % 8000 for i in range(sizes["response"])] for n in range(len(asked))]
        prompts = [list(range(2, 2 + sizes["prompt"])) for _ in asked]
        return {
            "prompt_ids": prompts,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(c) for c in completions],
        }

    def reward(prompts: list[str], **_: Any) -> list[float | None]:
        return [float(n % 2) for n in range(len(prompts))]

    batch = max(1, min(SIBLINGS, sizes["micro_batch"] // (sizes["prompt"] + sizes["response"])))
    batch = 2 ** (batch.bit_length() - 1)
    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output, use_cpu=device == "cpu", bf16=sizes["dtype"] == "bfloat16", report_to=[], max_steps=2,
            num_generations=SIBLINGS, per_device_train_batch_size=batch, max_completion_length=sizes["response"],
            gradient_accumulation_steps=sizes["groups"] * SIBLINGS // batch, beta=0.04, loss_type="grpo",
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
            model_init_kwargs={"dtype": sizes["dtype"]},
        )  # fmt: skip
        texts = [f"p{number}" for number in range(sizes["groups"])]
        trainer = GRPOTrainer(
            model=directory,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts] * 2),
            processing_class=AutoTokenizer.from_pretrained(directory, padding_side="left"),
            rollout_func=rollout,
            callbacks=[Steps()],
        )
        trainer.train()
    tokens = sizes["groups"] * (sizes["prompt"] + SIBLINGS * sizes["response"])
    return {"tokens/s": tokens / (ends[1] - ends[0])}


def main() -> int:
    """Print the figures as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("vllm", "trl"))
    for argument in ("directory", "device", "sizes"):
        parser.add_argument(argument)
    options = parser.parse_args()
    name = options.name
    if importlib.util.find_spec(name) is None:
        print("not installed", file=sys.stderr)
        return 1
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    print(json.dumps({"vllm": vllm, "trl": trl}[name](options.directory, options.device, json.loads(options.sizes))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
