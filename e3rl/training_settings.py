"""The settings of the optimisation: section ``[train]`` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from e3rl.settings import LARGEST_WEIGHT, PAPER, setting


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    steps: int = setting(0, "optimisation steps; 0: as many as epochs give", min=0)
    max_tokens: int = setting(0, "stop after this many generated tokens, erased ones included; 0: no limit", min=0)
    epochs: float = setting(2.0, "passes over the training problems where steps = 0", source=PAPER, above=0)
    prompts_per_step: int = setting(16, "prompts (groups) of one step (the paper's batch: 128)", min=1)
    num_iterations: int = setting(1, "passes over one batch of rollouts (mu)", min=1)
    minibatches: int = setting(1, "optimizer steps that one pass is divided into, by whole groups", min=1)
    micro_batch_tokens: int = setting(16384, "tokens that go through the model together; there is no padding", min=1)
    mask_truncated_completions: bool = setting(
        False, "leave responses cut off at the length limit out of the loss, not out of the advantages (TRL, DAPO)"
    )
    learning_rate: float = setting(1e-6, "peak learning rate", source=PAPER, above=0, max=1)
    warmup_steps: int = setting(0, "warm-up, in optimizer updates; 0: by warmup_ratio", min=0)
    warmup_ratio: float = setting(
        0.05,
        "warm-up, as a fraction of train.steps, also if max_tokens ends the run earlier",
        source=PAPER,
        min=0,
        max=1,
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = setting("constant", "learning rate after the warm-up")
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit", "muon"] = setting(
        "adamw",
        "PyTorch's AdamW, its fused kernel, bitsandbytes' with 8-bit moments (pip install 'e3rl[8bit]'), or Muon for "
        "layers' matrices and AdamW for the rest",
    )
    weight_decay: float = setting(0.0, "weight decay of matrices", min=0, max=1)
    adam_beta1: float = setting(0.9, "AdamW beta 1", min=0, max=0.9999)
    adam_beta2: float = setting(0.999, "AdamW beta 2", min=0, max=0.99999)
    router_loss: float = setting(
        0.0, "weight of the load-balancing loss that a mixture of experts defines; 0: without it", min=0
    )
    max_grad_norm: float = setting(1.0, "largest gradient norm; larger is scaled down", above=0)
    importance_correction: Literal[
        "none", "token_truncate", "token_mask", "segment_truncate", "segment_mask", "sequence_truncate", "sequence_mask"
    ] = setting(
        "none", "weight these by trainer's over engine's probability; above the cap: the cap (truncate) or 0 (mask)"
    )
    importance_cap: float = setting(2.0, "largest importance weight", above=0)
    selection_cap: float = setting(
        0.0,
        "weight committed segments of erasing rollouts by 1/w, at most this, w being how much oftener erasing commits such a "
        "segment than plain decoding does; 0: all alike",
        min=0,
        max=LARGEST_WEIGHT,
    )
    parallel: Literal["none", "ddp", "zero1", "zero2", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"] = setting(
        "none",
        "how several ranks train together: ddp replicates, zero1 divides AdamW's state, zero2 and fsdp2 also weights; "
        "or DeepSpeed's",
    )
    context_parallel: int = setting(
        1,
        "ranks that divide the tokens of each row among them, for long responses; the others divide the groups",
        min=1,
    )
    rank_timeout: int = setting(
        3600,
        "seconds that a rank waits for another; it must cover a step's rollouts (with staleness, a worker's evaluation too)",
        min=1,
    )
    workers: int = setting(0, "training workers on Ray, each one rank; 0: this process or torchrun's", min=0)
    worker_gpus: float = setting(0.0, "GPUs that Ray gives one training worker", min=0)
    max_skipped_steps: int = setting(
        3,
        "steps in a row that may be skipped because of NaN, infinite or exploding numbers; one more stops the run",
        min=0,
    )
    max_log_ratio: float = setting(
        40.0, "largest |log| of a token's probability ratio to the old policy; beyond it the step is skipped", above=0
    )
    max_kl: float = setting(
        1000.0, "largest mean KL (k3) of a response to the reference policy; beyond it the step is skipped", above=0
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")
    activation_offload: bool = setting(
        False, "hold activations in the machine's memory until the backward pass: less of the GPU's, more time"
    )
    eval_steps: int = setting(50, "evaluate every n steps; 0: only before and after", source=PAPER, min=0)
    save_steps: int = setting(50, "checkpoint every n steps; 0: only at the end", source=PAPER, min=0)
    save_total_limit: int = setting(2, "checkpoints to keep; 0: all", min=0)
    show_steps: int = setting(0, "print a sampled completion every n steps; 0: never", min=0)
    push_to_hub: str = setting(
        "", "hub repository OWNER/NAME that the finished model is uploaded to, private where it is new; empty: none"
    )
    report_to: tuple[str, ...] = setting((), "also log to: tensorboard, wandb, trackio, mlflow, swanlab")
