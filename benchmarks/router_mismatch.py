"""How often decoding and training send a token to different experts, in float32 and bfloat16.

python benchmarks/router_mismatch.py [--tokens 256] [--rows 4]

Random mixtures of experts (16 experts, 4 of them a token, 4 layers) draw responses with the torch engine; the same tokens then
pass through a packed row, as in training. Experts are compared as sets, layer by layer, and so are the log-probabilities of
the tokens that the routers disagree on and of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from e3rl.engine.protocol import Sampling
from e3rl.engine.torch.engine import TorchEngine
from e3rl.train.attribution import packed_attention
from e3rl.train.packing import PackedRow, TrainSequence
from e3rl.train.scoring import score_row
from e3rl.types import Draw

VOCABULARY, PROMPT = 256, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")


def build(name: str, dtype: torch.dtype) -> Any:
    """A random model; router weights wide enough that experts are chosen for reasons."""
    defaults = AutoConfig.for_model(name)
    settings = {key: value for key, value in SIZES.items() if hasattr(defaults, key)}
    settings.pop("head_dim" if name == "deepseek_v3" else "", None)
    torch.manual_seed(0)
    how = "eager" if name == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), attn_implementation=how)
    with torch.no_grad():
        for router in routers(model):
            router.weight.normal_(std=0.3)
    return model.to(dtype).eval()


def routers(model: Any) -> list[Any]:
    """The modules that choose experts, layer by layer; they return the choice last."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("router")]


@contextlib.contextmanager
def chosen(model: Any) -> Iterator[list[list[Tensor]]]:
    """By layer, the experts of each forward pass, [tokens, experts a token], sorted."""
    found: list[list[Tensor]] = [[] for _ in routers(model)]
    hooks = [
        router.register_forward_hook(lambda module, given, output, of=of: of.append(output[-1].sort(-1).values))
        for router, of in zip(routers(model), found, strict=True)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _decoded(model: Any, engine: TorchEngine, row: int, tokens: int) -> tuple[list[int], list[int], Tensor, Tensor]:
    """Prompt, response, its log-probabilities and the experts of all places but the last, [places, layers, experts]."""
    prompt = torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(row)).tolist()
    with chosen(model) as found:
        [handle] = engine.prefill(prompt, 1)
        engine.extend(handle, tokens, Draw(0, 0, "router", row, 0, 0), Sampling())
        [(_, candidate)] = engine.poll()
        engine.release(handle)
    experts = [torch.cat([of[0], *(step[:1] for step in of[1:])]) for of in found]
    return prompt, candidate.ids.tolist(), torch.tensor(candidate.logprobs), torch.stack(experts, 1)


@torch.no_grad()
def measured(name: str, dtype: torch.dtype, rows: int, tokens: int) -> dict[str, Any]:
    """Shares of tokens, and of tokens and layers, whose experts differ; differences of log-probabilities."""
    model = build(name, dtype)
    engine = TorchEngine(model, eos_ids=(), max_rows=1, cache_rows=1, max_length=PROMPT + tokens)
    drawn = [_decoded(model, engine, row, tokens) for row in range(rows)]
    zeros_T = torch.zeros(tokens)
    sequences = [
        TrainSequence(tuple(p), tuple(r), zeros_T.long(), zeros_T == 0, zeros_T, 0, i, False)
        for i, (p, r, _, _) in enumerate(drawn)
    ]
    row = PackedRow.of(sequences, torch.device("cpu"))
    with packed_attention(model), chosen(model) as found:
        scores = score_row(model, row, 1.0).by_sequence()
    trained = torch.stack([of[0] for of in found], 1)
    differs, gaps = [], []
    for (_, _, logprobs_T, experts), path, scored in zip(drawn, row.paths, scores, strict=True):
        before = path[PROMPT - 1 : -1]  # where each response token is predicted
        differs.append((experts[PROMPT - 1 :] != trained[before]).any(-1))
        gaps.append((scored.logprobs_T - logprobs_T).abs())
    differs_TL, gaps_T = torch.cat(differs), torch.cat(gaps)
    differs_T = differs_TL.any(-1)
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": len(gaps_T),
        "tokens_differ": round(float(differs_T.float().mean()), 4),
        "tokens_and_layers_differ": round(float(differs_TL.float().mean()), 4),
        "gap_where_they_differ": round(float(gaps_T[differs_T].mean()), 5) if differs_T.any() else None,
        "gap_elsewhere": round(float(gaps_T[~differs_T].mean()), 5) if not differs_T.all() else None,
    }


def main() -> None:
    """Print a line for each model and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    options = parser.parse_args()
    for name in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16):
            print(json.dumps(measured(name, dtype, options.rows, options.tokens)), flush=True)


if __name__ == "__main__":
    main()
