"""Renders chat templates in a child process with a deadline and a memory limit: a model's template is a program.

transformers renders it in jinja's sandbox, which blocks files and processes but not endless loops.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.lab.tokenizer import CHAT_TEMPLATE, TOOL_TEMPLATE
from e3rl.rewards.pool import PooledCall, ProcessPool

SECONDS = 5.0
"""Time limit for one conversation. Ordinary templates take a few milliseconds."""
_MEMORY = 4 * 2**30
_MOST_CHARACTERS = 2**24  # of a rendered conversation
_TOGETHER = 64
_ARGUMENTS = ("tools", "documents")  # those of `apply_chat_template` that a caller may set


def encode_chats(
    tokenizer: Any, chats: Sequence[list[dict[str, Any]]], arguments: Mapping[str, Any]
) -> list[Sequence[int] | str]:
    """Every conversation as token ids, generation prompt included, or why the template refuses it.

    As ``tokenizer.apply_chat_template(chat, add_generation_prompt=True, **arguments)``.
    """
    from transformers import PreTrainedTokenizerBase

    apply = PreTrainedTokenizerBase.apply_chat_template
    reserved = arguments.keys() & (_parameters(apply) - set(_ARGUMENTS))
    if reserved:
        return [f"data.chat_template_kwargs sets '{min(reserved)}', which is no argument of a template"] * len(chats)
    if type(tokenizer).apply_chat_template is not apply:  # a class that renders in its own way, without a template
        return [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **arguments)
            for chat in chats
        ]
    try:
        template = tokenizer.get_chat_template(None, arguments.get("tools"))
    except ValueError as error:
        return [str(error)] * len(chats)
    given = {**tokenizer.special_tokens_map, **arguments}
    return [
        outcome if isinstance(outcome, _Refusal) else tokenizer(outcome, add_special_tokens=False)["input_ids"]
        for outcome in _rendered(template, given, chats)
    ]


class _Refusal(str):
    """The reason why a conversation has no text."""


def _parameters(function: Callable[..., Any]) -> set[str]:
    import inspect

    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}


def _rendered(template: str, given: Mapping[str, Any], chats: Sequence[list[dict[str, str]]]) -> list[str]:
    """The text of every conversation, or a `_Refusal`."""
    if template in (CHAT_TEMPLATE, TOOL_TEMPLATE):  # the lab's own: trusted
        render = renderer(json.dumps([template, dict(given)]))
        return [_or_refusal(render, chat) for chat in chats]
    setup = json.dumps([template, dict(given)])
    tasks = [PooledCall(f"{__name__}:renderer", {"chat": chat}, memory=_MEMORY, setup=setup) for chat in chats]
    texts: list[str] = []
    while len(texts) < len(tasks):  # the first alone, then batches: a template that hangs is waited for once
        outcomes = _pool().map(tasks[len(texts) :][: _TOGETHER if texts else 1])
        texts += [_Refusal(o.error) if o.error is not None else str(o.value) for o in outcomes]
        refused = next((t for t in texts if isinstance(t, _Refusal)), None)
        if refused is not None:
            texts += [refused] * (len(tasks) - len(texts))
    return texts


def _or_refusal(render: Callable[..., str], chat: list[dict[str, str]]) -> str:
    try:
        return render(chat)
    except UserError as error:
        return _Refusal(str(error))


@functools.cache
def _pool() -> ProcessPool:
    return ProcessPool(1, SECONDS)


def renderer(setup: str) -> Callable[..., str]:
    """The function that renders a conversation by a template. It runs in the worker."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template, given = json.loads(setup)

    def render(chat: list[dict[str, str]]) -> str:
        try:
            made: Any = render_jinja_template([chat], chat_template=template, add_generation_prompt=True, **given)
            text = str(made[0][0])
        except (TemplateError, TypeError) as error:  # TypeError: an argument that the renderer sets itself
            raise UserError(str(error)) from None
        if len(text) > _MOST_CHARACTERS:
            raise UserError(f"the result has {len(text)} characters")
        return text

    return render
