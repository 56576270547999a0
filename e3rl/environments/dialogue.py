"""Tools in the model's chat template: the calls of a turn, and the tokens that follow it. Nothing is tokenised twice.

The tokens of a turn's results come from a small separate conversation, cut after the end of its assistant turn, as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from e3rl.data.templates import encode_chats
from e3rl.data.toolcalls import ToolCall, parse_tool_calls, tool_call_format
from e3rl.errors import UserError

Chat = list[dict[str, Any]]
_SAID = "Let me see."  # a text beside a call


class Dialogue:
    """A tokenizer's template with a set of tools. UserError if it can't show them over several turns."""

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any],
        schemas: Sequence[Mapping[str, Any]],
        ends: Sequence[int] = (),
    ) -> None:
        self._tokenizer, self._arguments, self._schemas = tokenizer, dict(arguments), list(schemas)
        self._ends = {tokenizer.eos_token_id, *ends}  # gpt-oss ends a call with another token than an answer
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise UserError("environments.factory needs a model with a chat template, and this tokenizer has none")
        try:
            text = tokenizer.get_chat_template(None, self._schemas)
        except ValueError as error:
            raise UserError(f"the model's chat template: {error}") from None
        form = tool_call_format(text)
        if form is None:
            raise UserError(
                "the model's chat template has no tool calls that e3rl reads (Qwen and Hermes, GLM, Mistral, Llama 3, gpt-oss, "
                "DeepSeek, LFM2, Gemma 4): "
                "use a model that was trained for tools"
            )
        self._form = form
        self._check()

    def calls(self, ids: Sequence[int]) -> list[ToolCall]:
        """The calls that an assistant turn makes, in order."""
        kept = list(ids)
        while kept and kept[-1] in self._ends:
            kept.pop()
        return parse_tool_calls(self._tokenizer.decode(kept), self._form, self._schemas)[1]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an assistant turn outside its calls."""
        said = str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
        beside, calls = parse_tool_calls(said, self._form, self._schemas)
        if not calls:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        for mark in self._tokenizer.all_special_tokens:
            beside = beside.replace(mark, "")
        return beside.strip()

    def after(self, results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """The tokens after an assistant turn: the results by tool name, and the start of the next turn."""
        chat = _called(results[0][0])
        told = [{"role": "tool", "name": name, "content": content} for name, content in results]
        before, full = self._encoded([chat, [*chat, *told]])
        return tuple(full[self._end_of(before) :])

    def _encoded(self, chats: Sequence[Chat], **arguments: Any) -> list[list[int]]:
        found = encode_chats(self._tokenizer, chats, {**self._arguments, **arguments})
        for ids in found:
            if isinstance(ids, str):
                raise UserError(f"the model's chat template refuses tool calls or results: {ids}")
        return [list(map(int, ids)) for ids in found]

    def _end_of(self, ids: Sequence[int]) -> int:
        """Tokens up to the end of the last turn that ends, its EOS included."""
        places = [place for place, token in enumerate(ids) if token in self._ends]
        if not places:
            raise UserError("the model's chat template doesn't end assistant turns with the end-of-sequence token")
        return places[-1] + 1

    def _shown(self) -> list[int]:
        """A prompt with the tools; UserError names one that the template can't render."""
        found, *alone = (
            encode_chats(self._tokenizer, [[_user()]], {**self._arguments, "tools": tools})[0]
            for tools in (self._schemas, *([schema] for schema in self._schemas))
        )
        if not isinstance(found, str):
            return [int(i) for i in found]
        refused = [s["function"]["name"] for s, one in zip(self._schemas, alone, strict=True) if isinstance(one, str)]
        raise UserError(f"the model's chat template can't show {', '.join(refused) or 'the tools together'}: {found}")

    def _check(self) -> None:
        """Check that tools are shown, and that a turn does not change when others follow."""
        plain = self._encoded([[_user()]])[0]
        shown = self._shown()
        text = self._tokenizer.decode(shown)
        missing = [s["function"]["name"] for s in self._schemas if s["function"]["name"] not in text]
        if missing or shown == plain:
            raise UserError(
                f"the model's chat template doesn't show the tool {missing[0] if missing else ''} to the model"
            )
        name = self._schemas[0]["function"]["name"]
        self._check_kept([*_twice(name, ""), {"role": "assistant", "content": "It is 3."}])
        spoken = _twice(name, _SAID)
        said = self._tokenizer.decode(self._encoded([spoken[:2]], tools=self._schemas)[0])
        if said.rfind(_SAID) < said.rfind(name):  # Gemma's puts a text behind the call: it was not said before it
            self._check_kept(spoken)

    def _check_kept(self, turns: Chat) -> None:
        """Check that each assistant turn stays what it is once others follow."""
        lengths = [n for n in range(2, len(turns) + 1) if turns[n - 1]["role"] == "assistant"]
        *earlier, whole = self._encoded([turns[:n] for n in (*lengths, len(turns))], tools=self._schemas)
        for count, ids in zip(lengths, earlier, strict=True):
            kept = ids[: self._end_of(ids)]
            if whole[: len(kept)] != kept:
                raise UserError(
                    f"the model's chat template changes turn {count} ({turns[count - 1]['role']}) once others follow, so what "
                    "was generated would not be what is trained on: use a template that keeps earlier turns as they are"
                )


def _user() -> dict[str, Any]:
    return {"role": "user", "content": "dummy"}


def _called(name: str, said: str = "") -> Chat:
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return [_user(), {"role": "assistant", "content": said, "tool_calls": [call]}]


def _twice(name: str, said: str) -> Chat:
    """Two calls with their results."""
    result = {"role": "tool", "name": name, "content": "3"}
    return [*_called(name, said), result, *_called(name, said)[1:], result]
