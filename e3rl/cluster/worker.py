"""A rollout worker: a model, an engine and a thread that keeps the engine busy with the groups asked for.

It does no networking: Ray actors and the rollout server forward calls to it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pyarrow as pa
import torch
from torch import Tensor

from e3rl import __version__
from e3rl.cluster.broadcast import Audience, Broadcast
from e3rl.cluster.messages import PROTOCOL, Answer, Ask, Fault, Hello, Task, encode_answer
from e3rl.cluster.wire import decode, encode
from e3rl.config import Config
from e3rl.engine.build import build_engine
from e3rl.environments.episodes import toolbox
from e3rl.environments.protocol import settled
from e3rl.errors import NonFiniteLogits, UserError
from e3rl.models import Policy, load_policy
from e3rl.rollout.columns import encode as encode_groups
from e3rl.rollout.driver import Driver
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.orders import Committed, Erased, Event
from e3rl.web.prometheus import Metrics
from e3rl.weights.image import image_size, read_image
from e3rl.weights.model import architecture
from e3rl.weights.publish import NotReachable, Offer, Receiver, this_node

_HELP = {
    "e3rl_segments_total": "committed segments",
    "e3rl_erasures_total": "erased candidates",
    "e3rl_committed_tokens_total": "tokens of committed segments",
    "e3rl_erased_tokens_total": "tokens of erased candidates",
    "e3rl_groups_total": "groups that were finished",
    "e3rl_faults_total": "groups or batches that an error ended",
    "e3rl_erase_rate": "erased candidates over all candidates",
    "e3rl_regeneration_ratio": "r: erased tokens for each committed one",
    "e3rl_rows": "sequences that the engine can hold",
    "e3rl_rows_held": "sequences that it holds",
    "e3rl_siblings_waiting": "held sequences that wait at their group's barrier",
    "e3rl_groups_decoding": "groups under way",
    "e3rl_groups_waiting": "groups that wait for rows",
    "e3rl_policy_version": "version of the weights; -1 before any came",
    "e3rl_prefix_cache_hit_rate": "share of the submitted tokens whose keys and values vLLM had already",
}

SECONDS_TO_STOP = 60.0
"""Seconds that new weights wait for a cancelled batch, which stops at its next candidate."""


class RolloutWorker:
    """Holds a copy of the policy and generates groups with it, in the background."""

    def __init__(self, config: Config, longest_prompt: int, policy: Policy | None = None) -> None:
        self._policy = policy or load_policy(config.model)
        self._engine = build_engine(config.rollout, self._policy.model, self._policy.eos_ids, longest_prompt)
        self._rows = self._engine.free_rows()
        self._architecture = architecture(self._policy.model)
        self._max_length = longest_prompt + config.rollout.completion_limit
        self._version: int | None = None
        self._receiver, self._audience = Receiver(), Audience()
        self._changed = threading.Condition()
        self._run, self._settings = "", None  # type: tuple[str, GroupSettings | None]
        self._tasks: list[Task] = []  # not yet taken by the thread
        self._asked: set[str] = set()  # groups of this run
        self._finished: list[pa.RecordBatch] = []
        self._fault: Fault | None = None
        self._beat, self._closed = 0, False
        self._tools = toolbox(config, self._policy.tokenizer, self._policy.eos_ids)
        self._driver, self._metrics = Driver(self._engine), Metrics(_HELP)
        for name in (name for name in _HELP if name.endswith("_total")):
            self._metrics.add(name, 0)
        self._holding = False  # the engine may hold rows
        self._thread = threading.Thread(target=self._decode_for_ever, name="rollouts", daemon=True)
        self._thread.start()

    def hello(self) -> bytes:
        """What this worker is (`Hello`)."""
        return encode(
            Hello(PROTOCOL, __version__, self._architecture, self._rows, self._max_length, self._version, this_node()),
        )

    def load_weights(self, version: int, weights: bytes, named: str | None = None) -> None:
        """Take the weights of a policy version, as safetensors with their checksum. What was under way is dropped.

        UserError where they are not all of the policy's, fitting and finite: then it goes on with those that it had.
        """
        image = torch.frombuffer(bytearray(weights or b"\0"), dtype=torch.uint8)
        self._replace(version, read_image(image, named, dict(self._policy.trainable())))

    def take_weights(self, body: bytes) -> bytes:
        """As `load_weights`, where an `Offer` says that the weights lie. Why they can't be reached from here, if so."""
        offer = decode(Offer, body)
        try:
            with self._receiver.taken(offer, SECONDS_TO_STOP) as image:
                self._replace(offer.version, read_image(image, offer.checksum, dict(self._policy.trainable())))
        except NotReachable as error:
            return str(error).encode()
        return b""

    def receive_weights(self, body: bytes) -> None:
        """As `load_weights`, where they are about to be broadcast (`Broadcast`)."""
        wanted, own = decode(Broadcast, body), dict(self._policy.trainable())
        if wanted.size != image_size(own):
            raise UserError(f"weights of {wanted.size} bytes were announced, and this worker's are {image_size(own)}")
        self._replace(wanted.version, read_image(self._audience.receive(wanted), wanted.checksum, own))

    def _replace(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        with self._changed:
            self._start_run("", None)
            if not self._changed.wait_for(lambda: not self._holding, SECONDS_TO_STOP):
                raise RuntimeError(f"the engine did not stop within {SECONDS_TO_STOP:.0f} s for new weights")
            self._version = (
                None  # an engine that fails here may hold half of the new weights: no group is made with those
            )
            self._engine.load_weights(tensors, version)
            self._version = version

    def exchange(self, body: bytes) -> bytes:
        """Take an `Ask`, wait a little, give an `Answer`."""
        ask = decode(Ask, body)
        with self._changed:
            if ask.run != self._run:
                self._start_run(ask.run, ask.settings)
                if ask.tools:
                    self._fault = self._without_tools(ask.tools)
            if not self._fault:
                self._tasks.extend(t for t in ask.tasks if t.prompt_id not in self._asked)  # a repeated call asks anew
                self._asked.update(t.prompt_id for t in ask.tasks)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._finished or self._fault or ask.run != self._run, ask.wait)
            finished, self._finished = self._finished, []
            return encode_answer(Answer(self._run, self._beat + self._driver.beat(), self._fault), finished)

    def _without_tools(self, wanted: str) -> Fault | None:
        """Why this worker can't run a run's tools. It uses those that it was started with: no request names code."""
        own = "none" if self._tools is None else self._tools.identity
        if own == wanted:
            return None
        return Fault(
            "UserError",
            f"the run's environment is {wanted} and this worker's {own}: start it with the run's own recipe, and the same files",
        )

    def close(self) -> None:
        """Stop generating."""
        with self._changed:
            self._closed = True
            self._start_run("", None)
        self._thread.join(SECONDS_TO_STOP)
        self._audience.leave()
        self._receiver.close()
        close = getattr(self._engine, "close", None)
        if close is not None:
            close()

    def _start_run(self, run: str, settings: GroupSettings | None) -> None:
        self._run, self._settings = run, settings
        self._tasks.clear()
        self._asked.clear()
        self._driver.wake()
        self._finished, self._fault = [], None
        self._changed.notify_all()

    def _decode_for_ever(self) -> None:
        """Step the driver as long as it has groups of the present run."""
        driver, run = self._driver, ""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._tasks or driver.busy)
                if self._closed:
                    driver.close()
                    return
                stale, run = run != self._run or self._fault is not None, self._run
                tasks, self._tasks, settings = self._tasks, [], self._settings
                self._holding = True
            try:
                if stale:
                    driver.close()
                self._decode(driver, run, settings, tasks)
            except Exception as error:  # any error is reported to the trainer
                self._report(run, error)
            finally:
                with self._changed:
                    self._holding = driver.busy
                    self._changed.notify_all()

    def _decode(self, driver: Driver, run: str, settings: GroupSettings | None, tasks: list[Task]) -> None:
        for task in tasks:
            assert settings is not None
            if settings.policy_version != self._version:
                raise UserError(
                    f"rollouts of policy version {settings.policy_version} were asked for; it holds {self._version}"
                )
            driver.submit(task.prompt(self._tools), settings, self._observe)
        for job in driver.step():
            finished = encode_groups([settled(job.result())])
            with self._changed:
                if self._run == run:
                    self._finished.append(finished)
                    self._changed.notify_all()

    def _observe(self, event: Event) -> None:
        self._beat += 1
        if isinstance(event, Committed):
            self._metrics.add("e3rl_segments_total")
            self._metrics.add("e3rl_committed_tokens_total", len(event.segment.candidate.ids))
        elif isinstance(event, Erased):
            self._metrics.add("e3rl_erasures_total")
            self._metrics.add("e3rl_erased_tokens_total", len(event.erasure.candidate.ids))
        else:
            self._metrics.add("e3rl_groups_total")

    def metrics(self) -> str:
        """What an operator watches, in Prometheus' text format."""
        driver, held, count = self._driver, self._rows - self._engine.free_rows(), self._metrics.count
        candidates = count("e3rl_segments_total") + count("e3rl_erasures_total")
        gauges = {
            "e3rl_erase_rate": count("e3rl_erasures_total") / max(1, candidates),
            "e3rl_regeneration_ratio": count("e3rl_erased_tokens_total") / max(1, count("e3rl_committed_tokens_total")),
            "e3rl_rows": self._rows,
            "e3rl_rows_held": held,
            "e3rl_siblings_waiting": max(0, held - driver.requests),
            "e3rl_groups_decoding": driver.decoding,
            "e3rl_groups_waiting": driver.waiting,
            "e3rl_policy_version": -1 if self._version is None else self._version,
        }
        hits = getattr(getattr(self._engine, "stats", None), "hit_rate", None)
        return self._metrics.text(gauges if hits is None else {**gauges, "e3rl_prefix_cache_hit_rate": hits})

    def _report(self, run: str, error: Exception) -> None:
        draw = error.draw if isinstance(error, NonFiniteLogits) else None
        self._metrics.add("e3rl_faults_total")
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with self._changed:
            if self._run == run:
                self._fault = Fault(type(error).__name__, message, draw)
                self._tasks.clear()
                self._changed.notify_all()
