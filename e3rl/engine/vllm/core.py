"""A running vLLM: started on a model, fed with requests, given new weights. Knows nothing of rows and segments."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e3rl.engine.requests import Request
from e3rl.engine.vllm.table import VllmArguments, merged_measures
from e3rl.errors import UserError
from e3rl.types import Draw
from e3rl.weights.model import write_model
from e3rl.weights.vllm import TRANSFER, WeightSender

_CPU_BLOCK = (
    32  # the least that vLLM has for CPUs; its own choice of 128 would run that many tokens again after an erasure
)

_FIRST_RUNNER = "e3rl.engine.vllm.taps:FirstRunnerTap"
_SECOND_RUNNER = "e3rl.engine.vllm.taps:SecondRunnerTap"

_KNOWN = ("0.32.",)
"""Versions whose second model runner and whose scheduler's insides our parts were tried with (`taps` and `inside`). With
others the first runner is asked for, and prefixes come from the prefix cache: at most a block of tokens runs again."""

SECONDS_TO_END = 30.0
"""In which vLLM's engine ends after the death of a worker of its own."""

BATCHED_TOKENS = 16384
"""Tokens of vLLM's largest pass: its default for an engine inside a program, on large GPUs."""


@dataclass(frozen=True)
class Generated:
    """A finished request. ``cached_tokens``: of its prompt, those that the prefix cache held."""

    ids: tuple[int, ...]
    measures_TM: np.ndarray  # `Samples.measures`
    prompt_tokens: int
    cached_tokens: int


