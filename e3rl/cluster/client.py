"""The trainer's end of a rollout server."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from e3rl.cluster.broadcast import local_address
from e3rl.cluster.pool import Place, WorkerLost
from e3rl.errors import UserError

WEIGHTS_CHECKSUM = "X-E3RL-Checksum"
_LONGEST_ANSWER = 2**32
_SECONDS_KEPT = 30.0
"""Seconds of idleness after which a connection is reopened, since the server closes idle ones."""
_REFUSED = (400, 401, 403, 405, 411, 413, 421)


class ServerConnection:
    """One connection to one server, kept open between calls."""

    def __init__(self, host: str, port: int, token: str | None, timeout: float) -> None:
        self._host, self._port, self._name = host, port, f"{host}:{port}"
        self._token, self._timeout = token, timeout
        self._http = http.client.HTTPConnection(host, port, timeout=timeout)
        self._used = 0.0

    def hello(self) -> bytes:
        """See `RolloutWorker.hello`."""
        return self._call("GET", "/hello")

    def exchange(self, body: bytes) -> bytes:
        """See `RolloutWorker.exchange`."""
        return self._call("POST", "/exchange", body)

    def load_weights(self, version: int, weights: bytes | memoryview, named: str) -> None:
        """See `RolloutWorker.load_weights`."""
        self._call("POST", f"/weights?version={version}", weights, {WEIGHTS_CHECKSUM: named})

    def take_weights(self, offer: bytes) -> bytes:
        """See `RolloutWorker.take_weights`."""
        return self._call("POST", "/offer", offer)

    def receive_weights(self, body: bytes) -> None:
        """See `RolloutWorker.receive_weights`."""
        self._call("POST", "/broadcast", body)

    def address(self) -> str:
        """This machine's address on the way to the server."""
        return local_address(self._host, self._port)

    def _call(
        self, method: str, path: str, body: bytes | memoryview | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        token = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if time.monotonic() - self._used > _SECONDS_KEPT:
            self._http.close()
        try:
            self._http.request(method, path, body, {**token, **(headers or {})})
            response = self._http.getresponse()
            answer = response.read(_LONGEST_ANSWER)
        except TimeoutError:
            self._http.close()
            raise WorkerLost(f"{self._name} did not answer within {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise WorkerLost(f"{self._name} can't be reached: {error or type(error).__name__}") from None
        self._used = time.monotonic()
        if response.status in _REFUSED:
            raise UserError(f"rollout server {self._name} refused {path}: {answer[:500].decode(errors='replace')}")
        if response.status != 200:
            raise WorkerLost(
                f"{self._name} answered {response.status} to {path}: {answer[:200].decode(errors='replace')}"
            )
        return answer

    def close(self) -> None:
        """Close the connection; the server goes on."""
        self._http.close()


def server_place(address: str, token: str | None, timeout: float) -> Place:
    """A server at ``http://host:port``."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"rollout.servers: '{address}' is no address: {error}") from None
    if parts.scheme != "http" or not host or port is None or parts.path.strip("/"):
        raise UserError(f"rollout.servers: '{address}' is no address; write http://HOST:PORT")
    return Place(f"{host}:{port}", lambda: ServerConnection(host, port, token, timeout))
