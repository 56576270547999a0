"""The lab's tokenizers: one token for each character, and marks for chat turns and for tool calls."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

PAD, UNKNOWN, BEGIN, END = "<|pad|>", "<|unknown|>", "<|begin|>", "<|end|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")
TOOL = "<|tool|>"
CALL_MARKS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The roles of a conversation are system, user and assistant.') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TOOL_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}"
    "{{ '<|system|>' }}"
    "{% for tool in tools %}"
    "{{ tool.function.name + '(' + tool.function.parameters.properties | join(',') + ')' }}"
    "{% endfor %}"
    "{{ eos_token }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('The roles of a conversation are system, user, assistant and tool.') }}"
    "{% endif %}"
    "{{ '<|' + message.role + '|>' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}"
    "{{ '<arg_key>' + key + '</arg_key><arg_value>' ~ value ~ '</arg_value>' }}"
    "{% endfor %}"
    "{{ '</tool_call>' }}"
    "{% endfor %}"
    "{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Calls as GLM writes them."""


def build_tokenizer(max_length: int, *, tools: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it. Characters outside printable ASCII become the unknown token.

    ``tools``: include marks and template for tool calls.
    """
    marks = (TOOL, *CALL_MARKS) if tools else ()
    vocabulary = {token: id for id, token in enumerate([PAD, UNKNOWN, BEGIN, END, *TURNS, *CHARACTERS, *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=[*TURNS, *marks[:1]],
        chat_template=TOOL_TEMPLATE if tools else CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    if tools:
        made.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in CALL_MARKS])
    return made
