"""DeepSpeed's ZeRO-2 and ZeRO-3 behind the learner's passes and optimizer. Imported only where ``train.parallel`` asks for it.

DeepSpeed's engine wraps one module that scores a row, output matrix included: so it sees every weight that a pass uses.
It averages gradients over ranks where losses carry the whole step's totals: losses are multiplied by the number of ranks.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import ModulePasses, WholePass
from e3rl.config import TrainConfig
from e3rl.engine.torch.recorded import allocates
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.train.checkpoint import LazyTensors
from e3rl.train.optimizer import adamw, fitting

_MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 5 * 10**8
"""Elements exchanged at once, DeepSpeed's own default."""


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        if error.name != "deepspeed":
            raise UserError(f"DeepSpeed is installed and can't be imported: {error}") from error
        raise UserError(
            "train.parallel = 'deepspeed-…' needs DeepSpeed: pip install 'e3rl[deepspeed]'; or take zero2 or fsdp2, which are "
            "PyTorch's own"
        ) from None
    if device.type == "cpu":
        # an unused inference operation that takes minutes to compile and fails in a folder with a space
        deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    return deepspeed


def _settings(policy: Policy, config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches, schedule and random numbers stay e3rl's."""
    stage = {"deepspeed-zero2": 2, "deepspeed-zero3": 3}[config.parallel]
    trained = [p for _, p in policy.trainable()]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the learner ends a step
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": any(p.dtype == torch.bfloat16 for p in policy.model.parameters())},
        "data_types": {"grad_accum_dtype": "fp32"},  # in bfloat16 512 additions lose several percent
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2,
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in trained)),
            # norms and biases stay whole, matrices are divided
            "stage3_param_persistence_threshold": max((p.numel() for p in trained if p.ndim < 2), default=0),
        },
    }


def start_engine(policy: Policy, config: TrainConfig, ranks: Ranks) -> Any:
    """DeepSpeed's engine around the model, whose parameters it takes over in place. An empty model is filled first."""
    deepspeed = _import_deepspeed(policy.device)
    if "managed_gradient_accumulation" not in dir(deepspeed.DeepSpeedEngine):
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is too old: it can't leave the end of a step to the trainer. "
            "pip install --upgrade 'e3rl[deepspeed]'"
        )
    settings = _settings(policy, config)
    if policy.files is not None:
        ranks.attempt(lambda: policy.fill())
    optimizer = adamw([p for _, p in policy.trainable()], config)
    engine, *_ = deepspeed.initialize(
        model=WholePass(policy.model), optimizer=optimizer, config=settings, dist_init_required=True
    )
    return engine


class EnginePasses(ModulePasses):
    """Passes through DeepSpeed's engine, which brings weights together and divides gradients as it goes."""

    def __init__(self, engine: Any, model: Any) -> None:
        super().__init__({model: engine})
        self._engine = engine

    @allocates
    def backward(self, loss: Tensor) -> None:
        """See `Passes.backward`."""
        self._engine.backward(loss * self._engine.dp_world_size)


class DeepSpeedOptimizer:
    """AdamW behind DeepSpeed's engine. What it saves is what every other way to train saves."""

    def __init__(self, engine: Any, policy: Policy, ranks: Ranks) -> None:
        self._engine, self._ranks = engine, ranks
        self._zero = engine.optimizer
        self._parameters = dict(policy.trainable())
        self._adamw = [_blank_moments(self._zero, master) for master in _masters(self._zero)]
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            # ZeRO-2 would do it in the middle of the first step and lose all parameter groups but one
            self._zero._lazy_init_hp_params_optimizer_state()
        self.nonfinite: tuple[str, ...] = ()

    @allocates
    def step(self, rate: float) -> float:
        """One update; DeepSpeed leaves all untouched where the norm is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return norm if self._engine.was_step_applied() else math.inf

    def weights(self) -> Mapping[str, Tensor]:
        """The float32 weights, brought together one by one."""
        return LazyTensors(self._parameters, self._weight)

    def state(self) -> Mapping[str, Tensor]:
        """AdamW's moments and step counts, brought together one by one."""
        keys = ("step", *_MOMENTS)
        return LazyTensors((f"{name}/{key}" for name in self._parameters for key in keys), self._moment)

    def _weight(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(self._parameters[name])
        return found

    def _moment(self, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        name, _, which = key.rpartition("/")
        if which == "step":
            return self._adamw[0]["step"]
        found: Tensor = safe_get_full_optimizer_state(self._parameters[name], which)
        return found

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of what any number of ranks saved."""
        import deepspeed

        for name, tensor in fitting(weights, {name: _shape(p) for name, p in self._parameters.items()}):
            parameter = self._parameters[name]
            whole = tensor.to(parameter.device)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)
            self._put(parameter, whole, None)
        for entry in self._adamw:
            entry["step"].fill_(next((float(state[key]) for key in state if key.endswith("/step")), 0.0))
        for name, parameter in self._parameters.items():
            for key in _MOMENTS:
                moment = state.get(f"{name}/{key}", torch.zeros(_shape(parameter)))
                self._put(parameter, moment.to(parameter.device), key)

    def _put(self, parameter: nn.Parameter, whole: Tensor, key: str | None) -> None:
        """Take this rank's part of a float32 weight, or of one of its moments."""
        if not hasattr(parameter, "ds_tensor"):  # ZeRO-2
            parameter.set_full_hp_param(whole, key)  # type: ignore[attr-defined]
            return
        size = parameter.ds_tensor.numel()  # type: ignore[operator]
        padded = whole.flatten().new_zeros(size * self._ranks.world)
        padded[: whole.numel()] = whole.flatten()
        self._zero.set_local_hp_param(padded[size * self._ranks.rank :][:size], parameter, key)


def _shape(parameter: Any) -> torch.Size:
    """The whole parameter's shape, of which ZeRO-3 leaves nothing in place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _masters(zero: Any) -> list[Tensor]:
    """DeepSpeed's flat float32 weights, by which AdamW knows its state."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        found: list[Tensor] = zero.fp32_partitioned_groups_flat
        return found
    return [*zero.single_partition_of_fp32_groups]


def _blank_moments(zero: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one of them as its first step would begin it: so it is there to be read and filled."""
    zero.state[master] = {"step": torch.tensor(0.0), **{key: torch.zeros_like(master) for key in _MOMENTS}}
    found: dict[str, Tensor] = zero.state[master]
    return found
