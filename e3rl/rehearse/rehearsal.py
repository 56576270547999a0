"""A rehearsal: the recipe's own commands on the processes that it would use, killed once and resumed, to the exported model.

Only sizes shrink (model, lengths, batch, problems), and each is named with both values. Everything else is the recipe's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from e3rl.config import Config, build_config, lay, to_tables, to_toml
from e3rl.data.benchmarks import BENCHMARKS
from e3rl.errors import UserError
from e3rl.files import write_text
from e3rl.rehearse import standins

STEPS, SEGMENT, PROMPTS, LIMIT, RANKS = 3, 8, 4, 1, 2
LARGEST_K = 256
SECONDS = 900
"""How long one process may take."""
_SIZES = (
    "model.path", "model.device", "data.train", "data.directory", "data.train_limit", "data.train_split",
    "data.max_prompt_length", "rollout.segment_length", "rollout.max_completion_length", "rollout.kv_budget",
    "rollout.servers", "rollout.workers", "rollout.worker_gpus", "train.workers", "train.worker_gpus", "train.steps",
    "train.prompts_per_step", "train.micro_batch_tokens", "train.eval_steps", "train.save_steps",
    "train.save_total_limit", "train.report_to", "eval.limit", "run.name", "run.output_dir", "rewards.functions",
    "rewards.workers",
)  # fmt: skip
"""Settings that a rehearsal may change. A test holds that it changes no other."""


@dataclass(frozen=True)
class Stage:
    """One process of a rehearsal: what ran, and how it ended."""

    name: str
    command: str
    seconds: float
    outcome: str


@dataclass
class Rehearsal:
    """What was rehearsed. ``changed``: settings with the recipe's value and the rehearsal's; ``kept``: those that the recipe
    sets otherwise than the defaults, rehearsed at their own value."""

    changed: dict[str, tuple[Any, Any]]
    model: dict[str, tuple[int, int]]
    kept: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sources(config: Config) -> list[str]:
    """What the recipe evaluates on, in its order."""
    named = config.data.eval
    return [s for s in ([named] if isinstance(named, str) else named) if s]


def shrink(config: Config, directory: Path) -> tuple[Config, dict[str, tuple[int, int]], list[str]]:
    """The recipe at the rehearsal's sizes, its stand-ins written; the model's sizes; what stands in for what."""
    notes = []
    model = directory / "model"
    sizes = standins.make_model(config, model)
    notes.append(f"model: random weights of {config.model.path}'s architecture, and a tokenizer of bytes")
    benchmarks = [s for s in sources(config) if s in BENCHMARKS]
    changes: dict[str, dict[str, Any]] = {
        "run": {"name": "rehearsal", "output_dir": str(directory)},
        "model": {"path": str(model), "device": "cpu"},
        "data": {"train_limit": 0, "max_prompt_length": 0},
        "rollout": {"segment_length": min(SEGMENT, config.rollout.segment_length), "max_completion_length": 0, "kv_budget": 0,
            "workers": min(1, config.rollout.workers), "worker_gpus": 0.0},
        "rewards": {"functions": ["e3rl.rehearse.standins:coin", *config.rewards.functions[1:]], "workers": 1},
        "train": {
            "steps": STEPS, "prompts_per_step": min(PROMPTS, config.train.prompts_per_step), "micro_batch_tokens": 2048,
            "workers": min(RANKS, config.train.workers), "worker_gpus": 0.0,
            "eval_steps": STEPS if config.train.eval_steps else 0, "save_steps": 1, "save_total_limit": 2, "report_to": [],
        },
        "eval": {"limit": LIMIT},
    }  # fmt: skip
    if not Path(config.data.train).exists() and not config.data.train.startswith("lab:"):
        train = directory / "problems.jsonl"
        standins.make_problems(train, 64, config.data.prompt_column, config.data.answer_column)
        changes["data"] |= {"train": str(train), "train_split": "train"}
        notes.append(f"data.train: sums under the columns of {config.data.train}")
    if benchmarks and not config.data.directory:
        standins.make_benchmarks(directory / "benchmarks", benchmarks)
        changes["data"]["directory"] = str(directory / "benchmarks")
        notes.append(
            f"benchmarks: sums in place of {', '.join(benchmarks)}, as many as each has, {LIMIT} of them answered"
        )
    notes.append("rewards: a coin in place of the first function, since random weights are never right")
    return build_config(lay(to_tables(config), changes)), sizes, notes


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
    """UserError, before anything runs, where a process of the recipe needs what is not installed."""
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


def rehearse(config: Config, directory: Path, say: Callable[[str], None]) -> Rehearsal:
    """Run everything; UserError where a process fails, with its last lines."""
    require_extras(config)
    small, sizes, notes = shrink(config, directory)
    recipe = directory / "rehearsal.toml"
    differing = changed(config, small)
    idle = {"train.epochs", "data.train_limit"}  # steps are counted, not epochs
    kept = {name: value for name, (value, _) in changed(config, Config()).items() if name not in {*differing, *idle}}
    found = Rehearsal(differing, sizes, kept, notes=notes)
    ranks = RANKS if config.train.parallel != "none" and not config.train.workers else 1  # workers are ranks on Ray
    with _servers(config, recipe, small, found, directory, say) as addresses:
        small = build_config(lay(to_tables(small), {"rollout": {"servers": addresses}}))
        write_text(recipe, to_toml(small))
        run = directory / "rehearsal"
        _killed(found, _train(recipe, ranks), run, directory, say)
        _stage(found, "train, resumed", [*_train(recipe, ranks), "--resume"], directory, say)
    _check_run(found, small, run)
    _exported(found, run / "model", small, directory, say)
    return found


def _train(recipe: Path, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "e3rl", "train", str(recipe)]


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _short(command: Sequence[str]) -> str:
    return " ".join(
        "python" if part == sys.executable else Path(part).name if "/" in part else part for part in command
    )


def _stage(found: Rehearsal, name: str, command: Sequence[str], directory: Path, say: Callable[[str], None]) -> str:
    """Run a command to its good end; returns what it printed."""
    say(f"{name}: {_short(command)}")
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=directory, env=_environment(), capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"rehearsal: {name} had not ended after {SECONDS} s: {_short(command)}") from None
    if done.returncode:
        raise UserError(f"rehearsal: {name} failed: {_short(command)}\n{_last_lines(done.stdout + done.stderr)}")
    found.stages.append(Stage(name, _short(command), time.monotonic() - began, "ended well"))
    return done.stdout


def _last_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-12:])


def _killed(found: Rehearsal, command: Sequence[str], run: Path, directory: Path, say: Callable[[str], None]) -> None:
    """Train until the second step is saved, then kill every process of it at once."""
    say(f"train: {_short(command)}")
    began, log = time.monotonic(), directory / "train.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=_environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            while not (run / "checkpoints" / "step-000002").is_dir() and process.poll() is None:
                if time.monotonic() - began > SECONDS:
                    raise UserError(f"rehearsal: training had not saved its second step after {SECONDS} s")
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not (run / "checkpoints" / "step-000002").is_dir():
        raise UserError(f"rehearsal: train failed: {_short(command)}\n{_last_lines(log.read_text(errors='replace'))}")
    found.stages.append(Stage("train", _short(command), time.monotonic() - began, "killed (SIGKILL) after step 2"))


@contextlib.contextmanager
def _servers(
    config: Config, recipe: Path, small: Config, found: Rehearsal, directory: Path, say: Callable[[str], None]
) -> Iterator[list[str]]:
    """A rollout server of this machine for a recipe that names some; its engine is the recipe's."""
    if not config.rollout.servers:
        yield []
        return
    own = recipe.with_name("server.toml")
    write_text(own, to_toml(build_config(lay(to_tables(small), {"rollout": {"servers": []}}))))
    command = [sys.executable, "-m", "e3rl", "rollout-server", str(own), "--port", "0", "--longest-prompt", "512"]
    say(f"rollout server: {_short(command)}")
    began = time.monotonic()
    with (directory / "server.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=directory,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            assert server.stdout is not None
            address = next((line.split()[0] for line in server.stdout if line.startswith("http://")), None)
            if address is None:
                text = (directory / "server.log").read_text(errors="replace")
                raise UserError(f"rehearsal: the rollout server did not start\n{_last_lines(text)}")
            yield [address]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    found.stages.append(Stage("rollout server", _short(command), time.monotonic() - began, "served the run"))


def _check_run(found: Rehearsal, small: Config, run: Path) -> None:
    """Three steps, each once; every source evaluated at the recipe's k."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if [record["step"] for record in steps] != list(range(1, STEPS + 1)):
        raise UserError(f"rehearsal: the run recorded steps {[record['step'] for record in steps]}, not 1 to {STEPS}")
    found.notes.append(
        f"last step: loss {steps[-1]['loss']:+.4f}, gradient norm {steps[-1]['grad_norm']:.4f}, r {steps[-1]['r']:.2f}"
    )
    if not sources(small):
        found.notes.append("nothing was evaluated while training: data.eval is empty")
        return
    lines = (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    last = [record for record in map(json.loads, lines) if record["step"] == STEPS]
    missing = [
        s
        for s in sources(small)
        if not any(r.get("data", s) == s and f"avg@{small.eval.num_samples}" in r for r in last)
    ]
    if missing:
        raise UserError(
            f"rehearsal: {', '.join(missing)} not evaluated at k = {small.eval.num_samples} in step {STEPS}"
        )
    found.notes.append(f"evaluated at step {STEPS}: {', '.join(sources(small))}, k = {small.eval.num_samples}")


def _exported(found: Rehearsal, model: Path, small: Config, directory: Path, say: Callable[[str], None]) -> None:
    """The model by transformers and, where it is installed, vLLM; its largest k by `e3rl eval`."""
    load = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1]); "
        "assert all(bool(p.isfinite().all()) for p in m.parameters()); "
        "print(m(torch.tensor([[1, 2, 3]])).logits.shape[-1])"
    )
    _stage(found, "export, loaded by transformers", [sys.executable, "-c", load, str(model)], directory, say)
    if find_spec("vllm") is not None:
        serve = "import sys; from vllm import LLM; LLM(sys.argv[1], max_model_len=256, enforce_eager=True)"
        _stage(found, "export, loaded by vLLM", [sys.executable, "-c", serve, str(model)], directory, say)
    else:
        found.notes.append("not rehearsed: the export in vLLM, which is not installed here")
    named = [s for s in sources(small) if s in BENCHMARKS]
    if named:
        settings = [f"eval.num_samples={LARGEST_K}", f"eval.limit={LIMIT}", f"data.directory={small.data.directory}"]
        command = [sys.executable, "-m", "e3rl", "eval", str(model), named[0], "--recipe", "rehearsal.toml", *settings]
        _stage(found, f"eval at k = {LARGEST_K}", command, directory, say)


def report(found: Rehearsal) -> str:
    """Process by process what ran, setting by setting what shrank, and what could not be rehearsed."""
    lines = ["", f"{'process':34}{'seconds':>8}  outcome"]
    lines += [f"{s.name:34}{s.seconds:8.1f}  {s.outcome}" for s in found.stages]
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
