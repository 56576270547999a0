"""Rollout workers as Ray actors: on this machine, or on a cluster that an address names."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

from e3rl.config import Config
from e3rl.distributed.pool import Place, WorkerLost
from e3rl.distributed.worker import RolloutWorker
from e3rl.errors import UserError

SECONDS_TO_START = 300.0
"""How long a worker may take to be placed and to load its model."""

_SECONDS_TO_REACH = 10.0


class RayConnection:
    """One actor. Its calls are waited for no longer than ``timeout``."""

    def __init__(self, config: Config, longest_prompt: int) -> None:
        import ray

        self._ray, self._timeout = ray, config.rollout.worker_timeout
        _check_head(ray)
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

    def load_weights(self, version: int, weights: bytes) -> None:
        """See `RolloutWorker.load_weights`."""
        self._wait(self._actor.load_weights.remote(version, weights), self._timeout)

    def _wait(self, reference: Any, seconds: float) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference, timeout=seconds)
        except errors.GetTimeoutError:
            raise WorkerLost(
                f"no answer within {seconds:g} s; Ray has {_resources(self._ray)}, and each worker needs 1 CPU"
            ) from None
        except (errors.RayError, ConnectionError, RuntimeError) as error:
            said = _last_line(error)
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


def _check_head(ray: Any) -> None:
    """Say that the cluster is gone while there is time: a minute later Ray ends this process without a word of ours."""
    if (
        ray.util.client.ray.is_connected()
    ):  # ray://: the head is reached through its proxy, whose errors are ordinary ones
        return
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()
    except OSError as error:
        raise UserError(
            f"the head node of the Ray cluster at {address} is gone ({error}). The run's state is in its newest checkpoint: "
            "when there is a cluster again, go on with the same command and --resume (rollout.address and rollout.workers "
            "may differ)"
        ) from None


def _last_line(error: BaseException) -> str:
    """What an exception says in the end; Ray puts a coloured traceback before it."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _resources(ray: Any) -> str:
    try:
        free = ray.available_resources()
    except Exception:  # what is said about a lost cluster must not hide that it is lost
        return "no connection to its head node"
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"


def ray_places(config: Config, longest_prompt: int) -> list[Place]:
    """``rollout.workers`` places on Ray, which is joined at ``rollout.address`` or started here."""
    try:
        import ray
    except ImportError:
        raise UserError("rollout.workers needs Ray: pip install 'e3rl[ray]'") from None
    if not ray.is_initialized():
        _join(ray, config)
    _check_room(ray, config)
    return [
        Place(f"ray-{number}", lambda: RayConnection(config, longest_prompt))
        for number in range(config.rollout.workers)
    ]


def _join(ray: Any, config: Config) -> None:
    """The cluster at ``rollout.address``, or one of this machine alone, large enough for the workers."""
    address = config.rollout.address
    here = {"num_cpus": max(os.cpu_count() or 1, config.rollout.workers)} if not address else {}
    try:
        ray.init(address=address or None, include_dashboard=False if here else None, log_to_driver=False, **here)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"at {address} (rollout.address)" if address else "on this machine"
        raise UserError(f"Ray can't be reached {where}: {_last_line(error)}") from None


def _check_room(ray: Any, config: Config) -> None:
    """Refuse more workers than can ever be placed: Ray would wait for the missing machines for ever."""
    rollout, all_of = config.rollout, ray.cluster_resources()
    needs = {"CPU": float(rollout.workers), "GPU": rollout.workers * rollout.worker_gpus}
    short = [
        f"{need:g} {kind}s of {all_of.get(kind, 0):g}" for kind, need in needs.items() if need > all_of.get(kind, 0)
    ]
    if short:
        raise UserError(
            f"rollout.workers = {rollout.workers} need {' and '.join(short)} that the Ray cluster has: lower rollout.workers "
            "or rollout.worker_gpus, or add nodes"
        )
