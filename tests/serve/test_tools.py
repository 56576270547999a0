"""`e3rl serve` and `e3rl decode` with tools of their own: calls are run, erased turns are never shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from e3rl.config import Config, load_config
from e3rl.errors import UserError
from e3rl.models import Policy
from e3rl.serve import service as service_module
from e3rl.serve.service import Service
from e3rl.types import Draw
from tests.environments.worlds import STATEFUL, Says, TextEngine, add, tokenizer
from tests.serve.conftest import serving
from tests.serve.test_server import CHAT, TEXT, post

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Count."}], "seed": 1}
STATIC = {"baseline": "static", "static_baseline": 5.0}
RUN = {"e3rl": {"run_tools": True, "row": {"start": 3}, **STATIC}}


def twice(context: str, draw: Draw) -> str:
    """A failing call first, then 2 in its place, then what it stands at."""
    if "<tool_response>" in context:
        return "It stands at 5."
    return f"Let me see. {add(10 if draw.attempt == 0 else 2)}"


class Served(TextEngine):
    """The scripted engine where a server expects one that it can interrupt."""

    def interrupt(self) -> None:
        """Every poll ends at once."""


@pytest.fixture
def start(tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def run(says: Says = twice, **settings: Any) -> Service:
        tokens = tokenizer()
        monkeypatch.setattr(service_module, "build_engine", lambda *_: Served(says, tokens))
        (tmp_path / "counter.py").write_text(STATEFUL)
        chosen = {"environments.factory": f"{tmp_path}/counter.py:Counter", "environments.erase": "errors", **settings}
        overrides = ["rollout.segment_length=64", "rollout.max_segments=8", *(f"{k}={v}" for k, v in chosen.items())]
        served = replace(policy, tokenizer=tokens, context_length=4096)
        made.append(
            Service(served, load_config(None, [], overrides), None, name="tiny", max_length=4096, queue_limit=8)
        )
        return made[-1]

    yield run
    for service in made:
        service.close()


def test_calls_are_run_and_listed_with_those_that_were_erased(start: Callable[..., Service]):
    with serving(start()) as url:
        status, answer = post(url, CHAT, {**ASK, **RUN})
    assert status == 200, answer
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Let me see.\nIt stands at 5.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    calls = choice["e3rl"]["calls"]
    assert [(c["name"], json.loads(c["arguments"]), c["result"], c["failed"], c["erased"]) for c in calls] == [
        ("add", {"by": 10}, "{'error': 'too many'}", True, True),
        ("add", {"by": 2}, "5", False, False),
    ]
    drawn = len(f"Let me see. {add(2)}") + 1 + len("It stands at 5.") + 1
    assert answer["usage"]["completion_tokens"] == drawn
    assert answer["usage"]["erased_tokens"] == len(f"Let me see. {add(10)}") + 1


def test_a_stream_shows_a_turn_once_it_was_answered(start: Callable[..., Service]):
    with serving(start()) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        chunks = list(client.chat.completions.create(**ASK, stream=True, extra_body=RUN))
    texts = [c.choices[0].delta.content for c in chunks]
    assert texts == ["Let me see.", "\nIt stands at 5."]
    assert [c.choices[0].finish_reason for c in chunks] == [None, "stop"]
    assert [c.choices[0].delta.role for c in chunks] == ["assistant", None]


def test_several_samples_have_environments_of_their_own(start: Callable[..., Service]):
    def says(context: str, draw: Draw) -> str:
        return "Done." if "<tool_response>" in context else add(draw.sibling + 1)

    with serving(start(says)) as url:
        _, answer = post(url, CHAT, {**ASK, "n": 3, **RUN})
    assert [c["e3rl"]["calls"][0]["result"] for c in answer["choices"]] == ["4", "5", "6"]


def test_a_tool_that_hangs_is_a_failure_and_holds_nobody_up(start: Callable[..., Service]):
    def says(context: str, draw: Draw) -> str:
        return (
            '<tool_call>\n{"name": "rest", "arguments": {"seconds": 20}}\n</tool_call>'
            if "Count." in context
            else "Hi."
        )

    service = start(says, **{"environments.timeout": 1.5})
    found: dict[str, Any] = {}
    with serving(service) as url:
        slow = threading.Thread(target=lambda: found.update(slow=post(url, CHAT, {**ASK, **RUN})))
        slow.start()
        while not service.load()["decoding"]:
            time.sleep(0.01)
        began = time.monotonic()
        _, quick = post(url, CHAT, {**ASK, "messages": [{"role": "user", "content": "Hello."}], "e3rl": STATIC})
        assert time.monotonic() - began < 1.0, "a tool that runs holds nobody up"
        slow.join()
    assert quick["choices"][0]["message"]["content"] == "Hi."
    assert found["slow"][1]["choices"][0]["e3rl"]["failure"] == "its environment took longer than 1.5 s"


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        (TEXT, {"model": "tiny", "prompt": "Count.", "e3rl": {"run_tools": True}}, "only for POST /v1/chat/completions"),
        (CHAT, {**ASK, "stop": ["x"], "e3rl": {"run_tools": True}}, "can't be combined with stop"),
        (CHAT, {**ASK, "logprobs": True, "e3rl": {"run_tools": True}}, "can't be combined with logprobs"),
        (CHAT, {**ASK, "frequency_penalty": 1, "e3rl": {"run_tools": True}}, "can't be combined with penalties"),
        (CHAT, {**ASK, "e3rl": {"row": {}}}, "send run_tools too"),
        (CHAT, {**ASK, "e3rl": {"run_tools": 1}}, "must be true or false"),
        (CHAT, {**ASK, "e3rl": {"run_tools": True, "row": 3}}, "row"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_with_tools_is_refused(start: Callable[..., Service], path: str, body: Any, why: str):
    with serving(start()) as url:
        status, answer = post(url, path, body)
    assert status == 400, answer
    assert why in answer["error"]["message"]


def test_a_server_without_tools_says_so(make_service: Callable[..., Service]):
    with serving(make_service()) as url:
        status, answer = post(url, CHAT, {**ASK, "e3rl": {"run_tools": True}})
    assert (status, "started without environments.factory" in answer["error"]["message"]) == (400, True)


def test_a_server_whose_model_has_no_tools_does_not_start(policy: Policy, config: Config):
    chosen = load_config(None, [], ["environments.factory=calculator"])
    with pytest.raises(UserError, match="no tool calls that e3rl reads"):
        Service(policy, chosen, None, name="tiny", max_length=256, queue_limit=8)
