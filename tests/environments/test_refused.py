# ruff: noqa: E501
"""Environments and templates that can't work are refused before a token is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e3rl.environments.builtin import Calculator
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.tools import schemas_of
from e3rl.errors import UserError
from tests.environments.worlds import COUNTER, STATEFUL, TEMPLATE, answers, roll, tokenizer, world


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("class Counter:\n    def add(self): pass", "has no reset"),
        ("class Counter:\n    def __init__(self, size): pass\n    def reset(self): pass", "missing a required argument: 'size'"),
        ("class Counter:\n    def reset(self): pass", "no public method"),
        ("class Counter:\n    def reset(self): pass\n    def add(self, a: int): pass", r"tool add\(\) needs a type hint"),
        ("class Counter:\n    def reset(self): pass\n    def add(self, a):\n        '''Add.\n\n        Args:\n            a: it\n        '''", r"tool add\(\) needs"),
        ("Counter = 3", "nothing to call"),
        ("Counter = {}", "names several environments, and here one is needed"),
        (COUNTER.replace('return f" It', 'return [{"type": "image"}] or f" It'), "reset\\(\\) returned list"),
        (COUNTER.replace('return f" It', 'return 3 or f" It'), "reset\\(\\) returned int"),
        (STATEFUL.replace("self.count = snapshot", "pass"), "restore\\(\\) doesn't bring back"),
        (STATEFUL.replace("return self.count\n\n    def restore", "return self.__dict__\n\n    def restore").replace("self.count = snapshot", "pass"), "later calls change"),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_work_is_refused(tmp_path: Path, source: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        roll(world(tmp_path, source, erase="errors"), answers("Done."))


@pytest.mark.parametrize(
    ("source", "settings", "why"),
    [
        (STATEFUL.replace("return self.count\n\n    def restore", "raise OSError('gone')\n\n    def restore"), {}, r"snapshot\(\) that fails: OSError: gone"),
        (STATEFUL.replace("self.count = snapshot", "raise OSError('gone')"), {}, r"restore\(snapshot\(\)\) fails after a call: OSError: gone"),
        (COUNTER.replace("self.count, self.asleep", "import threading\n        self.lock, self.count, self.asleep").replace("= start, False", "= threading.Lock(), start, False"), {"state": "deepcopy"}, r"can't be copied .*deepcopy.*TypeError"),
        (COUNTER.replace("self.count, self.asleep", "int(kwargs)\n        self.count, self.asleep"), {}, r"reset\(\) fails on problem 'p': NameError"),
        (COUNTER.replace("start: int = 0, **row", "start: int, sheet: str"), {}, r"reset\(\) fails on problem 'p': TypeError: .*'sheet'"),
        (COUNTER.replace("self.count, self.asleep", "import time\n        time.sleep(2)\n        self.count, self.asleep"), {"timeout": 0.2}, r"Counter': reset\(\) took longer than 0.2 s, before the run"),
        (STATEFUL, {"timeout": 0.2}, r"Counter': a toy call of rest\(\) took longer than 0.2 s, before the run"),
        (STATEFUL.replace("sleep(seconds)", "sleep(0)").replace("self.count = snapshot", "import time\n        time.sleep(2)"), {"timeout": 0.2}, "Counter': going back took longer than 0.2 s, before the run"),
        (STATEFUL.replace("time.sleep(seconds)", "os._exit(0)").replace("import time\n", "import os\n"), {"isolate": True}, r"Counter': a toy call of rest\(\) ended its process"),
    ],
)  # fmt: skip
def test_one_that_fails_before_the_run_is_named(
    tmp_path: Path, source: str, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=why):
        roll(world(tmp_path, source, erase="errors", **settings), answers("Done."))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "this tokenizer has none"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no tool calls that e3rl reads"),
        (TEMPLATE.replace("if tools", "if false"), "doesn't show the tool calculate"),
        (TEMPLATE.replace("m.content }}", "(m.content if loop.last else '') }}"), "changes turn 2 \\(assistant\\)"),
        (TEMPLATE.replace("m.content }}", "('' if m.tool_calls else m.content) }}"), None),
        (TEMPLATE.replace("{%- for call", "{{ '!' if loop.last }}{%- for call"), "changes turn 2 \\(assistant\\) once others follow"),
        (TEMPLATE.replace("tool | tojson", "raise_exception(tool.function.parameters.type)"), "can't show calculate: object"),
        (TEMPLATE.replace("<|im_end|>", "<|over|>"), "doesn't end assistant turns"),
        (TEMPLATE.replace("if m.role == 'tool'", "if m.role == 'tool' and raise_exception('no tools here')"), "refuses .* no tools here"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_carry_tools_is_refused(template: str | None, why: str | None) -> None:
    tokens = tokenizer(template or TEMPLATE)
    tokens.chat_template = template
    if why is None:  # it drops what is said beside a call, in the last turn like in an earlier one
        Dialogue(tokens, {}, schemas_of(Calculator(), "c"))
        return
    with pytest.raises(UserError, match=why):
        Dialogue(tokens, {}, schemas_of(Calculator(), "c"))