class VllmCore:
    """vLLM in processes of its own, over a copy of the model's weights.

    Memory for keys and values is what ``cache_rows`` full rows take, so that nothing that may still be needed is evicted, but
    at most ``kv_budget`` bytes on a device.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_ids: Sequence[int],
        max_rows: int,
        cache_rows: int,
        max_length: int,
        tensor_parallel_size: int = 1,
        kv_budget: int = 0,
        sleeps: bool = False,
    ) -> None:
        self._model, self._eos_ids = model, list(eos_ids)
        self._directory = Path(tempfile.mkdtemp(prefix="e3rl-vllm-"))
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        write_model(model, self._directory)
        self._llm = _start(
            self._directory,
            dtype=str(model.dtype).removeprefix("torch."),
            tensor_parallel_size=tensor_parallel_size,
            max_model_len=max_length,
            max_num_seqs=max_rows,
            kv_cache_memory_bytes=kv_cache_bytes(model, cache_rows, max_length, kv_budget, tensor_parallel_size),
            enable_sleep_mode=sleeps,
        )
        for path in self._directory.glob(
            "*.safetensors"
        ):  # vLLM has read them, and a killed process would leave them behind
            path.unlink()
        threading.Thread(target=_tell_of_deaths, args=(self._llm.engine_core,), daemon=True).start()
        self.block_size: int = self._llm.vllm_config.cache_config.block_size
        self._weights = 0  # how often they were changed: the salt of the prefix cache
        self._sender = WeightSender(self._llm, self._directory)
        self._keys = (f"{n}" for n in itertools.count())
        self._open: set[str] = set()
        self._forgotten: list[str] = []  # whose measures nobody wants, and the workers don't know yet
        self._finished: dict[str, Generated] = {}
        self._asleep = False
        self._interrupted = threading.Event()
        self.calls = 0  # of the workers, for measures
        self.measure_bytes = 0

    def submit(self, ids: Sequence[int], request: Request, continues: str = "") -> str:
        """Start generating after ``ids``; returns the key under which `take` will have the result.

        ``continues``: the finished request whose keys and values are to be used as far as the ids are the same. They are held
        until then, or until it is abandoned. What others wait for comes first (`precedence`).
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        key = next(self._keys)
        params = SamplingParams(
            temperature=0.0,  # the tap draws; vLLM takes what it made the likeliest
            max_tokens=request.tokens,
            ignore_eos=True,
            stop_token_ids=self._eos_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=VllmArguments(key, request.uniforms, request.sampling, continues).packed(),
        )
        prompt = {"prompt_token_ids": list(ids), "cache_salt": f"weights-{self._weights}"}
        with _living(self._llm.engine_core):
            self._wake_up()
            self._llm.add_request(key, prompt, params, priority=precedence(request.draw))
        self._open.add(key)
        return key

    def abandon(self, keys: Iterable[str]) -> None:
        """Stop requests whose results nobody wants, and let go of what finished ones hold."""
        keys = list(keys)
        if dropped := [key for key in keys if key in self._open]:
            self._open.difference_update(dropped)
            self._forgotten += dropped
            self._llm.abort_request(dropped)
        for key in keys:
            self._finished.pop(key, None)
        if keys:
            self._llm.engine_core.abort_requests(keys)  # the scheduler knows parked requests by their keys

    def take(self, keys: Iterable[str]) -> dict[str, Generated]:
        """Generate until one of ``keys`` is finished, or an interrupt; all of them that are finished."""
        wanted = set(keys)
        while wanted and not wanted & self._finished.keys() and not self._interrupted.is_set():
            self._step()
        self._interrupted.clear()
        return {key: self._finished.pop(key) for key in wanted & self._finished.keys()}

    def interrupt(self) -> None:
        """By any thread: the `take` in progress, or else the next one, returns. What is generated goes on meanwhile."""
        from vllm.v1.engine import EngineCoreOutputs

        self._interrupted.set()
        outputs = getattr(self._llm.engine_core, "outputs_queue", None)
        if outputs is not None:  # else vLLM is in this process, and a step is soon over
            outputs.put_nowait(EngineCoreOutputs())  # for a step that waits for vLLM's processes

    def _step(self) -> None:
        with _living(self._llm.engine_core):
            outputs = [o for o in self._llm.step() if o.finished and o.request_id in self._open]
        if not outputs:
            return
        self._open -= {o.request_id for o in outputs}
        ids = [tuple(o.outputs[0].token_ids) for o in outputs]
        measures = self._measures([(o.request_id, len(i)) for o, i in zip(outputs, ids, strict=True)])
        for output, drawn, measured in zip(outputs, ids, measures, strict=True):
            self._finished[output.request_id] = Generated(
                drawn, measured, len(output.prompt_token_ids), output.num_cached_tokens or 0
            )

    def _measures(self, finished: list[tuple[str, int]]) -> list[np.ndarray]:
        """What the tap measured of requests and their tokens: one call, and one array from each worker."""
        forgotten, self._forgotten = self._forgotten, []
        with _living(self._llm.engine_core):
            workers = self._llm.collective_rpc("take_measures", args=(finished, forgotten))
        self.calls += 1
        self.measure_bytes += sum(map(len, workers))
        ends = itertools.accumulate(tokens for _, tokens in finished)
        return np.split(merged_measures(workers), [*ends][:-1])

    def reload(self) -> None:
        """Take over the model's weights as they are now; nothing that was cached before is used again."""
        if self._open:
            raise ValueError(f"{len(self._open)} requests are open: they belong to the old weights")
        self._weights += 1
        with _living(self._llm.engine_core):
            self._sender.send(self._model, self._weights, self._wake_up)
            self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Move the weights to the host and give up the cache, with all that is parked, until there is something to do."""
        if self._open:
            raise ValueError(f"{len(self._open)} requests are open: what they have drawn would be lost")
        if not self._asleep:
            with _living(self._llm.engine_core):
                self._llm.sleep(level=1)
            self._asleep = True

    def _wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """Stop the processes and remove the copy of the weights."""
        core = self._llm.engine_core
        core.shutdown()
        self._sender.close()
        self._remove()


def precedence(draw: Draw) -> int:
    """A request's place in vLLM's queue, the least first: what redraws an erased segment, which a whole group waits for, then
    siblings with fewer segments, which have most left to do. So fewer steps are thin at a batch's end."""
    return -draw.attempt if draw.attempt else draw.segment


