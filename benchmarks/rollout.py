"""Rollouts against transformers' generate and continuous batching, against the machine, and what erasing costs.

python benchmarks/rollout.py --json out.json                                (less than a quarter of an hour on two cores)
python benchmarks/rollout.py --json out.json --only erase_cost --model lab   (one part; what is in the file stays)

Wall-clock medians, measured in turns. A figure above 1 in `vs_…` means that we are faster. Each peer runs with those of its
settings that a trial found to be its fastest: `generate` and continuous batching with one thread or with all, continuous
batching with pages of 16 or 64 tokens and forward passes of one or four tokens a request.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.pop("OMP_WAIT_POLICY", None)  # as PyTorch comes: generate with two threads is slower otherwise
os.environ.pop("GOMP_SPINCOUNT", None)

import numpy as np
import torch
from rollout_peers import Values, against_peers, in_turns
from rollout_workloads import (
    LIMIT,
    PROMPT,
    SIBLINGS,
    Workload,
    by_engine,
    engine_for,
    load,
    qwen3_3m,
    random_prompts,
)

from e3rl.config import ErasureConfig, RolloutConfig
from e3rl.engine.protocol import Sampling
from e3rl.engine.sampling import Samples, SamplingRows, inverse_cdf
from e3rl.engine.torch import decode
from e3rl.engine.torch.engine import TorchEngine
from e3rl.errors import UserError
from e3rl.model_files import BUILT_IN, resolve_model_path
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.stats import RolloutStats, summarise
from e3rl.train.summary import environment
from e3rl.types import Draw

MODELS = ("lab", "qwen3-3m", "smollm2")
GROUPS = 32  # the last ones decode in thin batches, which is no property of erasing
ROLLOUT = RolloutConfig(num_generations=SIBLINGS, segment_length=16, max_segments=8, max_rows=64)


def roofline(name: str, repeats: int) -> Values:
    """Tokens per second times 2 FLOPs per weight, over the rate of a large matrix product in the same run."""
    model, batch, limit, size = load(name), 32, 64, 2048
    work, engine = (
        Workload.of(model.config.vocab_size, batch, ragged=False, limit=limit),
        engine_for(model, batch, limit),
    )
    a, b = torch.randn(size, size), torch.randn(size, size)
    ours, product = in_turns(repeats, lambda: by_engine(engine, work), lambda: [a @ b for _ in range(8)])
    weights = sum(p.numel() for p in model.parameters())
    reached, possible = 2 * weights * work.useful_tokens / median(ours), 8 * 2 * size**3 / median(product)
    return {"roofline_fraction": reached / possible, "gemm_gflops": possible / 1e9}


def _roll(
    engine: TorchEngine, rollout: RolloutConfig, erasure: ErasureConfig, vocabulary: int, groups: int = GROUPS
) -> RolloutStats:
    prompts = random_prompts(vocabulary, groups)
    return summarise(run_groups(engine, prompts, GroupSettings(rollout, erasure, seed=0, step=1)))


def _rollout_engine(model: Any, eos_ids: Sequence[int]) -> TorchEngine:
    rows, length = ROLLOUT.max_rows, PROMPT + ROLLOUT.completion_limit
    return TorchEngine(model, eos_ids=eos_ids, max_rows=rows, cache_rows=2 * rows, max_length=length)


def _ending(vocabulary: int) -> range:
    """Tokens that end a response: as many as end one in a hundred under a flat distribution."""
    return range(vocabulary - max(1, vocabulary // 100), vocabulary)


def paired(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median ratio of runs next to each other: what the machine does over minutes counts in neither."""
    return median(mine / theirs for mine, theirs in zip(seconds, others, strict=True))


