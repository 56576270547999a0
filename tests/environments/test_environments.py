# ruff: noqa: E501
"""Environments written for TRL, from the class to the trajectory; and what is refused before a token is drawn."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, cast

import pytest

from e3rl.config import Config, EnvironmentsConfig, RewardsConfig, RolloutConfig, load_config
from e3rl.data.toolcalls import FORMATS, parse_tool_calls, tool_call_format
from e3rl.engine.protocol import Engine
from e3rl.environments.builtin import Calculator, Files, PythonTool
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.episodes import Toolbox, tool_prompts
from e3rl.environments.tools import ENVIRONMENTS, schemas_of
from e3rl.errors import UserError
from e3rl.lab.problems import generate
from e3rl.rewards.scorer import Scorer
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.types import Draw, Group, Message, Problem, Trajectory
from tests.environments.worlds import CALL, TEMPLATE, Says, TextEngine, tokenizer
from tests.rollout.worlds import MEAN_ONLY

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


def test_a_class_written_for_trl_runs_unchanged(tmp_path: Path) -> None:
    config = world(tmp_path)
    [trajectory], tokens, engine = roll(config, answers(f"Let me see. {add(2)}", add(4), "It stands at 9."))
    prompt = tokens.decode(list(trajectory.prompt.ids))
    assert prompt.endswith("Count. It stands at 3.<|im_end|>\n<|im_start|>assistant\n")
    assert '"name": "add", "description": "Count on."' in prompt
    assert '"ask"' in prompt
    assert '"get_reward"' not in prompt
    assert '"reset"' not in prompt
    assert tokens.decode(trajectory.ids.tolist()) == (
        f"Let me see. {add(2)}<|im_end|>\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        f"{add(4)}<|im_end|>\n<|im_start|>user\n<tool_response>\n9\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "It stands at 9.<|im_end|>"
    )
    drawn = trajectory.ids[trajectory.drawn_T].tolist()
    assert tokens.decode(drawn) == f"Let me see. {add(2)}<|im_end|>{add(4)}<|im_end|>It stands at 9.<|im_end|>"
    assert engine.prefills == 1, "observations are appended to the row"
    results = [c for s in trajectory.segments if s.observation for c in s.observation.calls]
    assert [(c.name, json.loads(c.arguments), c.result) for c in results] == [
        ("add", {"by": 2}, "5"),
        ("add", {"by": 4}, "9"),
    ]
    with Scorer(config.rewards) as scorer:
        [reward] = scorer.score([trajectory], [""])
    assert (reward.value, reward.parts) == (9.0, {"environment": 9.0})


SEVERAL = (
    STATEFUL.replace("self, start: int = 0, **row", "self, start, id, prompt, answer")
    + """

class Silent:
    def reset(self, **row):
        self.row = sorted(row)

    def look(self) -> str:
        \"\"\"What the row holds.\"\"\"
        return ", ".join(self.row)

