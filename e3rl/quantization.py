"""Base weights in 4 or 8 bits under LoRA adapters (``model.quantization``), by bitsandbytes.

Linear layers inside the model are quantized; embeddings, norms, the output matrix and weights of experts stay as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from e3rl.config import ModelConfig
from e3rl.errors import UserError

BLOCK = 64
"""Weights that share a scale in 4 bits."""


def loading_arguments(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told beside the rest. UserError where bitsandbytes is missing."""
    if config.quantization == "none":
        return {}
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.quantization = '{config.quantization}' needs bitsandbytes and accelerate ({error}): "
            "pip install 'e3rl[8bit]'"
        ) from None
    from transformers import BitsAndBytesConfig

    if config.quantization == "nf4":
        found = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
        )
    else:
        found = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": found, "device_map": {"": device}}


def is_quantized(model: Any) -> bool:
    """Whether a model's layers were quantized when it was loaded."""
    found = getattr(model.config, "quantization_config", None)
    return getattr(found, "quant_method", None) == "bitsandbytes"


def in_full(model: Any) -> Any:
    """A PEFT model over quantized layers, as a new one over the weights that these stand for, its adapters the same."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base, tensors = model.get_base_model(), dict[str, Tensor]()
    for where, module in base.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or "lora_" in where or name in module._non_persistent_buffers_set:
                continue
            quantized = type(tensor).__name__ in ("Params4bit", "Int8Params")
            whole = _unpacked(module, base.dtype) if quantized else tensor
            tensors[f"{where}.{name}".replace(".base_layer", "")] = whole.detach()
    described = copy.deepcopy(base.config)
    del described.quantization_config
    plain = AutoModelForCausalLM.from_config(described, dtype=base.dtype)
    tensors |= {
        name: tensor for name, tensor in plain.state_dict().items() if name not in tensors and _tied(plain, name)
    }
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    found = get_peft_model(plain, copy.deepcopy(model.peft_config["default"]))
    set_peft_model_state_dict(found, get_peft_model_state_dict(model))
    return found


def _tied(model: Any, name: str) -> bool:
    return name in (model._tied_weights_keys or ()) and model.config.get_text_config(decoder=True).tie_word_embeddings


class _Product(torch.autograd.Function):
    """x times weights that are unpacked for it, and once more in the backward pass; bitsandbytes' own products round x too, and
    other ones for a few tokens, so that engine and trainer would compute different numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, unpack: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return nn.functional.linear(x, unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradients[0] @ ctx.unpack(gradients[0].dtype), None, None


def _unpacked(layer: Any, dtype: torch.dtype) -> Tensor:
    """What a layer of bitsandbytes stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    if type(weight).__name__ == "Params4bit":
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    scales = layer.state.SCB if weight.SCB is None else weight.SCB
    return weight.data.to(dtype) * (scales / 127)[:, None].to(dtype)


def _product(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = _Product.apply(x, layer.bias, functools.partial(_unpacked, layer))  # type: ignore[no-untyped-call]
    return found


def with_exact_products(model: Any) -> Any:
    """The model, whose quantized layers multiply by what their weights stand for."""
    for layer in model.modules():
        if type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
            layer.forward = functools.partial(_product, layer)
    return model


class QuantizedShape(nn.Linear):
    """A quantized layer on the meta device: the bytes of its weights and of their scales, and what its passes unpack."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, "meta", layer.weight.dtype)
        entries = layer.weight.numel()
        packed = torch.empty(entries // 2 if kind == "nf4" else entries, dtype=torch.uint8, device="meta")
        scales = torch.empty(-(-entries // BLOCK) if kind == "nf4" else self.out_features, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        unpack = functools.partial(torch.empty, self.out_features, self.in_features, device=self.weight.device)
        found: Tensor = _Product.apply(x, self.bias, lambda dtype: unpack(dtype=dtype))  # type: ignore[no-untyped-call]
        return found


def as_shapes(model: Any, kind: str) -> Any:
    """The model, on the meta device, with quantized layers in place of those that `loading_arguments` quantizes."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer is not model.get_output_embeddings():
                setattr(parent, name, QuantizedShape(layer, kind))
    return model
