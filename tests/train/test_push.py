"""A finished model goes to a hub over HTTP: what the hub gets, and what is said where it does not answer as it should."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from e3rl.errors import UserError
from e3rl.lab.__init__ import lab_directory
from e3rl.train.summary import require_hub, upload


class StandInHub(BaseHTTPRequestHandler):
    """As much of a hub as huggingface_hub asks for: who am I, a repository, large files, a commit."""

    files: dict[str, bytes]
    created: list[dict[str, Any]]
    refused: str = ""
    """Paths that are answered with ``status``."""
    status = 503

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_right" and not self.path.startswith("/large/"):
            return self._answer(401, {"error": "Invalid username or password."})
        if self.refused and re.search(self.refused, self.path):
            return self._answer(self.status, {"error": "not today"})
        return self._answer(200, self._found(body))

    def _answer(self, status: int, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _found(self, body: bytes) -> Any:
        here = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.path.startswith("/api/whoami"):
            return {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{here}/me/mine", "id": "me/mine"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [_sent_as(name) for name in names]}
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {
                "transfer": "basic",
                "objects": [{**o, "actions": {"upload": {"href": f"{here}/large/{o['oid']}"}}} for o in objects],
            }
        if self.path.startswith("/large/"):
            self.files[self.path] = body
        if "/commit/" in self.path:
            self._commit(body)
        return {"success": True, "commitOid": "c" * 40, "commitUrl": f"{here}/me/mine/commit/c", "hookOutput": ""}

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.files[f"/large/{value['oid']}"]


def _sent_as(name: str) -> dict[str, Any]:
    return {"path": name, "uploadMode": "lfs" if name.endswith(".safetensors") else "regular", "shouldIgnore": False}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandInHub]]:
    handler = type("Here", (StandInHub,), {"files": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files by HTTP, as LFS sends them
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield handler
    server.shutdown()
    server.server_close()


def test_a_hub_gets_the_model_and_its_adapters(tmp_path: Path, hub: type[StandInHub]):
    require_hub("me/mine")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert upload(lab_directory(), adapter, "me/mine") == "uploaded to me/mine"
    assert [(repository["name"], repository["organization"]) for repository in hub.created] == [("mine", "me")]
    assert hub.created[0]["visibility"] == "private"
    sent = {name: data for name, data in hub.files.items() if not name.startswith("/large/")}
    model = {path.name: path.read_bytes() for path in lab_directory().iterdir() if path.is_file()}
    assert sent == {**model, "adapter/adapter_config.json": b"{}"}
    assert len(sent["model.safetensors"]) > 10**6


@pytest.mark.parametrize(
    ("refused", "status", "words"),
    [
        ("create|models/me/mine$", 403, "403"),
        ("preupload", 401, "401"),
        ("lfs", 403, "403"),
        ("large", 403, "403"),
        ("commit", 503, "503"),
    ],
)
def test_an_upload_that_is_refused_is_one_sentence(
    refused: str, status: int, words: str, tmp_path: Path, hub: type[StandInHub], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub tries again what may be better in a while
    hub.refused, hub.status = refused, status
    said = upload(lab_directory(), tmp_path / "none", "me/mine")
    assert said.startswith("the model was not uploaded: ")
    assert words in said
    assert "\n" not in said
    assert said.endswith(f". It is saved; try again with: hf upload me/mine {lab_directory()}")


def test_a_hub_that_knows_no_such_token_or_is_away_is_said_before_a_run(
    hub: type[StandInHub], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        UserError, match=r"train\.push_to_hub: the hub does not let us in: Invalid user token"
    ) as refused:
        require_hub("me/mine")
    assert "\n" not in str(refused.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^train\.push_to_hub: the hub does not let us in: .*Connection refused$"):
        require_hub("me/mine")