ALL = {"counting": Counter, "silent": Silent}
"""
)


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_a_row_names_its_environment_and_sees_only_its_tools(tmp_path: Path, isolate: bool) -> None:
    config = world(tmp_path, SEVERAL, several="ALL", erase="errors", isolate=isolate)
    rows = [
        Problem(f"p{n}", "?", columns={"start": n, "environment": kind})
        for n, kind in enumerate(["silent", "counting", "silent"])
    ]

    def says(context: str, draw: Draw) -> str:
        called = CALL.format("look", "{}") if '"look"' in context else add(10 if draw.attempt == 0 else 4)
        return "Done." if "<tool_response>" in context else called

    found, tokens, _ = roll(config, says, *rows)
    seen = {t.prompt.problem.id: t for t in found}
    shown = {name: tokens.decode(list(t.prompt.ids)) for name, t in seen.items()}
    assert [('"look"' in shown[p.id], '"add"' in shown[p.id]) for p in rows] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    results = {
        name: [c.result for s in t.segments if s.observation for c in s.observation.calls] for name, t in seen.items()
    }
    assert results == {"p0": ["answer, id, prompt, start"], "p1": ["5"], "p2": ["answer, id, prompt, start"]}
    assert [len(seen[p.id].erasures) for p in rows] == [0, 1, 0], "Silent has no way back, Counter has one"
    with pytest.raises(
        UserError, match=r"problem 'q': its column 'environment' is 'other', and .* has counting, silent"
    ):
        roll(config, says, Problem("q", "?", columns={"environment": "other"}))
    with pytest.raises(UserError, match="names several environments, and here one is needed"):
        Toolbox(config.environments, tokens, {})


def test_what_goes_wrong_is_what_the_model_sees(tmp_path: Path) -> None:
    turns = answers(
        add(10) + add(1) + CALL.format("ask", "{}"),
        CALL.format("fly", "{}") + CALL.format("add", '{"to": 1}'),
        "<tool_call>\nnot json\n</tool_call>",
    )
    [trajectory], _, _ = roll(world(tmp_path), turns)
    first, second = [s.observation for s in trajectory.segments if s.observation]
    assert [(c.result, c.failed) for c in first.calls] == [("{'error': 'too many'}", True), ("0", False), ("0", False)]
    assert next(c.result for c in second.calls) == "{'error': 'Tool fly not found.'}"
    assert "unexpected keyword argument 'to'" in second.calls[1].result
    assert (trajectory.finish, trajectory.turns) == ("stop", 3)


def test_a_tool_that_hangs_costs_one_trajectory_its_reward(tmp_path: Path) -> None:
    config = world(tmp_path, timeout=1.0)
    problems = [Problem(name, name, columns={"start": 3}) for name in ("hang", "go")]

    def says(context: str, draw: Draw) -> str:
        if "<tool_response>" in context:
            return "Done."
        return CALL.format("rest", '{"seconds": 20.0}') if draw.prompt_id == "hang" else add(1)

    began = time.monotonic()
    trajectories, _, _ = roll(config, says, *problems)
    assert time.monotonic() - began < 15
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(trajectories, ["", ""])
    by_name = dict(zip([t.prompt.problem.id for t in trajectories], rewards, strict=True))
    assert (by_name["go"].value, by_name["hang"].value) == (4.0, None)
    assert by_name["hang"].error == "its environment took longer than 1 s"


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_each_call_of_a_turn_has_the_deadline_for_itself(tmp_path: Path, isolate: bool) -> None:
    source = (
        COUNTER
        + """
    async def doze(self, seconds: float) -> str:
        \"\"\"Wait.

        Args:
            seconds: how long
        \"\"\"
        import asyncio
        await asyncio.sleep(seconds)
"""
    )
    config = world(tmp_path, source, timeout=1.0, isolate=isolate)
    turns = {
        "three": [("rest", 0.4), ("doze", 0.4), ("rest", 0.4)],
        "hangs": [("rest", 0.1), ("rest", 1.5)],
        "hangs, asynchronous": [("doze", 0.1), ("doze", 1.5)],
    }

    def says(context: str, draw: Draw) -> str:
        calls = [CALL.format(name, json.dumps({"seconds": s})) for name, s in turns[draw.prompt_id]]
        return "Done." if "<tool_response>" in context else "".join([*calls, add(1)])

    found, _, _ = roll(config, says, *[Problem(name, name, columns={"start": 3}) for name in turns])
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(found, [""] * 3)
    seen = {t.prompt.problem.id: (r.value, r.error) for t, r in zip(found, rewards, strict=True)}
    late = (None, "its environment took longer than 1 s")
    assert seen == {"three": (4.0, None), "hangs": late, "hangs, asynchronous": late}
    if not isolate:
        counts = {t.prompt.problem.id: t.environment.count for t in found if t.environment}
        assert counts == {"three": 4, "hangs": 3, "hangs, asynchronous": 3}, "after a late call none is begun"


def test_each_toy_call_before_the_run_has_the_deadline_for_itself(tmp_path: Path) -> None:
    slow = STATEFUL.replace("time.sleep(seconds)", "time.sleep(0.6)").replace(
        "        return str(self.count)\n", "        import time; time.sleep(0.6)\n        return str(self.count)\n"
    )
    [trajectory], _, _ = roll(world(tmp_path, slow, erase="errors", timeout=1.0), answers("Done."))
    assert trajectory.failure is None


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "isolated"])
def test_get_reward_may_be_asynchronous_and_fails_alone(tmp_path: Path, isolate: bool) -> None:
    source = COUNTER.replace(
        "    def get_reward(self) -> float:\n",
        "    async def get_reward(self) -> float:\n        1 / (self.count - 4)\n",
    )
    config = world(tmp_path, source, isolate=isolate)
    problems = [Problem(str(by), "Count.", columns={"start": 3}) for by in (1, 2)]
    trajectories, _, _ = roll(
        config, lambda context, draw: "Done." if "<tool_response>" in context else add(int(draw.prompt_id)), *problems
    )
    with Scorer(config.rewards) as scorer:
        rewards = scorer.score(trajectories, ["", ""])
    by_name = dict(zip([t.prompt.problem.id for t in trajectories], rewards, strict=True))
    assert (by_name["1"].value, by_name["2"].value) == (None, 5.0)
    assert "division by zero" in str(by_name["1"].error)


def test_a_tool_that_changes_the_directory_costs_its_own_reward(tmp_path: Path) -> None:
    source = (
        COUNTER
        + f"""
    def move(self) -> str:
        \"\"\"Go elsewhere.\"\"\"
        import os
        os.chdir({str(tmp_path)!r})
        return "moved"
