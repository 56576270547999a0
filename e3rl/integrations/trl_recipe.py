"""A TRL run, GRPO or RLOO, as a recipe: the same algorithm, batch and schedule, and a list of what does not carry over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e3rl.config import build_config
from e3rl.errors import UserError
from e3rl.integrations.trl_arguments import HOW_LOADED, Arguments
from e3rl.integrations.trl_losses import Settings, untranslated
from e3rl.integrations.trl_rows import FUNCTION
from e3rl.integrations.trl_schedule import rhythm_table, train_table
from e3rl.sections import toml_value

SEGMENTS = 8
"""Segments of the longest response, used once erasing is switched on (the paper's number)."""
SET_DATA = "SET-THIS.jsonl"
SET_REWARD = "SET_THIS.py:reward"
"""Placeholders for what could not be read: training refuses them, since there is no such file."""


@dataclass(frozen=True)
class Translation:
    """Tables of a recipe, and a sentence for each setting that is not in it."""

    tables: Mapping[str, Mapping[str, Any]]
    losses: tuple[str, ...]
    rows: str = ""
    """The text of the module that ``data.transform`` names: the script's own code for the rows of its dataset."""

    def to_toml(self) -> str:
        """The recipe; comments list what does not carry over."""
        method = "RLOO" if self.tables["objective"]["name"] == "rloo" else "GRPO"
        lines = [f"# Translated from TRL's {method}. To erase and redraw uncertain segments, set rollout.erase = true."]
        for section, table in self.tables.items():
            lines += ["", f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
        if self.losses:
            lines += ["", "# Not carried over:", *(f"# - {loss}" for loss in self.losses)]
        return "\n".join(lines) + "\n"


def translate(arguments: Arguments, *, processes: int = 1, rows_file: Path | None = None) -> Translation:
    """The recipe for TRL's settings; ``processes`` is the number that TRL trained on. `load_config` accepts it.

    Code that makes the rows goes to ``rows_file``, which is the caller's to write; without one it is a loss.
    """
    settings = Settings(arguments.values)
    rows, eval_rows = settings.optional("rows") or "", settings.optional("eval_rows") or ""
    if rows and rows_file is None:
        settings.lose("dataset.map and dataset.filter: with --output FILE their code is written beside the recipe")
    if rows != eval_rows and arguments.values.get("eval_dataset_name"):
        settings.lose(
            "eval_dataset: its rows are made otherwise than those of train_dataset, and data.transform makes both"
        )
    if arguments.rloo:  # whose trainer has no weights between trainer and engine
        settings.left["vllm_importance_sampling_correction"] = False
    generations = settings.take("num_generations", 2 if arguments.rloo else 8)
    train, updates = train_table(settings, generations, processes)
    tables = {
        "run": _run(settings),
        "model": _model(settings, arguments.remarks),
        "data": _data(settings) | ({"transform": f"{rows_file}:{FUNCTION}"} if rows and rows_file else {}),
        "rollout": _rollout(settings, generations),
        "objective": _rloo(settings) if arguments.rloo else _objective(settings),
        "rewards": _rewards(settings),
        "train": {**train, **rhythm_table(settings, updates)},
    }
    given = {"model": "model_name_or_path", "train_dataset": "dataset_name", "eval_dataset": "eval_dataset_name"}
    named = tuple(
        f"{what}: " for what, name in given.items() if arguments.values.get(name)
    )  # otherwise than in the script
    remarks = [remark for remark in arguments.remarks if not remark.startswith(named)]
    losses = (*remarks, *settings.losses, *untranslated(settings.left))
    found = {name: table for name, table in tables.items() if table}
    build_config(found)
    return Translation(found, losses, rows if rows_file else "")


def _run(settings: Settings) -> dict[str, Any]:
    named = {"name": settings.optional("run_name"), "output_dir": settings.optional("output_dir")}
    return {**{k: str(v) for k, v in named.items() if v}, "seed": settings.take("seed", 42)}


def _about(name: str, remarks: Sequence[str]) -> str:
    """The remarks on ``name``, for an error."""
    return "".join(f" ({remark})" for remark in remarks if remark.startswith(f"{name}: "))


def _model(settings: Settings, remarks: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    path = settings.optional("model_name_or_path")
    if not path:
        raise UserError(
            "these settings name no model that can be read: name it with --model MODEL" + _about("model", remarks)
        )
    table["path"] = path
    table["dtype"] = _dtype(settings)
    if settings.take("trust_remote_code", False):
        table["trust_remote_code"] = True
    lora = {name: settings.optional(name) for name in ("lora_r", "lora_alpha", "lora_dropout")}
    targets = settings.optional("lora_target_modules")
    if settings.take("use_peft", False):
        defaults = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}  # those of TRL's command line
        table |= {name: defaults[name] if value is None else value for name, value in lora.items()}
        table["lora_target_modules"] = [targets] if isinstance(targets, str) else list(targets or [])
    return {**table, **_quantization(settings, adapters="lora_r" in table)}


def _quantization(settings: Settings, *, adapters: bool) -> dict[str, str]:
    """Weights under the adapters in 4 or 8 bits, by bitsandbytes as in TRL."""
    four, eight = settings.take("load_in_4bit", False), settings.take("load_in_8bit", False)
    kind, nested = settings.take("bnb_4bit_quant_type", "nf4"), settings.take("use_bnb_nested_quant", False)
    settings.optional("bnb_4bit_compute_dtype")  # model.dtype here
    if not (four or eight):
        return {}
    if not adapters:
        settings.lose("load_in_4bit, load_in_8bit: weights are trained whole here unless model.lora_r is set")
        return {}
    if four and kind != "nf4":
        settings.lose(f"bnb_4bit_quant_type = {kind!r}: the recipe takes 'nf4'")
    if four and nested:
        settings.lose("use_bnb_nested_quant: the scales of 4-bit weights are held in full")
    return {"quantization": "nf4" if four else "int8"}


def _dtype(settings: Settings) -> str:
    """TRL's bf16 sets the type of arithmetic, not of weights; here weights become bfloat16 with float32 masters."""
    dtype, bf16, fp16 = settings.optional("dtype"), settings.optional("bf16"), settings.take("fp16", False)
    loading = settings.optional("model_init_kwargs")
    if isinstance(loading, dict):
        dtype = dtype or loading.get("dtype") or loading.get("torch_dtype")
        loading = {k: v for k, v in loading.items() if k not in HOW_LOADED and v is not None}
    settings.left["model_init_kwargs"] = loading
    dtype = settings.optional("torch_dtype") or dtype  # its older name
    on_cpu = settings.take("use_cpu", False)
    if fp16 or dtype == "float16":
        settings.lose("fp16: the types are float32 and bfloat16; the recipe takes bfloat16")
    if dtype in ("float32", "bfloat16") and not bf16:
        return str(dtype)
    wanted = not on_cpu if bf16 is None else bool(bf16) or fp16
    return "bfloat16" if wanted else "float32"


def _data(settings: Settings) -> dict[str, Any]:
    """Sources, splits and columns. A source that can't be read becomes a name that training refuses."""
    table: dict[str, Any] = {}
    name, subset = settings.optional("dataset_name"), settings.optional("dataset_config")
    split, held_out_split = settings.optional("dataset_train_split"), settings.optional("dataset_test_split")
    if name:
        table["train"] = f"{name}:{subset}" if subset else name
    else:
        table["train"] = SET_DATA
        settings.lose("train_dataset: none is named that can be read; set data.train")
    eval_name, eval_subset = settings.optional("eval_dataset_name"), settings.optional("eval_dataset_config")
    if eval_name:
        table["eval"] = [f"{eval_name}:{eval_subset}" if eval_subset else eval_name]
    table |= {key: found for key, found in (("train_split", split), ("eval_split", held_out_split)) if found}
    columns, eval_columns = settings.optional("columns") or {}, settings.optional("eval_columns")
    table |= {f"{field}_column": old for field in ("prompt", "answer", "solution", "id") if (old := columns.get(field))}
    if others := {new: old for new, old in columns.items() if f"{new}_column" not in table}:
        settings.lose(f"rename_columns {others}: reward functions get the data's own names")
    if eval_columns is not None and eval_columns != columns:
        settings.lose(f"rename_columns of the eval dataset, {eval_columns}: its columns are those of data.train")
    if limit := settings.optional("train_limit"):
        table["train_limit"] = limit
    if arguments := settings.optional("chat_template_kwargs"):
        table["chat_template_kwargs"] = arguments
    return {**table, "raw_prompts": True}  # as TRL: only messages go through the template


def _rollout(settings: Settings, generations: int) -> dict[str, Any]:
    limit = settings.take("max_completion_length", 512)
    return {
        "erase": False,
        "num_generations": generations,
        "segment_length": math.ceil(limit / SEGMENTS),
        "max_segments": SEGMENTS,
        "max_completion_length": limit,
        "temperature": settings.take("temperature", 1.0),
        "top_p": settings.take("top_p", 1.0),
        "top_k": settings.take("top_k", 0),
    }


def _objective(settings: Settings) -> dict[str, Any]:
    loss, level = settings.take("loss_type", "dapo"), settings.take("importance_sampling_level", "token")
    low = settings.take("epsilon", 0.2)
    clip = {"clip_low": low, "clip_high": settings.take("epsilon_high", low)}
    temperatures = {
        "temperature_positive": settings.take("sapo_temperature_pos", 1.0),
        "temperature_negative": settings.take("sapo_temperature_neg", 1.05),
    }
    weights = {
        "k_positive": settings.take("vespo_k_pos", 2.0),
        "lambda_positive": settings.take("vespo_lambda_pos", 3.0),
        "k_negative": settings.take("vespo_k_neg", 3.0),
        "lambda_negative": settings.take("vespo_lambda_neg", 2.0),
    }
    kl = {"kl_coef": settings.take("beta", 0.0)}
    token_ratios = level == "token" and loss in ("grpo", "bnpo", "dr_grpo", "dapo")
    clip |= _clipping(settings, token_ratios, bool(kl["kl_coef"]))
    scale = _scaling(settings, loss, token_ratios)
    named: dict[str, dict[str, Any]] = {
        "grpo": {"name": "grpo", "average": "sequence", **clip, **scale},
        "bnpo": {"name": "grpo", "average": "token", **clip, **scale},
        "dr_grpo": {"name": "dr_grpo", **clip},
        "dapo": {"name": "dapo", **clip, **scale},
        "sapo": {"name": "sapo", **temperatures},
        "cispo": {"name": "cispo", "ratio_cap": clip["clip_high"]},
        "luspo": {"name": "luspo", **clip},
        "vespo": {"name": "vespo", **weights},
    }
    if loss == "bnpo":
        settings.lose("loss_type = 'bnpo': the mean is over the tokens of the whole step, not of each micro-batch")
    if loss not in named:
        settings.lose(f"loss_type = {loss!r}: there is no such objective; the recipe takes 'dapo', its nearest")
    if loss == "luspo" and level == "token":
        settings.lose("importance_sampling_level = 'token': LUSPO's ratios are of responses")
    if loss == "vespo" and settings.left.get("use_vllm"):
        settings.lose("loss_type = 'vespo' with use_vllm: train.importance_correction weighs outside of VESPO's weight")
    if level == "sequence" and loss not in ("sapo", "luspo"):
        if loss != "grpo":
            settings.lose(f"loss_type = {loss!r} with sequence ratios: the recipe takes 'gspo', a mean over sequences")
        return {"name": "gspo", **clip, **kl}
    if level == "sequence" and loss == "sapo":
        settings.lose("importance_sampling_level = 'sequence': SAPO's ratios are of tokens")
    return {**named.get(loss, named["dapo"]), **kl}


def _rloo(settings: Settings) -> dict[str, Any]:
    low = settings.take("epsilon", 0.2)
    clip = {"clip_low": low, "clip_high": settings.take("epsilon_high", low)}
    return {"name": "rloo", **clip, "kl_coef": settings.take("beta", 0.05)}


def _clipping(settings: Settings, token_ratios: bool, kl: bool) -> dict[str, Any]:
    """Options that only objectives with a clipped ratio for each token have."""
    options: dict[str, Any] = {}
    if settings.take("use_bias_correction_kl", True) and kl:
        if token_ratios:
            options["kl_ratio"] = True
        else:
            settings.lose("use_bias_correction_kl: the KL term is not multiplied by the importance ratio")
    if token_ratios and (cap := settings.optional("delta")):
        options["ratio_cap"] = float(cap)
    return options


def _scaling(settings: Settings, loss: str, token_ratios: bool) -> dict[str, str]:
    """The option for advantages that are not divided by the group's spread; a loss where there is none."""
    scale = settings.optional("scale_rewards")
    scale = {None: "group", True: "group", False: "none"}.get(scale, scale)
    if loss == "dr_grpo" and scale != "none":
        settings.lose(f"scale_rewards = {scale!r}: advantages of 'dr_grpo' are not divided by the standard deviation")
    if loss != "dr_grpo" and scale == "none" and token_ratios:
        return {"scale_rewards": "none"}
    if loss != "dr_grpo" and scale != "group":
        settings.lose(f"scale_rewards = {scale!r}: advantages are divided by the group's standard deviation")
    return {}


def _rewards(settings: Settings) -> dict[str, Any]:
    functions, weights = list(settings.optional("reward_funcs") or []), settings.optional("reward_weights")
    if model := settings.optional("reward_model_name_or_path"):
        functions.insert(0, model if "/" in model else f"./{model}")
    models = [name for name in functions if "/" in name and ":" not in name]
    for model in models[1:]:
        settings.lose(f"reward model {model}: a run has one, {models[0]}")
    functions = ["reward_model" if name in models else name for name in functions if name not in models[1:]]
    if not functions:
        settings.lose("reward_funcs: none is named that can be read; set rewards.functions")
        if weights:
            settings.lose(f"reward_weights = {weights}: set rewards.weights with the functions")
        return {"functions": [SET_REWARD]}
    table: dict[str, Any] = {"functions": functions} | ({"reward_model": {"path": models[0]}} if models else {})
    several = list(weights) if isinstance(weights, list | tuple) else [weights] if weights is not None else []
    if several and len(several) == len(functions):
        table["weights"] = [float(w) for w in several]
    elif several:
        settings.lose(f"reward_weights = {several}: {len(functions)} functions could be named; set rewards.weights")
    return table
