"""Our sampler and scheduler in vLLM beside vLLM as it is: tokens a second, what erasing costs, what travels.

python benchmarks/vllm_engine.py --json out.json

Needs an environment with vLLM (`make test-vllm` makes .venv-vllm). Both generate responses of the same lengths to the same
prompts, run after run in turn, each in vLLM's own processes: plain vLLM with its own sampler and all responses at once; ours
segment by segment, with all that erasing needs, twice as many siblings held as run at once, which is the default of runs. Bytes
are counted where they arrive in this process. With ``--in-process`` both run in this one, and rows a step are counted instead.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.engine.vllm.core import VllmCore, kv_cache_bytes
from e3rl.engine.vllm.engine import VllmEngine
from e3rl.models import Policy, load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import summarise
from e3rl.train.summary import environment
from e3rl.types import Group, Prompt
from e3rl.weights.model import write_model

Values = dict[str, Any]


def config(model: str, siblings: int, length: int, segments: int, kappa0: float) -> Config:
    """The paper's kind of rollout, small."""
    return load_config(
        None,
        (),
        [
            f"model.path={model}",
            "data.train=lab:arith:1-3",
            f"rollout.num_generations={siblings}",
            f"rollout.segment_length={length}",
            f"rollout.max_segments={segments}",
            f"erasure.kappa0={kappa0}",
        ],
    )


@dataclass(frozen=True)
class Sizes:
    """What both engines are built for; ``held`` responses may be under way, ``rows`` of them run at once."""

    rows: int
    held: int
    longest: int
    kv_bytes: int


class Arrived:
    """Bytes that vLLM's processes sent to this one."""

    def __init__(self) -> None:
        from vllm.v1.serial_utils import MsgpackDecoder

        self.messages, self.bytes = 0, 0
        decode = MsgpackDecoder.decode

        def counted(decoder: Any, frames: Any) -> Any:
            parts = (
                [frames] if isinstance(frames, (bytes, bytearray, memoryview)) or hasattr(frames, "bytes") else frames
            )
            self.messages += 1
            self.bytes += sum(len(getattr(part, "buffer", part)) for part in parts)
            return decode(decoder, frames)

        MsgpackDecoder.decode = counted


class Steps:
    """Steps of vLLM's schedulers in this process, and the rows that ran in them."""

    def __init__(self) -> None:
        from vllm.v1.core.sched.scheduler import Scheduler

        self.steps, self.rows = 0, 0
        schedule = Scheduler.schedule

        def counted(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            found = schedule(scheduler, *args, **kwargs)
            self.steps += bool(found.num_scheduled_tokens)
            self.rows += len(found.num_scheduled_tokens)
            return found

        Scheduler.schedule = counted

    def since(self) -> tuple[int, float]:
        """Steps since the last call, and rows in one on average."""
        found = self.steps, self.rows / self.steps if self.steps else 0.0
        self.steps, self.rows = 0, 0
        return found


def plain_engine(policy: Policy, sizes: Sizes, folder: Path, block_size: int) -> Any:
    """vLLM as anybody would start it for these sizes."""
    from vllm import LLM
    from vllm.platforms import current_platform

    write_model(policy.model, folder)
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        generation_config="vllm",
        enable_prefix_caching=True,
        enforce_eager=current_platform.is_cpu(),
        disable_log_stats=True,
        dtype=str(policy.model.dtype).removeprefix("torch."),
        max_model_len=sizes.longest,
        max_num_seqs=sizes.rows,
        kv_cache_memory_bytes=sizes.kv_bytes,
        block_size=block_size,
    )


def run_plain(llm: Any, groups: Sequence[Group]) -> int:
    """Responses of the same lengths, all at once; their tokens."""
    from vllm import SamplingParams

    trajectories = [t for group in groups for t in group.trajectories]
    found = llm.generate(
        [{"prompt_token_ids": list(t.prompt.ids)} for t in trajectories],
        [
            SamplingParams(temperature=1.0, max_tokens=len(t.ids), ignore_eos=True, detokenize=False)
            for t in trajectories
        ],
        use_tqdm=False,
    )
    llm.reset_prefix_cache()
    return sum(len(o.outputs[0].token_ids) for o in found)


def cpu_seconds() -> float:
    """Of this process and all that it started, vLLM's among them: what a busy machine changes less than the time on the wall."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def timed(task: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds on the wall and of CPUs, and what came of it."""
    began, used = time.perf_counter(), cpu_seconds()
    found = task()
    return time.perf_counter() - began, cpu_seconds() - used, found


