"""What is tried again and again in the chaos tests: a small run is harmed once, resumed, and compared with an unharmed one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.kills import RECIPE, Crash, Life, differing, live, outcome, preload

TINY = (
    RECIPE.replace("steps = 7", "steps = 3")
    .replace("save_steps = 3", "save_steps = 1")
    .replace("eval_steps = 4", "eval_steps = 1")
    .replace("prompts_per_step = 3", "prompts_per_step = 2")
    .replace("max_refills = 1", "max_refills = 0")
    .replace("[eval]\nlimit = 2", "[eval]\nlimit = 1\nerasable = false")
)
"""Three steps, each with a checkpoint and an evaluation; two of them change the weights."""


class Place:
    """A directory with the recipe of a small run, and what comes of a run that nobody harms."""

    def __init__(self, directory: Path, recipe: str = TINY) -> None:
        self.directory, self.recipe = directory, directory / "recipe.toml"
        self.recipe.write_text(recipe, encoding="utf-8")
        if self.train("unharmed").status != 0:
            raise RuntimeError(self.said("unharmed"))
        preload(self.directory / "unharmed.log")
        self.expected = outcome(self.run("unharmed"))
        if sum(record["grad_norm"] > 0 for record in self.expected["metrics"]) < 2:
            raise RuntimeError("the run changes no weights: being identical would say little")

    def run(self, name: str) -> Path:
        return self.directory / name

    def said(self, name: str) -> str:
        """All that the lives of a run printed."""
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def calls(self, name: str) -> dict[str, int]:
        """How often the last life of a run that nothing ended made each kind of call."""
        return dict(json.loads((self.directory / f"{name}.calls").read_text(encoding="utf-8")))

    def train(self, name: str, crash: Crash | None = None) -> Life:
        """One life of a run: from its beginning, or resumed where there is something to resume."""
        resume = ["--resume"] * (self.run(name) / "config.toml").exists()
        command = ["train", str(self.recipe), f"run.output_dir={self.directory}", f"run.name={name}", *resume]
        return live(command, self.directory / f"{name}.log", crash or Crash(kind="none"))

    def unfinished(self, name: str) -> Path:
        """A run killed when the candidates of its last step were written, and its rollouts halfway."""
        life = self.train(name, Crash("write rollouts", 3))
        if life.status is not None:
            raise RuntimeError(f"it should have been killed: {self.said(name)}")
        return self.run(name)

    def forget(self, name: str) -> None:
        """Remove a run."""
        shutil.rmtree(self.run(name), ignore_errors=True)
        (self.directory / f"{name}.log").unlink(missing_ok=True)


@dataclass
class Verdicts:
    """How the trials ended, and which of them ended wrongly."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, how: str, wrong: str, said: str) -> None:
        """Count a trial that ended so; with ``wrong`` it should have ended otherwise."""
        self.ended["wrong" if wrong else how] += 1
        if wrong:
            self.wrong.append(f"{what}: {wrong}: {said[-1200:]}")

    def lines(self, of: str) -> list[str]:
        """The figures, for people."""
        return [
            f"{sum(self.ended.values())} {of}: " + ", ".join(f"{k} {n}" for k, n in sorted(self.ended.items())),
            *self.wrong,
        ]


def broken(life: Life, said: str) -> str:
    """Why a process didn't end as one should: with a status of e3rl's, and no traceback. Empty where it did."""
    if "Traceback" in said:
        return "a traceback"
    return "" if life.status in (0, 2) else f"exit {life.status}"


def not_the_same(place: Place, name: str, life: Life) -> str:
    """Why a run isn't the unharmed one in all bits; empty where it is."""
    if wrong := broken(life, place.said(name)):
        return wrong
    if life.status != 0:
        return "refused"
    keys = differing(place.expected, outcome(place.run(name)))
    return f"differs in {', '.join(keys)}" if keys else ""
