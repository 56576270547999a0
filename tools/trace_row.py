"""Writes docs/data-way.md: one row of the embedded model's problems, followed through every stage of a training step.

The erasure on that way is also the example of docs/concepts.md, between <!-- example --> and <!-- end -->.

python tools/trace_row.py            run the step and rewrite the page
python tools/trace_row.py --check    run it again and compare; exit 1 if the page is stale

Texts must be equal; numbers may differ in the last digit shown, since processors round differently.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from e3rl.cli.quiet import quiet_libraries
from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, load_config
from e3rl.data.loading import load_problems
from e3rl.data.prompts import render_prompts
from e3rl.equations.policy import segment_sums
from e3rl.lab.problems import generate
from e3rl.models import Policy, load_policy
from e3rl.objectives import build
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.engines import build_engine
from e3rl.rollout.scheduler import Scheduler
from e3rl.train.learner import Learner, Lesson, Update
from e3rl.train.ledger import learnt, ledger_rows
from e3rl.types import Candidate, Erasure, Group, Judgement, Problem, Prompt, RewardedGroup, Segment

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLE = re.compile(r"(?<=<!-- example -->\n).*?(?=\n<!-- end -->)", re.DOTALL)
SIBLINGS = 4
LEVEL = 4
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.0021


@dataclass(frozen=True)
class Trace:
    """One problem on its way, and the learner's work on it."""

    row: dict[str, Any]
    config: Config
    policy: Policy
    rewarded: RewardedGroup
    lessons: list[Lesson]
    update: Update
    before: list[float]
    after: list[float]
    ledger: list[dict[str, Any]]

    @property
    def group(self) -> Group:
        return self.rewarded.group

    @property
    def star(self) -> int:
        """The sibling that is followed: the first whose erasure led to a right answer."""
        pairs = zip(self.group.trajectories, self.rewarded.rewards, strict=True)
        return next(t.sibling for t, reward in pairs if t.erasures and reward.value)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.policy.tokenizer.decode(list(ids), skip_special_tokens=True))


def rows() -> list[dict[str, Any]]:
    """Lab problems as they would stand in a JSONL file."""
    return [
        {"id": p.id, "prompt": p.prompt, "answer": p.answer, **p.columns} for p in generate("chain", LEVEL, "train", 40)
    ]


def read(row: dict[str, Any], config: Config, policy: Policy) -> Prompt:
    """Row → Problem → Prompt, through a file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        problems = load_problems(str(path), config=config.data, split="train")
    limits = {"context_limit": policy.context_length, "completion_limit": config.rollout.completion_limit}
    return render_prompts(problems, policy.tokenizer, config.data, **limits)[0]


def roll_out(prompt: Prompt, config: Config, policy: Policy, scorer: Scorer) -> RewardedGroup:
    """Prompt → group of trajectories → rewards."""
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, len(prompt.ids))
    scheduler = Scheduler(engine, config.rollout, config.erasure, seed=config.run.seed)
    (group,) = scheduler.run([prompt], step=1, policy_version=0)
    texts = [policy.tokenizer.decode(list(t.ids), skip_special_tokens=True) for t in group.trajectories]
    return RewardedGroup(group, tuple(scorer.score(group.trajectories, texts)))


def is_telling(item: RewardedGroup) -> bool:
    """Right and wrong answers, and an erasure on the way to a right one."""
    rewards = {r.value for r in item.rewards}
    return len(rewards) > 1 and any(
        t.erasures and r.value for t, r in zip(item.group.trajectories, item.rewards, strict=True)
    )


def logprobs_of(learner: Learner, rewarded: RewardedGroup) -> list[float]:
    """Log-probability of each sibling's response under the policy as it is now."""
    return [float(x.scores.logprobs_T.sum()) for x in learner.prepare([rewarded]) if not x.sequence.erased]


def trace() -> Trace:
    """The first problem whose group shows something, through a whole step."""
    config = load_config(
        find_recipe("demo"), [], [f"rollout.num_generations={SIBLINGS}", "rollout.max_segments=6", "model.device=cpu"]
    )
    policy = load_policy(config.model)
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        candidates = ((row, roll_out(read(row, config, policy), config, policy, scorer)) for row in rows())
        row, rewarded = next((r, item) for r, item in candidates if is_telling(item))
    learner = Learner(policy, build(config.objective), config, updates=1)
    lessons = learner.prepare([rewarded])
    kept = [x for x in lessons if not x.sequence.erased]
    before = [float(x.scores.logprobs_T.sum()) for x in kept]
    update = learner.update(lessons, 0)
    after = logprobs_of(learner, rewarded)
    ledger = ledger_rows(1, [rewarded], learnt([rewarded], lessons), policy.tokenizer)
    return Trace(row, config, policy, rewarded, lessons, update, before, after, ledger)


