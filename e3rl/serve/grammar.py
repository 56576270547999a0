"""Grammars that answers must follow, by llguidance (the extra ``structured``): JSON schemas, regular expressions, Lark."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from e3rl.data.toolcalls import ToolCallFormat
from e3rl.serve.errors import ApiError, invalid
from e3rl.serve.fields import is_text, table

if TYPE_CHECKING:
    from torch import Tensor

MAX_GRAMMAR = 2**16
"""Characters of a schema or grammar."""
_JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x09]{0,16}"}
"""Bounds white space, so that a model can't generate it for ever."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: ``kind`` names the language of ``text``. ``free``: rules of a client's own, which may loop."""

    kind: Literal["json", "regex", "lark"]
    text: str
    free: bool = False


def read_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """From ``response_format`` (OpenAI's) or ``structured_outputs`` (vLLM's)."""
    form, structured = table(fields, "response_format"), table(fields, "structured_outputs")
    kinds = {name: value for name, value in structured.items() if value is not None}
    kind = form.get("type", "text")
    if kind == "json_object":
        kinds["json_object"] = True
    elif kind == "json_schema":
        described = form.get("json_schema")
        kinds["json"] = described.get("schema", {}) if isinstance(described, dict) else None
    elif kind != "text":
        raise invalid("response_format", 'its type must be "text", "json_object" or "json_schema"')
    if not kinds:
        return None
    if len(kinds) > 1:
        raise invalid("structured_outputs", f"asks for several at a time: {', '.join(sorted(kinds))}")
    ((name, value),) = kinds.items()
    return _grammar_of(name, value)


def _grammar_of(name: str, value: Any) -> Grammar:
    if name == "json_object" and value is True:
        return Grammar("json", '{"type": "object"}')
    if name == "json" and isinstance(value, dict | str):
        grammar = Grammar("json", value if isinstance(value, str) else json.dumps(value))
    elif name == "regex" and is_text(value):
        grammar = Grammar("regex", value)
    elif name == "grammar" and is_text(value):
        grammar = Grammar("lark", value, free=True)
    elif name == "choice" and isinstance(value, list) and value and all(is_text(v) and v for v in value):
        grammar = Grammar("lark", "start: " + " | ".join(json.dumps(v) for v in value))
    else:
        known = "json (a schema), json_object (true), regex, grammar (Lark) or choice (texts)"
        raise invalid("structured_outputs" if name != "json" else "response_format", f"must be one of {known}")
    if len(grammar.text) > MAX_GRAMMAR:
        raise invalid("response_format", f"a schema or grammar may have {MAX_GRAMMAR} characters")
    return grammar


def require_llguidance() -> Any:
    """The library; ApiError where it isn't installed."""
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            400, "grammars need a library that this server doesn't have: pip install 'e3rl[structured]'"
        ) from None
    return llguidance


def compiled(grammar: Grammar, tokenizer: Any) -> Any:
    """A matcher of the library; ValueError where the grammar can't be used."""
    maker = require_llguidance().LLMatcher
    if grammar.kind == "json":
        text = maker.grammar_from_json_schema(grammar.text, _JSON)
    elif grammar.kind == "regex":
        text = maker.grammar_from_regex(grammar.text)
    else:
        text = maker.grammar_from_lark(grammar.text)
    made = maker(tokenizer, text, log_level=0)
    if made.is_error():
        raise ValueError(made.get_error()[:500])
    return made


