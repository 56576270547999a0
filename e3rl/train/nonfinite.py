"""NaN, infinite and exploding numbers of a training step: found before they reach a weight, located, kept for replay.

A skipped step is kept in ``skipped/step-NNNNNN/``: what was found (finding.json), the step's rollouts and rewards
(batch.arrow) and the float32 weights before it, with checksums. The newest `KEPT` are kept.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from e3rl.config import TrainConfig
from e3rl.errors import UserError
from e3rl.files import atomic_directory, damage, write_json
from e3rl.objectives.base import TrainBatch
from e3rl.rollout.columns import decode, encode
from e3rl.rollout.ipc import from_ipc, to_ipc
from e3rl.train.packing import TrainSequence
from e3rl.types import Problem, Prompt, RewardedGroup

FORMAT = 3
KEPT = 3


@dataclass(frozen=True)
class NonFinite:
    """A number that is not finite or too large, and where it is. ``group``: position in the step.

    Fields that a kind does not have are None or empty.
    """

    what: str
    value: float
    group: int | None = None
    sibling: int | None = None
    segment: int | None = None
    token: int | None = None  # of the response
    erased: bool = False
    parameters: tuple[str, ...] = ()

    def sentence(self, prompt_id: str | None = None) -> str:
        """The finding in words."""
        of = (
            [f"prompt '{prompt_id}'" if prompt_id is not None else f"group {self.group}"]
            if self.group is not None
            else []
        )
        of += [f"{name} {v}" for name, v in (("sibling", self.sibling), ("segment", self.segment)) if v is not None]
        of += [f"response token {self.token}"] * (self.token is not None) + ["an erased candidate"] * self.erased
        if self.parameters:
            shown = ", ".join(self.parameters[:3]) + (", …" if len(self.parameters) > 3 else "")
            of.append(f"{len(self.parameters)} parameters ({shown})")
        return f"the {self.what} is {self.value:g}" + (f" at {', '.join(of)}" if of else "")


class NonFiniteNumbers(UserError):
    """A training step has numbers that must not reach the weights, which were left as they were."""

    def __init__(self, finding: NonFinite, update: int) -> None:
        self.finding, self.update = finding, update
        super().__init__(
            f"{finding.sentence()}, at optimizer update {update}; the weights were left as they were. "
            "Look at this step's rollouts, lower train.learning_rate or use float32."
        )


def find_nonfinite(
    sequences: Sequence[TrainSequence], batch: TrainBatch, loss: Tensor, config: TrainConfig
) -> NonFinite | None:
    """The first such number of a micro-batch, whose rows are ``sequences``; None where all are well.

    One read from the device where all are finite; only otherwise are they located.
    """
    logprobs_ST, old_ST, reference_ST = (
        batch.logprobs_ST.detach(),
        batch.old_logprobs_ST,
        batch.reference_logprobs_ST,
    )
    kinds = {
        "log-probability": logprobs_ST,
        "old log-probability": old_ST,
        **({} if reference_ST is None else {"reference log-probability": reference_ST}),
        "advantage": batch.advantages_ST,
    }
    bad = {what: ~values_ST.isfinite() & batch.mask_ST for what, values_ST in kinds.items()}
    far_ST = (logprobs_ST - old_ST).abs() * batch.mask_ST
    kl_S = _kl(logprobs_ST, reference_ST, batch.mask_ST)
    suspicious = [found_ST.any() for found_ST in bad.values()] + [~loss.detach().isfinite()]
    suspicious += [far_ST.amax() > config.max_log_ratio, kl_S.amax() > config.max_kl]
    if not bool(torch.stack(suspicious).any()):
        return None
    for what, values_ST in kinds.items():
        if bool(bad[what].any()):
            row, token = divmod(int(bad[what].flatten().int().argmax()), values_ST.shape[1])
            return _at(sequences[row], what, float(values_ST[row, token]), token)
    if float(far_ST.amax()) > config.max_log_ratio:
        row, token = divmod(int(far_ST.argmax()), far_ST.shape[1])
        return _at(sequences[row], "log of a token's probability ratio", float(far_ST[row, token]), token)
    if float(kl_S.amax()) > config.max_kl:
        row = int(kl_S.argmax())
        return _at(sequences[row], "mean KL to the reference policy", float(kl_S[row]), None)
    return NonFinite("loss", float(loss.detach()), group=sequences[0].group if len(sequences) == 1 else None)


@torch.no_grad()
def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters whose part in this process holds NaN or infinite numbers. One read from the device."""
    named = {n: getattr(p, "_local_tensor", p) for n, p in model.named_parameters() if p.requires_grad}
    finite = {n: p.isfinite().all() for n, p in named.items() if p.numel()}
    if not finite or bool(torch.stack(list(finite.values())).all()):
        return []
    return [n for n, well in finite.items() if not bool(well)]