"""
    )
    config, place = world(tmp_path, source), Path.cwd()
    [trajectory], _, _ = roll(config, answers(CALL.format("move", "{}"), "Done."))
    assert Path.cwd() == place
    with Scorer(config.rewards) as scorer:
        [reward] = scorer.score([trajectory], [""])
    assert reward.value is None
    assert reward.error == f"its environment changed the working directory to {tmp_path}; it was changed back"


def test_what_a_tool_changes_in_the_process_is_put_back_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        COUNTER
        + """
    def meddle(self) -> str:
        \"\"\"Change what others share.\"\"\"
        import os
        os.umask(0o077)
        os.environ["CHANGED_BY_A_TOOL"] = "secret"
        return "done"
"""
    )
    monkeypatch.setattr(os, "environ", os.environ.copy())
    umask = os.umask(0o022)
    try:
        [trajectory], _, _ = roll(world(tmp_path, source), answers(CALL.format("meddle", "{}"), "Done."))
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    assert trajectory.failure is None
    said = capsys.readouterr().err
    assert "the umask changed; put back" in said
    assert "CHANGED_BY_A_TOOL changed; that stays" in said
    assert "secret" not in said


def test_turns_and_calls_have_limits(tmp_path: Path) -> None:
    [trajectory], _, _ = roll(world(tmp_path, max_turns=2, max_calls=1), lambda context, draw: add(1) + add(1))
    seen = [s.observation for s in trajectory.segments if s.observation]
    assert (len(seen), trajectory.finish, trajectory.environment.count) == (2, "length", 5)
    assert seen[0].calls[1].result == "{'error': 'At most 1 calls a turn.'}"


@pytest.mark.parametrize(("source", "state"), [(STATEFUL, "snapshot"), (COUNTER, "deepcopy")])
def test_a_bad_call_is_taken_back_with_the_state(tmp_path: Path, source: str, state: str) -> None:
    config = world(tmp_path, source, erase="errors", state=state)

    def says(context: str, draw: Draw) -> str:
        return (add(10) if draw.attempt == 0 else add(2)) if "<tool_response>" not in context else "Done."

    [trajectory], tokens, _ = roll(config, says)
    [erasure] = trajectory.erasures
    assert tokens.decode(erasure.candidate.ids.tolist()) == f"{add(10)}<|im_end|>"
    assert erasure.observation is not None
    assert erasure.observation.calls[0].result == "{'error': 'too many'}"
    assert "too many" not in tokens.decode(trajectory.ids.tolist())
    assert trajectory.environment.count == 5


def test_without_a_way_back_the_bad_call_stays(tmp_path: Path) -> None:
    [trajectory], _, _ = roll(world(tmp_path, erase="errors"), answers(add(10), "Done."))
    assert (trajectory.erasures, trajectory.environment.count) == ((), -1)
    observation = trajectory.segments[-2].observation
    assert observation is not None
    assert observation.forced


def test_a_judge_of_ones_own_sees_the_results(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def odd(calls):\n    return float(int(calls[0].result) % 2)\n")
    config = world(tmp_path, STATEFUL, erase=f"{tmp_path}/judge.py:odd", max_turn_erasures=2)

    def says(context: str, draw: Draw) -> str:
        return add(4 if draw.attempt == 0 else 3) if "<tool_response>" not in context else "Done."

    [trajectory], _, _ = roll(config, says)
    results = [e.observation.calls[0].result for e in trajectory.erasures if e.observation is not None]
    assert (results, trajectory.environment.count) == (["7"], 6)


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


def test_the_example_s_template_teaches_calls_as_bare_json() -> None:
    folder = Path(__file__).parents[2] / "examples" / "calculator"
    schemas = schemas_of(Calculator(), "calculator")
    tokens = tokenizer((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    dialogue = Dialogue(tokens, {}, schemas)
    assert tool_call_format(tokens.chat_template) is FORMATS["llama3"]
    shown = tokens.apply_chat_template(
        [{"role": "user", "content": "How many?"}], tools=schemas, tokenize=False, add_generation_prompt=True
    )
    assert "Tool calculate(expression): Evaluate an arithmetic expression.<|im_end|>\n<|im_start|>user\nA shop" in shown
    assert shown.endswith("user\nHow many?\nFirst step as JSON:<|im_end|>\n<|im_start|>assistant\n")
    head = "<|im_start|>assistant\n"
    for turn in shown.split(head)[1:-2]:  # the worked example's calls give what it says
        said = turn.partition("<|im_end|>")[0]
        [call] = parse_tool_calls(said, FORMATS["llama3"], schemas)[1]
        value = Calculator().calculate(**json.loads(call.arguments))
        after = tokens.decode(list(dialogue.after([(call.name, value)])))
        assert turn == f"{said}<|im_end|>" + after.removesuffix(head)
    assert load_config(folder / "recipe.toml", [], []).environments.factory == "calculator"


def test_a_chat_prompt_keeps_its_messages(tmp_path: Path) -> None:
    prompt = (Message("system", "Be brief."), Message("user", "Count."))
    [trajectory], tokens, _ = roll(world(tmp_path), answers("3"), Problem("p", prompt, columns={"start": 3}))
    assert "Be brief." in tokens.decode(list(trajectory.prompt.ids))
    assert trajectory.prompt.problem.prompt == prompt


def test_the_calculator_computes_and_nothing_else() -> None:
    calculate = Calculator().calculate
    assert [calculate(e) for e in ("2 + 3 * 4", "(1 + 2) / 2", "7 // 2 - -1", "2 ** 10", "6 / 3", "0.1")] == [
        "14", "1.5", "4", "1024", "2", "0.1",
    ]  # fmt: skip
    for bad in (
        "__import__('os')",
        "9**9**9",
        "10**99",
        "x",
        "1 +",
        "(-8) ** 0.5",
        "'a' * 3",
        "1 / 0",
        "True + 1",
        "(" * 500,
    ):
        with pytest.raises((ValueError, ZeroDivisionError, MemoryError)):
            calculate(bad)


def test_python_and_files() -> None:
    assert PythonTool().python("print(sum(range(5)))") == "10\n"
    with pytest.raises(RuntimeError, match=r"PermissionError|FileNotFoundError"):  # or not even shown
        PythonTool().python("open('/etc/passwd')")
    files = Files()
    files.reset(files={"a": "1"}, id="p")
    before = files.snapshot()
    files.write_file("b", "22")
    assert (files.list_files(), files.read_file("b"), files.delete_file("a")) == ("a\nb", "22", "deleted")
    files.restore(before)
    assert files.list_files() == "a"
    for bad in (
        lambda: files.read_file("b"),
        lambda: files.delete_file("b"),
        lambda: files.write_file("c", "x" * 70000),
    ):
        with pytest.raises((FileNotFoundError, ValueError)):
            bad()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_environment_in_the_box_is_sound(name: str) -> None:
    box = Toolbox(EnvironmentsConfig(factory=name, erase="errors"), tokenizer(), {})
    problem = generate("books", 1, "train", 1)[0] if name == "books" else Problem("p", "?")
    box.check(problem)
    assert box.said(problem) == ""
