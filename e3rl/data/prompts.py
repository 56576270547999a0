"""Problems become token ids, exactly once: nothing downstream tokenises a prompt again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from e3rl.config import DataConfig
from e3rl.data.templates import encode_chats
from e3rl.errors import UserError, unknown
from e3rl.types import Problem, Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")


def render_prompts(
    problems: Sequence[Problem], tokenizer: Any, config: DataConfig, *, context_limit: int, completion_limit: int
) -> list[Prompt]:
    """Each problem through the tokenizer's chat template, generation prompt included.

    A string is one user message; ``config.system_prompt`` comes first. With ``config.raw_prompts``, or a tokenizer without a
    template, string prompts are encoded as they are, with the tokenizer's own special tokens; messages need a template.
    Few-shot examples are earlier messages of the prompt.
    """
    limit = prompt_limit(config, context_limit, completion_limit)
    template = bool(getattr(tokenizer, "chat_template", None))
    raw = [not template or (config.raw_prompts and isinstance(p.prompt, str)) for p in problems]
    stand = iter(_as_they_stand([p for p, r in zip(problems, raw, strict=True) if r], tokenizer, config))
    chats = iter(_through_template([p for p, r in zip(problems, raw, strict=True) if not r], tokenizer, config))
    prompts = [_prompt(p, next(stand if r else chats)) for p, r in zip(problems, raw, strict=True)]
    _require_fitting(prompts, limit)
    return prompts


def fitting(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """The prompts of at most ``limit`` tokens. UserError if there is none."""
    found = [p for p in prompts if len(p.ids) <= limit]
    if not found:
        shortest = min(len(p.ids) for p in prompts)
        raise UserError(f"no prompt fits: the limit is {limit} tokens and the shortest has {shortest}")
    return found


def prompt_limit(config: DataConfig, context_limit: int, completion_limit: int) -> int:
    """The prompt limit in tokens: the context minus the longest response, or ``max_prompt_length`` if that is lower."""
    room = context_limit - completion_limit
    if room < 1:
        raise UserError(
            f"a response of up to {completion_limit} tokens leaves no room for a prompt in the model's context of "
            f"{context_limit}; lower rollout.segment_length, max_segments or max_completion_length"
        )
    return min(room, config.max_prompt_length) if config.max_prompt_length else room


def _prompt(problem: Problem, ids: Sequence[int]) -> Prompt:
    if not ids:
        raise UserError(f"problem '{problem.id}': its prompt has no tokens")
    return Prompt(problem, tuple(int(i) for i in ids))


def _require_fitting(prompts: Sequence[Prompt], limit: int) -> None:
    longer = [p for p in prompts if len(p.ids) > limit]
    if longer:
        count = f", and {len(longer)} of {len(prompts)} prompts are longer" if len(prompts) > 1 else ""
        raise UserError(
            f"problem '{longer[0].problem.id}': its prompt has {len(longer[0].ids)} tokens and the limit is {limit}{count} "
            "(data.max_prompt_length, or what the longest response leaves of the context); raise that, or leave them out: "
            "data.filter_overlong_prompts = true"
        )


def _as_they_stand(problems: Sequence[Problem], tokenizer: Any, config: DataConfig) -> list[Sequence[int]]:
    for problem in problems:
        if not isinstance(problem.prompt, str):
            raise UserError(
                f"problem '{problem.id}' has a chat prompt, but the tokenizer has no chat template; use prompts that are "
                f"plain strings, or a model with a template"
            )
    for setting in ("system_prompt", "chat_template_kwargs"):
        if problems and getattr(config, setting):
            why = "data.raw_prompts skips the template" if config.raw_prompts else "this tokenizer has none"
            raise UserError(f"data.{setting} needs a chat template, and {why}; write it into the prompts")
    return [tokenizer.encode(problem.prompt) for problem in problems]


def _messages(problem: Problem, system_prompt: str) -> list[dict[str, str]]:
    if isinstance(problem.prompt, str):
        messages = [{"role": "user", "content": problem.prompt}]
    else:
        messages = [{"role": m.role, "content": m.content} for m in problem.prompt]
    for message in messages:
        if message["role"] not in ROLES:
            raise UserError(f"problem '{problem.id}': {unknown('role', message['role'], ROLES)}")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"problem '{problem.id}': its last message is the assistant's; end with a user message")
    if not system_prompt:
        return messages
    if messages[0]["role"] == "system":
        raise UserError(f"problem '{problem.id}' has a system message of its own; leave data.system_prompt empty")
    return [{"role": "system", "content": system_prompt}, *messages]


def _through_template(problems: Sequence[Problem], tokenizer: Any, config: DataConfig) -> list[Sequence[int]]:
    if not problems:
        return []
    chats = [_messages(problem, config.system_prompt) for problem in problems]
    encoded = encode_chats(tokenizer, chats, config.chat_template_kwargs)
    for problem, ids in zip(problems, encoded, strict=True):
        if isinstance(ids, str):
            raise UserError(f"problem '{problem.id}': the model's chat template refuses it: {ids}")
    return [ids for ids in encoded if not isinstance(ids, str)]
