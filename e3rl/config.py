"""A run's settings as a whole, and how they are read and written.

A recipe is one TOML file whose tables are the sections of `Config` (`e3rl.settings`); ``--overlay`` files and
``section.field=value`` overrides go through the same reader. Standard library only: importing this must not import torch.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from e3rl.errors import UserError, unknown
from e3rl.parsing import parse_toml, read_tables
from e3rl.sections import build_section, convert, toml_value
from e3rl.settings import (
    DataConfig,
    EnvironmentsConfig,
    ErasureConfig,
    EvalConfig,
    FilterConfig,
    ModelConfig,
    ObjectiveConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
)
from e3rl.settings import setting as setting  # objectives from outside make their options with it
from e3rl.synonyms import SYNONYMS, place_of
from e3rl.training_settings import TrainConfig

CONTEXT_PARALLEL = ("ddp", "zero1", "zero2", "fsdp2")
"""Values of ``train.parallel`` under which ranks can divide rows."""


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    erasure: ErasureConfig = field(default_factory=ErasureConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    environments: EnvironmentsConfig = field(default_factory=EnvironmentsConfig)

    def __post_init__(self) -> None:
        weights, functions = self.rewards.weights, self.rewards.functions
        if weights and len(weights) != len(functions):
            raise UserError(f"rewards.weights has {len(weights)} values for {len(functions)} rewards.functions")
        if self.rollout.workers and self.rollout.servers:
            raise UserError(
                "rollout.workers and rollout.servers are both set: use workers, which Ray starts, or servers, which run already"
            )
        if self.environments.factory and (self.rollout.workers or self.rollout.servers):
            self._check_deadlines()
        if not functions:
            raise UserError("rewards.functions is empty: name at least one reward function")
        if self.rollout.staleness and self.train.importance_correction == "none":
            raise UserError(
                f"rollout.staleness = {self.rollout.staleness} trains on rollouts of weights before the last update: choose how "
                "to correct for it, for example train.importance_correction=segment_truncate"
            )
        if self.rollout.boundary != "length" and self.rollout.engine == "vllm":
            raise UserError(
                f"rollout.boundary = '{self.rollout.boundary}' needs rollout.engine = 'torch': vLLM ends requests by length"
            )
        if self.train.selection_cap and self.erasure.on_exhausted != "last":
            raise UserError(
                "train.selection_cap corrects for erasing that commits the last attempt: set erasure.on_exhausted = 'last', or "
                "selection_cap = 0"
            )
        self._check_optimizer()
        self._check_context()
        self._check_quantization()
        self._check_sleep()
        if self.train.activation_offload and self.train.parallel not in ("none", "ddp", "zero1"):
            raise UserError(
                f"train.activation_offload needs ranks that hold all weights: set train.parallel to ddp or zero1 (it is "
                f"'{self.train.parallel}')"
            )
        if self.train.minibatches > self.train.prompts_per_step:
            raise UserError("train.minibatches must not exceed train.prompts_per_step: a minibatch holds whole groups")

    @property
    def may_erase(self) -> bool:
        """Whether rollouts may erase anything: a segment, or a turn of an environment."""
        environments = self.environments
        turns = environments.factory and environments.erase != "none" and environments.max_turn_erasures
        return self.rollout.erase and bool(self.erasure.max_erasures or turns)

    def _check_deadlines(self) -> None:
        """Refuse tools that may take longer than a worker may be silent: it would be given up on, and the group made again."""
        if self.environments.timeout >= self.rollout.worker_timeout:
            raise UserError(
                f"environments.timeout = {self.environments.timeout:g} lets a tool's call take longer than a worker may be "
                f"silent (rollout.worker_timeout = {self.rollout.worker_timeout:g}): lower the first or raise the second"
            )

    def _check_optimizer(self) -> None:
        """Refuse an optimizer whose state ``train.parallel`` can't divide."""
        name, parallel = self.train.optimizer, self.train.parallel
        whole = parallel in ("none", "ddp") or name == "adamw" or (name == "adamw_fused" and parallel[:4] != "deep")
        if not whole:
            raise UserError(
                f"train.optimizer = '{name}' keeps its state whole, and train.parallel = '{parallel}' divides it: take "
                "adamw, or train.parallel=ddp"
            )

    def _check_quantization(self) -> None:
        """Refuse quantized weights where they would be trained, divided, or are not taken."""
        kind = self.model.quantization
        if kind == "none":
            return
        if not self.model.lora_r:
            raise UserError(f"model.quantization = '{kind}' leaves weights that can't be trained: set model.lora_r too")
        if self.train.parallel not in ("none", "ddp", "zero1"):
            raise UserError(
                f"model.quantization = '{kind}' keeps all weights in every rank: set train.parallel to ddp or zero1 (it is "
                f"'{self.train.parallel}')"
            )
        if self.rollout.engine == "vllm":
            raise UserError(
                f"model.quantization = '{kind}': vLLM would generate with other weights than are trained; take "
                "rollout.engine = 'torch'"
            )

    def _check_sleep(self) -> None:
        """Refuse an engine that sleeps while it has something to do, or that no training waits for."""
        rollout = self.rollout
        if rollout.vllm_sleep and (rollout.engine != "vllm" or rollout.workers or rollout.servers or rollout.staleness):
            raise UserError(
                "rollout.vllm_sleep = true needs rollout.engine = 'vllm' in this process, waiting while it trains: set no "
                "rollout.workers, no rollout.servers and rollout.staleness = 0, or vllm_sleep = false"
            )

    def _check_context(self) -> None:
        """Refuse a division of rows that would not be exact, or among ranks that there are not."""
        train = self.train
        if train.context_parallel > 1 and train.parallel not in CONTEXT_PARALLEL:
            raise UserError(
                f"train.context_parallel = {train.context_parallel} needs ranks whose gradients add up: set train.parallel to "
                f"{', '.join(CONTEXT_PARALLEL)} (it is '{train.parallel}')"
            )
        if train.context_parallel > 1 and train.router_loss:
            raise UserError(
                "train.router_loss is a product of means over a row's tokens, which ranks that divide the row don't have: "
                "leave it at 0, or train.context_parallel at 1"
            )


