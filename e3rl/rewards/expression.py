r"""Parses an expression, LaTeX or plain, into a tree. A text that is not understood completely is no expression.

A node is a tuple: ``("n", Fraction)``, ``("s", symbol)``, ``("+", nodes)``, ``("*", nodes)``, ``("neg", node)``,
``("inv", node)``, ``("^", base, exponent)``, ``("!", node)``, ``("deg", node)``, ``("f", function, nodes)``,
``("call", symbol, node)``. Time is linear in the length; brackets may be nested `DEEPEST` deep.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from e3rl.rewards.tokens import (
    APPLIED,
    CLOSING,
    DECORATIONS,
    ENDS,
    FUNCTIONS,
    GROUPING,
    INVERSE,
    SYMBOLS,
    NotUnderstood,
    tokens_of,
)

Node = tuple[Any, ...]

DEEPEST = 40


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0
        self.depth = self.bars = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise NotUnderstood(f"no {token}")

    def sum(self) -> Node:
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            minus = self.take() == "-"
            term = self.product()
            terms.append(("neg", term) if minus else term)
        return terms[0] if len(terms) == 1 else ("+", tuple(terms))

    def product(self) -> Node:
        factors = [self.signed()]
        while True:
            token = self.peek()
            if token in ("*", "\\cdot", "\\times"):
                self.take()
                factors.append(self.signed())
            elif token in ("/", "\\div"):
                self.take()
                factors.append(("inv", self.signed()))
            elif not self.begins_factor(token):
                return factors[0] if len(factors) == 1 else ("*", tuple(factors))
            elif token[0] in _DIGITS and self.tokens[self.at - 1][0] in _DIGITS:
                raise NotUnderstood("two numbers side by side")
            else:
                factors.append(self.power())

    def begins_factor(self, token: str) -> bool:
        return bool(token) and token not in ENDS and token not in "^_!'" and not (token == "|" and self.bars)

    def signed(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return ("neg", value) if negative else value

    def power(self) -> Node:
        base = self.postfixed()
        if self.peek() != "^":
            return base
        if self.tokens[self.at + 1 : self.at + 2] == ["\\circ"]:
            self.at += 2
            return ("deg", base)
        return ("^", base, self.raised())

    def exponent(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.atom()
        if self.peek() == "^":
            value = ("^", value, self.raised())
        return ("neg", value) if negative else value

    def raised(self) -> Node:
        self.expect("^")
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotUnderstood("too deep")
        value = self.exponent()
        self.depth -= 1
        return value

    def postfixed(self) -> Node:
        value = self.atom()
        while self.accept("!"):
            if self.peek() == "!" or value[0] == "!":
                raise NotUnderstood("!!")
            value = ("!", value)
        return value

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotUnderstood("too deep")
        value = self.simple()
        self.depth -= 1
        return value

    def simple(self) -> Node:
        token = self.take()
        if not token or token in ENDS or (token == "|" and self.bars):
            raise NotUnderstood(token)
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token in GROUPING:
            value = self.sum()
            self.expect(CLOSING[token])
            return value
        if token in ("|", "\\lfloor", "\\lceil"):
            return self.enclosed(token)
        if token == "\\frac":
            return ("*", (self.argument(), ("inv", self.argument())))
        if token in ("\\binom", "\\dbinom", "\\tbinom"):
            return ("f", "binom", (self.argument(), self.argument()))
        if token == "\\sqrt":
            return self.root()
        if token[1:] in FUNCTIONS and token[0] == "\\":
            return self.function(token[1:])
        return self.symbol(token)

    def enclosed(self, token: str) -> Node:
        bars, self.bars = self.bars, int(token == "|")
        value = self.sum()
        self.bars = bars
        self.expect(CLOSING[token])
        return ("f", {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}[token], (value,))

    def number(self, token: str) -> Node:
        value = Fraction(token.replace(",", ""))
        if self.peek() == "\\overline" and "." in token and "e" not in token.lower():
            return self.repeating(token)
        if not token.isdigit():
            return ("n", value)
        following = self.tokens[self.at : self.at + 3]
        if len(following) == 3 and following[0].isdigit() and following[1] == "/" and following[2].isdigit():
            self.at += 3
            if not int(following[0]) < int(following[2]):
                raise NotUnderstood("no mixed number")
            return ("n", value + Fraction(int(following[0]), int(following[2])))
        if self.peek() == "\\frac":
            start = self.at
            part = self.atom()
            top, bottom = part[1][0], part[1][1][1]
            if top[0] == bottom[0] == "n" and 0 < top[1] < bottom[1]:
                return ("n", value + top[1] / bottom[1])
            self.at = start
        return ("n", value)

    def repeating(self, token: str) -> Node:
        self.expect("\\overline")
        self.expect("{")
        digits = self.take()
        self.expect("}")
        if not digits.isdigit():
            raise NotUnderstood(digits)
        places = len(token.partition(".")[2])
        return ("n", Fraction(token) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))

    def argument(self) -> Node:
        r"""An argument of ``\frac``: a group, or one sign, which may be the first digit of several."""
        token = self.peek()
        if len(token) > 1 and token.isdigit():
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        if token == "{":
            return self.atom()
        token = self.take()
        if token.isdigit():
            return ("n", Fraction(token))
        if token == "\\sqrt":
            return self.root()
        return self.symbol(token)

    def root(self) -> Node:
        degree: Node = ("n", Fraction(2))
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
        return ("f", "root", (self.atom(), degree))

    def function(self, name: str) -> Node:
        exponent: Node | None = None
        base: Node | None = None
        while self.peek() in ("^", "_"):
            if self.peek() == "^" and exponent is None:
                exponent = self.raised()
            elif self.peek() == "_" and base is None and name == "log":
                self.take()
                base = self.argument() if not self.peek().isdigit() else self.atom()
            else:
                raise NotUnderstood(name)
        arguments = self.arguments()
        if exponent == ("neg", ("n", Fraction(1))) and name in INVERSE:
            name, exponent = INVERSE[name], None
        value: Node = ("f", name, arguments if base is None else (*arguments, base))
        if exponent is None and self.peek() == "^":
            exponent = self.raised()
        return value if exponent is None else ("^", value, exponent)

    def arguments(self) -> tuple[Node, ...]:
        """A function's arguments: in brackets, separated by commas; without brackets, the factors up to another function."""
        opening = self.peek()
        if opening in GROUPING:
            self.take()
            found = [self.sum()]
            while self.accept(","):
                found.append(self.sum())
            self.expect(CLOSING[opening])
        else:
            factors = [self.power()]
            while self.begins_factor(token := self.peek()) and not (token[0] == "\\" and token[1:] in FUNCTIONS):
                factors.append(self.power())
            found = [factors[0] if len(factors) == 1 else ("*", tuple(factors))]
        return tuple(found)

    def symbol(self, token: str) -> Node:
        if token in DECORATIONS:
            name = token + self.raw()
        elif token in SYMBOLS:
            name = SYMBOLS[token]
        elif len(token) == 1 and token.isalpha():
            name = token
        else:
            raise NotUnderstood(token)
        while (mark := self.peek()) and (mark[0] in "'_" or self.tokens[self.at : self.at + 4] == _PRIME):
            if mark == "_":
                self.take()
                name += "_" + self.raw()
            else:
                self.at += 4 if mark == "^" else 1
                name += mark if mark != "^" else "'"
        if self.peek() == "(" and (name.rstrip("'") in APPLIED or self.applied()):
            self.take()
            value = self.sum()
            self.expect(")")
            return ("call", name, value)
        return ("s", name)

    def applied(self) -> bool:
        """Whether the bracket that follows holds one number or letter, as in I(0) or x(t)."""
        inside = self.tokens[self.at + 1 : self.at + 3]
        return len(inside) == 2 and inside[1] == ")" and (inside[0].isdigit() or inside[0].isalpha())

    def raw(self) -> str:
        """A subscript as written: one sign, or the content of braces."""
        if not self.accept("{"):
            token = self.take()
            if not token or token in ENDS:
                raise NotUnderstood("no subscript")
            return token
        start, depth = self.at, 1
        while depth:
            token = self.take()
            if not token:
                raise NotUnderstood("no }")
            depth += (token == "{") - (token == "}")
        return "".join(self.tokens[start : self.at - 1])


_DIGITS = frozenset(".0123456789")
_DERIVATIVE = re.compile(r"\\frac ?\{ ?(?:d|\\partial)[^{}]{0,40}\} ?\{ ?(?:d|\\partial) ?[A-Za-z\\]")
_PRIME = ["^", "{", "\\prime", "}"]


@functools.lru_cache(maxsize=4096)
def read_expression(text: str) -> Node | None:
    """Cleaned text as an expression; None if any part of it is not understood, such as a derivative."""
    if _DERIVATIVE.search(text):
        return None
    try:
        reader = _Reader(tokens_of(text))
        found = reader.sum()
    except (NotUnderstood, ZeroDivisionError):
        return None
    return found if reader.at == len(reader.tokens) else None
