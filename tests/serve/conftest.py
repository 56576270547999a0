"""A small random model with calibration statistics, and a server around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from e3rl.config import Config, ModelConfig, load_config
from e3rl.engine.build import build_engine
from e3rl.lab.pretrain import build_model
from e3rl.lab.tokenizer import build_tokenizer
from e3rl.models import Policy, load_policy
from e3rl.rollout.batches import run_groups
from e3rl.rollout.group import GroupSettings
from e3rl.rollout.statistics import CalibrationStatistics, measured_by
from e3rl.serve.server import make_server
from e3rl.serve.service import Service
from e3rl.types import Problem, Prompt
from e3rl.web.access import Access
from tests.web.running import running

SETTINGS = [
    "rollout.segment_length=6", "rollout.max_segments=3", "rollout.max_rows=8", "rollout.cache_rows=8",
    "erasure.perturbation_weight=1.0", "erasure.kappa0=0.5",
]  # fmt: skip


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary model directory: random weights with enough spread to be neither flat nor certain."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(256)
    torch.manual_seed(3)
    model = build_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config(None, overrides=SETTINGS)


@pytest.fixture(scope="session")
def policy(directory: Path) -> Policy:
    return load_policy(ModelConfig(path=str(directory), device="cpu"))


@pytest.fixture(scope="session")
def calibration(policy: Policy, config: Config) -> CalibrationStatistics:
    """Gathered from groups of the same model, as calibration does."""
    prompts = [Prompt(Problem(str(i), f"{i}+1"), tuple(policy.tokenizer.encode(f"{i}+1"))) for i in range(4)]
    rollout = replace(config.rollout, num_generations=4)
    engine = build_engine(rollout, policy.model, policy.eos_ids, 8)
    groups = list(run_groups(engine, prompts, GroupSettings(rollout, config.erasure, seed=1)))
    return CalibrationStatistics(measured_by(rollout, config.erasure)).including(groups)


@pytest.fixture
def make_service(
    policy: Policy, config: Config, calibration: CalibrationStatistics
) -> Iterator[Callable[..., Service]]:
    """Makes services of the model 'tiny', by default with statistics, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(
            known: CalibrationStatistics | None = calibration,
            *,
            queue_limit: int = 8,
            endless: bool = False,
            live: bool = False,
        ) -> Service:
            served = replace(policy, eos_ids=(10**6,)) if endless else policy
            service = Service(served, config, known, name="tiny", max_length=256, queue_limit=queue_limit, live=live)
            stack.callback(service.close)
            return service

        yield make


@contextlib.contextmanager
def serving(service: Service, token: str | None = None) -> Iterator[str]:
    """The address of a running server."""
    with running(make_server(service, Access("127.0.0.1", token), 0)) as server:
        yield server.url
