"""Problems through chat templates: literal text in, the tokenizer's ids out."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from e3rl.config import DataConfig
from e3rl.data import templates
from e3rl.data.prompts import fitting, prompt_limit, render_prompts
from e3rl.errors import UserError
from e3rl.rewards.pool import ProcessPool
from e3rl.types import Message, Problem, Prompt

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {chr(i): i for i in range(128)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="\0"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


def render(tokenizer: Any, prompt: Any, *, context: int = 1000, completion: int = 100, **settings: Any) -> Prompt:
    config = DataConfig(**settings)
    (rendered,) = render_prompts(
        [Problem("p", prompt)], tokenizer, config, context_limit=context, completion_limit=completion
    )
    return rendered


def text(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.ids))


def refusal(tokenizer: Any, prompt: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        render(tokenizer, prompt, **options)
    return str(caught.value)


def test_a_string_is_one_user_message(tokenizer: Any) -> None:
    prompt = render(tokenizer, "1+1?")
    assert text(prompt) == "<user>1+1?\n<assistant>"
    assert all(type(i) is int for i in prompt.ids)


def test_arguments_of_the_template_reach_it(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}<no>{% endif %}"
    )
    assert text(render(tokenizer, "1+1?")) == "<user>1+1?\n<assistant>"
    assert text(render(tokenizer, "1+1?", chat_template_kwargs={"enable_thinking": False})).endswith("<assistant><no>")
    assert "refuses it" in refusal(tokenizer, "1+1?", chat_template_kwargs={"tokenize": False})
    tokenizer.chat_template = None
    assert "data.chat_template_kwargs needs a chat template" in refusal(
        tokenizer, "1+1?", chat_template_kwargs={"enable_thinking": False}
    )


def test_system_prompt_and_many_turns(tokenizer: Any) -> None:
    turns = (Message("user", "1+1?"), Message("assistant", "2"), Message("user", "2+2?"))
    rendered = render(tokenizer, turns, system_prompt="add")
    assert text(rendered) == "<system>add\n<user>1+1?\n<assistant>2\n<user>2+2?\n<assistant>"


def test_without_a_template_strings_are_encoded_as_they_stand(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert text(render(tokenizer, "1+1?")) == "1+1?"
    assert "no chat template" in refusal(tokenizer, (Message("user", "x"),))
    assert "data.system_prompt needs a chat template" in refusal(tokenizer, "x", system_prompt="s")


def test_the_lab_tokenizer() -> None:
    from e3rl.lab.tokenizer import build_tokenizer

    lab = build_tokenizer(max_length=64)
    assert lab.decode(render(lab, "1+1:").ids) == "<|begin|><|user|>1+1:<|end|><|assistant|>"


def test_prompts_that_are_refused(tokenizer: Any) -> None:
    message = refusal(tokenizer, (Message("usr", "x"),))
    assert "problem 'p': unknown role 'usr'. Did you mean 'user'?" in message
    assert "end with a user message" in refusal(tokenizer, (Message("user", "x"), Message("assistant", "y")))
    assert "chat template refuses it: no tools here" in refusal(tokenizer, (Message("tool", "x"),))
    own = (Message("system", "a"), Message("user", "x"))
    assert "leave data.system_prompt empty" in refusal(tokenizer, own, system_prompt="s")
    tokenizer.chat_template = "{# nothing #}"
    assert "its prompt has no tokens" in refusal(tokenizer, "x")


def test_length_limits(tokenizer: Any) -> None:
    length = len("<user>1+1?\n<assistant>")
    assert len(render(tokenizer, "1+1?", context=length + 5, completion=5).ids) == length
    assert len(render(tokenizer, "1+1?", max_prompt_length=length).ids) == length
    message = refusal(tokenizer, "1+1?", context=length + 4, completion=5)
    assert f"problem 'p': its prompt has {length} tokens and the limit is {length - 1}" in message
    assert f"the limit is {length - 1}" in refusal(tokenizer, "1+1?", max_prompt_length=length - 1)
    assert "leaves no room for a prompt" in refusal(tokenizer, "1+1?", context=100, completion=100)


def test_the_lower_limit_counts() -> None:
    assert prompt_limit(DataConfig(), 100, 30) == 70
    assert prompt_limit(DataConfig(max_prompt_length=50), 100, 30) == 50
    assert prompt_limit(DataConfig(max_prompt_length=90), 100, 30) == 70


ENDLESS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "memory": "{% set s = namespace(t='xxxxxxxx') %}{% for a in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}{{ s.t }}",
    "length": "{{ 'x' * 100000000 }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_a_sentence(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ProcessPool(1, 0.5)
    monkeypatch.setattr(templates, "_pool", lambda: pool)
    tokenizer.chat_template = ENDLESS[name]
    message = refusal(tokenizer, "1+1?")
    assert message.startswith("problem 'p': the model's chat template refuses it: ")
    tokenizer.chat_template = TEMPLATE
    assert text(render(tokenizer, "1+1?")) == "<user>1+1?\n<assistant>"  # the next one has a worker again
    pool.close()


def test_a_template_gives_what_transformers_gives(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"bos_token": "<", "eos_token": ">"})
    tokenizer.chat_template = (
        "{{ bos_token }}{%- for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
        "{% break %}\n  {% endfor %}"
        "{{ tools | tojson }} {{ depth }}{{ eos_token }}{% if add_generation_prompt %}!{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    arguments = {"tools": tools, "depth": 3}
    chat = [{"role": "user", "content": " 1+1? "}, {"role": "user", "content": "2"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **arguments)
    assert templates.encode_chats(tokenizer, [chat, chat], arguments) == [expected, expected]


def test_arguments_that_are_none_of_a_templates_are_refused(tokenizer: Any) -> None:
    for name in ("add_generation_prompt", "chat_template", "max_length", "conversation"):
        assert f"data.chat_template_kwargs sets '{name}'" in refusal(tokenizer, "1", chat_template_kwargs={name: 1})


def test_raw_prompts_pass_by_the_template_and_messages_do_not(tokenizer: Any) -> None:
    problems = [Problem("a", "1+1?"), Problem("b", (Message("user", "2?"),)), Problem("c", "3")]
    limits = {"context_limit": 99, "completion_limit": 9}
    found = render_prompts(problems, tokenizer, DataConfig(raw_prompts=True), **limits)
    assert [text(p) for p in found] == ["1+1?", "<user>2?\n<assistant>", "3"]
    assert [p.problem.id for p in found] == ["a", "b", "c"]
    assert "raw_prompts skips the template" in refusal(tokenizer, "1", raw_prompts=True, system_prompt="x")


def test_prompts_that_are_too_long_are_counted_and_may_be_left_out(tokenizer: Any) -> None:
    problems = [Problem(str(i), "x" * (10 * i + 1)) for i in range(4)]
    settings = DataConfig(raw_prompts=True, max_prompt_length=20)
    with pytest.raises(
        UserError, match="problem '2': its prompt has 21 tokens and the limit is 20, and 2 of 4 prompts"
    ):
        render_prompts(problems, tokenizer, settings, context_limit=99, completion_limit=9)
    prompts = render_prompts(problems, tokenizer, DataConfig(raw_prompts=True), context_limit=99, completion_limit=9)
    assert [p.problem.id for p in fitting(prompts, 11)] == ["0", "1"]
    with pytest.raises(UserError, match="no prompt fits: the limit is 0 tokens and the shortest has 1"):
        fitting(prompts, 0)