def code(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def numbers(values: Sequence[float]) -> str:
    return " ".join(f"{v:.3f}" for v in values)


def as_problem(problem: Problem) -> str:
    fields = f"id={problem.id!r}, prompt={problem.prompt!r}, answer={problem.answer!r}"
    return f"Problem({fields},\n        columns={dict(problem.columns)!r})"


def data_stages(t: Trace) -> str:
    """Row and prompt."""
    problem: Problem = t.group.prompt.problem
    ids = t.group.prompt.ids
    pieces = " ".join(f"`{p}`" for p in t.policy.tokenizer.convert_ids_to_tokens(list(ids)))
    return f"""## Row → `Problem`

A line of a JSONL file; `e3rl/data/readers.py` reads it and `e3rl/data/rows.py` checks it.

{code(json.dumps(t.row, ensure_ascii=False), "json")}

The columns that the settings name become fields, all others go along in `columns` for the reward functions:

{code(as_problem(problem))}

## `Problem` → `Prompt`

`e3rl/data/prompts.py` puts it through the chat template, once; from here on there are only token ids.

{code(f"ids = {list(ids)}")}

Read back, they are {pieces}.
"""


def candidate_block(t: Trace, candidate: Candidate) -> str:
    return code(
        f"text           {t.text(candidate.ids)!r}\n"
        f"ids            {list(candidate.ids)}\n"
        f"logprobs       {numbers(candidate.logprobs)}\n"
        f"entropies      {numbers(candidate.entropies)}\n"
        f"perturbations  {numbers(candidate.perturbations)}"
    )


def judgement_cells(j: Judgement) -> tuple[str, ...]:
    theta = j.threshold
    values = (j.uncertainty.total, theta.baseline, theta.penalty, theta.modulation, theta.total)
    return (str(j.attempt), *(f"{v:.3f}" for v in values), str(j.verdict))


def attempts_at(t: Trace, sibling: int, index: int) -> list[Erasure | Segment]:
    """Everything drawn for one segment, in order."""
    trajectory = t.group.trajectories[sibling]
    return [*(e for e in trajectory.erasures if e.index == index), trajectory.segments[index]]


def rollout_stages(t: Trace) -> str:
    """Extend, judge, erase."""
    erasure = t.group.trajectories[t.star].erasures[0]
    n = erasure.index
    present = [x.sibling for x in t.group.trajectories if len(x.segments) > n]
    firsts = []
    for sibling in present:
        first = attempts_at(t, sibling, n)[0]
        assert first.judgement is not None
        firsts.append((sibling, f"`{t.text(first.candidate.ids)}`", *judgement_cells(first.judgement)[1:]))
    tries = []
    for drawn in attempts_at(t, t.star, n):
        assert drawn.judgement is not None
        tries.append((f"`{t.text(drawn.candidate.ids)}`", *judgement_cells(drawn.judgement)))
    prefix = t.text(t.group.trajectories[t.star].ids[: erasure.start])
    return f"""## Prefix → `Candidate`

Sibling {t.star} of {SIBLINGS} has committed `{prefix}` ({erasure.start} tokens). The engine draws up to
{t.config.rollout.segment_length} more, with numbers that depend on (seed, step, problem, sibling, segment, attempt) and on
nothing else, and hands over what it measured about each:

{candidate_block(t, erasure.candidate)}

## `Candidate` → `Judgement`

The first candidates of all siblings at segment {n} (counted from 0) give the baseline B; each sibling's own history gives
φ. This recipe measures U by the mean perturbation alone (E³RL+ε).

{table(("sibling", "first candidate", "U", "B", "Γ", "φ", "Θ = B·Γ·φ", "verdict"), firsts)}

## Erase

`erase` rolls the KV cache back to the prefix: no token of it is run again. The same prefix is then drawn on with other
random numbers, until a candidate is below its threshold or the budget of {t.config.erasure.max_erasures} is spent:

{table(("drawn", "attempt", "U", "B", "Γ", "φ", "Θ", "verdict"), tries)}

What was erased stays on record as an `Erasure`, for the report and for contrast.
"""


def reward_stage(t: Trace) -> str:
    body = [
        (x.sibling, f"`{t.text(x.ids)}`", len(x.segments), len(x.erasures), x.finish, f"{r.value:g}")
        for x, r in zip(t.group.trajectories, t.rewarded.rewards, strict=True)
    ]
    return f"""## `Trajectory` → `Reward`

The text of the committed segments goes to the reward functions, here `lab`. The answer is {t.group.prompt.problem.answer}.

{table(("sibling", "response", "segments", "erasures", "finish", "reward"), body)}
"""


def by_segment(values_T: torch.Tensor, lesson: Lesson) -> list[float]:
    segments_T = lesson.sequence.segments_T
    return segment_sums(values_T, segments_T, int(segments_T.max()) + 1).tolist()


def advantages_by_segment(lesson: Lesson) -> list[float]:
    ones = torch.ones_like(lesson.advantages_T)
    return [a / n for a, n in zip(by_segment(lesson.advantages_T, lesson), by_segment(ones, lesson), strict=True)]


def learning_stages(t: Trace) -> str:
    """Attribute, advantage, loss, step."""
    kept = [x for x in t.lessons if not x.sequence.erased]
    rewards = [r.value for r in t.rewarded.rewards]
    shares = []
    for x, reward in zip(kept, rewards, strict=True):
        assert x.scores.shares_T is not None
        shares.append((x.sequence.sibling, f"{reward:g}", numbers(by_segment(x.scores.shares_T, x))))
    advantages = [(x.sequence.sibling, numbers(advantages_by_segment(x))) for x in kept]
    erased = [
        (x.sequence.sibling, f"`{t.text(torch.tensor(x.sequence.response_ids)[x.sequence.mask_T].tolist())}`",
         f"{float(x.advantages_T[x.sequence.mask_T][0]):.1f}")
        for x in t.lessons if x.sequence.erased
    ]  # fmt: skip
    moved = [
        (x.sequence.sibling, f"{reward:g}", f"{a:.3f}", f"{b:.3f}")
        for x, reward, a, b in zip(kept, rewards, t.before, t.after, strict=True)
    ]
    means = {k: v for k, v in t.update.means.items() if "/" not in k}
    return f"""## `Trajectory` → shares of the reward

One forward pass scores all siblings. The attention that the end of a response pays to its tokens, summed by segment, is
the share of the reward that the segment gets (eq 19): R_n = reward × share.

{table(("sibling", "reward", "share of each segment"), shares)}

## Shares → advantages

At each segment index the siblings' R_n are compared (eq 20). A sibling that has no such segment counts with 0.

{table(("sibling", "advantage of each segment"), advantages)}

This recipe also learns from what was erased (`erased = "contrast"`): an erased candidate, behind its own prefix, counts
against the policy where the trajectory that replaced it was rewarded.

{table(("sibling", "erased", "advantage"), erased)}

## `TrainBatch` → `Loss`

Trajectories and erased candidates go through the model once more, with gradients. At the first pass every ratio is 1:

{code(chr(10).join(f"{key:14} {value:.3f}" for key, value in means.items()))}

## Gradients → a newer policy

The gradient's norm is {t.update.grad_norm:.3f}; it is scaled down to at most {t.config.train.max_grad_norm:g}, and AdamW takes
a step at {t.update.learning_rate:g}. The log-probability of each response, before and after:

{table(("sibling", "reward", "before", "after"), moved)}
"""


def ledger_stage(t: Trace) -> str:
    row = t.ledger[t.star]
    kept = {k: row[k] for k in ("step", "problem_id", "sibling", "response", "finish", "reward")}
    return f"""## State → directory → page

Each trajectory becomes a row of `rollouts/step-000001.parquet`, with everything that is on this page ({len(row)} columns):

{code(json.dumps(kept, ensure_ascii=False), "json")}

[The run directory](run-directory.md) lists the columns and the other files; [the report](report.md) is made from them.
"""


def page(t: Trace) -> str:
    head = f"""# The data's way: one row through a training step

Written by `python tools/trace_row.py`; do not edit. Every value below was printed by the library: the recipe `demo` on
the embedded model, with {SIBLINGS} siblings of a `lab:chain:{LEVEL}` problem, the first whose siblings disagree and where an
erasure led to a right answer. Each arrow is one type of `e3rl/types.py`.
"""
    stages = (data_stages, rollout_stages, reward_stage, learning_stages, ledger_stage)
    return "\n".join([head, *(stage(t) for stage in stages)])


def same(old: str, new: str) -> bool:
    """Whether two pages say the same, up to the last digit."""
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE * max(1.0, abs(float(a))) for a, b in pairs)


