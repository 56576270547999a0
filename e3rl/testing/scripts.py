"""Scripts of engine calls that are legal for any engine, and a player that checks the engine's row counts and lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from e3rl.engine.protocol import Engine, Row, Sampling
from e3rl.types import Candidate, Draw


@dataclass(frozen=True)
class EngineContract:
    """What the checks need to know. ``make_…`` return a new engine with ``rows`` rows of ``max_length`` tokens."""

    make_engine: Callable[[], Engine]
    make_oracle: Callable[[], Engine]
    vocab_size: int
    eos_ids: Sequence[int]
    rows: int = 6
    max_length: int = 48
    tolerance: float = 1e-5  # largest difference of a log-probability, entropy, perturbation or kept mass
    scripts: int = 10  # random scripts that are compared with the oracle

    def prompt(self, length: int) -> tuple[int, ...]:
        """A prompt of ``length`` tokens."""
        return tuple((7 * i + 3) % self.vocab_size for i in range(length))


@dataclass(frozen=True)
class Start:
    """Prefill a prompt for some siblings; skipped where they would be too many rows."""

    prompt: tuple[int, ...]
    siblings: int


@dataclass(frozen=True)
class ExtendRow:
    """Ask a row for a candidate, with a draw never used before; skipped where the row is full."""

    row: int
    tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Rollback:
    """Keep ``keep`` (modulo what it holds) generated tokens of a row."""

    row: int
    keep: int


@dataclass(frozen=True)
class ReleaseRow:
    """Forget a row; if it has an open request, that is cancelled."""

    row: int


@dataclass(frozen=True)
class Poll:
    """Poll once."""


Action = Start | ExtendRow | Rollback | ReleaseRow | Poll
"""A step of a script. ``row`` counts modulo the rows held, so that every script is a legal one."""

Transcript = dict[tuple[int, int], Candidate]
"""Candidates by (number of the row in order of creation, number of its draw)."""


@dataclass
class _PlayedRow:
    number: int
    length: int = 0
    draws: int = 0
    pending: bool = False
    prompt: int = 0


@dataclass
class _Player:
    """Runs a script and checks the engine's row counts and lengths against its own."""

    engine: Engine
    contract: EngineContract
    rows: dict[Row, _PlayedRow] = field(default_factory=dict)
    created: int = 0
    transcript: Transcript = field(default_factory=dict)
    asked: dict[tuple[int, int], int] = field(default_factory=dict)

    def act(self, action: Action) -> None:
        if isinstance(action, Start):
            self._start(action)
        elif isinstance(action, Poll):
            self._poll()
        elif self.rows:
            row = list(self.rows)[action.row % len(self.rows)]
            if isinstance(action, ReleaseRow):
                self.engine.release(row)
                del self.rows[row]
            else:
                self._wait_for(row)
                self._extend(row, action) if isinstance(action, ExtendRow) else self._rollback(row, action)
        self._compare_books()

    def finish(self) -> None:
        for row in self.rows:
            self._wait_for(row)
        assert self.engine.poll() == [], "poll returned a candidate though nothing was open"

    def _start(self, action: Start) -> None:
        if len(self.rows) + action.siblings > self.contract.rows:
            return
        handles = self.engine.prefill(action.prompt, action.siblings)
        assert len(set(handles)) == action.siblings, f"prefill made {handles} for {action.siblings} siblings"
        assert not set(handles) & set(self.rows), "prefill returned a handle that is in use"
        for handle in handles:
            self.rows[handle] = _PlayedRow(self.created, prompt=len(action.prompt))
            self.created += 1

    def _extend(self, row: Row, action: ExtendRow) -> None:
        played = self.rows[row]
        tokens = min(action.tokens, self.contract.max_length - played.prompt - played.length)
        if tokens < 1:
            return
        draw = Draw(0, 0, "contract", played.number, 0, played.draws)
        self.engine.extend(row, tokens, draw, action.sampling)
        self.asked[played.number, played.draws] = tokens
        played.draws, played.pending = played.draws + 1, True

    def _rollback(self, row: Row, action: Rollback) -> None:
        played = self.rows[row]
        played.length = action.keep % (played.length + 1)
        self.engine.rollback(row, played.length)

    def _wait_for(self, row: Row) -> None:
        while self.rows[row].pending:
            assert self._poll(), "poll delivered nothing though a request is open"

    def _poll(self) -> int:
        delivered = self.engine.poll()
        for row, candidate in delivered:
            assert row in self.rows, f"poll delivered a candidate for row {row}, which is not held"
            played = self.rows[row]
            assert played.pending, f"poll delivered a candidate that row {played.number} did not ask for"
            key = (played.number, played.draws - 1)
            assert_candidate(candidate, self.asked[key], self.contract.eos_ids)
            self.transcript[key] = candidate
            played.length, played.pending = played.length + len(candidate.ids), False
        return len(delivered)

    def _compare_books(self) -> None:
        free = self.engine.free_rows()
        assert free >= self.contract.rows - len(self.rows), f"{len(self.rows)} rows are held, and only {free} free"
        for row, played in self.rows.items():
            length = self.engine.length(row)
            assert length == played.length, (
                f"row {played.number} holds {played.length} tokens, the engine says {length}"
            )


