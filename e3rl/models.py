"""Policies: loading, adapters, and the reference policy."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from e3rl.config import ModelConfig
from e3rl.errors import UserError
from e3rl.model_files import no_bars_of_tensors, refuse_kernels, require_fetchable, require_model, resolve_model_path
from e3rl.quantization import loading_arguments, with_exact_products
from e3rl.weights.files import WeightFiles, emptied, fill, finite, require_finite, some, without_memory


@dataclass(frozen=True)
class Policy:
    """A model with its tokenizer, end tokens and context length."""

    model: Any  # a transformers model, with adapters around it where LoRA is on
    tokenizer: Any
    source: str
    eos_ids: tuple[int, ...]
    context_length: int
    files: WeightFiles | None = None  # from which an empty model is filled

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, source: str | None = None) -> Policy:
        """A policy around a transformers model that is already loaded; the model is neither copied nor moved.

        Settings and calibration statistics are looked for in ``source``; default: where the model came from.
        """
        found = source or getattr(model.config, "_name_or_path", "") or "(a model in memory)"
        context = getattr(model.config, "max_position_embeddings", None) or 2048
        return cls(model, tokenizer, found, _eos_ids(model.generation_config, tokenizer), int(context))

    @property
    def device(self) -> torch.device:
        return self.files.device if self.files is not None else next(self.model.parameters()).device

    def fill(self, model: Any = None) -> None:
        """Read in the weights of ``model``, or of this policy's own, where it is empty."""
        if self.files is not None:
            fill(self.model if model is None else model, self.files)

    def copied(self) -> Policy:
        """A copy with its own whole weights."""
        found = replace(self, model=copy.deepcopy(self.model))
        found.fill()
        return found

    def emptied(self) -> Policy:
        """A copy without weights: only names, shapes and types."""
        return replace(self, model=emptied(self.model), files=None)

    @property
    def vocabulary(self) -> int:
        """Ids that the model can draw: many models have more than their tokenizer names."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that training changes, by name, in a stable order."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device = '{name}' is no device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device = '{name}', but PyTorch sees no GPU here; use 'auto' or 'cpu'")
    return device


def _eos_ids(generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response, as generation config and tokenizer name them."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = {i for i in [*ids, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise UserError("the model names no end-of-sequence token; set eos_token_id in its generation_config.json")
    return tuple(sorted(found))


def add_lora(model: Any, config: ModelConfig) -> Any:
    """The model with new adapters around it, as the config describes them."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("model.lora_r > 0 needs PEFT: pip install 'e3rl[lora]'") from None
    names = config.lora_target_modules
    experts = [n for n in names if any(where.endswith(f".{n}") for where, _ in model.named_parameters())]
    modules = _target_modules([n for n in names if n not in experts])
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=[] if experts and modules is None else modules,
        target_parameters=experts or None,  # weights of experts are parameters of one module, not modules
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"model.lora_target_modules = {list(config.lora_target_modules)}: {error}") from None


def _target_modules(names: Sequence[str]) -> str | list[str] | None:
    """As PEFT takes them: 'all-linear' and patterns as a string, names as a list, nothing as its own choice."""
    if len(names) == 1 and (names[0] == "all-linear" or not re.fullmatch(r"[\w.]+", names[0])):
        return names[0]
    return list(names) or None


_OTHER_HEADS = ("Classification", "QuestionAnswering", "MaskedLM", "MultipleChoice", "RewardModel")


def _causal_config(config: ModelConfig, source: str) -> Any:
    """The model's config. UserError if it is no causal language model (transformers would add an untrained head), or if it
    names kernels of the hub."""
    from transformers import AutoConfig, PreTrainedConfig

    if not config.trust_remote_code:
        refuse_kernels(PreTrainedConfig.get_config_dict(source)[0], f"the config of model '{config.path}'")
    found: Any = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    other = [name for name in found.architectures or [] if any(head in name for head in _OTHER_HEADS)]
    if other or found.is_encoder_decoder:
        kind = other[0] if other else f"{found.model_type}, an encoder-decoder"
        raise UserError(
            f"model '{config.path}' is no causal language model but {kind}: e3rl samples from and trains decoder-only models"
        )
    return found


@dataclass(frozen=True)
class Outline:
    """A model without its weights: enough to render prompts and to check data."""

    tokenizer: Any
    source: str
    eos_ids: tuple[int, ...]
    context_length: int
    config: Any  # transformers' own
    generation: Any = None  # its generation config


