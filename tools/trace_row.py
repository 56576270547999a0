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
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from traced_step import LEVEL, SIBLINGS, Trace, trace

from e3rl.cli.opening import quiet_libraries
from e3rl.equations.policy import segment_sums
from e3rl.train.lessons import Lesson
from e3rl.types import Candidate, Erasure, Judgement, Problem, Segment

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLE = re.compile(r"(?<=<!-- example -->\n).*?(?=\n<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")
TOLERANCE = 0.0021


def code(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def numbers(values: Iterable[float]) -> str:
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
        f"ids            {candidate.ids.tolist()}\n"
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
