"""What is tried again and again in the chaos tests: a small run is harmed once, resumed, and compared with an unharmed one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e3rl.doctor.run import check_run
from tests.chaos.kills import RECIPE, Crash, Life, live, outcome

TINY = (
    RECIPE.replace("steps = 7", "steps = 2")
    .replace("save_steps = 3", "save_steps = 1")
    .replace("eval_steps = 4", "eval_steps = 1")
    .replace("num_generations = 4", "num_generations = 2")
    .replace("prompts_per_step = 3", "prompts_per_step = 1")
    .replace("max_refills = 1", "max_refills = 0")
    .replace("[eval]\nlimit = 2", "[eval]\nlimit = 1\nerasable = false")
)
"""Two steps, each with a checkpoint and an evaluation, of two siblings."""

SAYS = (
    "damaged",
    "can't read",
    "nothing is logged",
    "is missing",
    "does not match",
    "skipped",
    "left out",
    "evaluated again",
)
"""Words of a sentence about something that is not as it was left."""


class Place:
    """A directory with the recipe of a small run, and what comes of a run that nobody harms."""

    def __init__(self, directory: Path, recipe: str = TINY) -> None:
        self.directory, self.recipe = directory, directory / "recipe.toml"
        self.recipe.write_text(recipe, encoding="utf-8")
        if self.train("unharmed").status != 0:
            raise RuntimeError(self.said("unharmed"))
        self.expected = outcome(self.run("unharmed"))

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
        """A run killed when the candidates of its second step were written, and its rollouts halfway."""
        life = self.train(name, Crash("write rollouts", 2))
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

    whole: Path  # the run that nobody harmed
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, expected: Mapping[str, Any], status: int | None, said: str, run: Path) -> None:
        """Judge one resumed run: the same in all bits, a sentence, or wrong."""
        if "Traceback" in said or status not in (0, 2):
            self.ended["wrong"] += 1
            self.wrong.append(f"{what}: exit {status}: {said[-1200:]}")
            return
        if status == 2:
            self.ended["refused with a sentence"] += 1
            return
        unreadable = [f.subject for f in check_run(run) if f.kind == "problem" and f.subject.startswith("rollouts/")]
        for name in unreadable:  # resuming reads no old rollouts: whoever does is told
            shutil.copyfile(self.whole / name, run / name)
        said += "damaged" * len(unreadable)
        found = outcome(run)
        differing = [key for key, value in expected.items() if key != "files" and found[key] != value]
        differing += ["rollouts"] * len(unreadable)
        if not differing:
            self.ended["identical"] += 1
        elif any(word in said for word in SAYS):
            self.ended["a sentence, then on to the end"] += 1
        else:
            self.ended["wrong"] += 1
            self.wrong.append(f"{what}: differs in {', '.join(differing)}, and nothing was said: {said[-800:]}")

    def lines(self, of: str) -> list[str]:
        """The figures, for people."""
        return [
            f"{sum(self.ended.values())} {of}: " + ", ".join(f"{k} {n}" for k, n in sorted(self.ended.items())),
            *self.wrong,
        ]
