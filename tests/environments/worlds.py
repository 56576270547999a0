# ruff: noqa: E501
"""A tokenizer with a template for tools, an engine that says scripted texts, and an environment that counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from e3rl.config import Config, EnvironmentsConfig, RewardsConfig, RolloutConfig
from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.environments.episodes import tool_prompts
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Candidate, Draw, Group, Problem, Trajectory
from tests.rollout.worlds import MEAN_ONLY

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ (tool | tojson) + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for call in m.tool_calls %}{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}"
    "{{ '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALL = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
LIMITS: dict[str, Any] = {"context_limit": 8192, "completion_limit": 2048}
COUNTER = '''
class Counter:
    def reset(self, start: int = 0, **row):
        self.count, self.asleep = start, False
        return f" It stands at {start}."

    def add(self, by: int) -> str:
        """Count on.

        Args:
            by: how many
        """
        if by > 9:
            self.count = -1
            raise ValueError("too many")
        self.count += by
        return f"{self.count}"

    def rest(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long
        """
        import time
        time.sleep(seconds)

    async def ask(self) -> str:
        """Ask what it stands at."""
        return str(self.count)

    def get_reward(self) -> float:
        return float(self.count)
'''
STATEFUL = (
    COUNTER
    + """
    def snapshot(self):
        return self.count

    def restore(self, snapshot):
        self.count = snapshot
"""
)


def tokenizer(template: str = TEMPLATE) -> Any:
    """One token a character, and the two marks of a turn."""
    made = build_tokenizer(8192)
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = template
    return made


Says = Callable[[str, Draw], str]
"""What the model says after a context, up to the end of its turn."""


class TextEngine:
    """Rows of token ids that a function continues. ``seen`` is every context that a turn was begun in."""

    def __init__(self, says: Says, tokens: Any) -> None:
        self._says, self._tokens = says, tokens
        self._rows: dict[Row, list[int]] = {}
        self._prompts: dict[Row, int] = {}
        self._turns: dict[Row, tuple[int, list[int]]] = {}
        self._open: list[tuple[Row, Candidate]] = []
        self.prefills = 0

    def free_rows(self) -> int:
        return 64 - len(self._rows)

    def prefill(self, prompt_ids: Sequence[int], siblings: int) -> list[Row]:
        self.prefills += 1
        made = []
        for _ in range(siblings):
            row = Row(len(self._prompts))
            self._rows[row], self._prompts[row] = list(prompt_ids), len(prompt_ids)
            made.append(row)
        return made

    def length(self, row: Row) -> int:
        return len(self._rows[row]) - self._prompts[row]

    def append(self, row: Row, ids: Sequence[int]) -> None:
        self._rows[row] += ids

    def extend(self, row: Row, tokens: int, draw: Draw, sampling: Sampling) -> None:
        held = self._rows[row]
        start, ids = self._turns.get(row, (-1, []))
        if not 0 < len(held) - start < len(ids) or ids[: len(held) - start] != held[start:]:
            text = self._says(self._tokens.decode(held), draw)
            start, ids = (
                len(held),
                [*self._tokens(text, add_special_tokens=False)["input_ids"], self._tokens.eos_token_id],
            )
            self._turns[row] = start, ids
        said = ids[len(held) - start :][:tokens]
        self._rows[row] = held + said
        blank = np.full(len(said), 0.5)
        candidate = Candidate(said, -blank, blank, blank * 0, blank * 2, np.ones(len(said)), said[-1] == ids[-1])
        self._open.append((row, candidate))

    def poll(self) -> list[tuple[Row, Candidate]]:
        done, self._open = self._open, []
        return done

    def rollback(self, row: Row, length: int) -> None:
        del self._rows[row][self._prompts[row] + length :]

    def release(self, row: Row) -> None:
        del self._rows[row]


class PluginEngine(TextEngine):
    """The same as a recipe names it: the second sibling's first call fails, and its second try doesn't."""

    def __init__(self, model: Any, **settings: Any) -> None:
        def says(context: str, draw: Draw) -> str:
            if "<tool_response>" in context:
                return "Done."
            by = 2 if draw.sibling == 0 else 10 if draw.attempt == 0 else 3
            return CALL.format("add", f'{{"by": {by}}}')

        super().__init__(says, tokenizer())

    def load_weights(self, weights: Any, version: int) -> None:
        """It has none."""


def add(by: int) -> str:
    return CALL.format("add", json.dumps({"by": by}))


def world(tmp_path: Path, source: str = COUNTER, several: str = "", **settings: Any) -> Config:
    """Settings with the source's class Counter; or with its ``several``, a dict of classes."""
    path = tmp_path / f"env_{abs(hash(source))}.py"
    path.write_text(source)
    environments = EnvironmentsConfig(factory=f"{path}:{several or 'Counter'}", **settings)
    rollout = RolloutConfig(num_generations=1, segment_length=64, max_segments=32, max_completion_length=2048)
    return Config(environments=environments, rollout=rollout, rewards=RewardsConfig(functions=("environment",)))


def roll(config: Config, says: Says, *problems: Problem) -> tuple[list[Trajectory], Any, TextEngine]:
    tokens = tokenizer()
    prompts = tool_prompts(problems or [Problem("p", "Count.", columns={"start": 3})], tokens, config, **LIMITS)
    engine = TextEngine(says, tokens)
    groups: list[Group] = list(
        run_groups(cast(Engine, engine), prompts, GroupSettings(config.rollout, MEAN_ONLY, seed=1))
    )
    return [t for g in groups for t in g.trajectories], tokens, engine


def answers(*texts: str) -> Says:
    """The n-th text in the n-th turn."""
    return lambda context, draw: texts[context.count("<|im_start|>assistant") - 1]
