"""Every file of a run, damaged: a byte flipped, or the file cut short; then the run is resumed.

    python -m tests.chaos.damage --seconds 120

The run, which was killed in its last step, must end as the unharmed one; or be refused with a sentence that names the file;
or name the file and what became of it, and then differ in nothing but what the sentence says. Rollouts of steps that are
done are not read by a resumed run: of these `e3rl doctor` must name the file, and no other may differ.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from e3rl.doctor.run import check_run
from e3rl.files import is_litter
from tests.chaos.kills import Life, differing, outcome
from tests.chaos.trials import Place, Verdicts, broken


def harms(run: Path, rng: random.Random) -> Iterator[tuple[Path, str, int]]:
    """Endless harms: a file (each as often), the kind, and where."""
    files = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file() and not is_litter(p))
    while True:
        for file in files:
            size = (run / file).stat().st_size
            if size:
                yield file, rng.choice(["flip", "flip", "cut"]), rng.randrange(size)


def harm(path: Path, kind: str, where: int, rng: random.Random) -> None:
    """Flip one bit of the byte, or cut the file there."""
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[where] ^= 1 << rng.randrange(8)
    path.write_bytes(data if kind == "flip" else data[:where])


def judge(file: Path, expected: Mapping[str, Any], life: Life, said: str, run: Path) -> tuple[str, str]:
    """How a run ended whose ``file`` was damaged, and why that is wrong; empty where it is not."""
    if wrong := broken(life, said):
        return "", wrong
    if life.status == 2:
        *_, sentence = said.split("e3rl: ")
        return "refused, naming the file", "" if file.name in sentence else f"refused without naming {file.name}"
    found = outcome(run)
    if not differing(expected, found):
        return "identical", ""
    if file.parts[0] == "rollouts":
        return "identical but for the file, which doctor names", _unlike_rollouts(file, expected, found, run)
    if file.name == "metrics.jsonl":
        wrong = _unlike_metrics(expected, found, said)
    elif file.name == "evaluations.jsonl":
        wrong = _unlike_evaluations(expected, found, said)
    else:
        wrong = _unlike(expected, found)
    return "the loss named, and nothing else lost", wrong


def _unlike(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How a run is not as it should be."""
    keys = differing(expected, found)
    return f"differs in {', '.join(keys)}" if keys else ""


def _unlike_rollouts(file: Path, expected: Mapping[str, Any], found: Mapping[str, Any], run: Path) -> str:
    if not any(f.kind == "problem" and f.subject == str(file) for f in check_run(run)):
        return f"doctor doesn't name {file}"

    def others(run: Mapping[str, Any]) -> dict[str, Any]:
        return {**run, "rollouts": {name: rows for name, rows in run["rollouts"].items() if name != file.name}}

    return _unlike(others(expected), others(found))


def _numbers(words: str) -> set[int]:
    """The numbers that `ranges` put into words."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", words):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _kept_copies(expected: Mapping[str, Any], said: str) -> list[str]:
    """The files that a run should have: a damaged log is kept where the run says so."""
    return sorted([*expected["files"], *re.findall(r"the file as it was is kept as (\S+)", said)])


def _unlike_metrics(expected: Mapping[str, Any], found: Mapping[str, Any], said: str) -> str:
    """Lines are lost, of the steps that are named."""
    named = re.search(r"metrics\.jsonl: nothing is logged of step ([\d ,to]+);", said)
    lost = _numbers(named[1]) if named else set()
    allowed = {
        **expected,
        "metrics": [r for r in expected["metrics"] if r["step"] not in lost],
        "summary": {**expected["summary"], **({k: found["summary"][k] for k in ("r", "erase_rate")} if lost else {})},
        "files": _kept_copies(expected, said),
    }
    return _unlike(allowed, found)


def _unlike_evaluations(expected: Mapping[str, Any], found: Mapping[str, Any], said: str) -> str:
    """As many lines are lost as is said, and the summary lacks what they held."""
    named = re.search(r"evaluations\.jsonl: (\d+) of (\d+) evaluations? .* missing", said)
    there = [r for r in expected["evaluations"] if r in found["evaluations"]]
    lost = len(expected["evaluations"]) - len(there)
    if lost and (named is None or int(named[1]) != lost):
        return f"{lost} evaluations are lost, and that isn't said"
    before = found["summary"]["before"] if lost else expected["summary"]["before"]
    allowed = {
        **expected,
        "evaluations": there,
        "summary": {**expected["summary"], "before": before},
        "files": _kept_copies(expected, said),
    }
    return _unlike(allowed, found)


def try_damage(directory: Path, seconds: float, trials: int, seed: int = 0) -> Verdicts:
    """Harm copies of an unfinished run, each once, for so long."""
    end, rng, place = time.monotonic() + seconds, random.Random(seed), Place(directory)
    verdicts, whole, run = Verdicts(), place.unfinished("unfinished"), place.run("harmed")
    for number, (file, kind, where) in enumerate(harms(whole, rng)):
        if number >= trials or time.monotonic() > end:
            break
        shutil.copytree(whole, run)
        harm(run / file, kind, where, rng)
        life = place.train("harmed")
        said = place.said("harmed")
        how, wrong = judge(file, place.expected, life, said, run)
        verdicts.add(f"{file}: {kind} at byte {where}", how, wrong, said)
        place.forget("harmed")
    return verdicts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        verdicts = try_damage(Path(directory), options.seconds, options.trials, options.seed)
    print("\n".join(verdicts.lines("damaged files")))
    raise SystemExit(bool(verdicts.wrong))


if __name__ == "__main__":
    main()
