"""Steps that were skipped because of sick numbers: counted against a limit, and kept with their batch to be replayed.

``sick/step-NNNNNN/`` holds what was found (sick.json), the step's rollouts and rewards (batch.json) and the float32 weights
before it, with checksums. The newest `KEPT` are kept.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from e3rl.cluster.messages import Finished, Response
from e3rl.cluster.wire import from_plain, to_plain
from e3rl.errors import UserError
from e3rl.files import atomic_directory, damage, write_json
from e3rl.train.learner import Learner, Lesson, Update
from e3rl.train.nonfinite import Finding, SickNumbers
from e3rl.train.run_directory import read_lines
from e3rl.types import Group, Problem, Prompt, Reward, RewardedGroup, Trajectory

FORMAT = 1
KEPT = 3


@dataclass(frozen=True)
class SickStep:
    """A step that was skipped: what was found, in words and located, its batch, and the weights before it."""

    step: int
    update: int
    text: str
    finding: Finding
    batch: tuple[RewardedGroup, ...]
    weights: Mapping[str, Tensor]


def sick_directory(run: Path, step: int) -> Path:
    return run / "sick" / f"step-{step:06d}"


def sick_steps(run: Path) -> list[int]:
    """Steps whose batch is kept, newest first."""
    return sorted((int(p.name.removeprefix("step-")) for p in (run / "sick").glob("step-*")), reverse=True)


def write_sick(run: Path, sick: SickStep) -> Path:
    """Keep a skipped step, and forget the oldest beyond `KEPT`."""
    directory = sick_directory(run, sick.step)
    with atomic_directory(directory) as temporary:
        facts = {"format": FORMAT, "step": sick.step, "update": sick.update, "text": sick.text}
        write_json(temporary / "sick.json", {**facts, "finding": asdict(sick.finding)})
        (temporary / "batch.json").write_text(json.dumps([_plain(item) for item in sick.batch]), encoding="utf-8")
        save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in sick.weights.items()},
            temporary / "weights.safetensors",
        )
    for step in sick_steps(run)[KEPT:]:
        shutil.rmtree(sick_directory(run, step), ignore_errors=True)
    return directory


def read_sick(run: Path, step: int) -> SickStep:
    """A skipped step whose checksums have been verified."""
    directory = sick_directory(run, step)
    problem = damage(directory)
    if problem:
        raise UserError(f"{directory} is damaged: {problem}")
    facts = json.loads((directory / "sick.json").read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise UserError(f"{directory} has format {facts.get('format')}; this version reads {FORMAT}")
    batch = json.loads((directory / "batch.json").read_text(encoding="utf-8"))
    finding = Finding(**{**facts["finding"], "parameters": tuple(facts["finding"]["parameters"])})
    weights = load_file(directory / "weights.safetensors")
    return SickStep(facts["step"], facts["update"], facts["text"], finding, tuple(map(_rewarded, batch)), weights)


def _plain(item: RewardedGroup) -> dict[str, Any]:
    group = item.group
    responses = tuple(Response(t.sibling, t.segments, t.erasures, t.finish) for t in group.trajectories)
    finished = Finished(group.prompt.problem.id, group.policy_version or 0, responses)
    return {"prompt_ids": group.prompt.ids, "finished": to_plain(finished), "rewards": to_plain(item.rewards)}


def _rewarded(plain: Mapping[str, Any]) -> RewardedGroup:
    finished = from_plain(Finished, plain["finished"], "finished")
    prompt = Prompt(Problem(finished.prompt_id, ""), tuple(plain["prompt_ids"]))
    trajectories = tuple(Trajectory(prompt, r.sibling, r.segments, r.erasures, r.finish) for r in finished.responses)
    group = Group(prompt, trajectories, finished.policy_version)
    return RewardedGroup(group, tuple(Reward(r["value"], r["parts"], r["error"]) for r in plain["rewards"]))


class SickBook:
    """Counts the steps that a run skips in a row. ``run`` is where this rank writes, ``shared`` where the first one does."""

    def __init__(self, run: Path, shared: Path, limit: int, say: Callable[[str], None]) -> None:
        self._run, self._log, self._limit, self._say = run, shared / "metrics.jsonl", limit, say

    def learn(
        self, learner: Learner, groups: Sequence[RewardedGroup], update: int, step: int
    ) -> tuple[list[Lesson], Update]:
        """`Learner.learn`, or nothing learnt where numbers are sick: said aloud, and UserError beyond the limit."""
        try:
            return learner.learn(groups, update)
        except SickNumbers as sick:
            self.skip(sick, step, groups, learner.optimizer.weights())
            return [], Update({}, math.nan, 0.0)

    def in_a_row(self) -> int:
        """Steps that were skipped last."""
        records = read_lines(self._log)
        return next((n for n, r in enumerate(reversed(records)) if not r.get("skipped")), len(records))

    def skip(self, sick: SickNumbers, step: int, batch: Sequence[RewardedGroup], weights: Mapping[str, Tensor]) -> None:
        """Keep the step for replay and say so."""
        group = sick.finding.group
        prompt_id = None if group is None else batch[group].group.prompt.problem.id
        text = f"{sick.finding.sentence(prompt_id)}, in step {step}"
        write_sick(self._run, SickStep(step, sick.update, text, sick.finding, tuple(batch), weights))
        replay = f"'e3rl replay {self._run}' shows where it comes from"
        skipped = self.in_a_row()
        if skipped >= self._limit:
            before = f"; the {skipped} steps before were skipped already" if skipped else ""
            raise UserError(
                f"{text}{before} (train.max_skipped_steps = {self._limit}). The weights are those before it; {replay}. "
                "Lower train.learning_rate, or use model.dtype=float32."
            ) from sick
        self._say(f"{text}: the step is skipped, the weights stay as they were; {replay}")
