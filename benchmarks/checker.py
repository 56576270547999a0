r"""False positives and false negatives of the answer checker on data sets: spellings of each answer, and near misses.

    python benchmarks/checker.py FILE... [--wrong 40] [--show 20] [--workers 1]

FILE is JSON lines with "answer". Each answer is written in other ways, which must be accepted, and made wrong in many, which
must be refused. Prints a table by file and kind, and what was judged otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from e3rl.rewards.grading import grade_all
from e3rl.rewards.pool import ProcessPool

_WHOLE = re.compile(r"-?\d{1,15}")
_DECIMAL = re.compile(r"-?\d*\.\d+")
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CHANGES = (
    "squared", "cubed", "factorial", "tenths", "ppm", "divided by seven", "(wrong)", "times two", "light years", "minus one",
    "blorks", "or so", "halves",
)  # fmt: skip
_CHOICE = re.compile(r"(?:\\text(?:bf)?\{)?\(?[A-J]\)?\}?")
_NAMES = "abcdfghjkmnpqrtuvwxyz"


def _parts(text: str) -> list[str]:
    """What commas divide outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in [*parts, text[start:]]]


def _inside(text: str) -> tuple[str, list[str], str]:
    """A bracketed list as opening bracket, elements, closing bracket; a bare one without brackets."""
    plain = text.replace("\\left", "").replace("\\right", "").strip()
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]")):
        if plain.startswith(opening) and plain.endswith(closing):
            inner = plain[len(opening) : -len(closing)]
            if _balanced(inner):
                return opening, _parts(inner), closing
    return "", _parts(text), ""


def _balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _is_expression(gold: str) -> bool:
    """One mathematical expression, with no words, lists, relations or units."""
    if (
        _CHOICE.fullmatch(gold)
        or re.search(r"\.$|[\d}] [A-Za-z]$", gold)
        or not _balanced(gold)
        or "[" in gold.replace("sqrt[", "")
    ):
        return False
    return len(_parts(gold)) == len(_inside(gold)[1]) == 1 and not re.search(
        r"[=<>:&%~$;\]]|\\(?:text|mbox|le|ge|ne|in|cup|cap|infty|begin|pm|mathrm|circ|approx|equiv|%|\{|ldots|dots|overline|mathb)"
        r"|[A-Za-z]{3,}(?<!frac)(?<!sqrt)(?<!pi)(?<!cdot)(?<!times)(?<!left)(?<!right)(?<!binom)|_",
        re.sub(r"\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right|binom)", " ", gold),
    )


def spellings(gold: str) -> Iterator[tuple[str, str]]:
    """Kinds and responses that say the same as ``gold``."""
    yield "box", rf"Therefore it is $\boxed{{{gold}}}$."
    yield "display", rf"\[\boxed{{{gold}}}\]"
    yield "spaces", rf"\boxed{{ {gold} }}"
    if "$" not in gold:
        yield "dollars", f"The final answer is ${gold}$."
        yield "bold", rf"**Answer:** \({gold}\)"
    body = dict(_rewritten(gold))
    for kind, text in body.items():
        if text != gold:
            yield kind, rf"\boxed{{{text}}}"


