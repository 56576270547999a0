r"""Whether two expressions are equal in value: exactly if both are rational, else to hundreds of digits.

Symbols are given values. Two expressions are equal if they agree at every point at which both are real; `i` is the
imaginary unit, `e` Euler's number, and `log` without a base has base 10. Every operation is bounded: a number that is
too big or too small to represent raises `TooBig`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc, mpf

from e3rl.rewards.exact import BITS, Inexact, TooBig, Undefined, exact
from e3rl.rewards.expression import Node

_CONSTANTS = {"pi", "e", "i"}
_STEPS = frozenset(["floor", "ceil", "abs", "max", "min", "gcd", "lcm"])
_MOST_SYMBOLS = 12


def _moderate(value: Any) -> Any:
    """An mpmath number whose exponent later steps can handle."""
    for part in (value.real, value.imag) if isinstance(value, mpc) else (value,):
        if not mp.isfinite(part):
            raise Undefined
        if part and abs(part.exp + part.bc) > BITS:
            raise TooBig
    return value


class _Evaluator:
    """Values of mpmath at one point; ``scale`` is the largest term of any sum, to which rounding is relative."""

    def __init__(self, at: Mapping[str, Fraction], real: bool) -> None:
        self.at, self.real = at, real
        self.scale = mpf(0)
        self.angles = 0

    def __call__(self, node: Node) -> Any:
        try:
            value = _moderate(self._value(node))
        except (ValueError, ZeroDivisionError, OverflowError, TypeError):
            raise Undefined from None
        if isinstance(value, mpc) and self.real:
            if value.imag:
                raise Undefined
            value = value.real
        return value

    def _value(self, node: Node) -> Any:
        kind = node[0]
        if kind == "n":
            return mpf(node[1].numerator) / node[1].denominator
        if kind == "s":
            return self._symbol(node[1])
        if kind == "+":
            terms = [self(n) for n in node[1]]
            self.scale = max(self.scale, *(abs(t) for t in terms))
            return sum(terms[1:], terms[0])
        if kind == "*":
            return functools.reduce(lambda a, b: _moderate(a * b), (self(n) for n in node[1]))
        if kind == "neg":
            return -self(node[1])
        if kind == "deg":
            return self(node[1]) * mp.pi / 180 if self.angles else self(node[1])
        if kind == "inv":
            return 1 / self(node[1])
        if kind == "^":
            return self._power(self(node[1]), self(node[2]))
        if kind == "!":
            return self._factorial(self(node[1]))
        if kind == "call":
            return self._called(node[1], self(node[2]))
        return self._function(node[1], node[2])

    def _symbol(self, name: str) -> Any:
        if name in self.at:
            return mpf(self.at[name].numerator) / self.at[name].denominator
        return {"pi": mp.pi, "e": mp.e, "i": mpc(0, 1)}[name] * 1

    def _power(self, base: Any, exponent: Any) -> Any:
        if not base:
            if self.real and exponent > 0:
                return base
            raise Undefined
        if self.real and base < 0 and exponent != int(exponent):
            raise Undefined
        if abs(exponent) * max(1, abs(mp.log(abs(base)))) > BITS / 2:
            raise TooBig
        return mp.power(base, exponent)

    def _factorial(self, value: Any) -> Any:
        if abs(value) > 10_000:
            raise TooBig
        return mp.factorial(value)

    @staticmethod
    def _called(name: str, value: Any) -> Any:
        """An unknown function: a smooth one chosen by its name."""
        draw = random.Random(name)
        a, b, c = (mpf(draw.randint(100, 999)) / 173 for _ in range(3))
        return a + b * value + c * value * value + mp.atan(value)

    def _function(self, name: str, arguments: tuple[Node, ...]) -> Any:
        angle = name in _TRIGONOMETRIC
        self.angles += angle
        values = [self(n) for n in arguments]
        self.angles -= angle
        if name == "exp" and abs(values[0]) > BITS / 2:
            raise TooBig
        if name == "root" and self.real and values[0] < 0:
            if values[1] != int(values[1]) or not int(values[1]) % 2:
                raise Undefined
            return -mp.root(-values[0], int(values[1]))
        if name in ("gcd", "lcm"):
            raise Undefined
        if name == "binom" and max(abs(v) for v in values) > 10_000:
            raise TooBig
        return _INEXACT[name](*values)


_TRIGONOMETRIC = {"sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc}
_INEXACT: dict[str, Callable[..., Any]] = _TRIGONOMETRIC | {
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
    "coth": mp.coth, "arcsinh": mp.asinh, "arccosh": mp.acosh, "arctanh": mp.atanh, "exp": mp.exp, "ln": mp.log,
    "lg": mp.log10, "log": lambda x, b=10: mp.log(x) / mp.log(b),
    "root": lambda x, n: mp.power(x, 1 / n), "sqrt": mp.sqrt, "abs": abs, "floor": mp.floor, "ceil": mp.ceil,
    "max": max, "min": min, "binom": mp.binomial,
}  # fmt: skip


# --- equality


def symbols_of(node: Node) -> frozenset[str]:
    """The symbols of an expression, including constants such as pi."""
    if node[0] in ("n", "s"):
        return frozenset([node[1]] if node[0] == "s" else [])
    found: frozenset[str] = frozenset()
    for inner in _inner(node):
        found |= symbols_of(inner)
    return found


def functions_of(node: Node) -> frozenset[str]:
    """The functions that an expression uses."""
    found = frozenset([node[1]]) if node[0] == "f" else frozenset()
    for inner in _inner(node):
        found |= functions_of(inner)
    return found


def _inner(node: Node) -> tuple[Node, ...]:
    if node[0] in ("n", "s"):
        return ()
    if node[0] in ("+", "*"):
        return tuple(node[1])
    if node[0] == "f":
        return tuple(node[2])
    return tuple(n for n in node[1:] if isinstance(n, tuple))


def _agree(left: Node, right: Node, at: Mapping[str, Fraction], *, real: bool, digits: int) -> bool:
    """Whether two expressions have the same value at a point, to that many digits."""
    with mp.workdps(digits):
        one, two = _Evaluator(at, real), _Evaluator(at, real)
        a, b = one(left), two(right)
        size = max(abs(a), abs(b), one.scale, two.scale)
        return bool(abs(a - b) <= size * mpf(10) ** (20 - digits))


_DIGITS, _CERTAIN = 60, 1500


def _same_at(left: Node, right: Node, at: Mapping[str, Fraction], *, real: bool) -> bool:
    """Whether they agree at a point: exactly where both are rational there."""
    try:
        return exact(left, at) == exact(right, at)
    except Inexact:
        return _agree(left, right, at, real=real, digits=_DIGITS)


def point(names: frozenset[str], number: int) -> dict[str, Fraction]:
    """Values for symbols: positive ones, then of mixed signs, small ones, whole ones."""
    values = {}
    for name in names:
        draw = random.Random(f"{name}/{number}")
        value = Fraction(draw.randint(211, 997), draw.randint(101, 199))
        if number % 6 == 3:
            value = -value
        elif number % 6 == 4:
            value *= draw.choice((1, -1))
        elif number % 6 == 2:
            value /= 10
        elif number >= 100:
            value = Fraction(draw.randint(1, 12))
        values[name] = value
    return values


def same_value(left: Node, right: Node) -> bool:
    """Whether two expressions are equal."""
    names = symbols_of(left) - _CONSTANTS
    if len(names) > _MOST_SYMBOLS or names != symbols_of(right) - _CONSTANTS:
        return False
    try:
        if not names:
            return _same_constants(left, right)
        real = "i" not in symbols_of(left) | symbols_of(right)
        steps = bool(_STEPS & (functions_of(left) | functions_of(right)))
        agreed = 0
        for numbers, enough in ((range(40 if steps else 8), 3), (range(100, 112), 4)):
            agreed = _agreements(left, right, names, numbers, real)
            if agreed < 0:
                return False
            if agreed >= enough:
                return _certain(left, right, point(names, numbers[0]), real)
    except (TooBig, Undefined):
        pass
    return False


def _agreements(left: Node, right: Node, names: frozenset[str], numbers: range, real: bool) -> int:
    """At how many points they agree; -1 where they differ at one. Points where one of them has no value don't count."""
    agreed = 0
    for number in numbers:
        try:
            if not _same_at(left, right, point(names, number), real=real):
                return -1
            agreed += 1
        except Undefined:
            continue
    return agreed


