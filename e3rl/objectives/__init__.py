"""The objectives by name, and how one is made from a config. Does not import torch itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from e3rl.config import Config, ObjectiveConfig
from e3rl.errors import UserError
from e3rl.plugins import load
from e3rl.sections import build_section

if TYPE_CHECKING:
    from e3rl.objectives.base import Objective

OBJECTIVES = {
    "bapo": "e3rl.objectives.bapo:BAPO",
    "cispo": "e3rl.objectives.cispo:CISPO",
    "dapo": "e3rl.objectives.dapo:DAPO",
    "disco": "e3rl.objectives.disco:DisCO",
    "dr_grpo": "e3rl.objectives.dr_grpo:DrGRPO",
    "e3rl": "e3rl.objectives.e3rl:E3RL",
    "erpo": "e3rl.objectives.erpo:ERPO",
    "grpo": "e3rl.objectives.grpo:GRPO",
    "gspo": "e3rl.objectives.gspo:GSPO",
    "luspo": "e3rl.objectives.luspo:LUSPO",
    "rloo": "e3rl.objectives.rloo:RLOO",
    "sapo": "e3rl.objectives.sapo:SAPO",
    "sft": "e3rl.objectives.sft:SFT",
    "vanilla": "e3rl.objectives.vanilla:Vanilla",
    "vespo": "e3rl.objectives.vespo:VESPO",
}

_TITLES = {
    "bapo": "BAPO",
    "cispo": "CISPO",
    "dapo": "DAPO",
    "disco": "DisCO",
    "dr_grpo": "Dr. GRPO",
    "e3rl": "E³RL",
    "erpo": "ERPO",
    "grpo": "GRPO",
    "gspo": "GSPO",
    "luspo": "LUSPO",
    "rloo": "RLOO",
    "sapo": "SAPO",
    "sft": "SFT",
    "vanilla": "Vanilla",
    "vespo": "VESPO",
}


def build(config: ObjectiveConfig) -> Objective:
    """The objective that the config names, with its options and its behaviour on a toy group checked."""
    from e3rl.objectives.checks import check_class, check_objective_runs

    kind = load("objective", config.name, OBJECTIVES)
    check_class(config.name, kind)
    _check_owners(config, kind)
    try:
        objective: Objective = build_section(kind, config.options, "objective")
    except UserError as error:
        raise UserError(f"objective '{config.name}': {error}") from None
    check_objective_runs(config.name, objective)
    return objective


def left_behind(recipe: Mapping[str, Any], chosen: ObjectiveConfig) -> list[str]:
    """What a recipe's tables say of their own objective, and another that was named over them does otherwise; a sentence each."""
    own = recipe.get("objective", {})
    name = own.get("name", ObjectiveConfig().name)
    kind = load("objective", chosen.name, OBJECTIVES)
    if chosen.name == name or not dataclasses.is_dataclass(kind):  # what is none is refused later
        return []
    values = {field.name: chosen.options.get(field.name, field.default) for field in dataclasses.fields(kind)}
    return [
        f"objective.{key} = {own[key]} is the recipe's for {name}; {chosen.name} has {value} here. "
        f"Say objective.{key}={own[key]} to keep it"
        for key, value in values.items()
        if key in own and own[key] != value
    ]


def options(name: str) -> tuple[dataclasses.Field[Any], ...]:
    """The option fields of a named objective; each has its help and source in ``metadata``."""
    return dataclasses.fields(load("objective", name, OBJECTIVES))


def _check_owners(config: ObjectiveConfig, kind: type[Any]) -> None:
    """UserError for an unknown option; names the objective that has it, if any."""
    own = {f.name for f in dataclasses.fields(kind)}
    for key in config.options.keys() - own:
        owners = [f"'{n}'" for n in OBJECTIVES if n != config.name and key in {f.name for f in options(n)}]
        if owners or not own:
            elsewhere = f" It belongs to {', '.join(owners)}." if owners else ""
            known = ", ".join(sorted(own)) or "none"
            raise UserError(f"objective '{config.name}' has no option '{key}'.{elsewhere} Its options: {known}.")


def method_name(config: Config) -> str:
    """The method's name in reports and tables. Only the paper's method is called E³RL."""
    objective, metric = config.objective, config.erasure.metric
    judges = config.rollout.erase and objective.name != "sft"  # sft has no rollouts
    erases = judges and config.may_erase
    title = _TITLES.get(objective.name, objective.name.rpartition(":")[2])
    is_paper_method = objective.name == "e3rl"
    name = title + ("+erase" if erases and not is_paper_method else "")
    if judges and metric != "e3rl":
        name += "+" + metric.rpartition(":")[2]
    elif judges and config.erasure.perturbation_weight > 0:
        name += "+ε"
    if judges and config.erasure.length_exponent > 0:
        name += "+length"
    name += "+contrast" if erases and objective.options.get("erased") == "contrast" else ""
    return name + (" (plain rollouts)" if is_paper_method and not judges else "")
