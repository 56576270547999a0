"""Lark grammars of clients, followed in a process that can be killed.

llguidance never returns from some of them and can't be interrupted. A grammar is first tried by chance, where it hinders
nobody; what hangs later is killed after `STEP_SECONDS`, which ends its own answer.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from e3rl.errors import UserError
from e3rl.rewards.pool import PooledCall, ProcessPool
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.grammar import Grammar, GrammarCompiler, GrammarMatcher, require_llguidance

TRIAL_SECONDS, STEP_SECONDS = 5.0, 2.0
"""Time limits for the trial of a grammar, and for one step. Ordinary ones take milliseconds."""
_MEMORY = 8 * 2**30
_MOST_MATCHERS = 256


class Grammars:
    """Matchers for the grammars of clients, for one tokenizer; free ones in a process. Threads may share it."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int) -> None:
        self._tokenizer, self._eos_ids, self._vocabulary = tokenizer, list(eos_ids), vocabulary
        self._here = GrammarCompiler(tokenizer, eos_ids, vocabulary)
        self._lock = threading.Lock()
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._trials, self._steps = ProcessPool(1, TRIAL_SECONDS), ProcessPool(1, STEP_SECONDS)
        self._names = itertools.count()

    def close(self) -> None:
        """End the processes and remove their files."""
        self._trials.close()
        self._steps.close()
        if self._files is not None:
            self._files.cleanup()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A fresh matcher; ApiError where the grammar can't be used."""
        if not grammar.free:
            return self._here.matcher(grammar)
        require_llguidance()
        text = grammar.text
        with self._lock:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="e3rl-tokenizer-")
                self._tokenizer.save_pretrained(self._files.name)
        setup = json.dumps([self._files.name, self._eos_ids, self._vocabulary])
        name = str(next(self._names))

        def step(generated: Sequence[int]) -> tuple[bytes | None, str | None]:
            arguments = {"name": name, "text": text, "generated": list(generated)}
            call = PooledCall(f"{__name__}:follower", arguments, memory=_MEMORY, setup=setup)
            [outcome] = self._steps.map([call])
            mask, error = outcome.value or (None, outcome.error)
            return None if mask is None else base64.b64decode(mask), error

        [tried] = self._trials.map([PooledCall(f"{__name__}:try_grammar", {"text": text}, memory=_MEMORY)])
        matcher = _DistantMatcher(step, self._eos_ids, self._vocabulary)
        if tried.error is None:
            matcher.allowed([])  # starts the process of the steps, if need be, in the client's thread
        if error := tried.error or matcher.error:
            raise invalid("structured_outputs", f"the grammar can't be used: {error[:500]}")
        return matcher


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

    def follow(name: str, text: str, generated: list[int]) -> tuple[str | None, str | None]:
        try:
            matchers[name] = matcher = matchers.pop(name, None) or compiler.matcher(Grammar("lark", text))
        except ApiError as error:
            raise UserError(error.message) from None
        while len(matchers) > _MOST_MATCHERS:
            del matchers[next(iter(matchers))]
        mask = matcher.mask(generated)
        return None if mask is None else base64.b64encode(mask).decode("ascii"), matcher.error

    return follow


def try_grammar(text: str) -> None:
    """In the process of the trials: follow a grammar by chance, byte by byte; UserError if it can't be read."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer, rng = LLTokenizer("byte"), random.Random(0)
    for _ in range(4):
        matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise UserError(matcher.get_error())
        for _ in range(64):
            mask = matcher.compute_bitmask()
            able = [i for i in range(256) if mask[i // 8] >> (i % 8) & 1]
            if matcher.is_stopped() or not able:
                break
            matcher.consume_token(rng.choice(able))