def erasing(name: str, repeats: int) -> Values:
    """What erasable rollouts of 32 groups of 8 cost beside plain ones, at an erase rate of 10 to 30 %."""
    model = load(name)
    vocabulary = model.config.vocab_size
    blind = replace(ROLLOUT, erase=False)
    for kappa in (1.0, 0.5, 1.5, 2.0, 0.0):
        erasure, measured = ErasureConfig(kappa0=kappa, max_erasures=5), _rollout_engine(model, _ending(vocabulary))
        stats = _roll(measured, ROLLOUT, erasure, vocabulary)
        if 0.1 <= stats.erase_rate <= 0.3:
            break
    work = measured.stats
    engine, unbudgeted = (_rollout_engine(model, _ending(vocabulary)) for _ in range(2))
    _roll(unbudgeted, replace(ROLLOUT, max_segments=1), replace(erasure, max_erasures=0), vocabulary)
    plain = _roll(engine, blind, erasure, vocabulary)
    erased_s, plain_s = in_turns(
        repeats, lambda: _roll(engine, ROLLOUT, erasure, vocabulary), lambda: _roll(engine, blind, erasure, vocabulary)
    )
    a_token = paired(erased_s, plain_s) * plain.committed_tokens / stats.committed_tokens
    return {
        "erase_cost": a_token / (1 + stats.r),
        "erase_rate": stats.erase_rate,
        "r": stats.r,
        "kappa0": erasure.kappa0,
        "seconds_erasable_plain": [median(erased_s), median(plain_s)],
        "prefix_tokens_recomputed": work.refed_tokens,
        "kv_bytes_ratio": work.kv_bytes / unbudgeted.stats.kv_bytes,
        "prompt_tokens_prefilled": work.prompt_tokens / (GROUPS * PROMPT),
        "slot_occupancy": work.decode_row_steps / (work.decode_row_steps + work.filling_row_steps),
        "rows_decoded_together": work.decode_row_steps / work.decode_steps,
    }


def _without_measures(logits_SV: torch.Tensor, rows: SamplingRows, uniforms_S: torch.Tensor) -> Samples:
    """A token and its log-probability, which any RL rollout needs; nothing of what erasing looks at."""
    logp_SV = (logits_SV.float() / rows.temperature_S1).log_softmax(-1)
    ids_S = inverse_cdf(logp_SV.exp(), uniforms_S)
    logprobs_S = logp_SV.gather(1, ids_S.unsqueeze(1)).squeeze(1)
    zeros_S = torch.zeros_like(logprobs_S)
    return Samples(ids_S, logprobs_S, zeros_S, zeros_S, zeros_S, torch.ones_like(ids_S))


def monitoring(name: str, repeats: int) -> Values:
    """Plain rollouts in which every token's entropy and every segment's U are taken, over those without either."""
    model = load(name)
    vocabulary = model.config.vocab_size
    engine = _rollout_engine(model, ())
    watching = ErasureConfig(baseline="static", static_baseline=1e9)  # U of every segment, and nothing above it
    blind = replace(ROLLOUT, erase=False)

    def without() -> None:
        with mock.patch.object(decode, "sample", _without_measures):
            _roll(engine, blind, watching, vocabulary, 8)

    watched, unwatched = in_turns(repeats, lambda: _roll(engine, ROLLOUT, watching, vocabulary, 8), without)
    return {"monitor_overhead": paired(watched, unwatched)}


def _peak(tokens: int, results: Any) -> None:
    torch.set_num_threads(1)
    engine = TorchEngine(qwen3_3m(), eos_ids=(), max_rows=4, cache_rows=4, max_length=PROMPT + tokens)
    for sibling, row in enumerate(engine.prefill(range(3, 3 + PROMPT), 4)):
        engine.extend(row, tokens, Draw(0, 0, "benchmark", sibling, 0, 0), Sampling())
    engine.poll()
    results.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def memory() -> Values:
    """R² of a straight line through the peak memory of a process that generates T tokens in 4 rows."""
    lengths = (256, 512, 1024, 2048, 4096)
    context = multiprocessing.get_context("spawn")
    results = [context.Queue() for _ in lengths]
    processes = [context.Process(target=_peak, args=each) for each in zip(lengths, results, strict=True)]
    for process in processes:
        process.start()
    peaks = [result.get(timeout=240) for result in results]
    for process in processes:
        process.join()
    return {
        "linear_memory": float(np.corrcoef(lengths, peaks)[0, 1] ** 2),
        "peak_bytes_by_length": dict(zip(lengths, peaks, strict=True)),
    }


