"""Reads a model's safetensors files tensor by tensor into its parameters, and writes models as files.

An empty model has all its layers and no memory for their parameters. `fill` reads them: whole, or only this rank's rows
of a parameter that is divided among ranks. So no rank holds more of a divided model than its own part.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl.quantization import in_full, is_quantized

if TYPE_CHECKING:
    from e3rl.models import Policy

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The tensors of a model's files by name. ``path`` is what the user calls the model, ``device`` where its weights go."""

    def __init__(self, files: Sequence[Path], path: str, device: torch.device) -> None:
        self.path, self.device = path, device
        opened = [safe_open(file, "pt") for file in files]
        self._slices = {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118

    @classmethod
    def find(cls, source: str, path: str, device: torch.device) -> WeightFiles | None:
        """The files of a directory or of the hub; None if the weights are not safetensors."""
        single = _located(source, _SINGLE)
        index = None if single else _located(source, _INDEX)
        if index is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [_located(source, name) for name in names]
        else:
            files = [single]
        found = [file for file in files if file is not None]
        return cls(found, path, device) if found and len(found) == len(files) else None

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole tensor."""
        return torch.Size(self._slices[name].get_shape())

    def read(self, name: str, rows: slice, like: Tensor) -> Tensor:
        """Some rows of a tensor in memory of their own, in the type of ``like``."""
        part = self._slices[name][rows] if like.ndim else self._slices[name][...]
        return torch.empty_like(like, device=self.device).copy_(part)

    def hold(self, model: nn.Module) -> bool:
        """Whether the files hold this model's weights one to one: none missing, converted or merged from several."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        own, alike = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
        converts: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or get_model_conversion_mapping(
            model,  # type: ignore[arg-type]
            add_legacy=False,
        )
        fitting = all(name in self and self.shape(name) == parameter.shape for name, parameter in own.items())
        tied_apart = any(name in self for name in alike.keys() - own)
        return fitting and not (converts or tied_apart or model.state_dict().keys() - alike)


def _located(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Models that are built inside the ``with`` block are empty; buffers, which no file holds, have their values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def emptied(model: nn.Module) -> Any:
    """A copy of a model that is empty."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, parameters)  # type: ignore[arg-type]


@torch.no_grad()
def fill(model: nn.Module, files: WeightFiles) -> None:
    """Read the parameters that have no memory. UserError if they hold NaN or infinity."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    places = defaultdict[nn.Parameter, list[tuple[nn.Module, str]]](list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _local(parameter).is_meta:
                places[parameter].append((module, name))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(files.device)
    broken = []
    for parameter, holders in places.items():
        found = nn.Parameter(_read(parameter, names[parameter], files), parameter.requires_grad)
        if not finite(_local(found)):
            broken.append(names[parameter])
        for module, name in holders:
            setattr(module, name, found)
    require_finite(broken, files.path)


def _read(parameter: Tensor, name: str, files: WeightFiles) -> Tensor:
    """This process's part of a parameter."""
    if not isinstance(parameter, DTensor):
        return files.read(name, slice(None), parameter)
    mesh, local, rows = parameter.device_mesh, _local(parameter), len(parameter)
    first = min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))  # as torch.chunk divides
    part = files.read(name, slice(first, first + len(local)), local)
    return DTensor.from_local(
        part, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite. A sum, which takes no memory, nearly always shows it."""
    flat = tensor.detach()
    return flat.is_meta or bool(flat.sum(dtype=torch.float32).isfinite()) or bool(flat.isfinite().all())


def require_finite(broken: Sequence[str], path: str) -> None:
    """UserError if ``broken`` names tensors, which hold NaN or infinity."""
    if broken:
        raise UserError(f"the weights of model '{path}' hold NaN or infinity: {some(broken)}")


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor '{names[0]}'{more}"


def save_adapter(policy: Policy, directory: Path, card: str) -> None:
    """Only the adapters, as PEFT and vLLM load them, with tokenizer and model card."""
    policy.model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


def describe_checkpoint(policy: Policy, directory: Path) -> None:
    """What `from_pretrained` needs beside a checkpoint's weights: config, tokenizer and where each weight lies; with LoRA
    adapters PEFT's own two files. Adapters that several ranks wrote can't be read there: the run's end writes them whole."""
    model, files = policy.model, sorted(directory.glob("weights*.safetensors"))
    policy.tokenizer.save_pretrained(directory)
    if not hasattr(model, "peft_config"):
        where: dict[str, str] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                where |= dict.fromkeys(opened.keys(), file.name)
        model.config.save_pretrained(directory)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(directory)
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    elif len(files) == 1:
        model.peft_config["default"].save_pretrained(directory)
        adapters = {name.replace(".default.", "."): tensor for name, tensor in load_file(files[0]).items()}
        save_file(adapters, directory / "adapter_model.safetensors", {"format": "pt"})


def save_pretrained(policy: Policy, directory: Path, card: str) -> None:
    """An ordinary Hugging Face directory: adapters merged, tokenizer, generation config and model card with it."""
    model = policy.model
    if hasattr(model, "merge_and_unload"):
        model = (in_full(model) if is_quantized(model) else copy.deepcopy(model)).merge_and_unload()
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
