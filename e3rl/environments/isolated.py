"""The child side of `e3rl.environments.isolation`: a process that has loaded a factory, and forks one more for each environment.

Run as ``python -m e3rl.environments.isolated DESCRIPTOR``. Requests are pickles from the trainer, replies are JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from e3rl.environments.tools import Host, make
from e3rl.errors import UserError

_DEATH_SIGNAL = 1  # of prctl


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _answer(host: Host, request: tuple[str, tuple[Any, ...]]) -> dict[str, Any]:
    name, arguments = request
    try:
        return {"value": getattr(host, name)(*arguments)}
    except UserError as error:
        return {"refused": str(error)}
    except BaseException as error:  # SystemExit too: the model sees what a tool raises
        return {"error": str(error), "kind": type(error).__name__}


def _serve(connection: Connection, make_host: Callable[[], Host]) -> None:
    """Answer requests, each the name of a method of `Host`, until the connection closes."""
    _die_with_parent()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.send_bytes(json.dumps({"pid": os.getpid()}).encode())
    host = make_host()
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        reply = _answer(host, request)
        try:
            text = json.dumps(reply)
        except (TypeError, ValueError) as error:
            text = json.dumps({"error": f"no plain value: {error}", "kind": "TypeError"})
        connection.send_bytes(text.encode())


def main(descriptor: int) -> None:
    """Load the factory, then fork a process for each connection that the trainer sends, until the trainer ends."""
    control = socket.socket(fileno=descriptor)
    told = json.loads(control.makefile("r").readline())
    sys.path[:] = told["path"]
    name, deep = told["factory"], told["deep"]
    factory = make(name, told["kind"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    control.sendall(b"1")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                control.close()
                _serve(Connection(descriptors[0]), lambda: Host(factory, name, deep=deep))
            os._exit(0)
        os.close(descriptors[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