class Ours:
    """Our engine over one core, a batch of groups at a time."""

    def __init__(self, policy: Policy, sizes: Sizes, arrived: Arrived) -> None:
        self._policy, self._sizes, self._arrived = policy, sizes, arrived
        self.core = VllmCore(policy.model, **self._settings())

    def _settings(self) -> Values:
        return {
            "eos_ids": self._policy.eos_ids,
            "max_rows": self._sizes.rows,
            "cache_rows": self._sizes.held,
            "max_length": self._sizes.longest,
        }

    def run(self, prompts: Sequence[Prompt], settings: Config, step: int) -> tuple[list[Group], Values]:
        """The groups, and what they took."""
        engine = VllmEngine(self._policy.model, **self._settings(), core=self.core)
        calls, arrived = self.core.calls, self._arrived.bytes
        wanted = GroupSettings(settings.rollout, settings.erasure, seed=3, step=step)
        seconds, cpu, groups = timed(lambda: list(run_groups(engine, prompts, wanted)))
        stats, found = summarise(groups), engine.stats
        generated = stats.generated_tokens
        return groups, {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "r": stats.r,
            "generated": generated,
            "kept": sum(len(t.ids) for g in groups for t in g.trajectories),
            "run_again_after_commit": found.after_commit.mean,
            "run_again_after_erasure": found.after_erasure.mean,
            "most_run_again": max(found.after_commit.most, found.after_erasure.most),
            "commits": found.after_commit.requests,
            "erasures": found.after_erasure.requests,
            "worker_calls_per_segment": (self.core.calls - calls) / found.requests,
            "bytes_per_token": (self._arrived.bytes - arrived) / generated,
        }


def measure(options: argparse.Namespace) -> Values:
    """Rounds in turn: ours with nothing erased, plain; ours erasing, plain."""
    settings = config(options.model, options.siblings, options.segment_length, options.segments, options.kappa0)
    keeping = config(options.model, options.siblings, options.segment_length, options.segments, 1e6)
    policy = load_policy(settings.model)
    problems = load_problems(settings.data.train, config=settings.data, split="train")[: options.groups]
    limits = {"context_limit": policy.context_length, "completion_limit": settings.rollout.completion_limit}
    prompts = render_prompts(problems, policy.tokenizer, settings.data, **limits)
    longest = max(len(p.ids) for p in prompts) + settings.rollout.completion_limit
    held = options.held * options.rows
    sizes = Sizes(options.rows, held, longest, kv_cache_bytes(policy.model, held, longest))
    arrived, steps = Arrived(), Steps() if options.in_process else None
    ours, rounds = Ours(policy, sizes, arrived), list[Values]()
    with tempfile.TemporaryDirectory() as folder:
        llm = plain_engine(policy, sizes, Path(folder), ours.core.block_size)
        for number in range(options.rounds + 1):
            found: Values = {}
            for name, chosen in (("keeping", keeping), ("erasing", settings)):
                groups, found[name] = ours.run(prompts, chosen, number)
                if steps:
                    found[name]["steps"], found[name]["rows_a_step"] = steps.since()
                found[name]["plain_seconds"], found[name]["plain_cpu_seconds"], tokens = timed(
                    partial(run_plain, llm, groups)
                )
                if steps:
                    found[name]["plain_steps"], found[name]["plain_rows_a_step"] = steps.since()
                assert tokens == found[name]["kept"]
            rounds.append(found)
            print(json.dumps(found), flush=True)
    ours.core.close()
    return {"rounds": rounds[1:], **table(rounds[1:]), "environment": environment()}


def rate(found: Values, seconds: str) -> float:
    """Our tokens a second over plain vLLM's, nothing erased."""
    return float(found["keeping"][f"plain_{seconds}"] / found["keeping"][seconds])


def cost(found: Values, seconds: str) -> float:
    """What erasing takes over what so many tokens take plain vLLM: wall / ((1 + r) plain)."""
    erasing = found["erasing"]
    return float(erasing[seconds] / (erasing[f"plain_{seconds}"] * erasing["generated"] / erasing["kept"]))


def table(rounds: Sequence[Values]) -> Values:
    """Medians over the rounds."""

    def middle(value: Callable[[Values], float]) -> float:
        return median(value(found) for found in rounds)

    return {
        "plain vLLM, tokens/s": middle(lambda f: f["keeping"]["kept"] / f["keeping"]["plain_seconds"]),
        **{
            f"{name}, by {kind}": middle(partial(ratio, seconds=seconds))
            for kind, seconds in (("time", "seconds"), ("CPU time", "cpu_seconds"))
            for name, ratio in (("tokens/s over plain vLLM's, nothing erased", rate), ("cost of erasing", cost))
        },
        "r": middle(lambda f: f["erasing"]["r"]),
        "tokens run again after a commit": middle(lambda f: f["erasing"]["run_again_after_commit"]),
        "tokens run again after an erasure": middle(lambda f: f["erasing"]["run_again_after_erasure"]),
        "calls of the workers a segment": middle(lambda f: f["erasing"]["worker_calls_per_segment"]),
        "bytes a token to the client": middle(lambda f: f["erasing"]["bytes_per_token"]),
        **{
            f"rows a step, {name}, {who}": median(found[name][key] for found in rounds)
            for name in ("keeping", "erasing")
            for who, key in (("ours", "rows_a_step"), ("plain", "plain_rows_a_step"))
            if key in rounds[0][name]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16, help="responses that run at once")
    parser.add_argument(
        "--held", type=int, default=2, help="responses under way, in multiples of --rows (rollout.cache_rows)"
    )
    parser.add_argument("--in-process", action="store_true", help="count rows a step; without processes of vLLM's")
    parser.add_argument("--siblings", type=int, default=4)
    parser.add_argument("--segment-length", type=int, default=32)
    parser.add_argument("--segments", type=int, default=2)
    parser.add_argument("--kappa0", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if options.in_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    found = measure(options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k not in ("rounds", "environment")}, indent=2))


if __name__ == "__main__":
    main()
