"""Rows whose tokens two ranks divide, beside the same rows whole: numbers, gradients and bytes, as lines of JSON.

    torchrun --nproc_per_node 2 -m tests.ranks.context NAME …

A name is an architecture of docs/models.md.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from e3rl.cluster.ranks import Ranks
from e3rl.engine.torch.operations import MASKED
from e3rl.plan.dry_run import COUNTED, Allocations, micro_batch
from e3rl.plan.memory import others_tokens
from e3rl.train.attribution import AttributionSettings, attribution_layers, packed_attention
from e3rl.train.packing import PackedRow
from e3rl.train.scoring import Passes, RowScores
from tests.engine.models import VOCAB, build, page_model
from tests.train.packs import sequence

TOKENS = 2048


def scored(model: Any, row: PackedRow, passes: Passes) -> tuple[RowScores, dict[str, torch.Tensor]]:
    """A row's scores and the gradients of a loss that looks at every log-probability."""
    model.zero_grad()
    with packed_attention(model):
        settings = AttributionSettings(6, attribution_layers(model, "all"))
        found = passes.score_row(model, row, 0.7, settings)
        logprobs_ST = found.logprobs_ST()
        passes.backward((logprobs_ST * torch.linspace(-1, 2, logprobs_ST.numel()).view_as(logprobs_ST)).sum())
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differences(name: str, ranks: Ranks) -> dict[str, Any]:
    """Largest differences between a divided row and the whole one, over what it is that differs."""
    model, apart = page_model(name), Passes()
    apart.context = ranks
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (40,), generator=draw).tolist()
    row = PackedRow.of(
        [
            sequence(ids[:9], ids[9:31]),
            sequence(ids[:9], [*ids[9:14], *ids[2:13]]),
            sequence(ids[:9], [*ids[9:20], *ids[33:36]], masked=11, erased=True),
        ],
        torch.device("cpu"),
    )
    assert len(row.ids_N) % (2 * ranks.world), "a row that is made longer"
    (whole, wanted), (parts, mine) = scored(model, row, Passes()), scored(model, row, apart)
    names = sorted(wanted)
    assert set(mine) <= set(wanted)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    sums = {n: mine[n].clone() if n in mine else torch.zeros_like(wanted[n]) for n in names}
    ranks.add_up(sums.values())
    size = len(row.ids_N)
    pairs = [(a, b) for a, b in zip(parts.shares, whole.shares, strict=True) if a is not None and b is not None]
    return {
        "name": name,
        "logprobs": (parts.logprobs_N[:size] - whole.logprobs_N).abs().max().item(),
        "entropies": (parts.entropies_N[:size] - whole.entropies_N).abs().max().item(),
        "shares": max((a - b).abs().max().item() for a, b in pairs),
        "gradients": max((sums[n] - wanted[n]).abs().max().item() for n in names) / largest,
        "gradients of a rank alone": max((mine[n] - wanted[n]).abs().max().item() for n in names if n in mine)
        / largest,
    }


def asked(ranks: Ranks) -> dict[str, Any]:
    """Bytes that a pass has at its worst moment with the row whole and divided, and what is planned for the latter."""
    assert TOKENS * TOKENS // 4 <= MASKED, "beyond it a CPU pads queries to whole rows"
    found: dict[str, Any] = {"name": "bytes"}
    for checkpointing in (False, True):
        model = build("Qwen3", head_dim=8, max_position_embeddings=TOKENS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.randint(2, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
        row = PackedRow.of([sequence(ids[:100], ids[100:])], torch.device("cpu"))
        for which, context in (("whole", Ranks()), ("divided", ranks)):
            passes = Passes()
            passes.context = context
            with packed_attention(model), Allocations() as counted:
                for _ in range(2):  # the first makes masks, which stay
                    before = counted.restart()
                    scores = passes.score_row(model, row, 1.0)
                    kept = counted.live - before
                    passes.backward(scores.logprobs_N.sum())
                    del scores
            name = f"{which}, {'checkpointed' if checkpointing else 'kept'}"
            found[name] = {"kept": kept, "peak": counted.peak - before}
        with torch.device("meta"):
            shape = build("Qwen3", COUNTED, head_dim=8, max_position_embeddings=TOKENS)
        planned = micro_batch(shape, TOKENS // ranks.world, checkpointing)
        found[name]["planned"] = planned.kept + planned.passing + others_tokens(shape, TOKENS // 2, checkpointing)
    return found


def main(names: list[str]) -> None:
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    data, context = ranks.blocks(ranks.world)
    assert (data.rank, data.world) == (0, 1)
    for line in [*(differences(name, context) for name in names), asked(context)]:
        if ranks.first:
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
