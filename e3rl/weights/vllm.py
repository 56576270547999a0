"""New weights on their way to vLLM: in shared memory by vLLM's weight-transfer interface, or as files. Needs no vLLM."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.weights.image import sendable
from e3rl.weights.model import write_model, written_tensors
from e3rl.weights.publish import Publisher, this_node

_log = logging.getLogger(__name__)

BACKEND = "e3rl"
"""The name of our way for weights among vLLM's (`e3rl.weights.vllm_worker`)."""

TRANSFER = {
    "worker_extension_cls": "e3rl.engine.vllm.inside.TransferringWorker",
    "weight_transfer_config": {"backend": BACKEND},
}
"""What vLLM is started with so that its workers can read shared memory."""

SECONDS_TO_ANSWER = 600.0
"""How long vLLM may take to change its weights."""


class WeightSender:
    """Brings a model's weights into a running vLLM; ``directory`` is where it can write them."""

    def __init__(self, llm: Any, directory: Path) -> None:
        self._llm, self._directory = llm, directory
        self._publisher = Publisher() if self._is_known_to_workers() else None

    def _is_known_to_workers(self) -> bool:
        """Whether all workers can open this process's memory."""
        node = this_node()
        if not node or self._llm.vllm_config.weight_transfer_config is None:
            return False
        try:
            self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"node": node}})
        except Exception as error:  # vLLM's client raises nothing more special
            _log.info("new weights go to vLLM as files: %s", error)
            return False
        return True

    def send(self, model: Any, version: int, wake_up: Callable[[], None] = lambda: None) -> None:
        """Make vLLM's weights the model's. UserError where it does not take them.

        ``wake_up`` is called when they are ready and before vLLM is to have room for them.
        """
        call, tensors = self._llm.collective_rpc, {} if self._publisher is None else written_tensors(model)
        with _answering(self._llm.engine_core):
            if self._publisher is None or not sendable(tensors):
                write_model(model, self._directory)
                wake_up()
                call("reload_weights", kwargs={"weights_path": str(self._directory)})
                return
            offer = self._publisher.publish(version, tensors, tensors).offer
            wake_up()
            call("start_weight_update")
            call("update_weights", kwargs={"update_info": asdict(offer)})
            call("finish_weight_update")

    def close(self) -> None:
        """Release the shared memory."""
        if self._publisher is not None:
            self._publisher.close()


@contextlib.contextmanager
def _answering(client: Any) -> Iterator[None]:
    """UserError where the workers refuse what they are called for, or don't answer in time: vLLM's client waits for ever."""

    def give_up() -> None:
        for future in list(getattr(client, "utility_results", {}).values()):
            future.set_exception(TimeoutError())

    timer = threading.Timer(SECONDS_TO_ANSWER, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError:
        raise UserError(
            f"vLLM did not take new weights within {SECONDS_TO_ANSWER:g} s: one of its processes hangs; its own messages above "
            "may say why. A run goes on from its newest checkpoint with --resume"
        ) from None
    except Exception as error:
        if type(error) is not Exception:  # what a worker raised comes as that
            raise
        raise UserError(f"vLLM did not take new weights: {error}; its own messages above say more") from error
    finally:
        timer.cancel()
