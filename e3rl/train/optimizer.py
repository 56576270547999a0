"""Optimizers over float32 master weights, whatever type the model computes in, and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.config import TrainConfig
from e3rl.engine.torch.recorded import allocates
from e3rl.errors import UserError
from e3rl.train.checkpoint import load_optimizer_tensors, optimizer_tensors


def learning_rate(config: TrainConfig, update: int, updates: int) -> float:
    """Rate of optimizer update ``update`` (from 0) of ``updates``: linear warm-up, then the configured decay."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    left = (updates - update) / max(1, updates - warmup)
    share = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return config.learning_rate * share[config.lr_scheduler_type]


def by_kind(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices, and norms and biases: AdamW's two groups, in the order that it goes through them."""
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


def adamw(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW as the settings describe it: matrices decay; norms and biases don't."""
    matrices, others = by_kind(parameters)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw_8bit":
        return _eight_bit()(groups, **settings)  # type: ignore[no-any-return]
    if config.optimizer == "adamw_fused":
        return torch.optim.AdamW(groups, **settings, fused=True)
    # one parameter after the other: all at once, as on a GPU by default, holds another float32 copy
    return torch.optim.AdamW(groups, **settings, foreach=False)


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("train.optimizer = 'adamw_8bit' needs bitsandbytes: pip install 'e3rl[8bit]'") from None
    return AdamW8bit


_EMBEDDINGS = re.compile(r"embed|lm_head|\bwte\b|\bwpe\b|\boutput\.weight$")


def muon_takes(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter: a matrix that is neither an embedding nor the output matrix."""
    return parameter.ndim == 2 and not _EMBEDDINGS.search(name)


def muon(matrices: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Muon with updates of AdamW's size, so that learning rates and weight decay mean the same."""
    return torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


Named = Sequence[tuple[str, nn.Parameter]]


def build_optimizers(named: Named, config: TrainConfig) -> list[tuple[torch.optim.Optimizer, list[str]]]:
    """What ``train.optimizer`` names: one optimizer, or Muon with AdamW for the rest, each with its parameters' names in the
    order that it numbers their state."""
    of_muon = [(n, p) for n, p in named if config.optimizer == "muon" and muon_takes(n, p)]
    taken = {n for n, _ in of_muon}
    rest = [(n, p) for n, p in named if n not in taken]
    names = [n for n, p in rest if p.ndim >= 2] + [n for n, p in rest if p.ndim < 2]
    found: list[tuple[torch.optim.Optimizer, list[str]]] = []
    if of_muon:
        found.append((muon([p for _, p in of_muon], config), [n for n, _ in of_muon]))
    return [*found, (adamw([p for _, p in rest], config), names)] if rest else found


_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
"""bitsandbytes: smaller parameters keep float32 moments; others one float32 scale a block."""


def state_width(name: str, parameter: Tensor, optimizer: str) -> float:
    """Bytes that an optimizer keeps for each entry of a parameter."""
    if optimizer == "muon" and muon_takes(name, parameter):
        return 4.0
    if optimizer == "adamw_8bit" and parameter.numel() >= _EIGHT_BIT_FROM:
        return 2 * (1 + 4 / _EIGHT_BIT_BLOCK)
    return 8.0


def scratch_bytes(entries: Sequence[int]) -> int:
    """Bytes that AdamW's update of parameters of so many entries makes for itself, one parameter after the other: root and
    quotient of its second moment, and the quotient of the one before, which PyTorch lets go of later."""
    return max((4 * (before + 2 * now) for before, now in zip((0, *entries), entries, strict=False)), default=0)


def fitting(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Saved weights by name, in the order of ``shapes``. UserError where they are not those of a model with these."""
    strange = sorted(weights.keys() ^ shapes.keys())
    if strange:
        raise UserError(
            f"the checkpoint is of another model: {len(strange)} weights are in one of the two alone, {strange[0]} for one"
        )
    for name, shape in shapes.items():
        tensor = weights[name]
        if tensor.shape != shape:
            raise UserError(
                f"the checkpoint is of another model: {name} has shape {tuple(tensor.shape)} there and {tuple(shape)} here"
            )
        yield name, tensor


class GradientSums:
    """Gradients of many backward passes, added up in float32: 512 additions in bfloat16 lose several percent.

    A bfloat16 gradient exists from its computation to the end of autograd's hook, one parameter at a time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._add)

    @torch.no_grad()
    def _add(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            return
        if parameter in self._sums:
            self._sums[parameter].add_(gradient)  # type: ignore[index]
        else:
            self._sums[parameter] = gradient.float()  # type: ignore[index]

    @torch.no_grad()
    def scale(self, parameter: nn.Parameter, factor: float) -> None:
        """Multiply what was added up so far."""
        found = self._sums.get(parameter) if parameter.dtype != torch.float32 else parameter.grad
        if found is not None:
            found.mul_(factor)

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """The sum of a parameter's gradients since it was last taken, in float32."""
        if parameter.dtype != torch.float32:
            self._add(parameter)  # what was set by hand
            return self._sums.pop(parameter, None)
        gradient, parameter.grad = parameter.grad, None
        return gradient


class MasterOptimizer:
    """Steps float32 weights and copies them into the model: an update of 1e-6 is lost on a bfloat16 weight."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], config: TrainConfig) -> None:
        self._names = [name for name, _ in parameters]
        self._shapes = {name: p.shape for name, p in parameters}
        self._model = [p for _, p in parameters]
        self._masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self._model]
        self._sums = GradientSums(self._model)
        self._max_norm = config.max_grad_norm
        self.nonfinite: tuple[str, ...] = ()
        """Parameters whose gradients were NaN or infinite in the last step."""
        self._optimizers = build_optimizers(list(zip(self._names, self._masters, strict=True)), config)

    @allocates
    def step(self, rate: float) -> float:
        """Apply the gathered gradients at this learning rate; returns their norm. NaN or inf leaves all untouched."""
        self._collect()
        norm = self._clip()
        self.nonfinite = () if math.isfinite(norm) else self._nonfinite_gradients()
        if math.isfinite(norm):
            self._apply(rate)
            self._publish()
        for master in self._masters:
            master.grad = None
        return norm

    def scale(self, factor: float) -> None:
        """Multiply the gathered gradients."""
        for parameter in self._model:
            self._sums.scale(parameter, factor)

    def _apply(self, rate: float) -> None:
        """Update the float32 weights from their gradients."""
        for optimizer, _ in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def _collect(self) -> None:
        """Move the gathered gradients to the float32 weights."""
        for parameter, master in zip(self._model, self._masters, strict=True):
            master.grad = self._sums.take(parameter)

    def _clip(self) -> float:
        """Scale gradients down to the largest allowed norm; returns the norm before."""
        norm = nn.utils.get_total_norm([m.grad for m in self._masters if m.grad is not None])
        if bool(norm.isfinite()):
            nn.utils.clip_grads_with_norm_(self._masters, self._max_norm, norm)
        return float(norm)

    def _nonfinite_gradients(self) -> tuple[str, ...]:
        named = zip(self._names, self._masters, strict=True)
        return tuple(name for name, m in named if m.grad is not None and not bool(m.grad.isfinite().all()))

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self._model, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights by name."""
        return dict(zip(self._names, self._masters, strict=True))

    def state(self) -> Mapping[str, Tensor]:
        """The optimizer's moments and step counts, flat, by parameter name."""
        return {key: t for found in self._optimizers for key, t in optimizer_tensors(*found).items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restore what `weights` and `state` returned."""
        masters = dict(zip(self._names, self._masters, strict=True))
        for name, tensor in fitting(weights, self._shapes):
            if name in masters:
                masters[name].copy_(tensor)
        self._publish()
        for optimizer, names in self._optimizers:
            known = set(names)
            own = {key: state[key] for key in state if key.rpartition("/")[0] in known}
            load_optimizer_tensors(optimizer, names, own)
