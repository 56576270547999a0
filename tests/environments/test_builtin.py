"""The environments in the box, and the example's template for one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e3rl.config import EnvironmentsConfig, load_config
from e3rl.data.toolcalls import FORMATS, parse_tool_calls, tool_call_format
from e3rl.environments.builtin import Calculator, Files, PythonTool
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.episodes import Toolbox
from e3rl.environments.tools import ENVIRONMENTS, schemas_of
from e3rl.lab.problems import generate
from e3rl.types import Problem
from tests.environments.worlds import tokenizer


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