def _rewritten(gold: str) -> Iterator[tuple[str, str]]:
    yield "dfrac", re.sub(r"\\[dt]?frac(?![A-Za-z])", r"\\dfrac", gold)
    yield (
        "delimiters",
        re.sub(r"(?<![\\a-z])\(", r"\\left(", re.sub(r"(?<!\\)\)", r"\\right)", gold))
        if _plain_brackets(gold)
        else gold,
    )
    yield "operators", re.sub(r"(?<=[\w)}])([+=])(?=[\w(\\])", r" \1 ", gold)
    yield "commas", ", ".join(_parts(gold)) if "," in gold and not re.search(r"\d,\\?!?\d{3}", gold) else gold
    yield "degrees", re.sub(r"\^\{?\\circ\}?", "°", gold)
    yield "pi", re.sub(r"\\pi(?![A-Za-z])", "π", gold)
    yield "percent", gold.replace("\\%", "%")
    yield "mathrm", re.sub(r"\\(?:text|mbox)\b", r"\\mathrm", gold)
    yield "slash", re.sub(r"^(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", gold)
    yield "minus", re.sub(r"^-\\[dt]?frac\{(\w+)\}", r"\\frac{-\1}", gold)
    if _WHOLE.fullmatch(gold):
        yield from _wholes(int(gold))
    if (found := _FRACTION.fullmatch(gold)) and int(found[3]):
        value = Fraction(int(found[1] + found[2]), int(found[3]))
        yield "decimal", f"{float(value):.10g}" if abs(value) > Fraction(1, 100) else gold
        yield "scaled", rf"{found[1]}\frac{{{int(found[2]) * 3}}}{{{int(found[3]) * 3}}}"
    if _DECIMAL.fullmatch(gold):
        value = Fraction(gold)
        yield "fraction", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        yield "zeros", gold + "00"
    if _is_expression(gold):
        yield "named", f"S = {gold}" if "S" not in gold else gold
        yield "brackets", f"({gold})"
        yield "doubled", rf"\frac{{2({gold})}}{{2}}"
        yield "turned", f"3 + {gold} - 3" if not gold.startswith("-") else f"{gold} + 0"
    opening, parts, closing = _inside(gold)
    if len(parts) > 1 and opening in ("", "\\{") and not re.search(r"=|\\text|\\ldots|\\dots|\d,\\?!?\d{3}", gold):
        yield "order", f"{opening}{', '.join(reversed(parts))}{closing}"
        if not opening:
            yield "and", f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plain_brackets(gold: str) -> bool:
    return "\\left" not in gold and "\\" not in gold.replace("\\frac", "").replace("\\sqrt", "").replace("\\pi", "")


def _wholes(value: int) -> Iterator[tuple[str, str]]:
    yield "point", f"{value}.0"
    yield "dot", f"{value}."
    yield "thousands", f"{value:,}"
    yield "braces", f"{value:,}".replace(",", "{,}")
    yield "over one", rf"\frac{{{value * 2}}}{{2}}"
    yield "sum", f"{value - 1} + 1"
    if 0 <= value < len(_ONES):
        yield "word", _ONES[value]
    yield "units", rf"{value}\text{{ apples}}"
    yield "dollars", rf"\${value}" if value >= 0 else str(value)


