"""A hub that can't be reached: known after one question, said in one sentence, and the cache is used in its place."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from e3rl.cli import main
from e3rl.model_files import hub_silent, require_fetchable


class _Hub(BaseHTTPRequestHandler):
    """Answers that there is nothing, and remembers what it was asked."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is found is kept for the process's life, here for a test's."""
    for name in ("HF_HUB_OFFLINE", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    hub_silent.cache_clear()
    yield
    hub_silent.cache_clear()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"http://127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    return place


def test_a_hub_that_answers_is_asked_once_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers."""
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        _Hub.asked = []
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert [hub_silent(), hub_silent()] == ["", ""]
        server.shutdown()
        thread.join()
    assert len(_Hub.asked) == 1
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not huggingface_hub.is_offline_mode()


@pytest.mark.parametrize(
    ("setting", "said"), [("model.path=no/body", "model 'no/body'"), ("data.train=no/body", "dataset 'no/body'")]
)
def test_one_sentence_says_that_it_is_away(
    setting: str,
    said: str,
    no_hub: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Libraries would ask six times, with a line each time and 23 seconds between the first and the last."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s for another try"))
    (tmp_path / "recipe.toml").write_text("[data]\ntrain = 'lab:chain'\n")
    assert main(["data", str(tmp_path / "recipe.toml"), setting]) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"e3rl: {said}")
    assert f"is not on this machine, and {no_hub} can't be reached (" in line


def test_where_it_is_away_the_cache_is_used_here_and_in_processes_that_are_started(no_hub: str) -> None:
    assert no_hub in hub_silent()
    assert huggingface_hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_model_in_the_cache_needs_no_hub(no_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda source, name: f"/cache/{source}/{name}")
    require_fetchable("no/body")
    assert no_hub in hub_silent()


@pytest.mark.parametrize(("value", "silent"), [("0", ""), ("1", "HF_HUB_OFFLINE is set")])
def test_who_sets_the_librarys_own_variable_is_not_asked(
    value: str, silent: str, no_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", value == "1")
    assert hub_silent() == silent
