"""Writes docs/models.md: a tiny random model of each architecture, tried; ``--check`` compares.

python tools/models_page.py             build and try all (minutes) and write the page
python tools/models_page.py --check     exit 1 if the page is stale
python tools/models_page.py NAME …      print the rows of these architectures alone
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import logging
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from e3rl.engine.recompute import RecomputeEngine
from e3rl.engine.torch.engine import TorchEngine
from e3rl.engine.torch.fused import fusable
from e3rl.errors import UserError
from e3rl.testing.engine import EngineContract
from e3rl.testing.scripts import (
    ExtendRow,
    ReleaseRow,
    Rollback,
    Start,
    assert_same_transcript,
    play,
    random_script,
)
from e3rl.train.attribution import AttributionSettings, attribution_layers
from e3rl.train.packing import TrainSequence
from e3rl.train.scoring import require_scorable, score_sequences

VLLM = json.loads(Path(__file__).with_name("vllm_registry.json").read_text(encoding="utf-8"))
VLLM_WAYS = ("own", "transformers", "dropped")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
VOCABULARY, EOS, ROWS, LENGTH, WINDOW = 53, (0, 1), 6, 48, 5
SCRIPTS = tuple(range(6))  # seeds of what the engine is put through
TOLERANCE, TRAINING_TOLERANCE, SHARE_TOLERANCE = 1e-4, 1e-5, 1e-4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "sliding_window": WINDOW,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_n_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "state_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "index_topk": 5,
}
"""What is set where a config has it."""

_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_LATENT = {"num_key_value_heads": 4, "head_dim": ...}
_NO_IDS = {"pad_token_id": ..., "bos_token_id": ..., "eos_token_id": ...}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
    "hc_lowrank": 8,
}

OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bailing_hybrid": _LATENT | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere2": _MIXED,
    "cwm": _NO_IDS | _MIXED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "exaone4": _MIXED,
    "falcon": {"head_dim": ...},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8} | _MIXED,
    "gemma3n_text": {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4} | _SHARED_KEYS | _MIXED,
    "gemma4_text": {"head_dim": 8, "global_head_dim": 8, "sliding_window": WINDOW} | _SHARED_KEYS | _MIXED,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_oss": _MIXED,
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 2.0},
    "granitemoe": {"logits_scaling": 2.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": {"logits_scaling": 2.0},
    "kimi_linear": _LATENT
    | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": WINDOW},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minicpm3": _LATENT,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "initializer_range": 0.1},
    "olmo3": _MIXED,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "phi3": {"pad_token_id": 0},
    "qwen4_exp_text": _INDEXED,
    "rwkv": {"attention_hidden_size": 32},
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beside that, or instead; ``...`` leaves the library's own."""

_NAMES = """
afmoe apertus arcee axk1 axk2 bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone
exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text
gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling_text internlm3 iquestcoder jais2 jamba
jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4_text mamba mamba2 mellum
mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral mpt
nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text recurrent_gemma rwkv
sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu zaya
"""
ARCHITECTURES = tuple(_NAMES.split())


def build(name: str) -> Any:
    """A tiny random model of an architecture, always the same, loaded as a run loads it: sdpa where it has that."""
    kind = CONFIG_MAPPING[name]
    defaults, own = kind(), OWN.get(name, {})
    settings = {key: value for key, value in SMALL.items() if key not in own and hasattr(defaults, key)} | own
    config = kind(**{key: value for key, value in settings.items() if value is not ...})
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    torch.manual_seed(7)
    try:
        model = model_class._from_config(config, attn_implementation="sdpa")
    except ValueError:  # of those that have none
        model = model_class._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a bias of zeros would hide that it is left out
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.float().eval()


@dataclass(frozen=True)
class Tried:
    """What was found of one architecture: each cell is 'exact', 'yes', '–' or why not. ``compared``: how many candidates."""

    name: str
    model_class: str
    engine: str
    compared: int
    fast: str
    training: str
    attribution: str
    vllm: str

    def line(self, notes: dict[str, int]) -> str:
        """The table row; reasons become numbers in ``notes``."""
        short = ("exact", "yes", "no", "–", *VLLM_WAYS)
        cells = [c if c in short else f"no ({notes.setdefault(c, len(notes) + 1)})" for c in self.cells()]
        compared = str(self.compared or "–")
        return f"| {self.name} | {' | '.join((cells[0], compared, *cells[1:]))} |"

    def cells(self) -> tuple[str, ...]:
        """What doesn't depend on how many scripts were run."""
        return self.engine, self.fast, self.training, self.attribution, self.vllm


