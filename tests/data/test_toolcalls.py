"""Tool calls are read as models write them; whatever else a model writes stays text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e3rl.data.toolcalls import FORMATS, parse_tool_calls, tool_call_format

ADD = '{"name": "add", "arguments": {"a": 1, "b": [2, null]}}'
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}},
    }
]


BOTH = {"a": 1, "b": [2, None]}
FUNCTION = (
    "<tool_call>\n<function=add>\n<parameter=a>\n12\n</parameter>\n"
    "<parameter=s>\n12\n</parameter>\n</function>\n</tool_call>"
)
ARG_KEYS = (
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>s</arg_key>\n<arg_value>1</arg_value></tool_call>"
)
ARGUMENTS = '{"a": 1, "b": [2, null]}'
THOUGHT = "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant"
HARMONY = f"{THOUGHT} to=functions.add<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
_ONE = f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
DEEPSEEK = f"I add.<｜tool▁calls▁begin｜>{_ONE}\n{_ONE}<｜tool▁calls▁end｜>"
LLAMA = '{"name": "add", "parameters": {"a": 1}}'

CASES: list[tuple[str, str, str | None, list[tuple[str, dict]]]] = [
    ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", "", [("add", BOTH)]),
    ("hermes", f"I add.\n<tool_call>{ADD}</tool_call>\n", "I add.", [("add", BOTH)]),
    ("hermes", f"<tool_call>{ADD}</tool_call><tool_call>{ADD}</tool_call>", "", [("add", BOTH)] * 2),
    ("hermes", f"<tool_call>{ADD}", "", [("add", BOTH)]),
    ("hermes", f"<tool_call>{ADD[:-1]}", None, []),
    ("hermes", "<tool_call>{}</tool_call> hm", None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": NaN}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None, []),
    ("hermes", f"<tool_call>no</tool_call> <tool_call>{ADD}</tool_call>", "<tool_call>no</tool_call>", [("add", BOTH)]),
    ("hermes", f"<tool_call>{'[' * 100_000}</tool_call>", None, []),
    ("function", FUNCTION, "", [("add", {"a": 12, "s": "12"})]),
    ("function", FUNCTION.replace("12", "a\nb"), "", [("add", {"a": "a\nb", "s": "a\nb"})]),
    ("function", "<tool_call><function=now></function></tool_call>", "", [("now", {})]),
    ("function", "<tool_call><function=add><parameter=s>a</function></tool_call>", None, []),
    ("arg-keys", ARG_KEYS, "", [("add", {"a": 1, "s": "1"})]),
    ("mistral", f"[TOOL_CALLS] [{ADD}]", "", [("add", BOTH)]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{}', "", [("add", {"a": 1}), ("add", {})]),
    ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [("add", {"a": 1})] * 2),
    ("llama3", f"It is {LLAMA}", None, []),
    ("llama3", "7", None, []),
    ("harmony", HARMONY, THOUGHT, [("add", BOTH)]),
    ("harmony", HARMONY.replace("<|channel|>commentary json", " <|constrain|>json"), THOUGHT, [("add", BOTH)]),
    ("harmony", HARMONY.removesuffix("<|call|>"), THOUGHT, [("add", BOTH)]),
    ("harmony", "to=functions.add<|channel|>commentary json", None, []),
    ("deepseek", DEEPSEEK, "I add.", [("add", BOTH)] * 2),
    ("deepseek", f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>", "", [("add", BOTH)]),
    ("deepseek", f"<｜tool▁call▁begin｜>add{ARGUMENTS}<｜tool▁call▁end｜>", None, []),
    (
        "python-calls",
        "<|tool_call_start|>[add(a=1, b=[2, None]), now()]<|tool_call_end|>",
        "",
        [("add", BOTH), ("now", {})],
    ),
    (
        "python-calls",
        "<|tool_call_start|>[add(s='it\\'s', t=True)]<|tool_call_end|>",
        "",
        [("add", {"s": "it's", "t": True})],
    ),
    ("python-calls", "<|tool_call_start|>[add(__import__('os'))]<|tool_call_end|>", None, []),
    ("gemma", "<|tool_call>call:add{a:1,b:[2,null]}<tool_call|>", "", [("add", BOTH)]),
    ("gemma", '<|tool_call>call:add{s:<|"|>a "b", {c:1}<|"|>}<tool_call|>', "", [("add", {"s": 'a "b", {c:1}'})]),
    ("gemma", "<|tool_call>call:add<tool_call|>", None, []),
]


@pytest.mark.parametrize(("form", "text", "beside", "calls"), CASES)
def test_calls_are_read_as_the_family_writes_them(form, text, beside, calls):
    found_beside, found = parse_tool_calls(text, FORMATS[form], TOOLS)
    assert found_beside == (text if beside is None else beside)
    assert [(c.name, json.loads(c.arguments)) for c in found] == calls


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}{{ tool_call.arguments | tojson }}", "hermes"),
        ("{{ '<tool_call>\n<function=' + tool_call.name + '>' }}", "function"),
        ("<tool_call>{{ tc.name }}<arg_key>{{ k }}</arg_key>", "arg-keys"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("<|start_header_id|>ipython<|end_header_id|>", "llama3"),
        ('{{- "functions." + tool_call.name + "<|channel|>commentary " }}', "harmony"),
        ("{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type']}}", "deepseek"),
        ("{{ '<|tool_call>call:' + name + '{' }}", "gemma"),
        ("{{ '<|tool_call_start|>[' }}", "python-calls"),
        ("{{ message['content'] }}", None),
    ],
)
def test_the_template_says_which_format(template: str, name: str | None):
    found = tool_call_format(template)
    assert (found.name if found else None) == name


PIECES = ["<tool_call>", "</tool_call>", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "<arg_key>",
          "</arg_key>", "<arg_value>", "</arg_value>", "[TOOL_CALLS]", "[ARGS]", "to=functions.", "<|message|>", "<|call|>",
          "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<|tool_call_start|>", "f(a=", ")", "]", "<|tool_call>call:", '<|"|>',
          '{"name": "f", "arguments": {}}', "{", "}", "x", " ", "\n", '"', "é"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_anything_is_read_and_without_a_call_it_stays_as_it_was(text: str):
    for form in FORMATS.values():
        beside, calls = parse_tool_calls(text, form, TOOLS)
        assert all(isinstance(json.loads(c.arguments), dict) for c in calls)
        assert calls or beside == text


@pytest.mark.parametrize("form", FORMATS)
def test_long_nonsense_takes_no_longer_than_its_length(form: str):
    times = []
    for size in (2_000, 16_000):
        inside = "[TOOL_CALLS]f{}<parameter=a>1</parameter><arg_key>a</arg_key><arg_value>1</arg_value>"
        text = f"<tool_call><function=f>{inside * size}</function>"
        began = time.perf_counter()
        parse_tool_calls(text, FORMATS[form], TOOLS)
        times.append(time.perf_counter() - began)
    assert times[1] < 40 * times[0] + 0.2
