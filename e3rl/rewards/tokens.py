r"""The tokens of an expression, and the names it may use."""

from __future__ import annotations

import re

_MOST_TOKENS = 1200


class NotUnderstood(Exception):
    """The text is no expression, or one that is not supported."""


_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d{1,4}(?![\w.]))?)"
    r"|(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<word>[A-Za-z]+)|(?P<sign>'+|[-+*/^_!()\[\]{}|,])|(?P<blank>\s+)|(?P<bad>.)",
    re.DOTALL,
)

_TRIGONOMETRIC = "sin cos tan cot sec csc"
FUNCTIONS = frozenset(
    f"{_TRIGONOMETRIC} arcsin arccos arctan sinh cosh tanh coth arcsinh arccosh arctanh ln log lg exp gcd lcm max min "
    "abs floor ceil sqrt".split()
)
INVERSE = {name: f"arc{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar pi"
)
SYMBOLS = {f"\\{name}": name for name in _GREEK.split()} | {
    "\\varepsilon": "epsilon", "\\varphi": "phi", "\\vartheta": "theta", "\\angle": "angle", "\\triangle": "triangle",
}  # fmt: skip
DECORATIONS = frozenset(
    [
        "\\overline",
        "\\bar",
        "\\vec",
        "\\hat",
        "\\tilde",
        "\\dot",
        "\\ddot",
        "\\mathbf",
        "\\mathcal",
        "\\overrightarrow",
        "\\boldsymbol",
        "\\widehat",
    ]
)
_PLAIN_WORDS = FUNCTIONS | {"pi", "theta", "alpha", "beta", "lambda", "omega"}
APPLIED = frozenset("fghFGH")
"""Letters that are functions where a bracket follows; every other letter before a bracket is a factor."""

CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
GROUPING = frozenset(["(", "[", "{"])
ENDS = frozenset([")", "]", "}", "\\}", "\\rfloor", "\\rceil", ",", "+", "-", "*", "/", "\\cdot", "\\times", "\\div"])


def tokens_of(text: str) -> list[str]:
    found: list[str] = []
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "bad" or len(found) > _MOST_TOKENS:
            raise NotUnderstood(text)
        if token.lastgroup == "word":
            found += _letters(token[0])
        elif token.lastgroup != "blank":
            found.append(token[0])
    return found


def _letters(word: str) -> list[str]:
    """A run of letters: a function's name, possibly followed by a letter, or up to four adjacent symbols."""
    if word in _PLAIN_WORDS:
        return [f"\\{word}"]
    if word[:-1] in FUNCTIONS:
        return [f"\\{word[:-1]}", word[-1]]
    if len(word) > 4:
        raise NotUnderstood(word)
    return list(word)
