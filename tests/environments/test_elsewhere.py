"""Environments where the rollouts are: on a rollout server, and among ranks. The run is the one that a single process makes."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from e3rl.cluster.messages import Ask, Task, decode_answer
from e3rl.cluster.server import make_server
from e3rl.cluster.wire import encode
from e3rl.cluster.worker import RolloutWorker
from e3rl.config import Config, load_config
from e3rl.environments.episodes import tool_prompts
from e3rl.environments.protocol import RemoteEnvironment, settled
from e3rl.errors import UserError
from e3rl.rollout.columns import decode
from e3rl.rollout.columns import encode as encode_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.orders import Event
from e3rl.train import trainer as module
from e3rl.train.ledger import ledger_path
from e3rl.train.run_directory import read_lines
from e3rl.train.trainer import Trainer
from e3rl.types import Message, Problem, Prompt
from e3rl.web.access import Access
from tests.environments.test_training import write_run
from tests.environments.worlds import STATEFUL
from tests.train.rollouts import rewarded_group
from tests.web.running import running

QUICK = STATEFUL.replace("time.sleep(seconds)", "pass")  # it is tried before the run
HANGS = QUICK.replace(
    "self.count += by", "self.count += by\n        if by == 3:\n            import time; time.sleep(5)"
)


def ledger(run: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(ledger_path(run, 1)).to_pylist())


@pytest.fixture(scope="module", params=["works", "hangs"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run with its environments here, and at a rollout server."""
    place = tmp_path_factory.mktemp("runs")
    source = QUICK if request.param == "works" else HANGS
    recipe = write_run(place, "e3rl", source)
    own = [f"run.output_dir={place}", f"model.path={place / 'model'}", "environments.timeout=1"]
    config = load_config(recipe, [], [*own, "run.name=here"])
    Trainer(config).train()
    with running(make_server(RolloutWorker(config, 1000), Access("127.0.0.1"), 0, 2**26)) as server:
        there = load_config(recipe, [], [*own, "run.name=there", f'rollout.servers=["{server.url}"]'])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "build_engine", lambda *_: pytest.fail("an engine was built"))
            Trainer(there).train()
    return place / "here", place / "there"


def test_tools_at_a_rollout_server_make_the_run_of_one_process(runs: tuple[Path, Path]):
    """Calls, results, erased turns, rewards, missing ones with their reason, and what is learnt."""
    here, there = runs
    assert ledger(there) == ledger(here)
    ours, theirs = (read_lines(run / "metrics.jsonl")[0] for run in runs)
    names = (
        "reward",
        "reward_missing",
        "turns",
        "calls",
        "call_errors",
        "erased_turns",
        "environment_failures",
        "loss",
    )
    assert [theirs[n] for n in names] == [pytest.approx(ours[n], abs=1e-6) for n in names]
    [erased] = [e for row in ledger(there) for e in row["erasures"]]
    assert "too many" in erased["observation"]


def test_the_reward_is_that_of_the_servers_environment(runs: tuple[Path, Path], request: pytest.FixtureRequest):
    rows = ledger(runs[1])
    if "works" in request.node.name:
        assert [(r["reward"], r["reward_error"]) for r in rows] == [(5.0, None), (6.0, None)]
    else:
        assert [(r["reward"], r["reward_error"]) for r in rows] == [
            (5.0, None),
            (None, "its environment took longer than 1 s"),
        ]


class Bad:
    def get_reward(self) -> Any:
        raise ValueError("no score")


class Good:
    async def get_reward(self) -> Any:
        return torch.tensor(0.25)


class Silent:
    pass


