"""`reward_model`: a sequence-classification model, named by its directory or hub id, scores responses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from e3rl.errors import UserError
from e3rl.rewards.batch import Batch, Part
from e3rl.sections import build_section
from e3rl.settings import setting


@dataclass(frozen=True)
class RewardModelSettings:
    """The table ``rewards.reward_model``."""

    path: str = setting("", "a directory or hub id")
    label: int = setting(-1, "which of several labels' scores is the reward; -1: the only one", min=-1)
    batch_tokens: int = setting(16384, "tokens that go through it together, padding included", min=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "type of its weights")
    device: str = setting("auto", "'auto' takes a GPU where there is one; or 'cpu', 'cuda', 'cuda:1'")


class SequenceReward:
    """The model's score of prompt and response, as in TRL: through its chat template if it has one, else unchanged.

    A response that is too long for the model, or whose score is not finite, has no reward.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.settings = build_section(RewardModelSettings, table, "rewards.reward_model")
        if not self.settings.path:
            raise UserError("the reward 'reward_model' needs rewards.reward_model = {path = \"…\"}: which model is it?")
        self._model, self._tokenizer = _load(self.settings)
        labels = int(self._model.config.num_labels)
        if self.settings.label >= labels or (self.settings.label < 0 and labels > 1):
            raise UserError(
                f"reward model '{self.settings.path}' has {labels} labels: set rewards.reward_model.label, from 0 to {labels - 1}"
            )
        self._label = max(0, self.settings.label)
        self._longest = int(getattr(self._model.config, "max_position_embeddings", None) or 2**31)

    def score(self, batch: Batch) -> list[Part]:
        """One part a trajectory."""
        sequences = [self._ids(batch, i) for i in range(len(batch))]
        parts = [Part(error=f"{len(ids)} tokens, and the reward model takes {self._longest}") for ids in sequences]
        fitting = [i for i, ids in enumerate(sequences) if len(ids) <= self._longest]
        for places in _together(fitting, sequences, self.settings.batch_tokens):
            for place, value in zip(places, self._scores([sequences[i] for i in places]), strict=True):
                parts[place] = Part(value) if math.isfinite(value) else Part(error=f"its reward model says {value}")
        return parts

    def _ids(self, batch: Batch, index: int) -> list[int]:
        prompt, text = batch.problems[index].prompt, batch.texts[index]
        if not self._tokenizer.chat_template:
            before = prompt if isinstance(prompt, str) else "\n\n".join(m.content for m in prompt)
            return list(self._tokenizer(before + text, add_special_tokens=False)["input_ids"])
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(batch.prompts[index])  # type: ignore[arg-type]
        chat = [*turns, {"role": "assistant", "content": text}]
        rendered = self._tokenizer.apply_chat_template(chat, tokenize=False)
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _scores(self, sequences: Sequence[list[int]]) -> list[float]:
        import torch

        width = max(len(ids) for ids in sequences)
        padded = torch.full((len(sequences), max(1, width)), int(self._model.config.pad_token_id))
        mask = torch.zeros_like(padded)
        for row, ids in enumerate(sequences):
            padded[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        with torch.inference_mode():
            device = self._model.device
            logits = self._model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
        return [float(value) for value in logits[:, self._label].float().tolist()]


def _together(places: Sequence[int], sequences: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Batches of places with at most ``tokens`` tokens with padding, longest first; a longer sequence is a batch of its own."""
    waiting = sorted(places, key=lambda place: len(sequences[place]), reverse=True)
    while waiting:
        rows = max(1, tokens // max(1, len(sequences[waiting[0]])))
        yield waiting[:rows]
        waiting = waiting[rows:]


def _load(settings: RewardModelSettings) -> tuple[Any, Any]:
    """Model and tokenizer. UserError where they can't be loaded, or the model's head was never trained."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

    from e3rl.model_files import refuse_kernels, require_fetchable, require_model, resolve_model_path
    from e3rl.models import resolve_device

    name, source = settings.path, resolve_model_path(settings.path)
    require_model(source)
    require_fetchable(source)
    device = resolve_device(settings.device)
    try:
        refuse_kernels(PreTrainedConfig.get_config_dict(source)[0], f"the config of reward model '{name}'")
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, settings.dtype), output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # a file may be damaged in any way
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UserError(f"reward model '{name}' can't be loaded: {reason}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(
            f"reward model '{name}' has no {min(info['missing_keys'])}: it is no sequence-classification model, and an "
            "untrained head gives random scores"
        )
    if model.config.pad_token_id is None:  # the model finds a sequence's end by it
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    if model.config.pad_token_id is None:
        raise UserError(
            f"reward model '{name}' names no padding token: set pad_token_id in {Path(source) / 'config.json'}"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer
