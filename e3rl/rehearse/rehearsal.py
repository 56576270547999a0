"""A rehearsal: the recipe's own commands on the processes that it would use, killed once and resumed, to the exported model.

Only sizes shrink (model, lengths, batch, problems), and each is named with both values. Everything else is the recipe's.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from e3rl.config import Config, build_config, lay, to_tables, to_toml
from e3rl.data.benchmarks import BENCHMARKS
from e3rl.data.loading import AUTO, rows_of
from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.rehearse import standins
from e3rl.rehearse.stages import Stages, stages_table

STEPS, SEGMENT, PROMPTS, LIMIT, RANKS = 3, 8, 4, 1, 2
ROWS = 64
"""Training rows: stand-ins, or the first real ones."""
LARGEST_K = 256
_SIZES = (
    "model.path", "model.device", "data.train", "data.directory", "data.train_limit", "data.train_split",
    "data.max_prompt_length", "rollout.segment_length", "rollout.max_completion_length", "rollout.kv_budget",
    "rollout.servers", "rollout.workers", "rollout.worker_gpus", "train.workers", "train.worker_gpus", "train.steps",
    "train.context_parallel", "train.prompts_per_step", "train.micro_batch_tokens", "train.eval_steps", "train.save_steps",
    "train.save_total_limit", "train.report_to", "eval.limit", "run.name", "run.output_dir", "rewards.functions",
    "rewards.workers",
)  # fmt: skip
"""Settings that a rehearsal may change. A test holds that it changes no other."""


@dataclass
class Rehearsal:
    """What was rehearsed. ``changed``: settings with the recipe's value and the rehearsal's; ``kept``: those that
    differ from the defaults and keep the recipe's value."""

    changed: Mapping[str, tuple[Any, Any]]
    model: Mapping[str, tuple[int, int]]
    kept: Mapping[str, Any]
    stages: Stages
    notes: list[str] = field(default_factory=list)


def sources(config: Config) -> list[str]:
    """The recipe's evaluation data, in its order."""
    return [source for source in config.data.eval if source != AUTO]


def shrink(config: Config, directory: Path) -> tuple[Config, dict[str, tuple[int, int]], list[str]]:
    """Write stand-ins; returns the small recipe, the model's sizes before and after, and notes on replacements."""
    notes = []
    model = directory / "model"
    sizes = standins.make_model(config, model)
    notes.append(f"model: random weights of {config.model.path}'s architecture, and a tokenizer of bytes")
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "rehearsal", "output_dir": str(directory)},
        "model": {"path": str(model), "device": "cpu"},
        "rollout": {"segment_length": min(SEGMENT, config.rollout.segment_length), "max_completion_length": 0, "kv_budget": 0,
            "workers": min(1, config.rollout.workers), "worker_gpus": 0.0},
        "rewards": {"functions": ["e3rl.rehearse.standins:coin", *config.rewards.functions[1:]], "workers": 1},
        "train": {
            "steps": STEPS, "prompts_per_step": min(PROMPTS, config.train.prompts_per_step), "micro_batch_tokens": 2048,
            "workers": min(RANKS, config.train.workers), "worker_gpus": 0.0,
            "context_parallel": min(RANKS, config.train.context_parallel),
            "eval_steps": STEPS if config.train.eval_steps else 0, "save_steps": 1, "save_total_limit": 2, "report_to": [],
        },
        "eval": {"limit": LIMIT},
        "data": {"max_prompt_length": 0, **_training_data(config, directory, notes), **_benchmarks(config, directory, notes)},
    }  # fmt: skip
    notes.append("rewards: a coin in place of the first function, since random weights are never right")
    return build_config(lay(to_tables(config), changes)), sizes, notes


def _training_data(config: Config, directory: Path, notes: list[str]) -> dict[str, Any]:
    """Settings of the training data: a few real rows if they can be read, else stand-ins."""
    source = config.data.train
    if source.startswith("lab:"):
        return {"train_limit": 0}
    if standins.has_problems(config.data):
        notes.append(f"data.train: the first {ROWS} rows of {source}")
        return {"train_limit": min(ROWS, config.data.train_limit or ROWS)}
    train = directory / "problems.jsonl"
    standins.make_problems(train, ROWS, config.data.prompt_column, config.data.answer_column)
    notes.append(f"data.train: sums under the columns of {source}")
    return {"train": str(train), "train_split": "train", "train_limit": 0}


