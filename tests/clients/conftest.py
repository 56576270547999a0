"""`e3rl serve` in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from e3rl.config import ModelConfig
from e3rl.models import Policy, load_policy, resolve_model_path


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of ``e3rl serve`` with these arguments."""
    command = [sys.executable, "-m", "e3rl", "serve", *arguments, "--port", "0", "--drain", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[0].removesuffix("/v1")
        finally:
            process.send_signal(2)
            process.communicate(timeout=30)


@pytest.fixture(scope="session")
def lab_url() -> Iterator[str]:
    with served("lab") as url:
        yield url


@dataclass(frozen=True)
class Lab:
    """The model that is served, for comparison."""

    path: Path
    policy: Policy

    def rendered(self, prompt: str) -> list[int]:
        """A question's tokens."""
        ids: list[int] = self.policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        return ids

    def logprobs(self, prompt: list[int], answer: list[int]) -> list[float]:
        """Of the answer's tokens, by one plain pass."""
        with torch.inference_mode():
            logits = self.policy.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1).tolist()


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab(Path(resolve_model_path("lab")), load_policy(ModelConfig(path="lab", device="cpu")))
