"""Rollout workers as Ray actors: on this machine, or on a cluster that an address names."""

from __future__ import annotations

from typing import Any

from e3rl.cluster.pool import Place, WorkerLost
from e3rl.cluster.ray_cluster import SECONDS_TO_START, Head, join_cluster, last_line, resources, wait_for
from e3rl.cluster.worker import RolloutWorker
from e3rl.config import Config
from e3rl.errors import UserError


class RayConnection:
    """One actor. Its calls are waited for no longer than ``timeout``."""

    def __init__(self, config: Config, longest_prompt: int) -> None:
        import ray

        self._ray, self._timeout = ray, config.rollout.worker_timeout
        self._head = Head(ray)
        self._head.check()
        actor = ray.remote(RolloutWorker).options(
            num_cpus=1, num_gpus=config.rollout.worker_gpus, max_restarts=0, max_concurrency=2
        )
        self._actor = actor.remote(config, longest_prompt)
        try:
            self._wait(self._actor.hello.remote(), max(SECONDS_TO_START, self._timeout))
        except BaseException:
            self.close()
            raise

    def hello(self) -> bytes:
        """See `RolloutWorker.hello`."""
        answer: bytes = self._wait(self._actor.hello.remote(), self._timeout)
        return answer

    def exchange(self, body: bytes) -> bytes:
        """See `RolloutWorker.exchange`."""
        answer: bytes = self._wait(self._actor.exchange.remote(body), self._timeout)
        return answer

    def load_weights(self, version: int, weights: bytes | memoryview, named: str) -> None:
        """See `RolloutWorker.load_weights`."""
        self._wait(self._actor.load_weights.remote(version, bytes(weights), named), self._timeout)

    def take_weights(self, offer: bytes) -> bytes:
        """See `RolloutWorker.take_weights`."""
        answer: bytes = self._wait(self._actor.take_weights.remote(offer), self._timeout)
        return answer

    def receive_weights(self, body: bytes) -> None:
        """See `RolloutWorker.receive_weights`."""
        self._wait(self._actor.receive_weights.remote(body), self._timeout)

    def address(self) -> str:
        """This machine's address in the cluster."""
        found: str = self._ray.util.get_node_ip_address()
        return found

    def _wait(self, reference: Any, seconds: float) -> Any:
        errors = self._ray.exceptions
        try:
            return wait_for(self._ray, self._head, reference, seconds)
        except errors.GetTimeoutError:
            raise WorkerLost(
                f"no answer within {seconds:g} s; Ray has {resources(self._ray)}, and each worker needs 1 CPU"
            ) from None
        except (errors.RayError, ConnectionError, RuntimeError) as error:
            said = last_line(error)
            _, own, message = said.partition("UserError: ")
            if own:  # the worker's own words, from its start or from a call: another one would say the same
                raise UserError(f"a rollout worker on Ray can't go on: {message}") from None
            raise WorkerLost(said) from None

    def close(self) -> None:
        """End the actor's process."""
        try:
            self._ray.kill(self._actor)
        except Exception:  # it is gone already, or Ray is
            return


def ray_places(config: Config, longest_prompt: int) -> list[Place]:
    """``rollout.workers`` places on Ray, which is joined at ``rollout.address`` or started here."""
    join_cluster(config)
    return [
        Place(f"ray-{number}", lambda: RayConnection(config, longest_prompt))
        for number in range(config.rollout.workers)
    ]
