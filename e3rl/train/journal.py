"""The journal of rollouts: every candidate is written as soon as it is generated.

A run that was killed in the middle of a rollout repeats only the segments that were being generated. Everything else of a
rollout's state (attempts, thresholds, group baselines, who waits for whom) follows from its candidates, so these are all
that is kept: the driver (`e3rl.rollout.driver`) asks the journal before it asks the engine, and the group's state machine
goes through what was drawn before.

A file a step, for every step that no checkpoint holds yet: records of a length, a checksum and bytes. The first says
which weights generated the rest; candidates of other weights are never used. The others are record batches
(`e3rl.rollout.columns`): the candidates of one poll, a row each, or a group that a worker sent. A kill may tear the last
record, which is dropped. Nothing waits for the disk: what a power cut takes is generated again, by the same draws.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from e3rl.environments.protocol import Reply
from e3rl.errors import UserError
from e3rl.files import disk_full_is_a_sentence
from e3rl.rollout.columns import decode_drawn, encode, encode_drawn
from e3rl.rollout.ipc import problem_of, read_batch
from e3rl.rollout.turns import from_json
from e3rl.types import Candidate, Draw, Group

FORMAT = 3
_FRAME = struct.Struct("<II")  # bytes of the record, CRC-32 of them
_CANDIDATES, _GROUP, _REPLY = b"c", b"g", b"r"  # how a record begins
_PROBES = 64  # numbers of each weight tensor that go into the fingerprint


def fingerprint(model: torch.nn.Module) -> str:
    """Identifies the weights of a step: an optimizer update changes nearly every number of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        probes = flat[:: max(1, len(flat) // _PROBES)][:_PROBES].float().cpu()
        digest.update(name.encode() + probes.numpy().tobytes())
    return digest.hexdigest()


def frame(payload: bytes) -> bytes:
    """A record as it is in the file."""
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole records at the front of a file, each with the position after it."""
    position = 0
    while position + _FRAME.size <= len(content):
        size, checksum = _FRAME.unpack_from(content, position)
        start, position = position + _FRAME.size, position + _FRAME.size + size
        payload = content[start:position]
        if len(payload) < size or zlib.crc32(payload) != checksum:
            return
        yield position, payload


def pack(drawn: Sequence[tuple[Draw, Candidate]]) -> list[bytes]:
    """Records of these candidates, one for each seed and step: which they are as JSON, a line end, then a record batch."""
    found: dict[tuple[int, int], list[tuple[Draw, Candidate]]] = {}
    for draw, candidate in drawn:
        found.setdefault((draw.seed, draw.step), []).append((draw, candidate))
    return [
        _CANDIDATES + json.dumps(named).encode() + b"\n" + encode_drawn(here).serialize().to_pybytes()
        for named, here in found.items()
    ]


def unpack(payload: bytes) -> list[tuple[Draw, Candidate]]:
    """What `pack` was given, to the last bit; ValueError or TypeError where it can't have come from it."""
    head, _, body = payload.removeprefix(_CANDIDATES).partition(b"\n")
    seed, step = json.loads(head)
    return decode_drawn(read_batch(body), seed, step)


def survey(content: bytes) -> tuple[str, int]:
    """What a journal's file holds, in words, and how many bytes of its end are torn."""
    held = list(records(content))
    torn = len(content) - (held[-1][0] if held else 0)
    try:
        if held and json.loads(held[0][1]).get("format") != FORMAT:
            return "of another version: not used", torn
        candidates = sum(len(unpack(payload)) for _, payload in held[1:] if payload.startswith(_CANDIDATES))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"damaged: {error}", torn
    groups = sum(payload.startswith(_GROUP) for _, payload in held[1:])
    return f"{groups} groups" if groups else f"{candidates} candidates", torn


def pack_reply(draw: Draw, reply: Reply) -> bytes:
    """A record of what an environment answered, as JSON."""
    return _REPLY + json.dumps([asdict(draw), asdict(reply)]).encode()


def unpack_reply(payload: bytes) -> tuple[Draw, Reply]:
    """What `pack_reply` was given; ValueError, KeyError or TypeError where it can't have come from it."""
    draw, reply = json.loads(payload.removeprefix(_REPLY))
    observation = None if reply["observation"] is None else from_json(json.dumps(reply["observation"]))
    return Draw(**draw), Reply(**{**reply, "ids": tuple(map(int, reply["ids"])), "observation": observation})


class StepJournal:
    """One step's file: what it held when it was opened, and a place for more."""

    def __init__(self, path: Path, header: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self.known: dict[Draw, deque[Candidate]] = {}
        """Candidates that an earlier process left, by draw: in the order they were made where one was drawn twice."""
        self.replies: dict[Draw, Reply] = {}
        """What environments answered, by name."""
        self.groups: dict[str, pa.RecordBatch] = {}
        """Whole groups that workers sent, by prompt id."""
        self._drawn: list[tuple[Draw, Candidate]] = []  # not yet handed to the system
        self._replied: list[tuple[Draw, Reply]] = []
        with disk_full_is_a_sentence(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            good = self._read(header)
            self._file = path.open("ab")
            self._file.truncate(good)
            if not good:
                self._file.write(frame(json.dumps(header).encode()))
                self._file.flush()

    def _read(self, header: Mapping[str, Any]) -> int:
        """Read what an earlier process wrote; return how many of its bytes are intact."""
        content = self.path.read_bytes() if self.path.exists() else b""
        good = 0
        for end, payload in records(content):
            try:
                if good:
                    self._remember(payload)
                elif json.loads(payload) != header:
                    self._say(f"{self.path} was made by other weights or another version: its rollout is made again")
                    return 0
            except (ValueError, TypeError, KeyError):
                break
            good = end
        found = sum(map(len, self.known.values()))
        if good < len(content):
            self._say(f"{self.path}: its last {len(content) - good} bytes are incomplete; what they held is made again")
        if found or self.groups:
            what = f"{found} candidates" if found else f"{len(self.groups)} groups"
            self._say(f"{what} of step {header['step']} were on disk and are not generated again")
        return good

    def _remember(self, payload: bytes) -> None:
        if payload.startswith(_GROUP):
            batch = read_batch(payload.removeprefix(_GROUP))
            self.groups[problem_of(batch)] = batch
        elif payload.startswith(_REPLY):
            draw, reply = unpack_reply(payload)
            self.replies[draw] = reply
        else:
            for draw, candidate in unpack(payload):
                self.known.setdefault(draw, deque()).append(candidate)

    def take(self, draw: Draw) -> Candidate | None:
        """The candidate of this draw, where an earlier process made it."""
        waiting = self.known.get(draw)
        if waiting is None:
            return None
        candidate = waiting.popleft()
        if not waiting:
            del self.known[draw]
        return candidate

    def add(self, draw: Draw, candidate: Candidate) -> None:
        """Keep a candidate; after the next `flush` it survives the process."""
        self._drawn.append((draw, candidate))

    def take_reply(self, draw: Draw) -> Reply | None:
        """What an environment answered before."""
        return self.replies.pop(draw, None)

    def add_reply(self, draw: Draw, reply: Reply) -> None:
        """Keep what an environment answered; after the next `flush` it survives the process."""
        self._replied.append((draw, reply))

    def add_group(self, group: Group) -> None:
        """Keep a group that a worker sent."""
        with disk_full_is_a_sentence(self.path):
            self._file.write(frame(_GROUP + encode([group]).serialize().to_pybytes()))
        self.flush()

    def flush(self) -> None:
        """Write what was added to the file."""
        drawn, self._drawn = self._drawn, []
        replied, self._replied = self._replied, []
        with disk_full_is_a_sentence(self.path):
            for payload in (*pack(drawn), *(pack_reply(*kept) for kept in replied)):
                self._file.write(frame(payload))
            self._file.flush()

    def close(self) -> None:
        """Close the file. What could not be written (a full disk) is dropped."""
        try:
            try:
                self.flush()
            finally:
                self._file.close()
        except (OSError, UserError):
            self._say(f"the end of {self.path} could not be written; what it held will be made again")


class Journal:
    """The journals of a run."""

    def __init__(self, run: Path, weights: Callable[[], str], say: Callable[[str], None]) -> None:
        self._directory, self._weights, self._say = run / "journal", weights, say
        self._open: dict[int, StepJournal] = {}

    def of(self, step: int) -> StepJournal:
        """The journal of a step's rollout by the current weights; the same object as long as it is open."""
        if step not in self._open:
            self._close_before(step)
            header = {"format": FORMAT, "step": step, "weights": self._weights()}
            self._open[step] = StepJournal(self._directory / f"step-{step:06d}.journal", header, self._say)
        return self._open[step]

    def _close_before(self, step: int) -> None:
        """Close the files of earlier steps."""
        for earlier in [s for s in self._open if s < step]:
            self._open.pop(earlier).close()

    def drop_through(self, step: int) -> None:
        """Delete the files of steps that a checkpoint holds."""
        self._close_before(step + 1)
        for path in self._directory.glob("step-*.journal"):
            if int(path.stem.removeprefix("step-")) <= step:
                path.unlink()
        with contextlib.suppress(OSError):  # it holds more, or is not there
            self._directory.rmdir()
