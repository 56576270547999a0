"""Every file of a run, damaged: a byte flipped, or the file cut short; then the run is resumed.

    python -m tests.chaos.damage --seconds 120

The run, which was killed in its second step, must end as the unharmed one, or say what is damaged.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from e3rl.files import is_litter
from tests.chaos.trials import Place, Verdicts


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


def try_damage(directory: Path, seconds: float, trials: int, seed: int = 0) -> Verdicts:
    """Harm copies of an unfinished run, each once, for so long."""
    end, rng, place = time.monotonic() + seconds, random.Random(seed), Place(directory)
    verdicts = Verdicts(place.run("unharmed"))
    whole = place.unfinished("unfinished")
    for number, (file, kind, where) in enumerate(harms(whole, rng)):
        if number >= trials or time.monotonic() > end:
            break
        shutil.copytree(whole, place.run("harmed"))
        harm(place.run("harmed") / file, kind, where, rng)
        life = place.train("harmed")
        what = f"{file}: {kind} at byte {where}"
        verdicts.add(what, place.expected, life.status, place.said("harmed"), place.run("harmed"))
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
