"""Every setting of a run, by section: type, default, range, meaning, and where the default comes from.

`e3rl.config` makes them from recipes. Importing this module must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from e3rl.errors import UserError
from e3rl.sections import shown

PAPER = "paper, app. D"
PAPER_METHOD = "paper, method"
LARGEST_WEIGHT = 1e6
"""Largest weight or threshold: sums and products of a few of them stay far from infinity."""


def setting(
    default: Any,
    help: str,
    *,
    source: str = "ours",
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
) -> Any:
    """A config field: its default, meaning, where the default comes from, and its allowed range.

    ``min`` and ``max`` are inclusive, ``above`` is an exclusive lower bound.
    """
    told = {"help": help, "source": source, "min": min, "max": max, "above": above}
    return (
        field(default_factory=dict, hash=False, metadata=told)
        if default == {}
        else field(default=default, metadata=told)
    )


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    name: str = setting("run", "name of the run; its directory is output_dir/name")
    output_dir: str = setting("runs", "directory that holds run directories")
    seed: int = setting(0, "seed of every random draw", min=0)


@dataclass(frozen=True)
class ModelConfig:
    """The policy: any decoder-only causal language model of the transformers library."""

    path: str = setting(
        "lab",
        "a directory or hub id; 'lab', 'lab-tools' and 'lab-maze' are embedded, 'smollm2' is SmolLM2-135M-Instruct",
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "type of the weights in training and rollout")
    device: str = setting("auto", "'auto' takes a GPU where there is one; or 'cpu', 'cuda', 'cuda:1'")
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the model; off unless you trust its author"
    )
    quantization: Literal["none", "nf4", "int8"] = setting(
        "none", "weights under LoRA adapters in 4 or 8 bits, by bitsandbytes (pip install 'e3rl[8bit]')"
    )
    lora_r: int = setting(0, "rank of LoRA adapters; 0 trains all weights", min=0, max=65536)
    lora_alpha: int = setting(64, "LoRA scale", source="ERPO paper", min=1)
    lora_dropout: float = setting(0.0, "LoRA dropout", min=0, max=0.9)
    lora_target_modules: tuple[str, ...] = setting(
        ("all-linear",),
        "modules and parameters of experts that get adapters, as PEFT names them; empty: PEFT's choice for the model",
        source="ERPO paper",
    )


@dataclass(frozen=True)
class DataConfig:
    """Problems to train on and to evaluate on."""

    train: str = setting("lab:chain", "training data: JSONL, JSON, Parquet or CSV file, hub id, or lab:FAMILY[:LEVEL]")
    mixture: Mapping[str, Any] = setting(
        {}, "several sources in place of train, each with its weight: {'a.jsonl' = 3, 'OWNER/NAME' = 1}"
    )
    eval: tuple[str, ...] = setting(("auto",), "held-out data; 'auto': the held-out half of lab families; []: none")
    directory: str = setting("", "directory with files of the benchmarks named in train or eval; empty: from the hub")
    train_split: str = setting("train", "split of a hub dataset to train on")
    eval_split: str = setting("test", "split of a hub dataset to evaluate on")
    prompt_column: str = setting("prompt", "column with the prompt: a string or a list of chat messages")
    answer_column: str = setting("answer", "column with the reference answer")
    id_column: str = setting("id", "column with a unique id; rows without one are numbered")
    solution_column: str = setting("solution", "column with a full worked answer: what 'sft' trains on")
    transform: str = setting("", "function of a row, file.py:name: gives the row to use, or None to leave it out")
    system_prompt: str = setting("", "system message put before every prompt; empty: none")
    raw_prompts: bool = setting(False, "string prompts go to the model unchanged, without the chat template (TRL)")
    chat_template_kwargs: Mapping[str, Any] = setting({}, "arguments of the chat template: {enable_thinking = false}")
    train_limit: int = setting(0, "use only the first n training problems; 0: all", min=0)
    filter_overlong_prompts: bool = setting(False, "leave out training prompts that are too long, and say how many")
    max_prompt_length: int = setting(0, "longest prompt in tokens, else an error; 0: what the context leaves", min=0)

    @property
    def sources(self) -> dict[str, float]:
        """What is trained on, with the share of a step's prompts that comes from each."""
        total = sum(self.mixture.values())
        return {name: weight / total for name, weight in self.mixture.items()} if self.mixture else {self.train: 1.0}

    @property
    def trained_on(self) -> str:
        """The training sources, for messages."""
        return " + ".join(self.sources)

    def __post_init__(self) -> None:
        for name, weight in self.mixture.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= LARGEST_WEIGHT:
                raise UserError(f"data.mixture: the weight of '{name}' is {shown(weight)}; it must be a number above 0")
        if self.mixture and self.train not in ("", "lab:chain"):
            raise UserError(
                "data.train and data.mixture are both set: a mixture names all that is trained on (data.train='')"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are generated."""

    engine: str = setting("torch", "'torch' (slot KV cache), 'vllm', 'recompute' (slow oracle), or module:name")
    erase: bool = setting(True, "judge segments and erase (E3RL rollouts); false: plain rollouts")
    num_generations: int = setting(8, "siblings of one prompt, G", source=PAPER, min=1)
    segment_length: int = setting(1024, "L, tokens of a segment", source=PAPER, min=1)
    max_segments: int = setting(8, "N, most segments of a response", source=PAPER, min=1)
    max_completion_length: int = setting(0, "most response tokens; 0: N*L", min=0)
    boundary: Literal["length", "surprise", "entropy"] = setting(
        "length",
        "where a segment ends: after L tokens, or before that behind a token whose -log p ('surprise') or entropy is above "
        "boundary_level",
    )
    boundary_level: float = setting(1.0, "nats; e3rl calibrate says what share of tokens is above which", min=0)
    min_segment_length: int = setting(1, "fewest tokens of a segment that boundary_level ends", min=1)
    temperature: float = setting(1.0, "sampling temperature", source=PAPER, min=0.001, max=1000)
    top_p: float = setting(1.0, "nucleus sampling; 1 keeps all (the paper samples at 0.9)", above=0, max=1)
    top_k: int = setting(0, "sample from the k likeliest tokens; 0 keeps all (the paper samples at 50)", min=0)
    max_rows: int = setting(64, "sequences decoded together", min=1, max=2**20)
    cache_rows: int = setting(
        0, "sequences held in the KV cache, waiting ones included; 0: twice max_rows", min=0, max=2**20
    )
    kv_budget: int = setting(
        0,
        "largest KV cache in MiB; further rows wait for room (vLLM recomputes them); 0: no limit",
        min=0,
    )
    staleness: int = setting(0, "steps by which rollouts may start early, in parallel with training", min=0, max=16)
    vllm_tensor_parallel_size: int = setting(1, "GPUs that one vLLM engine spreads a model over", min=1)
    vllm_sleep: bool = setting(False, "free vLLM's memory on the GPU while this process trains on it")
    workers: int = setting(0, "rollout workers on Ray; 0: this process generates", min=0)
    worker_gpus: float = setting(0.0, "GPUs that Ray gives one rollout worker", min=0)
    worker_timeout: float = setting(600.0, "seconds without a sign of life after which a worker is replaced", above=0)
    address: str = setting("", "the Ray cluster to join, ray://HOST:PORT, HOST:PORT or 'auto'; empty: one started here")
    servers: tuple[str, ...] = setting((), "rollout servers to generate on (http://HOST:PORT), in place of Ray")

    @property
    def completion_limit(self) -> int:
        """Most tokens of a response: N*L, or max_completion_length where that is lower."""
        full = self.segment_length * self.max_segments
        return min(full, self.max_completion_length) if self.max_completion_length else full


@dataclass(frozen=True)
class ErasureConfig:
    """Uncertainty (eq 10-13), threshold (eq 14-18) and erasure (eq 23-26). The paper gives no values but max_erasures."""

    metric: str = setting(
        "e3rl",
        "how U is measured: 'e3rl' (eq 13), 'value' (a critic that learns from the rewards), or module:name",
        source=PAPER_METHOD,
    )
    max_erasures: int = setting(5, "E_max, erasures allowed per segment", source=PAPER, min=0)
    base_weight: float = setting(
        1.0, "weight of the smoothed entropy in U", source=PAPER_METHOD, min=0, max=LARGEST_WEIGHT
    )
    gradient_weight: float = setting(
        0.5, "lambda_G, weight of the mean absolute entropy step", min=0, max=LARGEST_WEIGHT
    )
    extremum_weight: float = setting(
        0.1, "lambda_M, weight of the largest entropy against the group's", min=0, max=LARGEST_WEIGHT
    )
    perturbation_weight: float = setting(
        0.0, "lambda_P, weight of the mean perturbation; above 0 the method is E3RL+eps", min=0, max=LARGEST_WEIGHT
    )
    entropy_distribution: Literal["full", "truncated"] = setting(
        "full", "entropy before ('full') or after top-k/top-p ('truncated')", source="paper, eq 2"
    )
    entropy_temperature: float = setting(
        0.0,
        "temperature of the measured entropies and perturbations, whatever sampling uses; 0: rollout.temperature (eq 2)",
        min=0,
        max=1000,
    )
    length_exponent: float = setting(
        0.0,
        "U is multiplied by the segment's tokens to this power: 0 gives means (eq 13), 1 sums",
        min=0,
        max=1,
    )
    smoothing_window: int = setting(1, "W of eq 11: causal, so W earlier segments", min=0)
    smoothing_decay: float = setting(0.5, "alpha of eq 11", above=0, max=1)
    entropy_reference: Literal["group", "batch"] = setting("group", "where mu_E and sigma_E of eq 13 come from")
    baseline: Literal["group", "quantile", "reservation", "reference", "static"] = setting(
        "group",
        "B_n from mean and spread of the siblings' first candidates, from their quantile, from what a retry is worth to the "
        "critic (metric = 'value'), from saved calibration statistics, or static_baseline",
    )
    retry_cost: float = setting(
        1.0,
        "price of a retry where baseline = 'reservation': 1 is the right answers that its tokens give on average",
        min=0,
        max=LARGEST_WEIGHT,
    )
    quantile: float = setting(
        0.5, "share of the first candidates that stay below B_n where baseline = 'quantile'", min=0, max=1
    )
    static_baseline: float = setting(
        1.0, "B_n where baseline = 'static'; 0: not known, refused", min=0, max=LARGEST_WEIGHT
    )
    min_siblings: int = setting(2, "with fewer siblings at a segment the group's last B stays in force", min=2)
    kappa0: float = setting(1.0, "kappa_0 of eq 16", min=-LARGEST_WEIGHT, max=LARGEST_WEIGHT)
    kappa1: float = setting(0.0, "kappa_1 of eq 16", min=-LARGEST_WEIGHT, max=LARGEST_WEIGHT)
    sigma0: float = setting(0.1, "sigma_0 of eq 16", above=0, max=LARGEST_WEIGHT)
    eta: float = setting(0.05, "eta of eq 17: how fast the threshold rises with attempts", min=0, max=LARGEST_WEIGHT)
    delta: float = setting(1.5, "delta of eq 17: growth order of the attempt penalty", above=0, max=100)
    rho: float = setting(
        0.1,
        "rho of eq 18: strength of the history modulation; above 0, nearly equal siblings are erased after a "
        "history of low entropy",
        min=0,
        max=0.99,
    )
    first_modulation: float = setting(
        1.0, "phi at the first segment, which has no history", above=0, max=LARGEST_WEIGHT
    )
    commit_anyway: float = setting(
        0.0,
        "c, probability that a candidate above its threshold is committed all the same: it bounds train.selection_cap's "
        "weights, and what would be erased gets rewards",
        min=0,
        max=0.99,
    )
    on_exhausted: Literal["last", "least_uncertain"] = setting(
        "last", "which attempt is committed when the budget is spent", source=PAPER_METHOD
    )

    @property
    def strictness(self) -> str:
        """Name of the setting that controls how much is erased: a larger value erases less."""
        names = {"quantile": "quantile", "reservation": "retry_cost", "static": "static_baseline"}
        return names.get(self.baseline, "kappa0")

    def __post_init__(self) -> None:
        if self.baseline == "reservation" and self.metric != "value":
            raise UserError(
                f"erasure.baseline = 'reservation' needs U in log odds, and erasure.metric = '{self.metric}' has another scale: "
                "set erasure.metric = 'value'"
            )
        if 0 < self.entropy_temperature < 0.001:
            raise UserError("erasure.entropy_temperature must be 0 or at least 0.001")
        if self.entropy_temperature and self.entropy_distribution == "truncated":
            raise UserError(
                "erasure.entropy_distribution = 'truncated' is the distribution that is drawn from, "
                "so erasure.entropy_temperature must be 0"
            )


@dataclass(frozen=True)
class FilterConfig:
    """Which groups are trained on, decided by their rewards; it works with every objective (dynamic sampling)."""

    name: str = setting(
        "none",
        "'none' keeps all groups, 'nonzero_spread' those whose rewards differ, 'mixed_accuracy' those with right and "
        "wrong answers (DAPO)",
    )
    max_refills: int = setting(
        8, "times that a step may roll out further prompts to replace dropped groups; 0: never", min=0
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised. The keys beside ``name`` are the options of that objective (`e3rl objectives` lists them)."""

    name: str = setting("e3rl", "an objective's name, or module:name")
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "options of the named objective"})


