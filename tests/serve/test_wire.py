"""vLLM's fields beside OpenAI's: log-probabilities, token ids, what shapes a distribution, tools, grammars."""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch

from e3rl.models import Policy
from e3rl.serve.hooks import FORBIDDEN, RowHook
from e3rl.serve.requests import Shaping
from e3rl.serve.service import Service
from tests.serve.conftest import serving
from tests.serve.test_server import ADD, CHAT, GENERATE, HI, TEXT, post

PLAIN = {"e3rl": {"erase": False}}
HELLO = {"model": "tiny", "prompt": "3", "seed": 2, "max_tokens": 18}
WIDE = {"e3rl": {"baseline": "static", "static_baseline": 4.5}}
"""Erases often, and needs no statistics."""
TOOLS_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% endif %}"
    "{% for m in messages %}<|user|>{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.a }}</tool_call>{% endfor %}{% endfor %}"
    "{% if thinking %}T{% endif %}<|assistant|>"
)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.fixture
def url(make_service: Callable[..., Service]) -> Iterator[str]:
    with serving(make_service()) as url:
        yield url


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    status, answer = post(url, path, body)
    assert status == 200, answer
    return answer


def forward(policy: Policy, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at every place of the answer, by one plain pass, [T, V]."""
    with torch.inference_mode():
        logits = policy.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("extra", [PLAIN, WIDE], ids=["plain", "erasing"])
def test_log_probabilities_and_ids_are_those_of_the_answer(url: str, policy: Policy, extra: dict[str, Any]):
    answer = ask(url, CHAT, **HI, seed=3, n=2, logprobs=True, top_logprobs=3, return_token_ids=True, **extra)
    prompt = answer["prompt_token_ids"]
    assert prompt == [2, 5, *policy.tokenizer.encode("1"), 3, 6]
    assert (answer["usage"]["erased_tokens"] > 0) == (extra is WIDE)
    for choice in answer["choices"]:
        ids, content = choice["token_ids"], choice["logprobs"]["content"]
        assert policy.tokenizer.decode(ids, skip_special_tokens=True) == choice["message"]["content"]
        logp_TV = forward(policy, prompt, ids)
        assert [c["logprob"] for c in content] == pytest.approx(
            [logp_TV[t, i].item() for t, i in enumerate(ids)], abs=1e-4
        )
        likeliest = logp_TV.topk(3)
        for place, entry in enumerate(content):
            assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
                likeliest.values[place].tolist(), abs=1e-4
            )
            best = policy.tokenizer.decode([int(likeliest.indices[place, 0])])
            assert entry["top_logprobs"][0]["token"] == best
            assert bytes(entry["top_logprobs"][0]["bytes"]).decode() == best


def test_log_probabilities_of_a_text_completion(url: str, policy: Policy):
    answer = ask(url, TEXT, **HELLO, logprobs=2, return_token_ids=True, **PLAIN)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert found["tokens"] == [policy.tokenizer.decode([i]) for i in choice["token_ids"]]
    assert found["text_offset"][:3] == [0, len(found["tokens"][0]), len(found["tokens"][0] + found["tokens"][1])]
    pairs = zip(found["top_logprobs"], found["token_logprobs"], strict=True)
    assert all(max(top.values()) >= p - 1e-6 and len(top) == 2 for top, p in pairs)
    assert choice["prompt_token_ids"] == policy.tokenizer.encode("3")


@pytest.mark.parametrize("extra", [PLAIN, WIDE], ids=["plain", "erasing"])
def test_streamed_ids_and_log_probabilities_add_up_to_the_whole(url: str, extra: dict[str, Any]):
    asked = {**HI, "seed": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, **extra}
    (whole,) = ask(url, CHAT, **asked)["choices"]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    more = {"return_token_ids": True, **extra}
    chunks = list(
        client.chat.completions.create(**HI, seed=3, logprobs=True, top_logprobs=2, stream=True, extra_body=more)
    )
    assert [i for c in chunks for i in c.choices[0].token_ids] == whole["token_ids"]
    entries = [e.model_dump() for c in chunks for e in c.choices[0].logprobs.content]
    assert entries == whole["logprobs"]["content"]
    assert [hasattr(c, "prompt_token_ids") for c in chunks] == [True] + [False] * (len(chunks) - 1)


def test_generate_gives_exact_ids_as_a_training_client_posts_it(url: str, policy: Policy):
    ids = policy.tokenizer.encode("3")
    sampling = {"seed": 2, "max_tokens": 18, "logprobs": 1, "stop_token_ids": [3], "skip_special_tokens": False}
    body = {"model": "tiny", "token_ids": ids, "sampling_params": {**sampling, "top_k": -1}, "cache_salt": "1", **PLAIN}
    answer = ask(url, GENERATE, **body)
    (choice,) = answer["choices"]
    text = ask(url, TEXT, **HELLO, return_token_ids=True, logprobs=0, **PLAIN)["choices"][0]
    assert choice["token_ids"] == text["token_ids"]
    entries = choice["logprobs"]["content"]
    assert [e["token"] for e in entries] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert [e["logprob"] for e in entries] == text["logprobs"]["token_logprobs"]
    assert answer["prompt_token_ids"] == ids
    assert answer["request_id"]


def test_a_stop_token_ends_a_sample_and_is_its_last_id(url: str, policy: Policy):
    whole = ask(url, TEXT, **HELLO, return_token_ids=True, **PLAIN)["choices"][0]
    stop = whole["token_ids"][8]
    assert stop not in whole["token_ids"][:8]
    for keep in (False, True):
        cut = ask(
            url, TEXT, **HELLO, return_token_ids=True, stop_token_ids=[stop], include_stop_str_in_output=keep, **PLAIN
        )
        (choice,) = cut["choices"]
        assert choice["token_ids"] == whole["token_ids"][:9]
        assert choice["text"] == policy.tokenizer.decode(
            whole["token_ids"][: 9 if keep else 8], skip_special_tokens=True
        )
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert cut["usage"]["completion_tokens"] == 9


def test_top_k_and_min_p_narrow_what_is_drawn(url: str):
    greedy = ask(url, TEXT, **{**HELLO, "temperature": 0})["choices"][0]["text"]
    assert ask(url, TEXT, **HELLO, **PLAIN)["choices"][0]["text"] != greedy
    assert ask(url, TEXT, **HELLO, top_k=1, **PLAIN)["choices"][0]["text"] == greedy
    assert ask(url, TEXT, **HELLO, min_p=1, **PLAIN)["choices"][0]["text"] == greedy


def test_a_bias_decides_and_an_end_can_be_put_off(url: str, policy: Policy):
    (seven,) = policy.tokenizer.encode("7")
    assert ask(url, TEXT, **HELLO, logit_bias={str(seven): 100}, **PLAIN)["choices"][0]["text"] == "7" * 18
    (end,) = policy.eos_ids
    ended = {**HELLO, "logit_bias": {str(end): 100}, **PLAIN}
    choice = ask(url, TEXT, **ended, min_tokens=5, return_token_ids=True)["choices"][0]
    assert (choice["token_ids"].index(end), choice["finish_reason"]) == (5, "stop")
    choice = ask(url, TEXT, **ended, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert (end in choice["token_ids"], choice["finish_reason"]) == (False, "length")


def test_penalties_by_value():
    hook = RowHook(Shaping(frequency=0.5, presence=0.25, repetition=2.0), prompt=[0, 1], eos_ids=[9])
    logits = torch.tensor([4.0, -4.0, 4.0, 4.0, -1.0])
    hook(logits, [2, 2, 4])
    # 0 and 1 are the prompt's: repetition alone; 2 twice: 4 / 2 - 2 * 0.5 - 0.25; 4 once: -1 * 2 - 0.5 - 0.25
    assert logits.tolist() == [2.0, -8.0, 0.75, 4.0, -2.75]
    first = torch.tensor([4.0, 4.0, 4.0])
    RowHook(Shaping(frequency=0.5, presence=0.25), prompt=[0, 1], eos_ids=[2])(first, [])
    assert first.tolist() == [4.0, 4.0, 4.0]


def test_penalties_change_what_repeats(url: str):
    counts = []
    for penalty in (-2.0, 0.0, 2.0):
        text = ask(url, TEXT, **{**HELLO, "max_tokens": 100}, frequency_penalty=penalty, ignore_eos=True, **PLAIN)
        counts.append(len(set(text["choices"][0]["text"])))
    assert counts[0] < counts[1] < counts[2]


def test_half_precision_takes_what_is_forbidden():
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.zeros(4, dtype=dtype)
        RowHook(Shaping(ignore_eos=True), prompt=[0], eos_ids=[3])(logits, [])
        assert logits.isfinite().all()
        assert logits[3] <= max(FORBIDDEN, -6e4)


def test_an_engine_that_takes_no_hooks_says_so(make_service: Callable[..., Service]):
    service = make_service()
    engine = service._engine

    class Plain:
        def free_rows(self) -> int:
            return engine.free_rows()

    with serving(service) as url:
        service._engine = Plain()
        status, answer = post(url, TEXT, {**HELLO, "frequency_penalty": 1})
        assert (status, "can't change logits" in answer["error"]["message"]) == (400, True)
        assert post(url, TEXT, {**HELLO, "logprobs": 0, "min_p": 0.1, **PLAIN})[0] == 200


@pytest.fixture
def tools_url(make_service: Callable[..., Service], policy: Policy) -> Iterator[str]:
    """A server of the model with a template that has tools."""
    service = make_service()
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = TOOLS_TEMPLATE
    service.policy = replace(policy, tokenizer=tokenizer)
    with serving(service) as url:
        yield url


def test_tools_and_their_results_reach_the_template(tools_url: str, policy: Policy):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": 7}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "9"},
    ]
    asked = {"messages": messages, "tools": [LOOK, ADD], "chat_template_kwargs": {"thinking": True}}
    found = ask(tools_url, "/tokenize", **asked)["tokens"]
    written = "look;add;<|user|>user:x<|user|>assistant:<tool_call>7</tool_call><|user|>tool:9T<|assistant|>"
    assert found == policy.tokenizer.encode(written, add_special_tokens=False)
    answer = ask(tools_url, CHAT, model="tiny", **asked, return_token_ids=True, max_tokens=4, **PLAIN)
    assert answer["prompt_token_ids"] == found
    without = ask(
        tools_url, CHAT, model="tiny", **asked, tool_choice="none", return_token_ids=True, max_tokens=4, **PLAIN
    )
    assert policy.tokenizer.decode(without["prompt_token_ids"]).startswith("<|user|>")


def test_a_call_that_the_model_writes_is_read(tools_url: str, policy: Policy):
    """The answer is dictated, token by token."""
    text = 'so <tool_call>{"name":"look","arguments":{"a":5}}</tool_call>'
    client = openai.OpenAI(base_url=f"{tools_url}/v1", api_key="none", max_retries=0)
    ids = [*policy.tokenizer.encode(text, add_special_tokens=False), *policy.eos_ids]
    original = RowHook.__call__

    def dictate(self: RowHook, logits: torch.Tensor, generated: Any) -> None:
        original(self, logits, generated)
        logits[:] = FORBIDDEN
        logits[ids[len(generated)]] = 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowHook, "__call__", dictate)
        asked = {**HI, "tools": [LOOK], "max_tokens": 90, "presence_penalty": 0.1, "extra_body": PLAIN}
        (choice,) = client.chat.completions.create(**asked).choices
        chunks = [c.choices[0] for c in client.chat.completions.create(**asked, stream=True)]
    assert (choice.message.content, choice.finish_reason) == ("so", "tool_calls")
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"a": 5})
    assert "".join(c.delta.content for c in chunks) == "so"
    assert [len(c.delta.tool_calls or []) for c in chunks] == [0] * (len(chunks) - 1) + [1]
    streamed = chunks[-1].delta.tool_calls[0].function
    assert (streamed.name, streamed.arguments) == (call.function.name, call.function.arguments)
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("extra", [PLAIN, WIDE], ids=["plain", "erasing"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_can_be_forced(tools_url: str, choice: Any, extra: dict[str, Any]):
    pytest.importorskip("llguidance")
    for seed in range(3):
        answer = ask(
            tools_url, CHAT, **HI, tools=[LOOK, ADD], tool_choice=choice, seed=seed, n=2, max_tokens=200,
            parallel_tool_calls=False, **extra,
        )  # fmt: skip
        for found in answer["choices"]:
            assert found["finish_reason"] in ("tool_calls", "length"), found
            if found["finish_reason"] == "tool_calls":
                (call,) = found["message"]["tool_calls"]
                assert found["message"]["content"] is None
                assert call["function"]["name"] in (("look", "add") if choice == "required" else ("look",))
                if call["function"]["name"] == "look":
                    assert 0 <= json.loads(call["function"]["arguments"])["a"] <= 99


@pytest.mark.parametrize("extra", [PLAIN, WIDE], ids=["plain", "erasing"])
def test_an_answer_follows_its_schema(url: str, extra: dict[str, Any]):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    ended = 0
    for seed in range(6):
        answer = ask(url, CHAT, **HI, response_format=form, seed=seed, n=2, max_tokens=60, logprobs=True, **extra)
        for choice in answer["choices"]:
            if choice["finish_reason"] == "stop":
                ended += 1
                value = json.loads(choice["message"]["content"])
                assert value.keys() == {"a"}
                assert 0 <= value["a"] <= 99
            else:
                assert choice["message"]["content"].lstrip()[:1] in ("{", "")
    assert ended >= 6


def test_other_grammars(url: str):
    pytest.importorskip("llguidance")
    for structured, pattern in [
        ({"regex": "[0-3]{4}"}, "[0-3]{4}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" | "b" start'}, "b*a"),
    ]:
        for seed in range(3):
            body = {**HELLO, "seed": seed, "max_tokens": 60}
            text = ask(url, TEXT, **body, structured_outputs=structured, **PLAIN)["choices"][0]["text"]
            assert re.fullmatch(pattern, text), (structured, text)


def test_a_grammar_that_makes_no_sense_is_refused(url: str):
    pytest.importorskip("llguidance")
    for structured in ({"regex": "(("}, {"grammar": "start: nothing"}, {"json": {"type": 3}}, {"json": "{"}):
        status, answer = post(url, TEXT, {**HELLO, "structured_outputs": structured})
        assert status == 400
        assert "the grammar can't be used" in answer["error"]["message"]


def test_a_grammar_without_its_library_is_refused(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    status, answer = post(url, TEXT, {**HELLO, "structured_outputs": {"regex": "a"}})
    assert (status, "e3rl[structured]" in answer["error"]["message"]) == (400, True)


def test_texts_become_ids_and_ids_texts(url: str, policy: Policy):
    found = ask(url, "/tokenize", prompt="1+1", return_token_strs=True)
    ids = policy.tokenizer.encode("1+1")
    assert found == {"count": 3, "max_model_len": 256, "tokens": ids, "token_strs": ["1", "+", "1"]}
    assert ask(url, "/detokenize", tokens=ids) == {"prompt": "1+1"}
    chat = ask(url, "/tokenize", messages=HI["messages"])
    assert chat["tokens"] == ask(url, CHAT, **HI, return_token_ids=True, max_tokens=1, **PLAIN)["prompt_token_ids"]


def test_metrics_count_what_was_done(url: str):
    answer = ask(url, TEXT, **HELLO, **WIDE)
    post(url, TEXT, {"model": "tiny"})
    post(url, "/nothing/at/all", {})
    text, until = "", time.monotonic() + 10
    while "\ne3rl_rows_free 8\n" not in text and time.monotonic() < until:  # rows come back after the answer has left
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as found:
            text = found.read().decode()
    used = answer["usage"]
    assert used["erased_tokens"] > 0
    for name in ("prompt", "completion", "erased"):
        assert f"\ne3rl_{name}_tokens_total {used[f'{name}_tokens']}\n" in text
    assert f"\ne3rl_erasures_total {answer['choices'][0]['e3rl']['erasures']}\n" in text
    assert 'e3rl_requests_total{path="/v1/completions",status="200"} 1\n' in text
    assert 'e3rl_requests_total{path="/v1/completions",status="400"} 1\n' in text
    assert 'e3rl_requests_total{path="other",status="404"} 1\n' in text
    assert 'e3rl_first_segment_seconds_bucket{le="+Inf"} 1\ne3rl_first_segment_seconds_sum' in text
    assert "\ne3rl_rows_free 8\n" in text