_OPERATIONS = {
    "matrix products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm"),
    "attention": ("aten::baddbmm", "aten::bmm", "aten::_softmax"),
    "keys and values written": ("aten::_index_put_impl_", "aten::copy_"),
    "softmax over the vocabulary": ("aten::_log_softmax", "aten::exp"),
}


def profile(name: str, batch: int) -> Values:
    """Where the time of a full-length batch goes: shares of the wall clock by kind of operation."""
    model = load(name)
    work, engine = Workload.of(model.config.vocab_size, batch, ragged=False, limit=32), engine_for(model, batch)
    by_engine(engine, work)
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as taken:
        by_engine(engine, work)
        seconds = time.perf_counter() - began
    own = {event.key: event.self_cpu_time_total / 1e6 / seconds for event in taken.key_averages()}
    shares = {kind: sum(own.get(key, 0.0) for key in keys) for kind, keys in _OPERATIONS.items()}
    shares["other operations"] = sum(own.values()) - sum(shares.values())
    shares["Python between them"] = 1 - sum(own.values())
    return {f"profile_{batch}": shares}


def parts(options: argparse.Namespace) -> list[tuple[str, str, Callable[[], Values]]]:
    """(key, model, measurement) of everything that is asked for, the quick ones first."""
    found: list[tuple[str, str, Callable[[], Values]]] = [("linear_memory", "qwen3-3m", memory)]
    for name in ("lab", "qwen3-3m"):
        found += [
            ("erase_cost", name, partial(erasing, name, 6)),
            ("monitor_overhead", name, partial(monitoring, name, 16)),
        ]
        found += [
            (f"{kind}_{batch}", name, partial(against_peers, name, batch, ragged, repeats, 32))
            for batch in (16, 64)
            for kind, ragged, repeats in (("full", False, 6), ("ragged", True, 4))
        ]
    found += [
        ("full_16", "smollm2", partial(against_peers, "smollm2", 16, False, 2, 16)),
        ("ragged_16", "smollm2", partial(against_peers, "smollm2", 16, True, 2, 16)),
        ("roofline_fraction", "smollm2", partial(roofline, "smollm2", 4)),
    ]
    found += [("profile", name, partial(profile, name, b)) for name, b in (("qwen3-3m", 64), ("smollm2", 16))]
    return [part for part in found if _wanted(part[0], options.only) and _wanted(part[1], options.model)]


def _wanted(name: str, chosen: Sequence[str] | None) -> bool:
    return not chosen or name in chosen


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a key, one column a model."""
    keys = sorted({key for values in results.values() for key in values if not isinstance(values[key], dict | list)})
    lines = ["| | " + " | ".join(results) + " |", "| --- " * (len(results) + 1) + "|"]
    for key in keys:
        cells = [f"{values[key]:.3g}" if key in values else "" for values in results.values()]
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="KEY", help="linear_memory, erase_cost, full_16, ragged_64, …")
    parser.add_argument("--model", nargs="+", choices=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:  # what a model needs is found out now, not after the others have run
        for name in {name for _, name, _ in parts(options)} & BUILT_IN.keys():
            resolve_model_path(name)
    except UserError as error:
        parser.error(str(error))
    results: dict[str, Values] = {}
    if options.json.is_file():
        results = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    for key, name, measure in parts(options):
        began = time.perf_counter()
        values = measure()
        results.setdefault(name, {}).update(values)
        print(f"{name} {key} ({time.perf_counter() - began:.0f} s): {values}", flush=True)
        together = {"environment": environment(), "tokens": {"prompt": PROMPT, "new": LIMIT}, "results": results}
        options.json.write_text(json.dumps(together, indent=2), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