class GrammarCompiler:
    """Turns grammars into matchers for one tokenizer, which is read at the first use. Threads may share it."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], vocabulary: int) -> None:
        self._tokenizer, self._eos_ids, self._vocabulary = tokenizer, list(eos_ids), vocabulary
        self._known: Any = None
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """A fresh matcher; ApiError where the grammar can't be used."""
        llguidance = require_llguidance()
        with self._lock:
            if self._known is None:
                self._known = self._read_tokenizer(llguidance)
        try:
            made = compiled(grammar, self._known)
        except ValueError as error:
            raise invalid("response_format", f"the grammar can't be used: {error}") from None
        return GrammarMatcher(made, self._eos_ids, self._vocabulary)

    def _read_tokenizer(self, llguidance: Any) -> Any:
        from llguidance.hf import from_tokenizer

        eos = [i for i in self._eos_ids if i < self._vocabulary]
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=eos)
        except ValueError:  # a kind of tokenizer that it doesn't know: by the text of each token
            wrapped = llguidance.TokenizerWrapper(_TokenTexts(self._tokenizer))
            return llguidance.LLTokenizer(wrapped, n_vocab=self._vocabulary, eos_token=eos)


class _TokenTexts:
    """A tokenizer as llguidance takes one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = list(tokenizer.all_special_ids)
        special = set(self.special_token_ids)
        texts = (tokenizer.decode([i]) for i in range(len(tokenizer)))
        self.tokens = [
            f"<|special_{i}|>".encode() if i in special else text.encode(errors="replace")
            for i, text in enumerate(texts)
        ]

    def __call__(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found


class GrammarMatcher:
    """Follows one sample. ``error`` says why it had to end before the grammar did."""

    def __init__(self, matcher: Any, eos_ids: Sequence[int], vocabulary: int) -> None:
        self._matcher, self._eos_ids = matcher, list(eos_ids)
        self._vocabulary = vocabulary
        self._consumed: list[int] = []
        self.error: str | None = None

    def copy(self) -> GrammarMatcher:
        """Another one at the grammar's beginning, of one that is there. It takes no time: what was compiled is shared."""
        return GrammarMatcher(self._matcher.deep_copy(), self._eos_ids, self._vocabulary)

    def allowed(self, generated: Sequence[int]) -> Tensor:
        """Which tokens may follow; the end alone where the grammar is complete or can't go on."""
        import torch

        mask = self.mask(generated)
        if mask is not None:
            words = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
            bits = (words.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
            return bits.flatten()[: self._vocabulary].bool()
        end_V = torch.zeros(self._vocabulary, dtype=torch.bool)
        end_V[[i for i in self._eos_ids if i < self._vocabulary]] = True
        return end_V

    def mask(self, generated: Sequence[int]) -> bytes | None:
        """One bit a token; None where the answer has to end."""
        self._follow(generated)
        if self.error is None and not self._matcher.is_stopped():
            mask: bytes = self._matcher.compute_bitmask()
            if not self._matcher.is_error():
                return mask
            self.error = self._matcher.get_error()
        return None

    def _follow(self, generated: Sequence[int]) -> None:
        """Bring the matcher to these tokens, rolling it back where tokens were erased."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self._consumed, generated, strict=False)) if a != b),
            min(len(self._consumed), len(generated)),
        )
        if same < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - same)
            del self._consumed[same:]
        new = list(generated[same:])
        if new and self._matcher.try_consume_tokens(new) < len(new):
            self.error = self._matcher.get_error() or "a token that the grammar doesn't allow"
        self._consumed += new


def call_grammar(form: ToolCallFormat, tools: Sequence[Mapping[str, Any]], *, several: bool) -> Grammar:
    """The grammar of an answer that is nothing but calls of ``tools``, as the model's own format writes them."""
    key = {"hermes": "arguments", "llama3": "parameters"}.get(form.name)
    if key is None:
        raise invalid(
            "tool_choice", f"a call can't be forced in this model's format ({form.name}); use 'auto', which reads calls"
        )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                key: tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"anyOf": calls, "x-guidance": _JSON}
    if not form.opening:
        return Grammar("json", json.dumps(schema))
    one = f'"{form.opening}\\n" call "\\n{form.closing}"'
    more = f' ("\\n" {one})*' if several else ""
    return Grammar("lark", f"start: {one}{more}\ncall: %json {json.dumps(schema)}")
