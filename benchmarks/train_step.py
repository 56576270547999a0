"""A training step against TRL's on the same work: same weights, prompts, completions, rewards and settings.

python benchmarks/train_step.py --json out.json                     (under 15 minutes on two quiet cores)
python benchmarks/train_step.py --json out.json --parts logits      (one part; what out.json has of others stays)

Needs TRL: pip install 'e3rl[peers]', and gguf for SmolLM2: pip install 'e3rl[smollm2]'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from train_step_memory import PeakMemory, logits_of, touch
from train_step_work import LIMIT, SIBLINGS, Work, fixed_work, model_directory, text_work

from e3rl.config import Config, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from e3rl.engine.build import build_engine
from e3rl.models import load_policy
from e3rl.objectives import build as build_objective
from e3rl.plan.memory import make_plan
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.train.attribution import AttributionSettings, attribution_layers
from e3rl.train.learner import Learner
from e3rl.train.packing import group_sequences, packed_size, plan_rows
from e3rl.train.scoring import score_sequences
from e3rl.train.summary import environment
from e3rl.types import Candidate, Group, Problem, Prompt, Reward, RewardedGroup, Segment, Trajectory

SEGMENT, KL, RATE, THREADS = 16, 0.04, 1e-6, 2
BATCH = 8  # completions in a micro-batch of TRL: its default
MEMORY_PROMPTS = 2  # a peak does not grow with micro-batches


def settings_of(directory: Path, work: Work, objective: str, **train: Any) -> Config:
    """Our settings for the work. A micro-batch holds as many tokens as TRL's does without its padding."""
    micro_batch_tokens = BATCH * (sum(map(len, work.prompts)) // len(work.prompts) + LIMIT // 2)
    options: dict[str, Any] = {"kl_coef": KL} | ({"average": "sequence"} if objective == "grpo" else {})
    return Config(
        model=ModelConfig(path=str(directory), device="cpu"),
        rollout=RolloutConfig(
            erase=False, num_generations=SIBLINGS, segment_length=SEGMENT, max_segments=LIMIT // SEGMENT,
            max_rows=64, cache_rows=64,
        ),
        objective=ObjectiveConfig(objective, options),
        train=TrainConfig(
            learning_rate=RATE, warmup_ratio=0.0, micro_batch_tokens=micro_batch_tokens, **train
        ),
    )  # fmt: skip


def rewarded_groups(work: Work) -> list[RewardedGroup]:
    """The fixed completions as rollouts of ours, in segments."""
    groups = []
    for index, (prompt_ids, completions) in enumerate(zip(work.prompts, work.completions, strict=True)):
        prompt = Prompt(Problem(str(index), str(index), ""), tuple(prompt_ids))
        siblings = [Trajectory(prompt, s, tuple(_segments(ids)), (), "stop") for s, ids in enumerate(completions)]
        rewards = tuple(Reward(r, {"fixed": r}) for r in work.rewards[index])
        groups.append(RewardedGroup(Group(prompt, tuple(siblings), 0), rewards))
    return groups


def _segments(ids: Sequence[int]) -> list[Segment]:
    pieces = [tuple(ids[i : i + SEGMENT]) for i in range(0, len(ids), SEGMENT)]
    zeros = [(0.0,) * len(p) for p in pieces]
    return [
        Segment(n, Candidate(p, z, z, z, z, (1,) * len(p), False), None)
        for n, (p, z) in enumerate(zip(pieces, zeros, strict=True))
    ]


class Ours:
    """Our training side on the work, and whole steps."""

    def __init__(self, directory: Path, work: Work, objective: str, **train: Any) -> None:
        self.config = settings_of(directory, work, objective, **train)
        self.policy = load_policy(self.config.model)
        self.learner = Learner(self.policy, build_objective(self.config.objective), self.config, updates=1000)
        self.work, self.groups, self.updates = work, rewarded_groups(work) if work.completions else [], 0
        self.norms: list[float] = []

    def train(self) -> None:
        """The training side: reference, log-probabilities, loss, backward, optimizer."""
        self._learn(self.groups)

    def _learn(self, groups: Sequence[RewardedGroup]) -> None:
        _, update = self.learner.learn(groups, self.updates)
        self.norms.append(update.grad_norm)
        self.updates += 1

    def load_engine(self) -> None:
        """What a run does once."""
        self._engine = build_engine(
            self.config.rollout, self.policy.model, self.policy.eos_ids, self.work.longest_prompt
        )
        self._prompts = [
            Prompt(Problem(str(i), text, ""), tuple(ids))
            for i, (text, ids) in enumerate(zip(self.work.texts, self.work.prompts, strict=True))
        ]

    def step(self) -> None:
        """A whole step: rollouts, then the training side; the rewards are the work's."""
        chosen, updates = self.config, self.updates
        settings = GroupSettings(chosen.rollout, chosen.erasure, seed=1, step=updates, policy_version=updates)
        groups = list(run_groups(self._engine, self._prompts, settings))
        rewards = [tuple(Reward(r, {"fixed": r}) for r in values) for values in self.work.rewards]
        self._learn([RewardedGroup(g, rewards[int(g.prompt.problem.id)]) for g in groups])
        self._engine.load_weights({}, self.updates)


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def against_trl(
    directory: Path, work: Work, rounds: int, *, whole: bool, warm: int, objectives: Sequence[str]
) -> dict[str, Any]:
    """Seconds of TRL's steps and ours, one after the other, without the ``warm`` first ones; medians of the rounds' ratios."""
    from train_step_trl import TrlSettings, run_trl

    sides = {objective: Ours(directory, work, objective) for objective in objectives}
    if whole:
        for side in sides.values():
            side.load_engine()
    ours: dict[str, list[float]] = {name: [] for name in sides}

    def between() -> None:
        turn = [*sides.items()]
        for name, side in turn if len(ours[turn[0][0]]) % 2 else reversed(turn):  # neither is always the first
            ours[name].append(timed(side.step if whole else side.train))

    trl = run_trl(directory, work, TrlSettings(rounds + warm, BATCH, KL, RATE), between)
    seconds = {"trl": trl["seconds"][warm:], **{name: values[warm:] for name, values in ours.items()}}

    def ratio(above: str, below: str) -> float:
        return median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    key = "vs_trl_step" if whole else "vs_trl_train"
    found: dict[str, Any] = {key: {name: ratio("trl", name) for name in sides}, "seconds": seconds}
    if len(sides) > 1:
        found["e3rl_over_grpo"] = ratio("e3rl", "grpo")
    if not whole and "grpo" in sides:
        found["grad_norm"] = {"trl": trl["grad_norms"][0], "grpo": sides["grpo"].norms[0]}
    return {**found, "prompts": len(work.texts)}


def memory_of(side: str, directory: Path, work: Work) -> dict[str, float]:
    """Peak of two steps of one side, in this process; run it in one of its own."""
    memory, recompute = PeakMemory(), side.endswith("-recompute")
    if side.startswith("trl"):
        from train_step_trl import TrlSettings, run_trl

        def ready(trainer: Any) -> None:
            for model in (trainer.model, trainer.ref_model):
                touch(model)
            memory.start()

        batch = len(work.texts) * SIBLINGS if "all" in side else BATCH
        run_trl(directory, work, TrlSettings(2, batch, KL, RATE, recompute), lambda: None, ready)
    else:
        ours = Ours(directory, work, side.removesuffix("-recompute"), gradient_checkpointing=recompute)
        touch(ours.policy.model)
        memory.start()
        for _ in range(2):
            ours.train()
    return {"above_mib": memory.above()}


def in_a_process(*arguments: str) -> dict[str, Any]:
    """The result of this program run with other arguments."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(model: str, where: Path, sides: Sequence[str]) -> dict[str, Any]:
    """Every side's peak, and ours over TRL's."""
    peaks = {side: in_a_process("--memory", side, model, "--where", str(where))["above_mib"] for side in sides}
    work = fixed_work(MEMORY_PROMPTS, 2048, where / f"ids-{MEMORY_PROMPTS}.json")
    plans = {side: planned(side, model_directory(model, where), work) for side in sides if side.startswith("e3rl")}
    return {
        "peak_mib": peaks,
        "peak_rss_ratio": peaks["e3rl"] / peaks["trl"],
        "planned_mib": plans,
        "planned_over_measured": {side: mib / peaks[side] for side, mib in plans.items()},
    }


def planned(side: str, directory: Path, work: Work) -> float:
    """What the plan says of the training side, above weights and reference weights, MiB."""
    config = settings_of(directory, work, "e3rl", gradient_checkpointing=side.endswith("-recompute"))
    plan = make_plan(config)
    trainer = plan.trainer
    return (trainer.held["optimizer"] + max(sum(trainer.phases[p].values()) for p in ("training", "optimizer"))) / 2**20


def attribution(directory: Path, work: Work, rounds: int) -> dict[str, Any]:
    """The pass that yields attention shares over the same pass without."""
    policy = load_policy(ModelConfig(path=str(directory), device="cpu"))
    sequences = group_sequences([g.group for g in rewarded_groups(work)], False)
    settings = {"plain": None, "shares": AttributionSettings(64, attribution_layers(policy.model, "last"))}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(rounds + 1):  # the first warms up
        for name, chosen in settings.items():
            began = time.process_time()  # of all threads: what else runs on the machine counts little
            score_sequences(policy.model, sequences, temperature=1.0, token_budget=1280, attribution=chosen)
            seconds[name].append(time.process_time() - began)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    return {"attribution_overhead": medians["shares"] / medians["plain"], "processor_seconds": seconds}


def logits() -> dict[str, Any]:
    """Chunks against the naive version, at Qwen3's vocabulary and 1,024 hidden values."""
    found: dict[str, Any] = {}
    for name, tokens, gradient in (("no_grad_4096", 4096, False), ("grad_1024", 1024, True)):
        sides = {how: in_a_process("--logits", how, str(tokens), str(int(gradient))) for how in ("naive", "chunks")}
        ratio = sides["chunks"]["above_mib"] / sides["naive"]["above_mib"]
        found[name] = {"logits_peak_ratio": ratio, **sides}
    return found


def padding(work: Work) -> dict[str, Any]:
    """Positions computed by TRL's layout and by ours, and how many of them hold no token of their own."""
    sequences = group_sequences([g.group for g in rewarded_groups(work)], False)
    by_group = [[s for s in sequences if s.group == g] for g in range(len(work.prompts))]
    rows = plan_rows(by_group, BATCH * (work.longest_prompt + LIMIT))
    ours = sum(packed_size([s for i in row for s in by_group[i]]) for row in rows)
    real = sum(s.length for s in sequences)
    trl = len(sequences) * (work.longest_prompt + max(work.lengths))
    return {"pad_waste": 0.0, "trl_pad_waste": 1 - real / trl, "tokens": real, "computed": ours, "trl_computed": trl}


def parts(where: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that is measured, by name; each takes under four minutes."""

    def directory(model: str) -> Path:
        return model_directory(model, where)

    def fixed(model: str, prompts: int) -> Work:
        return fixed_work(prompts, 2048, where / f"ids-{prompts}.json")

    def sides(model: str, names: Sequence[str]) -> dict[str, Any]:
        directory(model)
        return memory(model, where, names)

    def compared(model: str, work: Work, rounds: int, **options: Any) -> dict[str, Any]:
        return against_trl(directory(model), work, rounds, **options)

    both, sides_3m = ("grpo", "e3rl"), ("trl", "trl-recompute", "trl-all", "grpo", "e3rl", "e3rl-recompute")
    return {
        "padding": lambda: padding(fixed("3m", 8)),
        "logits": logits,
        "train-3m": lambda: compared("3m", fixed("3m", 8), 5, whole=False, warm=1, objectives=both),
        "step-3m": lambda: compared("3m", text_work(directory("3m"), 8), 5, whole=True, warm=1, objectives=both),
        "attribution-3m": lambda: attribution(directory("3m"), fixed("3m", 8), 9),
        "memory-3m": lambda: sides("3m", sides_3m),
        "memory-135m": lambda: sides("135m", ("trl", "e3rl", "e3rl-recompute")),
        "train-135m": lambda: compared("135m", fixed("135m", 8), 1, whole=False, warm=0, objectives=("e3rl",)),
        "step-135m": lambda: compared(
            "135m", text_work(directory("135m"), 2), 1, whole=True, warm=0, objectives=("e3rl",)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--where", type=Path, default=Path("runs/train-step"), help="models and ids are kept here")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--logits", nargs=3, metavar=("HOW", "TOKENS", "GRADIENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    options.where.mkdir(parents=True, exist_ok=True)
    if options.memory:
        side, model = options.memory
        work = fixed_work(MEMORY_PROMPTS, 2048, options.where / f"ids-{MEMORY_PROMPTS}.json")
        print(json.dumps(memory_of(side, model_directory(model, options.where), work)))
        return
    if options.logits:
        how, tokens, gradient = options.logits
        print(json.dumps(logits_of(how, int(tokens), gradient == "1")))
        return
    found = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {"parts": {}}
    versions = {name: version(name) for name in ("trl", "transformers", "accelerate")}
    for name, run in parts(options.where).items():
        if options.parts and name not in options.parts:
            continue
        began = time.perf_counter()
        found["parts"][name] = {**run(), "took": time.perf_counter() - began, "environment": environment() | versions}
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
        shown = {k: v for k, v in found["parts"][name].items() if k != "environment"}
        print(f"{name}: {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