@dataclass(frozen=True)
class RewardsConfig:
    """How responses are rewarded."""

    functions: tuple[str, ...] = setting(
        ("math",), "built-in names, or module:name or file.py:name; TRL and verl signatures"
    )
    weights: tuple[float, ...] = setting((), "weight of each function; empty: 1 each")
    overlong: bool = setting(False, "add DAPO's length penalty: from 0 to -1 over the last fifth of the length limit")
    workers: int = setting(1, "processes that check answers", min=1)
    timeout: float = setting(5.0, "seconds one answer may take to check; then the worker is killed", above=0)
    isolate: bool = setting(False, "run your own reward functions in the worker processes too")
    unboxed: Literal["last", "stated", "none"] = setting(
        "last", "math: what is the answer without a box (docs/answers.md)"
    )
    cut_off_needs_box: bool = setting(False, "math: a response cut off at the length limit is wrong without a box")
    judge: Mapping[str, Any] = setting({}, "judge: its endpoint, model, rubric and limits (docs/rewards.md)")
    reward_model: Mapping[str, Any] = setting({}, "reward_model: its path, label and batch (docs/rewards.md)")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    limit: int = setting(0, "use only n held-out problems, evenly spread over all; 0: all", min=0)
    num_samples: int = setting(8, "samples of each problem, the k of Avg@k and Pass@k", min=1)
    temperature: float = setting(1.0, "sampling temperature", min=0.001, max=1000)
    top_p: float = setting(1.0, "nucleus sampling", above=0, max=1)
    top_k: int = setting(0, "top-k sampling; 0 keeps all", min=0)
    erasable: bool = setting(True, "also evaluate erasable decoding, beside plain")


