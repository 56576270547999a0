"""Grammars of clients, tried and followed in processes that can be killed.

Every grammar is first compiled and followed by chance in a process of its own: some schemas of a few characters take minutes
and all memory. Then it is compiled once, and every sample has a copy. From some Lark grammars llguidance never returns, and
can't be interrupted; so those are followed in such a process, too. One that hangs there is killed after `STEP_SECONDS`, which
ends the answers by grammars of who sent it.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import mmap
import random
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from e3rl.errors import UserError
from e3rl.rewards.pool import PooledCall, ProcessPool
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.grammar import Grammar, GrammarCompiler, GrammarMatcher, compiled, require_llguidance

TRIAL_SECONDS, STEP_SECONDS = 5.0, 2.0
"""Time limits for the trial of a grammar, and for one step. Ordinary ones take milliseconds."""

BAN_SECONDS = 600.0
"""How long Lark grammars are refused from an address one of whose grammars hung: everybody's tokens wait for such a step."""

COMPILE_SECONDS = 0.5
"""CPU time that a grammar may take to be compiled that is followed in the process of the steps, where the others' steps wait."""

HELD_BYTES = 2**31
"""What the grammars of all requests may take together, by their trials."""

_MEMORY = 8 * 2**30
_TRIAL_MEMORY = 2**31
_LEAST_BYTES = 2**16  # of a grammar: what is less can't be measured
_MOST_MATCHERS, _MOST_ORIGINALS = 256, 32
_MOST_TRIED = 1024