def example(t: Trace) -> str:
    """The followed erasure in a few lines."""
    erasure = t.group.trajectories[t.star].erasures[0]
    before = t.text(t.group.trajectories[t.star].ids[: erasure.start])
    lines = [f"prompt     {t.group.prompt.problem.prompt}", f"committed  {before}"]
    for drawn in attempts_at(t, t.star, erasure.index):
        j = drawn.judgement
        assert j is not None
        sign, done = (">", "erased") if isinstance(drawn, Erasure) else ("≤", "committed")
        text = t.text(drawn.candidate.ids)
        lines.append(f"drawn      {text}   U {j.uncertainty.total:.3f} {sign} Θ {j.threshold.total:.3f}: {done}")
    others = [x.sibling for x in t.group.trajectories if x.sibling != t.star and len(x.segments) > erasure.index]
    firsts = [attempts_at(t, other, erasure.index)[0] for other in others]
    siblings = [f"{t.text(x.candidate.ids)} (U {x.judgement.uncertainty.total:.3f})" for x in firsts if x.judgement]
    return code("\n".join([*lines, "siblings   " + ", ".join(siblings)]))


def main(arguments: list[str]) -> int:
    """0, or 1 where --check finds a page stale."""
    quiet_libraries()
    torch.set_num_threads(1)
    found = trace()
    way, concepts = DOCS / "data-way.md", DOCS / "concepts.md"
    shown = example(found)
    fresh = {way: page(found), concepts: EXAMPLE.sub(lambda _: shown, concepts.read_text(encoding="utf-8"))}
    if "--check" not in arguments:
        for path, text in fresh.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [p.name for p, text in fresh.items() if not p.is_file() or not same(p.read_text(encoding="utf-8"), text)]
    if stale:
        print(f"stale: {', '.join(stale)}; run python tools/trace_row.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