def tried(name: str, scripts: Sequence[int] = SCRIPTS) -> Tried:
    """Build an architecture and try it, its engine by the scripts of these seeds."""
    model = build(name)
    (engine, compared), training = _engine(model, scripts), _training(model)
    attribution = "–" if training != "exact" else _attribution(model)
    kind, fast = type(model).__name__, "yes" if fusable(model) else "no"
    return Tried(name, kind, engine, compared, fast, training, attribution, VLLM["classes"].get(kind, "–"))


def _reason(model: Any, error: Exception) -> str:
    """The sentence without the class's name and what is said of every model, in one line."""
    sentence = str(error).split(". It serves")[0].split(". It trains")[0].replace(type(model).__name__, "the model")
    sentence = re.sub(r"\s+", " ", sentence.replace("|", "/"))
    sentence = re.sub(r"differ by (up to )?[-+.e\d]+", "differ", sentence)  # figures vary in their last digits
    return re.sub(r" \(allowed .*?\)", "", sentence)


def _engine(model: Any, scripts: Sequence[int] = SCRIPTS) -> tuple[str, int]:
    """The cell, and how many candidates were those of full forward passes."""

    def start() -> TorchEngine:
        return TorchEngine(model, eos_ids=EOS, max_rows=3, cache_rows=ROWS, max_length=LENGTH)

    def oracle() -> RecomputeEngine:
        return RecomputeEngine(model, eos_ids=EOS, cache_rows=ROWS, max_length=LENGTH)

    contract, compared = EngineContract(start, oracle, VOCABULARY, EOS, ROWS, LENGTH, TOLERANCE), 0
    try:
        for seed in scripts:
            script = random_script(seed, VOCABULARY)
            found = play(start(), script, contract)
            assert_same_transcript(found, play(oracle(), script, contract), TOLERANCE)
            compared += len(found)
    except UserError as error:
        return _reason(model, error), 0
    except AssertionError:
        return "NOT REFUSED, but its candidates differ from those of full forward passes", compared
    return "exact", compared