class Grammars:
    """Matchers for the grammars of clients, for one tokenizer; free ones in a process. Threads may share it."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int) -> None:
        self._tokenizer, self._eos_ids, self._vocabulary = tokenizer, list(eos_ids), vocabulary
        self._here = GrammarCompiler(tokenizer, eos_ids, vocabulary)
        self._lock = threading.Lock()
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._trials, self._steps = ProcessPool(1, TRIAL_SECONDS), ProcessPool(1, STEP_SECONDS)
        self._names = itertools.count()
        self._tried: dict[Grammar, int] = {}  # bytes that a grammar takes
        self._compiled: dict[Grammar, GrammarMatcher] = {}  # which samples are copies of; the one used last stands last
        self._held: weakref.WeakKeyDictionary[GrammarMatcher, int] = weakref.WeakKeyDictionary()  # bytes
        self._making = 0  # bytes of those that are being made
        self._banned: dict[str, float] = {}  # until when

    def close(self) -> None:
        """End the processes and remove their files."""
        self._trials.close()
        self._steps.close()
        if self._files is not None:
            self._files.cleanup()

    def knows(self, grammar: Grammar) -> bool:
        """Whether it was tried and is compiled, so that `matcher` takes no time."""
        return grammar in (self._tried if grammar.free else self._compiled)

    def try_out(self, grammar: Grammar) -> int:
        """Compile it, after a trial the first time; the bytes that it takes. ApiError where it can't be used or is too slow."""
        require_llguidance()
        size = self._tried.get(grammar) or self._size(grammar)
        if not grammar.free:
            self._original(grammar, size)
        return size

    def _size(self, grammar: Grammar) -> int:
        call = PooledCall(f"{__name__}:try_grammar", asdict(grammar), memory=_TRIAL_MEMORY)
        [tried] = self._trials.map([call])
        if tried.error is not None:
            raise invalid("response_format", f"the grammar can't be used: {tried.error[:500]}")
        with self._lock:
            while len(self._tried) >= _MOST_TRIED:
                del self._tried[next(iter(self._tried))]
            self._tried[grammar] = found = max(_LEAST_BYTES, int(tried.value))
        return found

    def matcher(self, grammar: Grammar, who: str = "") -> GrammarMatcher:
        """A fresh matcher for ``who``, an address; ApiError where the grammar can't be used."""
        size = self.try_out(grammar)
        original = None if grammar.free else self._original(grammar, size)
        with self._room(size):
            made = self._distant(grammar.text, who) if original is None else original.copy()
            with self._lock:
                self._held[made] = size
        return made

    def _original(self, grammar: Grammar, size: int) -> GrammarMatcher:
        with self._lock:
            made = self._compiled.pop(grammar, None)
            if made is not None:
                self._compiled[grammar] = made
                return made
        with self._room(size):
            made = self._here.matcher(grammar)
            with self._lock:
                self._held[made], self._compiled[grammar] = size, made
        return made

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Have so many bytes for what is made meanwhile, in place of compiled grammars that nobody uses now; or ApiError."""
        with self._lock:
            while (over := sum(self._held.values()) + self._making + size > HELD_BYTES) and self._compiled:
                del self._compiled[next(iter(self._compiled))]
            if over:
                raise ApiError(429, "the grammars of other requests take all memory; try again soon", code="overloaded")
            self._making += size
        try:
            yield
        finally:
            with self._lock:
                self._making -= size

    def _distant(self, text: str, who: str) -> GrammarMatcher:
        """A matcher that asks the process of the steps."""
        if error := self._ban(who):
            raise ApiError(429, error)
        with self._lock:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="e3rl-tokenizer-")
                self._tokenizer.save_pretrained(self._files.name)
        setup = json.dumps([self._files.name, self._eos_ids, self._vocabulary])
        name = str(next(self._names))

        def step(generated: Sequence[int]) -> tuple[bytes | None, str | None]:
            if ban := self._ban(who):
                return None, ban
            arguments = {"name": name, "text": text, "generated": list(generated)}
            restarts = self._steps.restarts
            [outcome] = self._steps.map([PooledCall(f"{__name__}:follower", arguments, memory=_MEMORY, setup=setup)])
            if self._steps.restarts > restarts and outcome.error is not None:
                self._banned[who] = time.monotonic() + BAN_SECONDS
            mask, error = outcome.value or (None, outcome.error)
            return None if mask is None else base64.b64decode(mask), error

        matcher = _DistantMatcher(step, self._eos_ids, self._vocabulary)
        matcher.allowed([])  # starts the process of the steps, if need be, in the client's thread
        if matcher.error:
            raise invalid("structured_outputs", f"the grammar can't be used: {matcher.error[:500]}")
        return matcher

    def _ban(self, who: str) -> str:
        """Why grammars of theirs are not followed now; empty where they are."""
        left = self._banned.get(who, 0.0) - time.monotonic()
        if left > 0:
            return f"a grammar from your address hung and held up everybody: Lark grammars are refused for {left:.0f} s more"
        self._banned.pop(who, None)
        return ""


class _DistantMatcher(GrammarMatcher):
    """Follows one sample by asking the process of the steps."""

    def __init__(
        self,
        step: Callable[[Sequence[int]], tuple[bytes | None, str | None]],
        eos_ids: Sequence[int],
        vocabulary: int,
    ) -> None:
        super().__init__(None, eos_ids, vocabulary)
        self._step = step

    def mask(self, generated: Sequence[int]) -> bytes | None:
        """One bit a token; None where the answer has to end."""
        if self.error is not None:
            return None
        mask, self.error = self._step(generated)
        return mask


def follower(setup: str) -> Callable[..., tuple[str | None, str | None]]:
    """In the process of the steps: the function that follows samples by name; it makes the matchers that it lacks."""
    from transformers import AutoTokenizer

    directory, eos_ids, vocabulary = json.loads(setup)
    compiler = GrammarCompiler(AutoTokenizer.from_pretrained(directory), eos_ids, vocabulary)
    matchers: dict[str, GrammarMatcher] = {}
    originals: dict[str, GrammarMatcher] = {}  # by text

    def begun(text: str) -> GrammarMatcher:
        originals[text] = original = originals.pop(text, None) or compiler.matcher(Grammar("lark", text))
        while len(originals) > _MOST_ORIGINALS:
            del originals[next(iter(originals))]
        return original.copy()

    def follow(name: str, text: str, generated: list[int]) -> tuple[str | None, str | None]:
        try:
            matchers[name] = matcher = matchers.pop(name, None) or begun(text)
        except ApiError as error:
            raise UserError(error.message) from None
        while len(matchers) > _MOST_MATCHERS:
            del matchers[next(iter(matchers))]
        mask = matcher.mask(generated)
        return None if mask is None else base64.b64encode(mask).decode("ascii"), matcher.error

    return follow


def try_grammar(kind: Any, text: str, free: bool) -> int:
    """In the process of the trials: follow a grammar by chance, byte by byte, and give the bytes of memory that it took.

    UserError if it can't be read. Rules of a client's own, which may loop, are followed several times, and compiled in
    `COMPILE_SECONDS`.
    """
    from llguidance import LLTokenizer

    tokenizer, rng, before = LLTokenizer("byte"), random.Random(0), _resident()
    for _ in range(4 if free else 1):
        began = time.process_time()
        try:
            matcher = compiled(Grammar(kind, text, free), tokenizer)
        except ValueError as error:
            raise UserError(str(error)) from None
        if free and time.process_time() - began > COMPILE_SECONDS:
            raise UserError(f"took longer than {COMPILE_SECONDS:g} s to compile")
        for _ in range(64):
            mask = matcher.compute_bitmask()
            able = [i for i in range(256) if mask[i // 8] >> (i % 8) & 1]
            if matcher.is_stopped() or not able:
                break
            matcher.consume_token(rng.choice(able))
    return _resident() - before


def _resident() -> int:
    """Bytes of memory that this process has."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except OSError:  # no Linux
        return 0
