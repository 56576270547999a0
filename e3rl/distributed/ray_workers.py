"""Rollout workers as Ray actors: on this machine, or on a cluster that an address names."""

from __future__ import annotations

from typing import Any

from e3rl.config import Config
from e3rl.distributed.pool import Place, WorkerLost
from e3rl.distributed.worker import RolloutWorker
from e3rl.errors import UserError

SECONDS_TO_START = 300.0
"""How long a worker may take to be placed and to load its model."""


class RayConnection:
    """One actor. Its calls are waited for no longer than ``timeout``."""

    def __init__(self, config: Config, longest_prompt: int) -> None:
        import ray

        self._ray, self._timeout = ray, config.rollout.worker_timeout
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
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError | ValueError):
                raise UserError(f"a rollout worker on Ray can't go on: {cause}") from None
            raise WorkerLost(str(cause or error).strip().splitlines()[-1]) from None
        except (errors.RayError, ConnectionError, RuntimeError) as error:
            raise WorkerLost(str(error).strip().splitlines()[0] or type(error).__name__) from None

    def close(self) -> None:
        """End the actor's process."""
        try:
            self._ray.kill(self._actor)
        except Exception:  # it is gone already, or Ray is
            return


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
        address = config.rollout.address or None
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"at {address}" if address else "on this machine"
            raise UserError(f"Ray can't be reached {where}: {str(error).strip().splitlines()[0]}") from None
    return [
        Place(f"ray-{number}", lambda: RayConnection(config, longest_prompt))
        for number in range(config.rollout.workers)
    ]
