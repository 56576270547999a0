"""Reads the settings of a TRL run, GRPO or RLOO, from a Python script, which is parsed and never run.

Names are followed to what they were last bound to before the trainer is built: constants, configs, models, datasets and lists
of reward functions. What only running the script could tell becomes a remark.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.integrations.script_source import UNKNOWN, Source, called
from e3rl.integrations.trl_arguments import FROM_COMMAND_LINE, HOW_LOADED, Arguments, reward_name
from e3rl.integrations.trl_rows import changed_rows, dataset_source

TRAINER = (
    *(
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "reward_processing_classes",
    ),
    *("callbacks", "optimizers", "quantization_config", "peft_config", "tools", "rollout_func", "environment_factory"),
)
"""Parameters of GRPOTrainer in TRL 1.16, in their order; RLOOTrainer has those up to the adapter's."""
METHODS = ("GRPO", "RLOO")
CONFIG = ("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate")
PEFT = {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": None}
"""LoraConfig()'s own defaults; TRL's command line has others."""
_LORA = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
}
_LORA_NEUTRAL = {"task_type": None, "bias": "none", "inference_mode": False, "use_rslora": False}


def read_script(text: str, path: Path) -> Arguments:
    """The settings of the one GRPOTrainer(...) or RLOOTrainer(...) that the script builds."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{path}{line} is not valid Python: {getattr(error, 'msg', error)}") from None
    return _Script(tree, path).arguments()


class _Script:
    def __init__(self, tree: ast.Module, path: Path) -> None:
        self._source, self._path = Source(tree), path

    def arguments(self) -> Arguments:
        """TRL's settings by TRL's names."""
        trainer = self._only("Trainer")
        if trainer is None:
            config = self._only("Config")
            if config is None:
                raise UserError(
                    f"{self._path} has no call of GRPOTrainer(...), RLOOTrainer(...) or their configs: there is nothing to "
                    "convert"
                )
            return Arguments(self._config(config), tuple(self._source.remarks), called(config) == "RLOOConfig")
        given = self._source.given(trainer, TRAINER)
        values = self._config(given.pop("args", None))
        values |= self._model(given.pop("model", None), values)
        values |= self._adapter(given.pop("peft_config", None))
        values |= self._quantized(given.pop("quantization_config", None))
        values |= self._dataset(given.pop("train_dataset", None), "train")
        values |= self._dataset(given.pop("eval_dataset", None), "eval")
        values |= self._rewards(given.pop("reward_funcs", None))
        for name, node in given.items():
            if self._source.value(node) is not None and name != "processing_class":
                self._source.remark(
                    node, f"{name} = {ast.unparse(node)}", _REASONS.get(name, "it has no counterpart here")
                )
        return Arguments(values, tuple(self._source.remarks), called(trainer) == "RLOOTrainer")

    def _only(self, kind: str) -> ast.Call | None:
        """The one call of a method's ``kind``, "Trainer" or "Config"; None where there is none."""
        found = [call for method in METHODS for call in self._source.calls(method + kind)]
        if len(found) > 1:
            names = " and ".join(sorted({f"{called(call)}(...)" for call in found}))
            raise UserError(f"{self._path} has {len(found)} calls of {names}; exactly one can be converted")
        return found[0] if found else None

    def _values(self, given: dict[str, ast.expr]) -> dict[str, Any]:
        """The constants among them; a remark for each of the others."""
        values = {}
        for name, node in given.items():
            value = self._source.value(node)
            if value is UNKNOWN:
                self._source.remark(node, name)
            else:
                values[name] = value
        return values

    def _config(self, node: ast.expr | None) -> dict[str, Any]:
        """GRPOConfig(...) or RLOOConfig(...), and what is set on it afterwards; without one, TRL's defaults."""
        if node is None:
            return {}
        config = self._source.follow(node)
        made = isinstance(config, ast.Call) and called(config) in [f"{method}Config" for method in METHODS]
        if not made:
            self._source.remark(node, f"args = {ast.unparse(node)}", FROM_COMMAND_LINE)
            if not self._source.parsed(node):
                return {}
        values = self._values(self._source.given(config, CONFIG)) if isinstance(config, ast.Call) and made else {}
        for owner, name, value, certain in self._source.attributes:
            if isinstance(node, ast.Name) and owner == node.id:
                values.pop(name, None)
                if certain:
                    values |= self._values({name: value})
                else:
                    self._source.remark(value, name, "it is set under a condition; set it by hand")
        return values

    def _model(self, node: ast.expr | None, config: dict[str, Any]) -> dict[str, Any]:
        """The model's name: a constant, or the first argument of a from_pretrained(...)."""
        if node is None:
            return {}
        found: dict[str, Any] = {}
        call = self._source.follow(node)
        while isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "cuda"):
            call = self._source.follow(call.func.value)
        if isinstance(call, ast.Call) and called(call) == "get_peft_model":
            inner = self._source.given(call, ("model", "peft_config"))
            return self._model(inner.get("model"), config) | self._adapter(inner.get("peft_config"))
        if isinstance(call, ast.Call) and called(call) == "from_pretrained":
            given = self._source.given(call, ("pretrained_model_name_or_path",))
            name = given.pop("pretrained_model_name_or_path", None) or given.pop("model_name", None)
            if name is not None and "dtype" not in config and (kind := given.get("dtype", given.get("torch_dtype"))):
                found = self._values({"dtype": kind})
            found |= self._quantized(given.pop("quantization_config", None))
            for key in [k for k in given if k not in HOW_LOADED]:
                self._source.remark(
                    given[key], f"{key} of from_pretrained", "models are loaded with model.dtype and defaults"
                )
        else:
            name = node
        if self._source.parsed(name):
            self._source.remark(
                node, "model", "the script takes it from its command line: --model_name_or_path after '--'"
            )
            return found
        path = self._source.value(name)
        if isinstance(path, str):
            return {"model_name_or_path": path, **found}
        self._source.remark(node, "model")
        return {}

    def _adapter(self, node: ast.expr | None) -> dict[str, Any]:
        """LoraConfig(...), PEFT's own defaults for what it leaves out."""
        if node is None or self._source.value(node) is None:
            return {}
        call = self._source.follow(node)
        if (
            isinstance(call, ast.Call)
            and called(call) == "get_peft_config"
            and all(map(self._source.parsed, call.args))
        ):
            return {}
        if not isinstance(call, ast.Call) or called(call) != "LoraConfig":
            self._source.remark(
                node, f"peft_config = {ast.unparse(node)}", "only LoRA carries over; set model.lora_r by hand"
            )
            return {}
        given = self._values(self._source.given(call, ("task_type",)))
        values = {**PEFT, **{_LORA[name]: value for name, value in given.items() if name in _LORA}}
        for name, value in given.items():
            if (
                name not in _LORA
                and value != _LORA_NEUTRAL.get(name)
                and name != "task_type"
                and value not in (None, False)
            ):
                self._source.remark(
                    call, f"{name} = {value!r}", "only rank, alpha, dropout and target modules of LoRA carry over"
                )
        modules = values["lora_target_modules"]
        return {
            "use_peft": True,
            **values,
            "lora_target_modules": [modules] if isinstance(modules, str) else modules or [],
        }

    def _quantized(self, node: ast.expr | None) -> dict[str, Any]:
        """BitsAndBytesConfig(...), in the names of TRL's command line and with its own default of 4-bit numbers."""
        if node is None or self._source.value(node) is None:
            return {}
        call = self._source.follow(node)
        if not isinstance(call, ast.Call) or called(call) != "BitsAndBytesConfig":
            self._source.remark(node, "quantization_config", "set model.quantization by hand: 'nf4' or 'int8'")
            return {}
        values = {"bnb_4bit_quant_type": "fp4", **self._values(self._source.given(call, ()))}
        return {"use_bnb_nested_quant" if k == "bnb_4bit_use_double_quant" else k: v for k, v in values.items()}

    def _dataset(self, node: ast.expr | None, split: str) -> dict[str, Any]:
        """The dataset's source, and the changes of its rows as settings or code; others are listed."""
        if node is None or self._source.value(node) is None:
            return {}
        found = dataset_source(self._source, node)
        call = found.loaded
        if not (isinstance(call, ast.Call) and called(call) == "load_dataset"):
            self._source.remark(
                node, f"{split}_dataset", "it is no load_dataset(...): write its rows into a file and set data.train"
            )
            return {}
        arguments = self._source.given(call, ("path", "name"))
        given = self._values({name: node for name, node in arguments.items() if not self._source.parsed(node)})
        source = given.get("path")
        files = given.get("data_files")
        files = files.get(found.split or given.get("split") or "train") if isinstance(files, dict) else files
        if source in ("json", "csv", "parquet") and isinstance(files, str):
            given, source = {}, files
        elif source in ("json", "csv", "parquet"):
            self._source.remark(call, f"{split}_dataset", "one file can be read: join its files, and set data.train")
            return {}
        values = {"dataset_name": source, "dataset_config": given.get("name")}
        values |= {"dataset_split": found.split or given.get("split"), **changed_rows(self._source, found.changes)}
        keys = {"dataset_split": f"dataset_{'train' if split == 'train' else 'test'}_split"}
        if split == "eval":
            keys |= {name: f"eval_{name}" for name in ("dataset_name", "dataset_config", "columns", "rows")}
            if count := values.pop("train_limit"):
                how = f"eval.limit = {count} takes as many, evenly spread"
                self._source.remark(node, f"the first {count} rows of eval_dataset", how)
        return {keys.get(k, k): v for k, v in values.items() if v}

    def _rewards(self, node: ast.expr | None) -> dict[str, Any]:
        if node is None:
            return {}
        several = self._source.follow(node)
        nodes = several.elts if isinstance(several, ast.List | ast.Tuple) else [node]
        return {"reward_funcs": [name for each in nodes if (name := self._function(each))]}

    def _function(self, node: ast.expr) -> str | None:
        name = node.id if isinstance(node, ast.Name) else None
        if name in self._source.functions:
            if not self._source.importable(str(name)):
                why = "an import of the script does not define it: move it out of the function or condition around it"
                self._source.remark(node, f"reward function {name}", why)
            elif self._source.runs_when_imported:
                self._source.remark(
                    node,
                    f"reward function {name}",
                    f"importing {self._path} would run the training in it; move the function to a file of its own, or the "
                    "training under if __name__ == '__main__'",
                )
            return f"{self._path}:{name}"
        if name in self._source.imports:
            return self._source.imports[name]
        value = self._source.value(node)
        if isinstance(value, str):
            return reward_name(value)
        followed = self._source.follow(node)
        if isinstance(followed, ast.Call) and called(followed) == "from_pretrained":
            path = self._source.value(self._source.given(followed, ("path",)).get("path"))
            if isinstance(path, str):
                return path if "/" in path else f"./{path}"
        if isinstance(followed, ast.Call) and isinstance(followed.func, ast.Name):
            made = self._source.imports.get(followed.func.id, "")
            if made == "trl.rewards:get_soft_overlong_punishment":
                return "overlong"
        self._source.remark(
            node, f"reward_funcs: {ast.unparse(node)}", "it is no plain function; add it to rewards.functions"
        )
        return None


_REASONS = {
    "callbacks": "listeners of a Trainer take their place",
    "optimizers": "the optimizer and schedule are those of [train]",
    "tools": "set the tools by hand",
    "reward_processing_classes": "a reward model is named in rewards.reward_model; its own tokenizer is used",
    "rollout_func": "rollout.engine says what generates",
}