def _certain(left: Node, right: Node, at: Mapping[str, Fraction], real: bool) -> bool:
    """The final comparison by digits, with many of them."""
    try:
        return exact(left, at) == exact(right, at)
    except Inexact:
        pass
    try:
        return _agree(left, right, at, real=real, digits=_CERTAIN if not at else 3 * _DIGITS)
    except Undefined:
        return True  # no value at this point; they agree at others


def _same_constants(left: Node, right: Node) -> bool:
    return _same_at(left, right, {}, real=False) and _certain(left, right, {}, False)


def constant(node: Node) -> bool:
    """Whether an expression has no variable."""
    return not symbols_of(node) - _CONSTANTS


def between(node: Node, low: Fraction, high: Fraction) -> bool:
    """Whether a constant lies between two numbers, the numbers themselves left out."""
    if not constant(node):
        return False
    try:
        try:
            return low < exact(node, {}) < high
        except Inexact:
            with mp.workdps(_DIGITS):
                ends = (mpf(end.numerator) / end.denominator for end in (low, high))
                return bool(next(ends) < _Evaluator({}, True)(node) < next(ends))
    except (TooBig, Undefined):
        return False


def proportional(left: Node, right: Node, *, positive: bool = False) -> bool:
    """Whether two expressions differ by a constant factor other than 0: equations ``left = 0`` and ``right = 0`` agree.

    With ``positive``, by a factor above 0: inequalities agree.
    """
    names = symbols_of(left) - _CONSTANTS
    if not names or len(names) > _MOST_SYMBOLS or names != symbols_of(right) - _CONSTANTS:
        return False
    ratios: list[Any] = []
    real = "i" not in symbols_of(left) | symbols_of(right)
    for number in range(8):
        at = point(names, number)
        try:
            try:
                ratios.append(_ratio(exact(left, at), exact(right, at)))
            except Inexact:
                with mp.workdps(_DIGITS):
                    ratios.append(_ratio(_Evaluator(at, real)(left), _Evaluator(at, real)(right)))
        except Undefined:
            continue
        except TooBig:
            return False
    if len(ratios) < 3 or (positive and not (isinstance(ratios[0], Fraction | mpf) and ratios[0] > 0)):
        return False
    with mp.workdps(_DIGITS):
        if all(isinstance(r, Fraction) for r in ratios):
            return all(r == ratios[0] for r in ratios)
        numbers = [mpf(r.numerator) / r.denominator if isinstance(r, Fraction) else r for r in ratios]
        return all(abs(n - numbers[0]) <= abs(numbers[0]) * mpf(10) ** -35 for n in numbers)


def _ratio(left: Any, right: Any) -> Any:
    if not left or not right:
        raise Undefined
    return left / right
