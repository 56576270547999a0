"""What OpenAI's own client sees."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import openai
import pytest

from e3rl.config import Config, ModelConfig
from e3rl.generation import generate
from e3rl.lab.problems import generate as problems
from e3rl.models import Policy, load_policy, resolve_model_path
from e3rl.rollout.companions import find_companions
from e3rl.serve.service import Service
from tests.serve.conftest import serving

QUESTION = [{"role": "user", "content": "1+1"}]
PLAIN = {"e3rl": {"erase": False}}


@pytest.fixture
def url(make_service: Callable[..., Service]) -> Iterator[str]:
    with serving(make_service()) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models_lists_what_is_served(client: openai.OpenAI):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(("n", "erase"), [(1, True), (4, True), (4, False)])
def test_an_answer_is_what_the_library_decodes(
    client: openai.OpenAI, policy: Policy, config: Config, calibration: object, n: int, erase: bool, monkeypatch
):
    monkeypatch.setattr("e3rl.generation.find_companions", lambda path: _Companions(calibration))
    seeded = replace(config, run=replace(config.run, seed=5))
    expected = generate(policy, "1+1", samples=n, erase=erase, config=seeded)[0]
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, n=n, seed=5, extra_body={"e3rl": {"erase": erase}},
        max_tokens=config.rollout.completion_limit,
    )  # fmt: skip
    assert [c.message.content for c in answer.choices] == [g.text for g in expected]
    assert [c.finish_reason for c in answer.choices] == [g.trajectory.finish for g in expected]
    assert [c.e3rl["erasures"] for c in answer.choices] == [g.erased for g in expected]
    assert answer.usage.completion_tokens == sum(g.trajectory.committed_tokens for g in expected)
    assert answer.usage.erased_tokens == sum(g.trajectory.erased_tokens for g in expected)
    assert answer.usage.prompt_tokens == len(expected[0].trajectory.prompt.ids)
    assert (answer.usage.erased_tokens > 0) == erase
    assert answer.e3rl == {"erase": erase, "seed": 5}


class _Companions:
    recipe = None

    def __init__(self, calibration: object) -> None:
        self.calibration = calibration


def test_a_text_prompt_and_its_token_ids_are_the_same(client: openai.OpenAI, policy: Policy):
    ids = policy.tokenizer.encode("2+2")
    by_text = client.completions.create(model="tiny", prompt="2+2", seed=1, n=2)
    by_ids = client.completions.create(model="tiny", prompt=ids, seed=1, n=2)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert by_text.usage.prompt_tokens == len(ids)


def test_several_prompts_make_choices_in_their_order(client: openai.OpenAI):
    one = client.completions.create(model="tiny", prompt="2+2", seed=1, n=2, max_tokens=8)
    two = client.completions.create(model="tiny", prompt=["2+2", "7"], seed=1, n=2, max_tokens=8)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]
    assert [c.text for c in two.choices[:2]] == [c.text for c in one.choices]


@pytest.mark.parametrize("n", [1, 4])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, n: int):
    asked = {"model": "tiny", "messages": QUESTION, "n": n, "seed": 7}
    whole = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(c.delta.content for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert sum(c.e3rl["erasures"] for c in mine) == choice.e3rl["erasures"]
        assert len(mine) == choice.e3rl["segments"] > 1
        assert mine[-1].e3rl["total"] == choice.e3rl
    assert last.choices == []
    assert last.usage == whole.usage


def test_text_completions_stream_too(client: openai.OpenAI):
    whole = client.completions.create(model="tiny", prompt="3", seed=2, extra_body=PLAIN)
    chunks = list(client.completions.create(model="tiny", prompt="3", seed=2, stream=True, extra_body=PLAIN))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert len(chunks) > 1


def test_erased_texts_come_on_request(client: openai.OpenAI):
    extra = {"e3rl": {"return_erased": True, "baseline": "static", "static_baseline": 0.01, "max_erasures": 1}}
    answer = client.completions.create(model="tiny", prompt="3", seed=2, n=2, extra_body=extra)
    for choice in answer.choices:
        erased = choice.e3rl["erased"]
        assert len(erased) == choice.e3rl["erasures"] == choice.e3rl["segments"]  # one each: the budget
        assert all(e["text"] and e["uncertainty"] > e["threshold"] for e in erased)


def test_a_stop_string_ends_a_sample_where_it_begins(client: openai.OpenAI):
    asked = {"model": "tiny", "prompt": "3", "seed": 2, "max_tokens": 18, "extra_body": PLAIN}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:7]  # across the border of the first two segments
    assert text.find(stop) == 5
    cut = client.completions.create(**asked, stop=stop)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[:5], "stop")
    assert cut.usage.completion_tokens == 7
    streamed = client.completions.create(**asked, stop=[stop], stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text[:5]


def test_temperature_zero_is_greedy_and_plain(client: openai.OpenAI):
    answers = [client.completions.create(model="tiny", prompt="3", temperature=0, max_tokens=8, seed=s) for s in (1, 2)]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].e3rl["erase"] is False
    with pytest.raises(openai.BadRequestError, match="redrawn segment is the same"):
        client.completions.create(model="tiny", prompt="3", temperature=0, extra_body={"e3rl": {"erase": True}})


def test_without_a_seed_answers_differ_and_name_theirs(client: openai.OpenAI):
    first, second = (client.completions.create(model="tiny", prompt="3", extra_body=PLAIN) for _ in range(2))
    assert first.choices[0].text != second.choices[0].text
    again = client.completions.create(model="tiny", prompt="3", seed=first.e3rl["seed"], extra_body=PLAIN)
    assert again.choices[0].text == first.choices[0].text


def test_clients_at_once_get_what_each_would_get_alone(client: openai.OpenAI):
    def ask(seed: int) -> str:
        return client.completions.create(model="tiny", prompt="3", seed=seed, n=2).choices[1].text

    alone = [ask(seed) for seed in range(6)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda s=s: together.update({s: ask(s)})) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[s] for s in range(6)] == alone


def test_a_single_sample_needs_statistics(make_service: Callable[..., Service]):
    with serving(make_service(None)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="e3rl calibrate") as caught:
            client.completions.create(model="tiny", prompt="3")
        assert caught.value.code == "no_reference_statistics"
        assert client.completions.create(model="tiny", prompt="3", n=2).e3rl["erase"] is True
        assert client.completions.create(model="tiny", prompt="3", extra_body=PLAIN).e3rl["erase"] is False
        fixed = {"e3rl": {"baseline": "static", "static_baseline": 5.5}}
        answer = client.completions.create(model="tiny", prompt="3", seed=3, extra_body=fixed)
        assert answer.choices[0].e3rl["erasures"] > 0


def test_statistics_hold_for_the_settings_they_were_measured_with(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match=r"rollout.segment_length: 6 then, 4 now"):
        client.completions.create(model="tiny", prompt="3", extra_body={"e3rl": {"segment_length": 4}})
    answer = client.completions.create(
        model="tiny", prompt="3", n=2, max_tokens=9, extra_body={"e3rl": {"segment_length": 4}}
    )
    assert max(c.e3rl["segments"] for c in answer.choices) == 3


def test_a_token_is_asked_for(make_service: Callable[..., Service]):
    token = "0123456789abcdef"
    with serving(make_service(), token) as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="0123456789abcdeX", max_retries=0).models.list()
        assert list(openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0).models.list())


def test_the_embedded_model_is_served_with_its_own_statistics():
    policy = load_policy(ModelConfig(path="lab", device="cpu"))
    companions = find_companions(resolve_model_path("lab"))
    config = companions.config()
    problem = problems("chain", 3, "heldout", 1)[0]
    service = Service(policy, config, companions.calibration, name="lab", max_length=256, queue_limit=4)
    with contextlib.closing(service), serving(service) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        question = [{"role": "user", "content": str(problem.prompt)}]
        answer = client.chat.completions.create(model="lab", messages=question, seed=1)
    seeded = replace(config, run=replace(config.run, seed=1))
    ((expected,),) = generate(policy, str(problem.prompt), config=seeded)
    assert answer.choices[0].message.content == expected.text
    assert "A:" in expected.text