def _sequences() -> list[TrainSequence]:
    """Three responses that part after a shared start, longer than a window."""
    ids = torch.randint(2, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    other = torch.randint(2, VOCABULARY, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    responses = (ids[6:], [*ids[6:12], *other], [*ids[6:12], *other[:4], *ids[:6]])
    return [
        TrainSequence(
            tuple(ids[:6]),
            tuple(r),
            torch.zeros(len(r)).long(),
            torch.ones(len(r)).bool(),
            torch.zeros(len(r)),
            0,
            i,
            False,
        )
        for i, r in enumerate(responses)
    ]


@torch.no_grad()
def _training(model: Any) -> str:
    sequences = _sequences()
    try:
        require_scorable(model)
        found = score_sequences(model, sequences, temperature=1.0, token_budget=512)
    except UserError as error:
        return _reason(model, error)
    except Exception as error:  # as a run would meet it
        return f"NOT REFUSED, but raises {type(error).__name__}: {str(error).splitlines()[0]}"
    for scores, sequence in zip(found, sequences, strict=True):
        ids_1T = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        first = len(sequence.prompt_ids)
        logprobs_TV = model(input_ids=ids_1T, use_cache=False).logits[0, first - 1 : -1].log_softmax(-1)
        plain_T = logprobs_TV.gather(-1, ids_1T[0, first:, None])[:, 0]
        if not float((scores.logprobs_T - plain_T).abs().max()) <= TRAINING_TOLERANCE:
            return "NOT REFUSED, but packed log-probabilities differ from those of plain passes"
    return "exact"


@torch.no_grad()
def _attribution(model: Any) -> str:
    """Attention shares of a packed row against the matrices that the eager implementation returns."""
    try:
        settings = AttributionSettings(4, attribution_layers(model, "all"))
        sequences = _sequences()
        found = score_sequences(model, sequences, temperature=1.0, token_budget=512, attribution=settings)
    except UserError as error:
        return _reason(model, error)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for scores, sequence in zip(found, sequences, strict=True):
        expected_T = _eager_shares(eager, sequence, settings.window)
        if expected_T is None or scores.shares_T is None:
            return "the model returns no attention matrices to compare with"
        if not float((scores.shares_T - expected_T).abs().max()) <= SHARE_TOLERANCE:
            return "attention shares differ from those of the matrices that eager attention returns"
    return "exact"


def _eager_shares(model: Any, sequence: TrainSequence, window: int) -> Tensor | None:
    ids_1T = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    matrices = model(input_ids=ids_1T, use_cache=False, output_attentions=True).attentions
    if not matrices or any(m is None for m in matrices):
        return None
    received_T = torch.stack([m[0, :, -window:].mean((0, 1)) for m in matrices]).mean(0)[len(sequence.prompt_ids) :]
    return received_T / received_T.sum()


HEAD = """# Which models

Written by `python tools/models_page.py` with transformers {version}; do not edit. Of each architecture a tiny random
model (a window of 5 where there are windows, 4 experts where there are experts, float32, on a CPU) is built and tried:

- **engine**: the torch engine makes the candidates that full forward passes make; log-probabilities, entropies and
  perturbations to 1e-4. Where it says no, a run refuses the model at its start.
- **candidates**: how many were compared, in {scripts} random scripts of together
  {actions}.
- **fast path**: decoding by the forward pass that e3rl writes out itself; for the others by the model's own.
- **training**: packed prefix trees give the log-probabilities of plain forward passes, to 1e-5. Where it says no,
  `e3rl train` refuses the model.
- **attribution**: the attention shares of eq 19, over all layers that attend, are those of the matrices that eager
  attention returns, to 1e-4. A dash: not tried, as the model can't be trained. (The matrices of granite_swa and
  granitemoe_swa leave out what their sinks receive; the shares don't.)
- **vLLM**: how vLLM {vllm} runs the class by its registry (`tools/vllm_registry.py`), read and not tried: by an
  implementation of its own, through transformers' code, or no longer (dropped); a dash: it isn't listed, and transformers'
  code may still do. e3rl's tests of its vLLM engine run llama and qwen3. Where all layers attend to all of the past, a
  commit or an erasure costs one token again; elsewhere vLLM's prefix cache decides.

In mixtures of experts decoding and training may choose other experts for a token, as they round differently: never in
float32, in bfloat16 for 0.3 to 2.5 % of the tokens of random models in some layer, for 32 % of gpt-oss's
([measured](results/LOG.md)). Where log-probabilities moved far by it, `train.importance_correction = "token_mask"` leaves
the token out; choices are not replayed ([why](decisions.md)).

A number leads to the sentence of the refusal, below. Of RWKV, transformers has version 4 alone. An architecture that
isn't here is checked in the same way when a run starts, on a few tokens: what differs from full forward passes is
refused. Layers of a type that e3rl doesn't know are refused whatever a few tokens show.

"""


def _actions() -> str:
    """How many actions of each kind the scripts hold, which are the same for every architecture."""
    kinds = collections.Counter(type(action) for seed in SCRIPTS for action in random_script(seed, VOCABULARY))
    names = {Start: "prompts", ExtendRow: "extensions", Rollback: "rollbacks", ReleaseRow: "releases"}
    counts = [f"{kinds[kind]} {name}" for kind, name in names.items()]
    return f"{', '.join(counts[:-1])} and {counts[-1]}"


def page(rows: Sequence[Tried]) -> str:
    """The page of these rows."""
    notes: dict[str, int] = {}
    lines = "\n".join(row.line(notes) for row in rows)
    counts = ", ".join(
        f"{what} {sum(getattr(row, field) in ('exact', 'yes') for row in rows)}"
        for what, field in (
            ("engine exact", "engine"),
            ("fast path", "fast"),
            ("training exact", "training"),
            ("attribution exact", "attribution"),
        )
    )
    counts += f", of vLLM's own {sum(row.vllm == 'own' for row in rows)}"
    reasons = "\n".join(
        textwrap.fill(f"{number}. {reason}", 120, subsequent_indent="   ", break_on_hyphens=False)
        for reason, number in notes.items()
    )
    head = HEAD.format(version=transformers.__version__, scripts=len(SCRIPTS), actions=_actions(), vllm=VLLM["vllm"])
    return (
        f"{head}Of {len(rows)} architectures: {counts}.\n\n"
        "| architecture | engine | candidates | fast path | training | attribution | vLLM |\n"
        f"| --- | --- | ---: | --- | --- | --- | --- |\n{lines}\n\n## Why not\n\n{reasons}\n"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice about kernels that are not installed."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with ``--check`` say whether it is fresh."""
    torch.set_num_threads(1)
    check, names = "--check" in arguments, [a for a in arguments if a != "--check"]
    with _quiet():
        if names:
            for name in names:
                print(tried(name))
            return 0
        written = page([tried(name) for name in ARCHITECTURES])
    if not check:
        PAGE.write_text(written, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == written:
        return 0
    print(f"{PAGE} is stale: python tools/models_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