def _benchmarks(config: Config, directory: Path, notes: list[str]) -> dict[str, Any]:
    """Settings of the benchmarks: the real ones if they can be read, else sums, as many as each has problems."""
    named = [s for s in sources(config) if s in BENCHMARKS]
    if not named:
        return {}
    real = standins.has_benchmarks(named, config.data)
    if not real:
        standins.make_benchmarks(directory / "benchmarks", named)
    held = "the real ones" if real else f"sums in place of {', '.join(named)}, as many as each has"
    notes.append(f"benchmarks: {held}, {LIMIT} of each answered")
    return {} if real else {"directory": str(directory / "benchmarks")}


def changed(recipe: Config, small: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted name."""
    before, after = to_tables(recipe), to_tables(small)
    return {
        f"{section}.{name}": (value, after[section].get(name))
        for section, table in before.items()
        for name, value in table.items()
        if value != after[section].get(name)
    }


def require_extras(config: Config) -> None:
    """UserError, before anything runs, if a process of the recipe needs a package that is not installed."""
    needs = {
        "vllm": config.rollout.engine == "vllm",
        "ray": bool(config.rollout.workers or config.train.workers),
        "deepspeed": config.train.parallel.startswith("deepspeed"),
        "peft": config.model.lora_r > 0,
    }
    missing = [name for name, needed in needs.items() if needed and find_spec(name) is None]
    if missing:
        extras = ",".join("lora" if name == "peft" else name for name in missing)
        raise UserError(
            f"this recipe's processes need {', '.join(missing)}: pip install 'e3rl[{extras}]', or rehearse it with other "
            "settings (rollout.engine=torch, rollout.workers=0, train.workers=0, train.parallel=fsdp2)"
        )


def require_sources(config: Config) -> None:
    """UserError if data.eval names something that is no benchmark, no file and no possible hub id."""
    for source in sources(config):
        if source not in BENCHMARKS and not source.startswith("lab:"):
            rows_of(source, config.data, "eval")


def rehearse(config: Config, directory: Path, say: Callable[[str], None]) -> Rehearsal:
    """Run everything. UserError if a process fails, with its last lines."""
    require_extras(config)
    require_sources(config)
    small, sizes, notes = shrink(config, directory)
    recipe = directory / "rehearsal.toml"
    found = Rehearsal(changed(config, small), sizes, kept(config, small), Stages(directory, say), notes)
    ranks = RANKS if config.train.parallel != "none" and not config.train.workers else 1  # workers are ranks on Ray
    with _servers(config, recipe, small, found.stages) as addresses:
        small = build_config(lay(to_tables(small), {"rollout": {"servers": addresses}}))
        write_text(recipe, to_toml(small))
        run = directory / "rehearsal"
        found.stages.run_until_saved("train", _train(recipe, ranks), run)
        found.stages.run("train, resumed", [*_train(recipe, ranks), "--resume"])
    notes += trained(small, run)
    _exported(found, run / "model", small)
    return found


def kept(config: Config, small: Config) -> dict[str, Any]:
    """Settings that differ from the defaults and keep the recipe's value in the rehearsal."""
    idle = {"train.epochs", "data.train_limit"}  # steps are counted, not epochs
    but = {*changed(config, small), *idle}
    return {name: value for name, (value, _) in changed(config, Config()).items() if name not in but}


def _train(recipe: Path, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "e3rl", "train", str(recipe)]


@contextlib.contextmanager
def _servers(config: Config, recipe: Path, small: Config, stages: Stages) -> Iterator[list[str]]:
    """A local rollout server with the recipe's engine, for a recipe that names servers."""
    if not config.rollout.servers:
        yield []
        return
    own = recipe.with_name("server.toml")
    write_text(own, to_toml(build_config(lay(to_tables(small), {"rollout": {"servers": []}}))))
    longest = standins.LONGEST_PROMPT if small.data.train.endswith("problems.jsonl") else standins.LONGEST_REAL_PROMPT
    command = [
        sys.executable,
        "-m",
        "e3rl",
        "rollout-server",
        str(own),
        "--port",
        "0",
        "--longest-prompt",
        str(longest),
    ]
    with stages.serving("rollout server", command) as address:
        yield [address]


def trained(small: Config, run: Path) -> list[str]:
    """Check a finished run. UserError unless it recorded three steps, each once, and evaluated all sources at the recipe's k."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if [record["step"] for record in steps] != list(range(1, STEPS + 1)):
        raise UserError(f"rehearsal: the run recorded steps {[record['step'] for record in steps]}, not 1 to {STEPS}")
    last = steps[-1]
    said = [f"last step: loss {last['loss']:+.4f}, gradient norm {last['grad_norm']:.4f}, r {last['r']:.2f}"]
    if not sources(small):
        return [*said, "nothing was evaluated while training: data.eval names nothing"]
    k = small.eval.num_samples
    lines = (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["step"] == STEPS]
    missing = [s for s in sources(small) if not any(r.get("data", s) == s and f"avg@{k}" in r for r in found)]
    if missing:
        raise UserError(f"rehearsal: {', '.join(missing)} not evaluated at k = {k} in step {STEPS}")
    return [*said, f"evaluated at step {STEPS}: {', '.join(sources(small))}, k = {k}"]


def _exported(found: Rehearsal, model: Path, small: Config) -> None:
    """Load the export with transformers and, if installed, vLLM; run `e3rl eval` with the largest k."""
    found.notes += loaded(found.stages, model)
    named = [s for s in sources(small) if s in BENCHMARKS]
    if named:
        settings = [f"eval.num_samples={LARGEST_K}", f"eval.limit={LIMIT}", f"data.directory={small.data.directory}"]
        command = [sys.executable, "-m", "e3rl", "eval", str(model), named[0], "--recipe", "rehearsal.toml", *settings]
        found.stages.run(f"eval at k = {LARGEST_K}", command)


def loaded(stages: Stages, model: Path) -> list[str]:
    """Load an exported model with transformers and, if installed, vLLM; returns what could not be tried."""
    load = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1]); "
        "assert all(bool(p.isfinite().all()) for p in m.parameters()); "
        "print(m(torch.tensor([[1, 2, 3]])).logits.shape[-1])"
    )
    stages.run("export, loaded by transformers", [sys.executable, "-c", load, str(model)])
    if find_spec("vllm") is None:
        return ["not rehearsed: the export in vLLM, which is not installed here"]
    serve = (
        "import sys\nfrom vllm import LLM, SamplingParams\nif __name__ == '__main__':\n"
        "  m = LLM(sys.argv[1], max_model_len=256, max_num_seqs=2, enforce_eager=True, kv_cache_memory_bytes=2**27)\n"
        "  print(len(m.generate(['1 + 1 ='], SamplingParams(max_tokens=4))[0].outputs[0].token_ids))"
    )
    stages.run("export, loaded by vLLM", [sys.executable, "-c", serve, str(model)])
    return []


def report(found: Rehearsal) -> str:
    """The report: processes that ran, settings that shrank, and what could not be rehearsed."""
    lines = ["", *stages_table(found.stages.done)]
    lines += ["", "rehearsed at the recipe's value:"]
    lines += [f"  {name:32}{_value(value):>24}" for name, value in found.kept.items()]
    lines += ["", "shrunk or replaced:"]
    lines += [f"  {name:32}{_value(a):>24} -> {_value(b)}" for name, (a, b) in found.changed.items()]
    lines += [f"  model {name:26}{a:>24} -> {b}" for name, (a, b) in found.model.items()]
    lines += ["", *found.notes, "not rehearsed here: CUDA kernels, NCCL, real weights, real lengths"]
    return "\n".join(lines)


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else "…" + text[-23:]
