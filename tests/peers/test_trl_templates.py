"""Models' own chat templates, as TRL carries them: what a call looks like there is what is read here, and results follow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e3rl.environments.builtin import Calculator
from e3rl.environments.dialogue import Dialogue
from e3rl.environments.tools import schemas_of
from e3rl.errors import UserError
from e3rl.lab.tokenizer import build_tokenizer

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>")
GEMMA = ("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
LFM2 = ("<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>")
AFTER_LFM = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
KNOWN = {  # template: end of sequence, further marks, those that end a turn, what follows a call that returned 7
    "gptoss": (
        "<|return|>", HARMONY, ("<|call|>",),
        '<|start|>functions.calculate to=assistant<|channel|>commentary<|message|>"7"<|end|><|start|>assistant',
    ),
    "gemma4_v5": (
        "<eos>", GEMMA, ("<turn|>", "<|tool_response>"), 'response:calculate{value:<|"|>7<|"|>}<tool_response|>'
    ),
    "lfm2_v2": ("<|im_end|>", LFM2, (), AFTER_LFM.format("<|tool_response_start|>7<|tool_response_end|>")),
    "lfm2_2_5_v2": ("<|im_end|>", LFM2, (), AFTER_LFM.format("7")),
}  # fmt: skip


def tokens(name: str, end: str, marks: tuple[str, ...]) -> Any:
    made = build_tokenizer(8192)
    made.add_special_tokens({"eos_token": end, "additional_special_tokens": list(marks)})
    made.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return made


@pytest.mark.parametrize("name", KNOWN)
def test_a_call_in_a_model_s_own_template_is_read_and_answered(name: str):
    end, marks, ends, after = KNOWN[name]
    made = tokens(name, end, marks)
    schemas = schemas_of(Calculator(), "calculator")
    dialogue = Dialogue(made, {}, schemas, [made.convert_tokens_to_ids(mark) for mark in ends])
    arguments = {"expression": '(1 + "2") * 3'}
    call = {"type": "function", "function": {"name": "calculate", "arguments": arguments}}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    before = made.apply_chat_template(chat[:1], tools=schemas, tokenize=False, add_generation_prompt=True)
    whole = made.apply_chat_template(chat, tools=schemas, tokenize=False)
    assert whole.startswith(before)
    [found] = dialogue.calls(made.encode(whole[len(before) :], add_special_tokens=False))
    assert (found.name, json.loads(found.arguments)) == ("calculate", arguments)
    assert made.decode(list(dialogue.after([("calculate", "7")]))) == after


def test_a_template_that_shows_no_tools_is_refused():
    with pytest.raises(UserError, match="doesn't show the tool calculate"):
        Dialogue(tokens("deepseekv3", "<｜end▁of▁sentence｜>", ()), {}, schemas_of(Calculator(), "calculator"))