def load_outline(config: ModelConfig, *, directory: Path | None = None) -> Outline:
    """Tokenizer, context and end tokens of the model that ``config`` names. Fast: loads no weights."""
    from transformers import AutoTokenizer, GenerationConfig

    source = str(directory) if directory else resolve_model_path(config.path)
    require_model(source)
    require_fetchable(source)
    with _loading_errors(config.path):
        described = _causal_config(config, source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:  # a model without generation_config.json
            generation = GenerationConfig.from_model_config(described)
    context = getattr(described.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    return Outline(tokenizer, config.path, _eos_ids(generation, tokenizer), int(context), described, generation)


@contextlib.contextmanager
def _loading_errors(path: str) -> Iterator[None]:
    """Whatever transformers raises, as a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a file may be damaged in any way, and the library documents no closed list
        reason = str(error).strip().splitlines()
        if type(error).__name__ == "UnpicklingError":
            reason = [
                "its weights are a pickle that holds more than tensors, which may run code; save them as safetensors"
            ]
        raise UserError(f"model '{path}' can't be loaded: {reason[0] if reason else error!r}") from None


def _attention(config: Any) -> str:
    """PyTorch's attention, or for architectures that don't have it (gpt-oss, Gemma 2) their own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return "sdpa" if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_sdpa", True) else "eager"


def load_policy(
    config: ModelConfig, *, directory: Path | None = None, outline: Outline | None = None, empty: bool = False
) -> Policy:
    """The policy that ``config`` names, its weights taken from ``directory`` where one is given.

    ``empty``: reads no weights, so that the model can be divided before `Policy.fill` reads them. Models with adapters, or with
    weights that are converted while they are read, are loaded whole.
    """
    outline = outline or load_outline(config, directory=directory)
    source = str(directory) if directory else resolve_model_path(config.path)
    device = resolve_device(config.device)
    with _loading_errors(config.path), no_bars_of_tensors():
        # on a CPU transformers reads each tensor in place by itself
        by_tensor = config.quantization == "none" and (empty or device.type != "cpu")
        files = WeightFiles.find(source, config.path, device) if by_tensor else None
        model = None if files is None else _empty_model(config, source, outline, files)
        if model is None:
            model, files = _whole_model(config, source, outline, device), None
        elif config.lora_r or not empty:
            fill(model, cast(WeightFiles, files))
            files = None
    if config.lora_r:
        model = add_lora(model, config)
    return replace(Policy.of(model, outline.tokenizer, source=config.path), files=files)


def _whole_model(config: ModelConfig, source: str, outline: Outline, device: torch.device) -> Any:
    """The model as transformers loads it. UserError if its files lack tensors, or hold NaN or infinity."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=copy.deepcopy(outline.config),  # passed here, or an attention that it names would override ours
        dtype=getattr(torch, config.dtype),
        attn_implementation=_attention(outline.config),
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        **loading_arguments(config, device),
    )
    model, found = loaded
    _check_weights(model, found["missing_keys"], config.path)
    return model.to(device) if config.quantization == "none" else with_exact_products(model)


def _empty_model(config: ModelConfig, source: str, outline: Outline, files: WeightFiles) -> Any:
    """The same without memory for its parameters; None if the files don't hold exactly these."""
    from transformers import AutoModelForCausalLM

    described = copy.deepcopy(outline.config)
    described.name_or_path = source
    with without_memory():
        model = AutoModelForCausalLM.from_config(
            described,
            dtype=getattr(torch, config.dtype),
            attn_implementation=_attention(described),
            trust_remote_code=config.trust_remote_code,
        )
    model.generation_config = outline.generation
    return model.eval() if files.hold(model) else None


def _check_weights(model: nn.Module, missing: Collection[str], path: str) -> None:
    """UserError where the files lack tensors, which transformers would draw at random, or hold NaN or infinity."""
    if missing:
        raise UserError(f"the weights of model '{path}' are incomplete: {some(sorted(missing))}")
    require_finite([name for name, p in model.named_parameters() if not finite(p)], path)


class ReferencePolicy:
    """The policy as it was before training: the adapters switched off, or a frozen copy of the weights."""

    def __init__(self, model: Any) -> None:
        self._policy = model
        self._adapted = hasattr(model, "disable_adapter")
        self.frozen = None if self._adapted else copy.deepcopy(model).requires_grad_(False).eval()

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """The reference model, for use inside the ``with`` block."""
        if self.frozen is not None:
            yield self.frozen
        else:
            with self._policy.disable_adapter():
                yield self._policy


def unwrapped(model: Any) -> Any:
    """The transformers model inside adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: Any) -> Any:
    return unwrapped(model).config.get_text_config(decoder=True)


def has_dropout(model: Any) -> bool:
    """Whether a forward pass in training is random: then its log-probabilities are not the policy's."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return modules or getattr(unwrapped(model).config, "attention_dropout", 0.0) > 0


def sliding_window(model: Any) -> int | None:
    """How many positions the queries of sliding layers see, their own included; None where every layer sees all."""
    config = _text_config(model)
    layer_types = getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return getattr(config, "sliding_window", None) if slides else None


@contextlib.contextmanager
def narrow_window(model: Any) -> Iterator[None]:
    """Sliding layers see no more than 4 positions, so that a check with few tokens exceeds the window."""
    window = sliding_window(model)
    holders = [_text_config(model), *unwrapped(model).modules()] if window is not None else []
    holders = [holder for holder in holders if getattr(holder, "sliding_window", None) == window]
    for holder in holders:
        holder.sliding_window = min(window or 4, 4)
    try:
        yield
    finally:
        for holder in holders:
            holder.sliding_window = window
