"""Weights from a trainer to an engine: checked, copied in place, or written as a directory for another process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e3rl.errors import UserError


def architecture(model: Any) -> str:
    """A fingerprint of the model's parameters: their names and shapes, not their values."""
    shapes = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in model.named_parameters())
    return hashlib.blake2b("\n".join(shapes).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model; those that are the model's own tensors are there already.

    Nothing is copied where any of them does not fit.
    """
    own = model.state_dict(keep_vars=True)
    strangers = sorted(weights.keys() - own.keys())
    if strangers:
        raise ValueError(f"the model has no weights named {', '.join(strangers[:5])} ({len(strangers)} in all)")
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"weight {name} has shape {tuple(tensor.shape)}, the model's has {tuple(own[name].shape)}")
    for name, tensor in weights.items():
        if own[name].data_ptr() != tensor.data_ptr():
            own[name].copy_(tensor)


@torch.no_grad()
def take_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a model of the same kind, each looked up once: a look-up may gather it from other ranks."""
    own = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def write_model(model: Any, directory: Path) -> None:
    """The model as a directory that any engine can load: adapters merged, config and safetensors, no tokenizer."""
    try:
        _merged(model).save_pretrained(directory)
    except OSError as error:
        raise UserError(f"the weights can't be written to {directory}: {error}") from error


@torch.no_grad()
def written_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors that `write_model` would write, under the names that they would have there."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model = _merged(model)
    skipped = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in skipped}
    found: dict[str, Tensor] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return found


def _merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model
