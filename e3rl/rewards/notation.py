r"""Normalises notation: Unicode signs, LaTeX's fractions and spaces, dollar signs, markdown."""

from __future__ import annotations

import re

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/",
    "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "°": r"^\circ", "º": r"^\circ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}",
    "（": "(", "）": ")", "，": ",", "：": ":", "∶": ":", "％": "%", "；": ";", "。": ".", "＝": "=", "＄": "$",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "“": '"', "”": '"', "’": "'", "‘": "'", "′": "'",
}  # fmt: skip
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")

CURRENCY = "¤"
"""Replaces a dollar sign that means money, not mathematics."""

_SPELLINGS = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:mathrm|text|rm|mathit)\s*\{\s*([ei])\s*\}(?=\s*\^)", r"\1"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\(?:[bB]ig{1,2}[lrm]?|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])\s*", ""),
    (r"\\(?:textbf|textit|textrm|textnormal|textsf|texttt|textsc|mbox|mathrm|mathbf|mathsf|mathit|emph|operatorname|bold)(?![A-Za-z])",
     r"\\text"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=|=<", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=|=>", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=|\\not\s*=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:lbrace|lbrack)(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"\\colon(?![A-Za-z])|\\ratio(?![A-Za-z])", ":"),
    (r"\\langle(?![A-Za-z])", "("),
    (r"\\rangle(?![A-Za-z])", ")"),
    (r"\\(?:lvert|rvert|mid|vert)(?![A-Za-z])", "|"),
    (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", r"^\\circ "),
    (r"\\thickspace|\\medspace|\\thinspace|\\enspace|\\space|\\nobreakspace", " "),
    (r"(?<=\d)(?:\\[!,]|\{,\})(?=\d{3}(?!\d))", ""),  # 10\!000, 4{,}500
    (r"(?<=\d)\s*(?:\{,\s*\}|,\\!)\s*(?=\d)", ","),
    (r"\{\s*,\s*\}", ","),
    (r"\\qquad(?![A-Za-z])|\\quad(?![A-Za-z])|(?<!\\)\\[!,;: ]|~", " "),
    (r"\\%", "%"),
    (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
    (r"\\text ?\{ ?[.,]? ?\}$", ""),
    (r"``|''(?=\s*$)", ""),
)]  # fmt: skip

_MONEY = re.compile(r"\\\$|\$(?=\s*-?\d*[.,]?\d)|(?<=\d)\s?\$")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])")


def unicode_to_latex(text: str) -> str:
    """Mathematical signs as LaTeX writes them."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] if m[1] is not None else m[2]}}}", text)
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    return _SIGN.sub(lambda m: _SIGNS[m[0]], text)


_BLANKS = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n(?: ?\n)*")
BOLD = re.compile(r"(?:(?<=[\s:])|^)\*\*([^*]+)\*\*(?=[\s.,:;!?]|$)")


_ESCAPED_TWICE, _ROW_BRACKET = re.compile(r"\\\\(?=[A-Za-z{}%$()\[\]])"), re.compile(r"\\\\(?=\[)")


def tidied(text: str) -> str:
    """Collapses runs of blanks and of empty lines, so that later patterns never see a long run of spaces."""
    return _LINES.sub(lambda m: "\n\n" if m[0].count("\n") > 1 else "\n", _BLANKS.sub(" ", text))


def without_delimiters(text: str) -> str:
    r"""Mathematics without its ``$…$`` and ``\(…\)``; a dollar sign that is money becomes `CURRENCY`."""
    text = text.replace("\\$", CURRENCY)
    if text.count("$") % 2:
        text = _MONEY.sub(CURRENCY, text)
    for delimiter in ("$", "\\(", "\\)", "\\[", "\\]"):
        text = text.replace(delimiter, " ")
    return text


def clean(answer: str) -> str:
    """An answer without its typography."""
    text = unicode_to_latex(tidied(answer))
    # LaTeX that was escaped twice on its way; in a matrix \\\\ ends a row, and a row may begin with a bracket
    twice = (_ROW_BRACKET, r"\\\\ ") if "\\begin" in text else (_ESCAPED_TWICE, r"\\")
    text = twice[0].sub(twice[1], text)
    text = without_delimiters(text)
    text = BOLD.sub(r"\1", text).replace("**", "^")
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    text = re.sub(r"\s+", " ", text).strip()
    text = text.strip("\"'` ").rstrip(".,;: \\").strip()
    if text.startswith("="):
        text = text[1:].strip()
    return text


def squeezed(text: str) -> str:
    """Cleaned text without meaningless spaces: all except those between two letters or digits."""
    return _LOOSE_SPACE.sub("", text)


def matching(text: str, start: int) -> int:
    """The position where the bracket at ``start`` is closed; -1 if it never is. ``\\{`` counts as ``{``."""
    depth = 0
    for position in range(start, len(text)):
        character = text[position]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return position
    return -1


_WRAPPER = re.compile(r"(?:\\(?:text|boxed|fbox)\s*)?\{")


def unwrapped(text: str) -> str:
    r"""Without braces, ``\text{…}`` or ``\boxed{…}`` around the whole; eight deep at most."""
    for _ in range(8):
        head = _WRAPPER.match(text)
        if head is None or matching(text, head.end() - 1) != len(text) - 1:
            break
        text = text[head.end() : -1].strip()
    return text


_SEPARATOR = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|(?<=\))or(?=\()|[,;]", re.IGNORECASE
)


_SEMICOLON = re.compile(";")


def split_list(text: str) -> list[str]:
    """The elements of a list, separated by commas, semicolons, 'and' or 'or' outside brackets. One element is no list.

    If there are both semicolons and commas, only semicolons separate.
    """
    groups = split_at(text, _SEMICOLON)
    return groups if len(groups) > 1 else split_at(text, _SEPARATOR)


def split_at(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text between separators outside brackets; empty parts are left out."""
    parts, depth, start = [], 0, 0
    position = 0
    while position < len(text):
        character = text[position]
        if depth == 0 and (found := separator.match(text, position)):
            parts.append(text[start : found.start()])
            start = position = found.end()
            continue
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif text.startswith(r"\begin{", position):
            depth += 1
        elif text.startswith(r"\end{", position):
            depth = max(0, depth - 1)
        position += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


_MATRIX = re.compile(r"\\begin ?\{([pbBv]?matrix|array)\}(?: ?\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)
_ROW, _CELL = re.compile(r"\\\\"), re.compile("&")


def read_matrix(text: str) -> tuple[bool, list[list[str]]] | None:
    """Whether it is a determinant, and its rows."""
    found = _MATRIX.fullmatch(text.strip("()[] ") if "array" in text else text)
    if found is None or "\\begin" in found[2]:
        return None
    return found[1] == "vmatrix", [split_at(row, _CELL) for row in split_at(found[2], _ROW)]
