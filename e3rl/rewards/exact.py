r"""Exact values of expressions, as fractions where possible.

Every operation is bounded: a number that is too big or too small to represent raises `TooBig`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from e3rl.rewards.expression import Node

BITS = 2**17
"""Bits of the largest exact number, and the largest binary exponent of any other."""


class Undefined(Exception):
    """There is no (real) value here."""


class TooBig(Exception):
    """The value is too big to compute."""


class Inexact(Exception):
    """The value is not known to be rational."""


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > BITS or value.denominator.bit_length() > BITS:
        raise TooBig
    return value


def exact(node: Node, at: Mapping[str, Fraction]) -> Fraction:
    """The value as a fraction; Inexact where it may be irrational."""
    kind = node[0]
    if kind == "n":
        return node[1]  # type: ignore[no-any-return]
    if kind == "s":
        if node[1] not in at:
            raise Inexact
        return at[node[1]]
    if kind == "+":
        return functools.reduce(lambda a, b: _bounded(a + b), (exact(n, at) for n in node[1]))
    if kind == "*":
        return functools.reduce(lambda a, b: _bounded(a * b), (exact(n, at) for n in node[1]))
    if kind == "neg":
        return -exact(node[1], at)
    if kind == "deg":
        return exact(node[1], at)
    if kind == "inv":
        return _inverse(exact(node[1], at))
    if kind == "^":
        return _exact_power(exact(node[1], at), exact(node[2], at))
    if kind == "!":
        return _factorial(exact(node[1], at))
    if kind == "f" and node[1] in _EXACT:
        return _bounded(_EXACT[node[1]](*(exact(n, at) for n in node[2])))
    raise Inexact


def _inverse(value: Fraction) -> Fraction:
    if not value:
        raise Undefined
    return 1 / value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return _exact_root(_exact_power(base, Fraction(exponent.numerator)), exponent.denominator)
    power = exponent.numerator
    if power <= 0 and not base:
        raise Undefined
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base and abs(power) * bits > 2 * BITS:
        raise TooBig
    return _bounded(base ** (power if abs(base) != 1 else power % 2))


def _exact_root(value: Fraction, degree: int) -> Fraction:
    """A root that is rational."""
    if value < 0 or degree > 64:
        raise Inexact
    top, bottom = (_whole_root(n, degree) for n in (value.numerator, value.denominator))
    return Fraction(top, bottom)


def _whole_root(value: int, degree: int) -> int:
    if degree == 2:
        root = math.isqrt(value)
    else:
        root = 1 << -(-value.bit_length() // degree)
        while True:  # Newton's method from above
            better = ((degree - 1) * root + value // root ** (degree - 1)) // degree
            if better >= root:
                break
            root = better
    if root**degree != value:
        raise Inexact
    return root


def _root(value: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or degree < 1:
        raise Inexact
    if value < 0 and degree % 2:
        return -_exact_root(-value, degree.numerator)
    return _exact_root(value, degree.numerator)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1:
        raise Inexact
    if value < 0:
        raise Undefined
    if value > 10_000:
        raise TooBig
    return _bounded(Fraction(math.factorial(value.numerator)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction:
    if top.denominator != 1 or bottom.denominator != 1 or top < 0 or bottom < 0:
        raise Inexact
    if min(bottom, top - bottom) > 10_000 or top > 2**64:
        raise TooBig
    return Fraction(math.comb(top.numerator, bottom.numerator))


def _whole(function: Callable[..., int]) -> Callable[..., Fraction]:
    def apply(*values: Fraction) -> Fraction:
        if any(v.denominator != 1 for v in values):
            raise Undefined
        return Fraction(function(*(v.numerator for v in values)))

    return apply


_EXACT: dict[str, Callable[..., Fraction]] = {
    "root": _root, "sqrt": lambda v: _root(v, Fraction(2)), "binom": _binomial, "abs": lambda v: abs(v),
    "floor": lambda v: Fraction(math.floor(v)), "ceil": lambda v: Fraction(math.ceil(v)),
    "max": lambda *v: max(v), "min": lambda *v: min(v), "gcd": _whole(math.gcd), "lcm": _whole(math.lcm),
}  # fmt: skip
