"""From a config to an objective: every mistake is answered before training, and the method gets its honest name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from e3rl.cli.recipes import find_recipe
from e3rl.config import Config, build_config, load_config
from e3rl.errors import UserError
from e3rl.objectives import OBJECTIVES, method_name, options
from tests.objectives.support import make

HEAD = """
from dataclasses import dataclass
import torch
from e3rl.config import setting
from e3rl.objectives.base import Loss, TrajectoriesOnly
"""
GOOD = """
@dataclass(frozen=True)
class Mine(TrajectoriesOnly):
    scale: float = setting(1.0, "a scale", min=0)
    needs = frozenset()
    def advantages(self, signals):
        return self.scale * (signals.rewards_G - signals.rewards_G.mean())[:, None] * signals.mask_GT
    def loss(self, batch):
        return Loss(-(batch.advantages_ST * batch.logprobs_ST * batch.mask_ST).sum(), {})
"""


def refusal(name: str, **given: Any) -> str:
    with pytest.raises(UserError) as error:
        make(name, **given)
    return str(error.value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_built_and_explains_its_options(name: str) -> None:
    objective = make(name)
    assert type(objective).__doc__
    for field in options(name):
        assert field.metadata["help"]
        assert field.metadata["source"]
        assert getattr(objective, field.name) == field.default


def test_options_reach_the_objective() -> None:
    objective = make("e3rl", allocation="anchored", kl_coef=0, attribution_window=8)
    assert (objective.allocation, objective.kl_coef, objective.attribution_window) == ("anchored", 0.0, 8)


def test_unknown_objective_lists_and_suggests() -> None:
    message = refusal("grop")
    assert "unknown objective 'grop'. Did you mean 'grpo'?" in message
    assert all(name in message for name in OBJECTIVES)


def test_option_of_another_objective_names_its_owner() -> None:
    message = refusal("grpo", allocation="causal")
    assert "objective 'grpo' has no option 'allocation'. It belongs to 'e3rl'." in message
    assert "clip_high" in message


def test_option_of_nobody_suggests_the_nearest() -> None:
    assert "Did you mean 'kl_coef'?" in refusal("grpo", kl_coeff=0.1)


def test_objective_without_options_says_so() -> None:
    assert "objective 'vanilla' has no option 'steps'. Its options: none." in refusal("vanilla", steps=3)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("grpo", {"kl_coef": -0.1}, "objective.kl_coef = -0.1 is out of range: it must be at least 0"),
        ("e3rl", {"clip_low": 1.5}, "at most 1"),
        ("e3rl", {"attribution_window": 0}, "at least 1"),
        ("e3rl", {"allocation": "casual"}, "expected one of 'causal', 'sequence', 'anchored', 'value', got 'casual'"),
        ("erpo", {"buckets": 2.5}, "objective.buckets: expected a whole number"),
        ("grpo", {"kl_coef": float("nan")}, "out of range"),
    ],
)
def test_wrong_values_name_the_option_and_its_range(name: str, given: dict, expected: str) -> None:
    message = refusal(name, **given)
    assert expected in message
    assert f"'{name}'" in message


def plug_in(directory: Path, body: str) -> str:
    path = directory / "mine.py"
    path.write_text(HEAD + body)
    return f"{path}:Mine"


def test_a_plug_in_file_is_built_with_its_options(tmp_path: Path) -> None:
    assert make(plug_in(tmp_path, GOOD), scale=2).scale == 2.0


BROKEN = {
    "1/0": "can't be imported: ZeroDivisionError",
    "import nowhere_at_all": "can't be imported: ModuleNotFoundError",
    "Other = 1": "has no 'Mine'",
    "Mine = 3": "must be a class, and is a int",
    GOOD.replace("@dataclass(frozen=True)", ""): "must be a frozen dataclass",
    GOOD.replace("frozen=True", "frozen=False").replace("TrajectoriesOnly", "object"): "must be a frozen dataclass",
    GOOD.replace("def loss", "def los"): "has no method `loss`",
    GOOD.replace("(TrajectoriesOnly)", ""): "has no method `erased_advantage`",
    GOOD.replace("needs = frozenset()", ""): "has no `needs`",
    GOOD.replace("frozenset()", "frozenset({'reward_model'})"): "'shares', 'reference', 'uncertainties', 'erased'",
    GOOD.replace("frozenset()", "{'reference'}"): "must be a frozenset",
    GOOD.replace("frozenset()", "frozenset({'shares'})"): "has no option `attribution_window`",
    GOOD.replace("[:, None] * signals.mask_GT", ""): "`advantages` returned (3,), not one number per token (3, 5)",
    GOOD.replace("signals.rewards_G.mean())", "float('nan'))"): "NaN or infinite",
    GOOD.replace(" * signals.mask_GT", " + 0 * signals.mask_GT"): "must be 0 in padding",
    GOOD.replace("return self.scale *", "return None and"): "`advantages` returned NoneType",
    GOOD.replace("return Loss(", "return ("): "`loss` must return a Loss",
    GOOD.replace(".sum(), {}", ", {}"): "must be one finite number",
    GOOD.replace("batch.logprobs_ST *", "batch.old_logprobs_ST *"): "does not depend on batch.logprobs_ST",
    GOOD.replace(".sum(), {}", ".sum(), {'a': 1.0}"): "metrics must be (sum, count) pairs",
    GOOD.replace("needs = frozenset()", "needs = frozenset(); divides_by = 'rows'"): "`divides_by` is 'rows'",
    GOOD.replace("needs = frozenset()", "needs = frozenset(); divides_by = 'groups'"): "give another gradient",
    GOOD.replace("self.scale *", "self.shale *"): "failed on a toy group with AttributeError",
    GOOD.replace(
        "    def loss", "    def erased_advantage(self, reward): ...\n    def loss"
    ): "`erased_advantage` must return",
}


@pytest.mark.parametrize(("body", "clause"), BROKEN.items(), ids=list(BROKEN.values()))
def test_a_broken_plug_in_is_refused_by_name_and_clause(tmp_path: Path, body: str, clause: str) -> None:
    message = refusal(plug_in(tmp_path, body))
    assert clause in message
    assert "mine.py" in message


@pytest.mark.parametrize("signal", ["reference_logprobs_GT", "shares_GT", "uncertainties_GT"])
def test_an_undeclared_need_is_found_before_training(tmp_path: Path, signal: str) -> None:
    body = GOOD.replace("self.scale *", f"signals.{signal} *")
    assert "TypeError" in refusal(plug_in(tmp_path, body))


def test_importing_the_table_needs_no_torch() -> None:
    code = "import sys, e3rl.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def named(
    name: str, *, erase: bool = True, perturbation: float = 0.0, length: float = 0.0, most: int = 5, **given: Any
) -> str:
    tables = {
        "objective": {"name": name, **given},
        "rollout": {"erase": erase},
        "erasure": {"perturbation_weight": perturbation, "length_exponent": length, "max_erasures": most},
    }
    return method_name(build_config(tables))


def test_e3rl_is_the_name_of_the_paper_method_alone() -> None:
    assert method_name(Config()) == "E³RL"
    assert named("e3rl") == "E³RL"
    assert named("e3rl", perturbation=0.5) == "E³RL+ε"
    assert named("e3rl", erased="contrast") == "E³RL+contrast"
    assert named("e3rl", perturbation=0.5, erased="contrast") == "E³RL+ε+contrast"
    assert named("e3rl", length=0.5) == "E³RL+length"
    assert named("e3rl", perturbation=0.5, length=1.0, erased="contrast") == "E³RL+ε+length+contrast"
    assert named("e3rl", erase=False, length=0.5) == "E³RL (plain rollouts)"
    assert named("e3rl", erased="drop") == "E³RL"
    assert named("e3rl", erase=False) == "E³RL (plain rollouts)"
    assert named("e3rl", erase=False, perturbation=0.5) == "E³RL (plain rollouts)"
    assert named("e3rl", erase=False, erased="contrast") == "E³RL (plain rollouts)"


def test_other_methods_say_when_they_train_on_erased_rollouts() -> None:
    assert named("grpo", erase=False) == "GRPO"
    assert named("grpo") == "GRPO+erase"
    assert named("grpo", perturbation=1.0) == "GRPO+erase+ε"
    assert named("dr_grpo", erase=False) == "Dr. GRPO"
    assert named("vanilla", erase=False) == "Vanilla"
    assert named("some.package:Mine", erase=False) == "Mine"
    assert named("some.package:Mine") == "Mine+erase"


def test_a_judge_that_may_erase_nothing_gives_no_name_for_what_is_erased() -> None:
    assert named("e3rl", most=0, perturbation=0.5, erased="contrast") == "E³RL+ε"
    assert named("grpo", most=0) == "GRPO"
    demo = load_config(find_recipe("demo"), [find_recipe("methods/step-credit")])
    assert (demo.objective.options["erased"], method_name(demo)) == ("contrast", "E³RL+value")


@pytest.mark.parametrize(
    ("settings", "title"),
    [({}, "GRPO+erase"), ({"erase": "none"}, "GRPO"), ({"max_turn_erasures": 0}, "GRPO"), ({"factory": ""}, "GRPO")],
)
def test_a_turn_is_something_to_erase(settings: dict[str, Any], title: str) -> None:
    environments = {"factory": "python", "erase": "errors", "max_turn_erasures": 1, **settings}
    tables = {"objective": {"name": "grpo"}, "erasure": {"max_erasures": 0}, "environments": environments}
    assert method_name(build_config(tables)) == title


def test_every_objective_has_a_title() -> None:
    titles = {named(name, erase=False) for name in OBJECTIVES}
    assert len(titles) == len(OBJECTIVES)
    assert not titles & set(OBJECTIVES)
