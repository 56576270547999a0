"""The Ray cluster that workers live on: joined at an address or started here, and watched, so that no wait for it is silent."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import Any

from e3rl.config import Config
from e3rl.errors import UserError

SECONDS_TO_START = 300.0
"""How long a worker may take to be placed and to load its model."""

_SECONDS_TO_REACH = 10.0
_SECONDS_BETWEEN_LOOKS = 2.0


def join_cluster(config: Config) -> Any:
    """Ray, connected to the cluster at ``rollout.address`` or to one of this machine alone, with room for all workers."""
    needed = _needed(config)
    try:
        import ray
    except ImportError:
        raise UserError(f"{' and '.join(needed)} needs Ray: pip install 'e3rl[ray]'") from None
    if not ray.is_initialized():
        address, workers = config.rollout.address, sum(number for number, _ in needed.values())
        here = {"num_cpus": max(os.cpu_count() or 1, workers)} if not address else {}
        try:
            # "local": with no address Ray would join whatever cluster was started on this machine last
            ray.init(address=address or "local", include_dashboard=False if here else None, log_to_driver=False, **here)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"at {address} (rollout.address)" if address else "on this machine"
            raise UserError(f"Ray can't be reached {where}: {last_line(error)}") from None
    _check_room(ray, needed)
    return ray


def _needed(config: Config) -> dict[str, tuple[int, float]]:
    """The settings that ask for workers: how many, and the GPUs of each."""
    rollout, train = config.rollout, config.train
    asked = {
        "rollout.workers": (rollout.workers, rollout.worker_gpus),
        "train.workers": (train.workers, train.worker_gpus),
    }
    return {name: need for name, need in asked.items() if need[0]}


def _check_room(ray: Any, needed: dict[str, tuple[int, float]]) -> None:
    """Refuse more workers than can ever be placed: Ray would wait for the missing machines for ever."""
    needs = {
        "CPU": float(sum(number for number, _ in needed.values())),
        "GPU": sum(number * gpus for number, gpus in needed.values()),
    }
    there = ray.cluster_resources()
    short = [f"{need:g} {kind}s of {there.get(kind, 0):g}" for kind, need in needs.items() if need > there.get(kind, 0)]
    if short:
        asked = " and ".join(f"{name} = {number}" for name, (number, _) in needed.items())
        raise UserError(
            f"{asked} need {' and '.join(short)} that the Ray cluster has: lower them or their worker_gpus, or add nodes"
        )


class Head:
    """The cluster's head node, looked at now and then while something is waited for.

    No other signal comes in time: calls that are under way may hang, and a minute later Ray ends this process without an
    exception.
    """

    def __init__(self, ray: Any) -> None:
        # through ray:// the head is reached by a proxy, whose errors are ordinary ones
        self._address = "" if ray.util.client.ray.is_connected() else ray.get_runtime_context().gcs_address
        self._looked = 0.0

    def check(self) -> None:
        """UserError if it does not listen any more. Cheap: it looks every other second at most."""
        if not self._address or time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_REACH).close()
        except OSError as error:
            raise head_is_gone(self._address, error) from None
        self._looked = time.monotonic()


def head_is_gone(address: str, error: object) -> UserError:
    """The error of a cluster that has lost its head node."""
    return UserError(
        f"the head node of the Ray cluster at {address} is gone ({error}). The run's state is in its newest checkpoint: "
        "when there is a cluster again, go on with the same command and --resume (rollout.address and the numbers of "
        "workers may differ)"
    )


def wait_for(ray: Any, head: Head, reference: Any, seconds: float) -> Any:
    """The value of a call, within so many seconds: Ray's GetTimeoutError after them, UserError as soon as the head is gone."""
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            return ray.get(reference, timeout=max(0.0, min(left, _SECONDS_BETWEEN_LOOKS)))
        except ray.exceptions.GetTimeoutError:
            head.check()
            if left <= _SECONDS_BETWEEN_LOOKS:
                raise


def last_line(error: BaseException) -> str:
    """The last line of an exception's text; Ray puts a coloured traceback before it."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def resources(ray: Any) -> str:
    """The cluster's free resources, in words."""
    try:
        free = ray.available_resources()
    except Exception:  # a failure here must not hide the error that is being reported
        return "no connection to its head node"
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free"