def misses(gold: str, others: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Kinds and answers that differ from ``gold``; some turn out to be equal, which `plainly_equal` tells."""
    other = rng.choice(others)
    yield "another", other
    yield "in a list", f"{gold}, {other}"
    yield "in a list", f"{other}, {gold}"
    yield "in a list", rf"{gold} \text{{ or }} {other}"
    yield "in a set", rf"\{{{gold}, {other}\}}"
    if not _CHOICE.fullmatch(gold):  # what stands behind a letter is the text of the choice
        for change in rng.sample(_CHANGES, 3):
            yield "word", rf"{gold} \text{{ {change}}}"
            yield "word", f"{gold} {change}"
    yield "denied", rf"\text{{not }} {gold}"
    if None not in (_number(gold), _number(other)) and _number(gold) != _number(other):
        yield "equation", f"{other} = {gold}"
    opening, parts, closing = _inside(gold)
    if len(parts) > 1:
        yield "part", parts[0]
        yield "part", f"{opening}{', '.join(parts[:-1])}{closing}"
        yield "repeated", f"{opening}{', '.join([*parts, parts[-1]])}{closing}"
        if opening in ("(", "[") and parts[0] != parts[1]:
            yield "swapped", f"{opening}{', '.join([parts[1], parts[0], *parts[2:]])}{closing}"
            yield "bracket", f"[{', '.join(parts)})" if opening == "(" else f"({', '.join(parts)}]"
        yield "element + 1", f"{opening}{', '.join([_plus_one(parts[0]), *parts[1:]])}{closing}"
    else:
        yield from _single_misses(gold, rng)
    yield from _edits(gold, rng)


_TURNS = (
    ". No wait, {}.", ". Actually, {}.", ". Or {}.", ". {}.", ". But it could be {}.", ". Maybe {}.", ", or {}.", "?",
    ", I guess.", ".\n\nWait, {}.", ". Sorry, it is {}.", ". On second thought, {}.", "; no, {}.",
)  # fmt: skip


def taken_back(gold: str, other: str, rng: random.Random) -> Iterator[str]:
    """Responses that state an answer and take it back, or set another one beside it."""
    lettered = re.fullmatch(r"[({\s]*(?:\\text(?:bf)?)?[({\s]*[A-J][)}\s]*", gold)
    if "$" not in gold + other and not lettered and not plainly_equal(gold, other):
        for turn in rng.sample(_TURNS, 3):
            yield f"The answer is ${gold}$" + turn.format(f"${other}$")


_AHEAD = (
    "minus", "negative", "twice", "half of", "the square of", "the opposite of", "at least", "anything but", "more than",
    "nearly",
)  # fmt: skip


def changed_before(gold: str, rng: random.Random) -> Iterator[str]:
    """Responses in which words before a number make it another one."""
    if _WHOLE.fullmatch(gold) and abs(int(gold)) > 1:
        for words, number in zip(rng.sample(_AHEAD, 2), (gold, f"${gold}$"), strict=True):
            yield f"The answer is {words} {number}."


def _plus_one(text: str) -> str:
    return str(int(text) + 1) if _WHOLE.fullmatch(text) else f"{text} + 1"


def _single_misses(gold: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    if _WHOLE.fullmatch(gold):
        value = int(gold)
        for kind, wrong in (
            ("+ 1", value + 1), ("- 1", value - 1), ("sign", -value), ("ten times", value * 10), ("+ 1000", value + 1000),
            ("doubled", 2 * value), ("reversed", int(str(abs(value))[::-1])),
        ):  # fmt: skip
            yield kind, str(wrong)
        yield "nearly", f"{value} + 10^{{-30}}"
        yield "nearly", f"{value}.0000001"
        yield "power", f"{value}^2" if abs(value) > 1 else f"{value + 3}^2"
        yield "letter", f"{value}{rng.choice(_NAMES)}"
        yield "half", rf"{value}\frac12"
        yield "per cent", rf"{value * 100}\%" if value not in (0, 1) else f"{value + 2}"
        return
    if _is_expression(gold):
        yield "+ 1", f"{gold} + 1"
        if not _DECIMAL.search(gold):
            yield "nearly", f"{gold} + 10^{{-30}}"
        yield "sign", f"-({gold})"
        yield "doubled", f"2({gold})"
        yield "power", f"({gold})^2"
        yield "letter", f"{rng.choice(_NAMES)}({gold})"
    if found := _FRACTION.search(gold):
        yield "upside down", gold.replace(found[0], rf"{found[1]}\frac{{{found[3]}}}{{{found[2]}}}", 1)
        yield "part", found[2]
        yield "part", found[3]
        yield "digits", f"{float(Fraction(int(found[2]), int(found[3]) or 1)):.3g}1"
    if "=" not in gold and not _CHOICE.fullmatch(gold) and not re.fullmatch(r"\\(?:text|mathbf)\{.*\}", gold):
        for token in re.findall(r"[A-Za-z]|\d+", re.sub(r"\\[A-Za-z]+", " ", gold))[:3]:
            if not re.fullmatch(rf"{token} [A-Z]", gold):  # a unit that is left out is no mistake
                yield "part", token
    letters = re.findall(r"(?<![\\A-Za-z])[a-zA-Z](?![A-Za-z])", gold)
    if letters and not re.search(r"\\in |p\.m|a\.m|\\text|_\{?\d", gold) and not _CHOICE.fullmatch(gold):
        yield "case", re.sub(rf"(?<![\\A-Za-z]){letters[0]}(?![A-Za-z])", letters[0].swapcase(), gold)


def _edits(gold: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One digit changed, added or left out; a sign turned."""
    places = [m.start() for m in re.finditer(r"\d", gold)]
    if places:
        at = rng.choice(places)
        yield "digit", gold[:at] + str((int(gold[at]) + rng.randint(1, 9)) % 10) + gold[at + 1 :]
        at = rng.choice(places)
        yield "digit more", gold[:at] + str(rng.randint(1, 9)) + gold[at:]
        at = rng.choice(places)
        if gold[at] != "0" and "approx" not in gold:
            yield "digit less", gold[:at] + gold[at + 1 :]
    signs = [m.start() for m in re.finditer(r"(?<=[\w)} ])[+-](?=[\w(\\ ])", gold)]
    if signs:
        at = rng.choice(signs)
        yield "inner sign", gold[:at] + {"+": "-", "-": "+"}[gold[at]] + gold[at + 1 :]


_PERCENT = re.compile(r"\\?%")
_TYPOGRAPHY = re.compile(
    r"\\[!,;$]|[\s$]|(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))|\\(?:text|textnormal|mbox|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?"
    r"|\^\{?\\circ\}?|^[A-Za-z]="
)


def _number(text: str) -> Fraction | None:
    """The value of a plain number, read without the checker."""
    plain = re.sub(r"\\(?:mathbf|text)\{([\d.]+)\}", r"\1", text)
    plain = _TYPOGRAPHY.sub("", plain)
    plain = _PERCENT.sub("", plain)
    plain = re.sub(
        r"^(-?)(\d+)\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?$",
        lambda m: f"{m[1]}{int(m[2]) * int(m[4]) + int(m[3])}/{m[4]}",
        plain,
    )
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", plain)
    plain = re.sub(r"\\[dt]?frac(\d)(\d)", r"\1/\2", plain).removesuffix(".")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def plainly_equal(gold: str, wrong: str) -> bool:
    """Whether a near miss is the answer after all, as far as text and plain numbers tell; without the checker."""
    squeezed = [re.sub(r"\\(?:left|right|!|,|;)|[\s${}]|\\[dt]?frac", "", t).lower().rstrip(".") for t in (gold, wrong)]
    if squeezed[0] == squeezed[1] and gold.lower() != gold.swapcase().lower():
        return True
    left, right = _number(gold), _number(wrong)
    if left is None or right is None:
        return re.sub(r"\W", "", gold) == re.sub(r"\W", "", wrong) and gold.count("-") == wrong.count("-")
    percent = "%" in gold or "%" in wrong
    return left == right or (percent and (left * 100 == right or left == right * 100))


def cases(golds: Sequence[str], wrong: int, seed: int = 0) -> Iterator[tuple[str, str, str, bool]]:
    """(kind, gold, response, whether it is right) for every answer: its spellings, and up to ``wrong`` near misses."""
    rng = random.Random(seed)
    for gold in golds:
        for kind, response in spellings(gold):
            yield kind, gold, response, True
        found = dict.fromkeys((k, m) for k, m in misses(gold, golds, rng) if m and not plainly_equal(gold, m))
        for i, (kind, miss) in enumerate(list(found)[:wrong]):
            yield kind, gold, rf"\boxed{{{miss}}}" if i % 4 or "$" in miss else f"The answer is ${miss}$.", False
        for response in taken_back(gold, rng.choice(golds), rng):
            yield "taken back", gold, response, False
        for response in changed_before(gold, rng):
            yield "words before", gold, response, False


def measure(
    golds: Sequence[str], pool: ProcessPool, wrong: int
) -> tuple[Counter[tuple[str, bool]], list[tuple[str, str, str, bool]]]:
    """How many cases of each kind there are, and those that were judged otherwise."""
    counts: Counter[tuple[str, bool]] = Counter()
    misjudged = []
    batch = list(cases(golds, wrong))
    grades = grade_all([(gold, response) for _, gold, response, _ in batch], pool)
    for case, grade in zip(batch, grades, strict=True):
        counts[case[0], case[3]] += 1
        if grade.correct is not case[3]:
            misjudged.append(case)
    return counts, misjudged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--wrong", type=int, default=40, help="near misses of one answer, at most")
    parser.add_argument("--show", type=int, default=20, help="misjudged cases to print for each file")
    parser.add_argument("--limit", type=int, default=0, help="answers of each file; 0: all")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    pool = ProcessPool(options.workers, 5.0)
    print("| data | answers | spellings | accepted | near misses | accepted |\n|---|---:|---:|---:|---:|---:|")
    notes = []
    for file in options.files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        golds = list(dict.fromkeys(str(row["answer"]) for row in rows))[: options.limit or None]
        counts, misjudged = measure(golds, pool, options.wrong)
        right = sum(n for (_, same), n in counts.items() if same)
        wrong = sum(n for (_, same), n in counts.items() if not same)
        refused = sum(same for *_, same in misjudged)
        accepted = len(misjudged) - refused
        share = f"{100 * (right - refused) / max(1, right):.1f} %"
        print(f"| {file.stem} | {len(golds)} | {right} | {share} | {wrong} | {accepted} |", flush=True)
        for same in (False, True):
            notes += [(file.stem, *case) for case in misjudged if case[3] is same][: options.show]
    pool.close()
    for name, kind, gold, response, same in notes:
        print(f"{name}: {'refused' if same else 'ACCEPTED'} {kind}: {gold!r} <- {response!r}")


if __name__ == "__main__":
    main()