def play(engine: Engine, script: Sequence[Action], contract: EngineContract) -> Transcript:
    """Carry out a script and every request left open at its end. The result depends only on the script."""
    player = _Player(engine, contract)
    for action in script:
        player.act(action)
    player.finish()
    return player.transcript


def random_script(seed: int, vocab_size: int, length: int = 14) -> list[Action]:
    """A script that mixes all actions."""
    rng = random.Random(seed)
    settings = (
        Sampling(),
        Sampling(temperature=0.7, top_k=5, measured_at=1.0),
        Sampling(top_p=0.8, entropy_distribution="truncated"),
    )

    def start() -> Action:
        return Start(tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))), rng.randint(1, 3))

    makers: list[Callable[[], Action]] = [
        start,
        lambda: Rollback(rng.randrange(8), rng.randrange(12)),
        lambda: ReleaseRow(rng.randrange(8)),
        Poll,
    ]
    makers += [lambda: ExtendRow(rng.randrange(8), rng.randint(1, 7), rng.choice(settings))] * 3
    return [start(), *(rng.choice(makers)() for _ in range(length))]


def assert_candidate(candidate: Candidate, tokens: int, eos_ids: Sequence[int]) -> None:
    """A candidate is consistent in itself and with what was asked for."""
    n = len(candidate.ids)
    lengths = {
        len(candidate.logprobs),
        len(candidate.entropies),
        len(candidate.perturbations),
        len(candidate.kept_mass),
    }
    assert lengths == {n}, f"a candidate of {n} tokens carries {lengths} numbers per token"
    ended = candidate.ids[-1] in eos_ids
    assert candidate.ended == ended, f"ended is {candidate.ended}, the last token {candidate.ids[-1]} says {ended}"
    assert not set(candidate.ids[:-1].tolist()) & set(eos_ids), (
        f"the candidate goes on after an end of sequence: {candidate.ids}"
    )
    assert n == tokens or (ended and n < tokens), f"{tokens} tokens asked for, {n} delivered without an end of sequence"
    for name, low, high in (("logprobs", None, 1e-4), ("entropies", 0, None), ("perturbations", 0, None)):
        for value in getattr(candidate, name):
            assert low is None or value >= low, f"{name} has {value}, below {low}"
            assert high is None or value <= high, f"{name} has {value}, above {high}"
    assert all(0 < mass <= 1 for mass in candidate.kept_mass), f"kept_mass out of (0, 1]: {candidate.kept_mass}"


def assert_same(got: Candidate, expected: Candidate, tolerance: float, what: str) -> None:
    """The same tokens, and numbers that differ by no more than ``tolerance``."""
    assert got.ids.tolist() == expected.ids.tolist(), f"{what}: tokens {got.ids}, expected {expected.ids}"
    assert got.ended == expected.ended, f"{what}: ended is {got.ended}, expected {expected.ended}"
    for name in ("logprobs", "entropies", "perturbations", "kept_mass"):
        pairs = zip(getattr(got, name), getattr(expected, name), strict=True)
        worst = max(abs(a - b) for a, b in pairs)
        assert worst <= tolerance, f"{what}: {name} differ by {worst:.3g}, allowed {tolerance:.3g}"


def assert_same_transcript(got: Transcript, expected: Transcript, tolerance: float) -> None:
    """The same candidates of the same rows. A request cancelled before delivery may be missing on either side."""
    common = got.keys() & expected.keys()
    assert common or not (got or expected), "the two transcripts have no candidate in common"
    for row, draw in sorted(common):
        assert_same(got[row, draw], expected[row, draw], tolerance, f"row {row}, draw {draw}")