def _kl(logprobs_ST: Tensor, reference_ST: Tensor | None, mask_ST: Tensor) -> Tensor:
    """Mean k3 estimate of each row; 0 without a reference."""
    if reference_ST is None:
        return logprobs_ST.new_zeros(1)
    gap_ST = ((reference_ST - logprobs_ST) * mask_ST).double()
    return ((gap_ST.exp() - gap_ST - 1) * mask_ST).sum(1) / mask_ST.sum(1).clamp(min=1)


def _at(sequence: TrainSequence, what: str, value: float, token: int | None) -> NonFinite:
    segment = None if token is None else int(sequence.segments_T[token])
    return NonFinite(what, value, sequence.group, sequence.sibling, segment, token, sequence.erased)


@dataclass(frozen=True)
class SkippedStep:
    """A step that was skipped: what was found, in words and located, its batch, and the weights before it."""

    step: int
    update: int
    text: str
    finding: NonFinite
    batch: tuple[RewardedGroup, ...]
    weights: Mapping[str, Tensor]


def skipped_directory(run: Path, step: int) -> Path:
    return run / "skipped" / f"step-{step:06d}"


def skipped_steps(run: Path) -> list[int]:
    """Steps whose batch is kept, newest first."""
    return sorted((int(p.name.removeprefix("step-")) for p in (run / "skipped").glob("step-*")), reverse=True)


def write_skipped(run: Path, skipped: SkippedStep) -> Path:
    """Write a skipped step, and delete the oldest beyond `KEPT`."""
    directory = skipped_directory(run, skipped.step)
    with atomic_directory(directory) as temporary:
        facts = {"format": FORMAT, "step": skipped.step, "update": skipped.update, "text": skipped.text}
        write_json(temporary / "finding.json", {**facts, "finding": asdict(skipped.finding)})
        (temporary / "batch.arrow").write_bytes(to_ipc([encode(skipped.batch)]))
        save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in skipped.weights.items()},
            temporary / "weights.safetensors",
        )
    for step in skipped_steps(run)[KEPT:]:
        shutil.rmtree(skipped_directory(run, step), ignore_errors=True)
    return directory


def read_skipped(run: Path, step: int) -> SkippedStep:
    """A skipped step whose checksums have been verified."""
    directory = skipped_directory(run, step)
    problem = damage(directory)
    if problem:
        raise UserError(f"{directory} is damaged: {problem}")
    facts = json.loads((directory / "finding.json").read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise UserError(f"{directory} has format {facts.get('format')}; this version reads {FORMAT}")
    batches = from_ipc((directory / "batch.arrow").read_bytes())
    batch = tuple(item for found in batches for item in decode(found, _prompt_of))
    finding = NonFinite(**{**facts["finding"], "parameters": tuple(facts["finding"]["parameters"])})
    weights = load_file(directory / "weights.safetensors")
    return SkippedStep(facts["step"], facts["update"], facts["text"], finding, batch, weights)


def _prompt_of(problem_id: str, ids: np.ndarray) -> Prompt:
    """A prompt of these tokens, whose problem has an id and nothing else."""
    return Prompt(Problem(problem_id, ""), tuple(ids.tolist()))


def skip_step(
    run: Path,
    found: NonFiniteNumbers,
    step: int,
    batch: Sequence[RewardedGroup],
    weights: Mapping[str, Tensor],
    *,
    before: int,
    limit: int,
    writes: bool = True,
) -> str:
    """Keep a step for replay and say so; UserError where ``before`` steps were skipped already and that is the limit.

    All ranks call it, since weights may have to be gathered; the rank that ``writes`` stores them.
    """
    group = found.finding.group
    prompt_id = None if group is None else batch[group].group.prompt.problem.id
    text = f"{found.finding.sentence(prompt_id)}, in step {step}"
    if writes:
        write_skipped(run, SkippedStep(step, found.update, text, found.finding, tuple(batch), weights))
    else:
        deque(weights.values(), maxlen=0)
    replay = f"'e3rl replay {run}' shows where it comes from"
    if before >= limit:
        already = f"; the {before} steps before were skipped already" if before else ""
        raise UserError(
            f"{text}{already} (train.max_skipped_steps = {limit}). The weights are those before it; {replay}. "
            "Lower train.learning_rate, or use model.dtype=float32."
        ) from found
    return f"{text}: the step is skipped, the weights stay as they were; {replay}"
