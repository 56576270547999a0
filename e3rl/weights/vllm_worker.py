"""The end of new weights' way in each of vLLM's workers. Needs vLLM.

The process that holds the model publishes an image of new weights (`e3rl.weights.publish`) and offers it by vLLM's
weight-transfer interface (`e3rl.weights.vllm`); each worker reads its part of the tensors where they lie. No file is written and
nothing is hashed again: a worker looks at version and checksum in the memory's state. It touches its model only once it has the
whole image, so weights that are refused leave the old ones in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from e3rl.weights.image import tensors_of
from e3rl.weights.publish import Offer, Receiver, this_node

SECONDS_TO_TAKE = 60.0
"""How long a worker waits for an update of the weights that is being written."""


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Where the images will be: see `this_node`."""

    node: str


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """An `Offer`."""

    version: int
    pid: int
    fd: int
    size: int
    checksum: str


class SharedMemoryWeights(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """One worker's end. Start and end of an update do nothing: all of it happens in `receive_weights`."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._receiver = Receiver()

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """RuntimeError where this worker can't open memory of the process that holds the model."""
        if init_info.node != this_node():
            raise RuntimeError("the model is in a process on another machine, of another user or in another container")

    def start_weight_update(self) -> None:
        """Nothing yet."""

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load the version that is offered. UserError, and the old weights, where it is not what lies there."""
        with self._receiver.taken(Offer(**vars(update_info)), SECONDS_TO_TAKE) as image:
            tensors = tensors_of(image)
            initialize_layerwise_reload(self.model)
            self.model.load_weights(tensors.items())
            finalize_layerwise_reload(self.model, self.model_config)

    def finish_weight_update(self) -> None:
        """Nothing more."""

    def shutdown(self) -> None:
        """Let go of the memory."""
        self._receiver.close()