@dataclass(frozen=True)
class EnvironmentsConfig:
    """Tools and multi-turn rollouts. The model's calls are run, and its response continues after their results."""

    factory: str = setting(
        "",
        "the environment: 'file.py:Name' as for TRL (a class, or a dict of several), calculator, python, files, books; "
        "empty: none",
    )
    max_turns: int = setting(8, "most turns of a response whose calls are run; a further call ends it", min=1)
    max_calls: int = setting(16, "most calls run in a turn; further ones return an error", min=1)
    timeout: float = setting(
        30.0, "seconds for each call of a tool; after them the response ends without a reward", above=0
    )
    isolate: bool = setting(
        False,
        "run each environment in its own process, killed if a call takes too long or this process ends",
    )
    erase: str = setting(
        "none",
        "evidence against a turn, from its calls: none, errors (a call failed), empty (or returned nothing), or a function "
        "'file.py:name' of the results that returns 0 to 1",
    )
    erase_threshold: float = setting(
        0.5, "a turn with more evidence against it is erased, with its observation", min=0, max=1
    )
    max_turn_erasures: int = setting(1, "erasures of one turn after its observation", min=0)
    state: Literal["snapshot", "deepcopy"] = setting(
        "snapshot", "how an environment is rolled back: by its own snapshot() and restore(), or by deep copies"
    )
