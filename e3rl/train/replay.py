"""Repeats a skipped step with hooks on every module: which prompt and which module the non-finite numbers come from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.config import Config
from e3rl.errors import UserError
from e3rl.models import load_policy
from e3rl.objectives import build as build_objective
from e3rl.plugins import foreign_code, require_trust
from e3rl.train.learner import Learner
from e3rl.train.nonfinite import NonFiniteNumbers, SkippedStep, read_skipped, skipped_steps
from e3rl.train.run_directory import read_config
from e3rl.types import RewardedGroup


@dataclass
class Watch:
    """The first module whose output, and the first whose gradient, is not finite."""

    forward: str | None = None
    backward: str | None = None

    def words(self) -> str:
        """The finding in words."""
        seen = [f"first in the output of {self.forward}"] if self.forward else []
        seen += [f"first in the gradient that reaches {self.backward}"] if self.backward else []
        return " and ".join(seen) or "every module's output and gradient is finite"


def _is_nonfinite(value: Any) -> bool:
    tensors = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(t, Tensor) and t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors)


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Check every module's output and the gradient of its output."""
    watch = Watch()

    def observe(name: str, module: nn.Module) -> list[Any]:
        def forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if watch.forward is None and _is_nonfinite(output):
                watch.forward = name

        def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if watch.backward is None and _is_nonfinite(grad_output):
                watch.backward = name

        return [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]

    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    hooks = [hook for name, module in leaves for hook in observe(name, module)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # at the embedding, as meant
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _about(item: RewardedGroup) -> str:
    rewards = ", ".join("missing" if r.value is None else f"{r.value:g}" for r in item.rewards)
    tokens = ", ".join(str(t.committed_tokens) for t in item.group.trajectories)
    return f"prompt '{item.group.prompt.problem.id}': rewards {rewards}; tokens {tokens}"


class Replay:
    """A run's policy and learner, set back to before the skipped step as often as needed."""

    def __init__(self, config: Config, skipped: SkippedStep) -> None:
        self._step, self._policy = skipped, load_policy(config.model)
        self._learner = Learner(
            self._policy, build_objective(config.objective), config, updates=max(1, skipped.update + 1)
        )

    def learn(self, batch: Sequence[RewardedGroup]) -> str | None:
        """What is not finite in these groups alone and where it comes from; None where all is well."""
        self._learner.optimizer.load(self._step.weights, {})
        with watching(self._policy.model) as watch:
            try:
                self._learner.learn(batch, self._step.update)
            except NonFiniteNumbers as found:
                group = found.finding.group
                prompt_id = None if group is None else batch[group].group.prompt.problem.id
                return f"{found.finding.sentence(prompt_id)}: {watch.words()}"
        return None


def chosen_step(run: Path, step: int | None) -> int:
    """The step to replay: the newest that is kept, or the one that was asked for."""
    kept = skipped_steps(run)
    if not kept and (run / "sick").is_dir():
        raise UserError(
            f"{run} keeps skipped steps in the format of an earlier version (sick/): replay them with that one"
        )
    if not kept:
        raise UserError(f"{run} has skipped no step: there is nothing to replay")
    if step is not None and step not in kept:
        raise UserError(f"{run} keeps no skipped step {step}; it keeps {', '.join(map(str, kept))}")
    return kept[0] if step is None else step


def replay(run: Path, step: int | None, say: Callable[[str], None], *, trusted: Sequence[str] = ()) -> None:
    """Learn the skipped step again, whole and group by group, and say what is found.

    UserError where the run's config names code that is not e3rl's and not ``trusted``: the run may come from elsewhere.
    """
    step, config = chosen_step(run, step), read_config(run)
    require_trust(foreign_code(config), run / "config.toml", trusted)
    skipped = read_skipped(run, step)
    say(f"step {skipped.step} was skipped: {skipped.text}")
    torch.manual_seed(0)
    again = Replay(config, skipped)
    whole = again.learn(skipped.batch)
    say(f"learnt again as a whole: {whole or 'all is well: here these numbers are finite (is it another machine?)'}")
    for item in skipped.batch:
        say(f"{_about(item)}: {again.learn([item]) or 'well'}")