def test_what_is_known_of_an_environment_goes_with_its_group():
    """Its reward, why it failed, or that it has no opinion; what raises fails its trajectory alone."""
    group = rewarded_group("p", (1.0,) * 4, ((3,),) * 4, ((),) * 4).group
    lived = [
        replace(t, environment=e) for t, e in zip(group.trajectories, (Good(), Bad(), Silent(), Good()), strict=True)
    ]
    lived[3] = replace(lived[3], failure="took longer than 1 s")
    sent = encode_groups([settled(replace(group, trajectories=tuple(lived)))])
    [item] = decode(sent, lambda *_: group.prompt)
    found = item.group.trajectories
    assert [t.environment for t in found] == [
        RemoteEnvironment(0.25),
        RemoteEnvironment(None),
        RemoteEnvironment(None),
        RemoteEnvironment(0.25),
    ]
    assert [t.failure for t in found] == [
        None,
        "get_reward() failed: ValueError: no score",
        None,
        "took longer than 1 s",
    ]
    assert encode_groups([item.group]).equals(sent), "and may go on from there"
    [item] = decode(encode_groups([group]), lambda *_: group.prompt)
    assert all((t.environment, t.failure) == (None, None) for t in item.group.trajectories)


class NoTools:
    identity = "mine"


def test_a_row_reaches_the_worker_as_it_was():
    said = (Message("system", "Be brief."), Message("user", "Count."))
    problem = Problem("p", said, None, {"start": 3, "names": ["a", "ü"]})
    assert Task.of(Prompt(problem, (1, 2), NoTools())).prompt(None) == Prompt(problem, (1, 2))
    assert Task.of(Prompt(problem, (1, 2))).row is None, "without tools it stays with the trainer"
    odd = Prompt(replace(problem, columns={"when": date(2026, 1, 2)}), (1, 2), NoTools())
    with pytest.raises(UserError, match=r"problem 'p' can't be sent .* date is not JSON"):
        Task.of(odd)


def test_a_worker_runs_only_the_tools_that_it_was_started_with(tmp_path: Path):
    recipe = write_run(tmp_path, "e3rl", QUICK)
    config = load_config(recipe, [], [f"model.path={tmp_path / 'model'}"])
    worker = RolloutWorker(config, 1000)
    settings = GroupSettings(config.rollout, config.erasure, seed=1)
    try:
        asked = Ask("r", settings, (Task("p", (1, 2), "{}"),), 5.0, "other.py:Counter (00000000)")
        answer, groups = decode_answer(worker.exchange(encode(asked)))
    finally:
        worker.close()
    assert groups == []
    assert answer.fault is not None
    assert "the run's environment is other.py:Counter (00000000) and this worker's" in answer.fault.message


def test_every_call_is_a_sign_of_life(tmp_path: Path):
    """So a turn of many calls may take longer than a worker may be silent."""
    recipe = write_run(tmp_path, "e3rl", QUICK)
    config = load_config(recipe, [], [f"model.path={tmp_path / 'model'}"])
    events: list[Event] = []

    class Counted(RolloutWorker):
        def _observe(self, event: Event) -> None:
            events.append(event)
            super()._observe(event)

    worker = Counted(config, 1000)
    try:
        worker.load_weights(0, save({name: t.detach() for name, t in worker._policy.trainable()}))
        settings = GroupSettings(config.rollout, config.erasure, seed=1, policy_version=0)
        [prompt] = tool_prompts(
            [Problem("p", "Count.", columns={"start": 3})],
            worker._policy.tokenizer,
            config,
            context_limit=4096,
            completion_limit=480,
        )
        ask = encode(Ask("r", settings, (Task.of(prompt),), 5.0, prompt.tools.identity))
        groups: list[Any] = []
        while not groups:
            answer, groups = decode_answer(worker.exchange(ask))
    finally:
        worker.close()
    assert answer.fault is None
    turns = 3  # one of them taken back; in each a snapshot, a call and a look at its result
    assert answer.beat == len(events) + 3 * turns


def test_tools_that_outlast_a_workers_silence_are_refused(tmp_path: Path):
    recipe = write_run(tmp_path, "e3rl", QUICK)
    own = ['rollout.servers=["http://127.0.0.1:1"]', "environments.timeout=60", "rollout.worker_timeout=50"]
    with pytest.raises(UserError, match=r"environments\.timeout = 60 lets .*rollout\.worker_timeout = 50"):
        load_config(recipe, [], own)
    assert isinstance(load_config(recipe, [], [*own[:2], "rollout.worker_timeout=61"]), Config)