def _build_objective(table: Mapping[str, Any]) -> ObjectiveConfig:
    """The objective's own options are checked by the objective itself, before training starts."""
    options = {k: v for k, v in table.items() if k not in ("name", "others")}
    others = convert(table.get("others", {}), Mapping[str, Any], "objective.others")
    for name, own in others.items():  # options that another objective takes, where an overlay or override names it
        convert(own, Mapping[str, Any], f"objective.others.{name}")
    name = convert(table.get("name", "e3rl"), str, "objective.name")
    return ObjectiveConfig(name=name, options=options)


def _require_places(section: str, table: Mapping[str, Any], sections: Mapping[str, type]) -> None:
    """UserError for a setting that belongs to another section, or has another name here."""
    known = {f.name for f in fields(sections[section])}
    for key in table:
        place = "" if key in known else place_of(key, Config)
        if place and (section != "objective" or (key in SYNONYMS and not place.startswith("objective.name"))):
            raise UserError(f"[{section}] has no key '{key}': it is set as {place}")


def build_config(tables: Mapping[str, Any]) -> Config:
    """A `Config` from nested tables, as read from TOML."""
    sections = typing.get_type_hints(Config)
    built: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in sections:
            raise unknown("section", name, sections)
        if not isinstance(table, Mapping):
            raise UserError(f"'{name}' is a section: write [{name}] and its fields below it, or {name}.FIELD=VALUE")
        _require_places(name, table, sections)
        built[name] = _build_objective(table) if name == "objective" else build_section(sections[name], table, name)
    return Config(**built)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on it, table by table."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def lay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on it. Options belong to one objective: another ``objective.name`` drops them, and takes its
    own from ``objective.others``, if any."""
    name = over.get("objective", {}).get("name") if isinstance(over.get("objective"), Mapping) else None
    if name is not None and name != base.get("objective", {}).get("name", name):
        others = base["objective"].get("others", {})
        base = {**base, "objective": {**others.get(name, {}), "others": others}}
    return merge(base, over)


def parse_override(text: str) -> dict[str, Any]:
    """``section.field=value`` as nested tables. The value is TOML; what is not valid TOML is taken as a string."""
    path, equals, raw = text.partition("=")
    section, dot, key = path.strip().removeprefix("--").partition(".")
    if equals and not dot and (place := place_of(section, Config)):
        value = "" if " " in place else f"={raw}"
        raise UserError(f"'{text}' is no override: it is set as {place}{value}")
    if not (equals and dot and section and key):
        raise UserError(f"'{text}' is no override: write section.field=value, for example train.learning_rate=1e-5")
    try:
        value = parse_toml(f"value = {raw}", text)["value"]
    except UserError:
        value = raw
    return {section: {key: value}}


def layered(base: Mapping[str, Any], overlays: Sequence[Path] = (), overrides: Sequence[str] = ()) -> dict[str, Any]:
    """``base`` with each overlay and then the overrides laid on it, unchecked."""
    tables = dict(base)
    for overlay in overlays:
        tables = lay(tables, read_tables(overlay))
    together: dict[str, Any] = {}
    for override in overrides:
        together = merge(together, parse_override(override))
    return lay(tables, together)


def load_config(recipe: Path | None = None, overlays: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Config:
    """The recipe, then each overlay, then the overrides, checked as a whole."""
    base = read_tables(recipe) if recipe else {}
    try:
        return build_config(layered(base, overlays, overrides))
    except UserError as error:
        blamed = recipe and not _is_sound(layered(base, overlays))
        raise UserError(f"{recipe}: {error}" if blamed else str(error)) from None


def _is_sound(tables: Mapping[str, Any]) -> bool:
    """Whether the tables build a config. If so, an error comes from the overrides."""
    try:
        build_config(tables)
    except UserError:
        return False
    return True


def to_tables(config: Config) -> dict[str, dict[str, Any]]:
    """The resolved config as nested tables, objective options beside the objective's name."""
    tables = {f.name: dataclasses.asdict(getattr(config, f.name)) for f in fields(config)}
    tables["objective"] = {"name": config.objective.name, **config.objective.options}
    return tables


def tables_to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of plain values as TOML."""
    lines: list[str] = []
    for section, table in tables.items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def to_toml(config: Config) -> str:
    """The resolved config as a recipe that reads back to an equal one."""
    return tables_to_toml(to_tables(config))
