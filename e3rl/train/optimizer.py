"""AdamW over float32 master weights, whatever type the model computes in, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

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


def adamw(parameters: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as the settings describe it: matrices decay; norms and biases don't."""
    matrices, others = by_kind(parameters)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        foreach=False,  # one parameter after the other: the fused default on a GPU holds another float32 copy
    )


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
        self._adamw = adamw(self._masters, config)
        # AdamW numbers its state by position in its groups, not by position in the model
        self._state_names = [n for n, m in zip(self._names, self._masters, strict=True) if m.ndim >= 2]
        self._state_names += [n for n, m in zip(self._names, self._masters, strict=True) if m.ndim < 2]

    @allocates
    def step(self, rate: float) -> float:
        """Apply the gathered gradients at this learning rate; returns their norm. NaN or inf leaves all untouched."""
        self._collect()
        norm = self._clip()
        self.nonfinite = () if math.isfinite(norm) else self._nonfinite_gradients()
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self._publish()
        for master in self._masters:
            master.grad = None
        return norm

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
        """AdamW's moments and step counts, flat, by parameter name."""
        return optimizer_tensors(self._adamw, self._state_names)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restore what `weights` and `state` returned."""
        masters = dict(zip(self._names, self._masters, strict=True))
        for name, tensor in fitting(weights, self._shapes):
            if name in masters:
                masters[name].copy_(tensor)
        self._publish()
        load_optimizer_tensors(self._adamw, self._state_names, state)