def _tell_of_deaths(client: Any) -> None:
    """Wait for the end of a process of vLLM's, and tell who waits for its answer: vLLM's own client would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if not _ends(client, None):
        return
    client.outputs_queue.put_nowait(EngineDeadError())
    for future in list(client.utility_results.values()):
        future.set_exception(EngineDeadError())


def _ends(client: Any, seconds: float | None) -> bool:
    """Whether a process of vLLM's ends within so many seconds; None: wait for it. False where vLLM runs in this process."""
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    sentinels = [process.sentinel for process in getattr(manager, "processes", ())]
    return bool(sentinels and multiprocessing.connection.wait(sentinels, seconds))


@contextlib.contextmanager
def _living(client: Any) -> Iterator[None]:
    """UserError where a process of vLLM's is gone. Where a worker dies, the call under way may fail before the engine ends."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except Exception as error:
        failed_there = type(error) is Exception  # so vLLM's client raises what went wrong in another process
        if not isinstance(error, EngineDeadError) and not (failed_there and _ends(client, SECONDS_TO_END)):
            raise
        raise UserError(
            "a process of vLLM's has died, and what it was generating with it; its own messages above say why. Where it was "
            "killed for memory, lower rollout.kv_budget or rollout.max_rows. A run goes on from its newest checkpoint with "
            "--resume"
        ) from error


def kv_cache_bytes(model: Any, rows: int, longest: int, budget: int = 0, parts: int = 1) -> int:
    """Bytes on each of ``parts`` devices for the keys and values of ``rows`` full rows, within ``budget`` (0: no bound).

    One part in eight is for blocks that are not full. Within a bound vLLM forgets blocks of rows that wait, and computes them
    again. UserError where the bound holds no full row.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * longest
    least, wanted = ((n * row + n * row // 8 + 2**24) // parts for n in (1, rows))
    if budget and budget < least:
        raise UserError(
            f"rollout.kv_budget = {budget // 2**20} MiB holds no row of {longest} tokens in vLLM's cache: raise it to "
            f"{-(-least // 2**20)}, or lower rollout.segment_length, max_segments or max_completion_length"
        )
    return min(wanted, budget) if budget else wanted


def _start(directory: Path, **arguments: Any) -> Any:
    """A `vllm.LLMEngine` with our tap and our scheduler in it."""
    try:
        import vllm
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise UserError(
            f"rollout.engine = 'vllm' needs vLLM, and it can't be imported ({error}): pip install 'e3rl[vllm]' on a machine "
            "with an NVIDIA GPU; on a CPU see docs/how-to/scale.md. Without it: rollout.engine = 'torch'"
        ) from None
    cpu, known = current_platform.is_cpu(), vllm.__version__.startswith(_KNOWN)
    if arguments["enable_sleep_mode"] and not current_platform.is_sleep_mode_available():
        raise UserError("rollout.vllm_sleep = true needs a GPU that vLLM can clear, and there is none: set it to false")
    if not known:
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if cpu:  # what little is not eager: PyTorch's compiler fails where the environment's path has a space
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    common = {
        "model": str(directory),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "worker_extension_cls": "e3rl.engine.vllm.table.MeasuringWorker",
        **(TRANSFER if known else {}),
        "scheduling_policy": "priority",
        "enforce_eager": cpu,
        "block_size": _CPU_BLOCK if cpu else None,
        **arguments,
    }
    try:
        found = EngineArgs(**common).create_engine_config()
        tap = _SECOND_RUNNER if found.use_v2_model_runner else _FIRST_RUNNER
        parks = {"scheduler_cls": _scheduler(found)} if known else {}
        config = EngineArgs(**common, logits_processors=[tap], **parks).create_engine_config()
        llm = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        if known:
            llm.collective_rpc("end_with_engine")
        return llm
    except (RuntimeError, ValueError) as error:
        raise UserError(f"vLLM did not start: {error} (its own messages above say more)") from error


def _scheduler(config: Any) -> str:
    """The scheduler that holds keys and values between segments, of the kind that vLLM would have."""
    kind = "AsyncParkingScheduler" if config.scheduler_config.async_scheduling else "ParkingScheduler"
    return f"e3rl.engine.vllm.inside.{kind}"
