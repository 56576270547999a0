"""verifiers evaluates an environment against `e3rl serve lab`, and its training client gets the exact tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

vf = pytest.importorskip("verifiers.v1")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


async def play(client: Any, count: int) -> list[Any]:
    from verifiers.v1.clients import ModelContext
    from verifiers.v1.utils.loaders import load_environment

    plugin = "lab_environment"  # a module of its own, as an installed environment is
    config = vf.SingleAgentEnvConfig(
        taskset={"id": plugin},
        agent=vf.AgentConfig(harness={"id": plugin}, runtime=vf.SubprocessConfig()),
    )
    environment = load_environment(config)
    context = ModelContext(model="lab", client=client, sampling=vf.SamplingConfig(temperature=1.0, max_tokens=96))
    async with environment.serving():
        tasks = list(environment.taskset.take(count))
        episodes = await asyncio.gather(*(environment.run_episode(task, context) for task in tasks))
    assert [e.errors for e in episodes] == [[]] * count
    return [e.traces[0] for e in episodes]


def test_an_environment_is_evaluated(lab_url: str):
    client = vf.EvalClientConfig(base_url=f"{lab_url}/v1", api_key_var="NO_KEY")
    traces = asyncio.run(play(client, 8))
    assert all(trace.ok for trace in traces)
    assert 1 <= sum(trace.reward for trace in traces) <= 8  # the lab's model solves about half


def test_the_training_client_gets_the_tokens_that_were_drawn(lab_url: str, lab: Any):
    renderer = {"name": "default"}
    client = vf.TrainClientConfig(
        base_url=f"{lab_url}/v1", api_key_var="NO_KEY", renderer=renderer, renderer_model_name=str(lab.path)
    )
    traces = asyncio.run(play(client, 4))
    for trace in traces:
        (turn,) = trace.branches
        sampled = [i for i, mine in zip(turn.token_ids, turn.sampled_mask, strict=True) if mine]
        prompt = turn.token_ids[: len(turn.token_ids) - len(sampled)]
        assert prompt == lab.rendered(trace.task.data.prompt)
        assert lab.policy.tokenizer.decode(sampled, skip_special_tokens=True).strip() == str(
            trace.assistant_messages[-1].content
        )
        expected = lab.logprobs(prompt, sampled)
        assert [p for p, mine in zip(turn.logprobs, turn.sampled_mask, strict=True) if mine] == pytest.approx(
            expected, abs=1e-3
        )
