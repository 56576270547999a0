"""What a run leaves for other libraries: checkpoints, merged model and adapters load, and the hub gets them where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from e3rl.errors import UserError
from e3rl.train.checkpoint import list_checkpoints, read_checkpoint
from e3rl.train.summary import upload
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config, random_lab

IDS = torch.arange(2, 9)[None]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_every_checkpoint_is_a_model_of_transformers(tmp_path: Path):
    config = lab_config(tmp_path, "train.save_steps=1", "train.save_total_limit=0")
    trainer = Trainer(
        config, reward_functions=[lambda completions, **_: [float(i % 2) for i in range(len(completions))]]
    )
    trainer.train()
    begun, _, ended = sorted(list_checkpoints(trainer.run_path))
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(begun)),
        logits_of(AutoModelForCausalLM.from_pretrained(random_lab())),
    )
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(ended)), logits_of(trainer.policy.model))
    assert not torch.equal(*(logits_of(AutoModelForCausalLM.from_pretrained(c)) for c in (begun, ended)))
    assert AutoTokenizer.from_pretrained(ended).encode("1+2") == trainer.policy.tokenizer.encode("1+2")
    assert read_checkpoint(ended).step == 2


def test_adapters_lie_beside_the_merged_model_and_in_checkpoints(tmp_path: Path):
    peft = pytest.importorskip("peft")
    trainer = Trainer(lab_config(tmp_path, "model.lora_r=2", "objective.kl_coef=0"))
    trainer.train()
    run, expected = trainer.run_path, logits_of(trainer.policy.model)

    def adapted(directory: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(random_lab())
        return logits_of(peft.PeftModel.from_pretrained(base, directory))

    torch.testing.assert_close(adapted(run / "adapter"), expected)
    torch.testing.assert_close(adapted(list_checkpoints(run)[0]), expected)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(run / "model"))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert not (run / "model" / "adapter_config.json").exists()
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert (run / "adapter" / "README.md").read_text() == (run / "model" / "README.md").read_text()


class Hub:
    """Stands for huggingface_hub.HfApi and remembers what it was asked."""

    asked: ClassVar[list[tuple[Any, ...]]] = []
    refuses = False

    def whoami(self) -> None:
        self._ask("whoami")

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self._ask("create", repository, private, exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: Path, path_in_repo: str = "", commit_message: str) -> None:
        self._ask("upload", repo_id, folder_path.name, path_in_repo, (folder_path / "README.md").is_file())

    def _ask(self, *what: Any) -> None:
        self.asked.append(what)
        if self.refuses:
            raise RuntimeError("503 Service Unavailable\nmore")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    found = type("Hub", (Hub,), {"asked": []})
    monkeypatch.setattr("huggingface_hub.HfApi", found)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    return found


def test_a_finished_model_is_uploaded_where_that_is_asked_for(tmp_path: Path, hub: type[Hub]):
    pytest.importorskip("peft")
    Trainer(lab_config(tmp_path, "train.push_to_hub=me/mine", "model.lora_r=2", "objective.kl_coef=0")).train()
    assert hub.asked == [
        ("whoami",),
        ("create", "me/mine", True, True),
        ("upload", "me/mine", "model", "", True),
        ("upload", "me/mine", "adapter", "adapter", True),
    ]


@pytest.mark.parametrize(
    ("repository", "token", "refuses", "words"),
    [
        ("mine", "hf_x", False, "is no repository: write OWNER/NAME"),
        ("me/mine", None, False, "needs a login: run 'hf auth login'"),
        ("me/mine", "hf_x", True, "the hub does not let us in: 503 Service Unavailable$"),
    ],
)
def test_what_can_not_be_uploaded_is_said_before_the_first_step(
    tmp_path: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    repository: str,
    token: str | None,
    refuses: bool,
    words: str,
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    hub.refuses = refuses
    with pytest.raises(UserError, match=words):
        Trainer(lab_config(tmp_path, f"train.push_to_hub={repository}"))
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_costs_nothing(tmp_path: Path, hub: type[Hub]):
    hub.refuses = True
    said = upload(tmp_path, tmp_path / "adapter", "me/mine")
    assert said == (
        f"the model was not uploaded: 503 Service Unavailable. It is saved; try again with: hf upload me/mine {tmp_path}"
    )
