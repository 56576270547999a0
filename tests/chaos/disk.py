"""A disk that fills up, for real: a small file system in memory, runs that hit its end at many places, and what is left.

    python -m tests.chaos.disk          (needs the right to mount a tmpfs)

Each run must end with a sentence and exit code 2, its newest checkpoint must be intact, and after there is room again it
must end as a run that always had room.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from e3rl.files import damage
from e3rl.train.checkpoint import list_checkpoints
from tests.chaos.kills import RECIPE, Crash, live, outcome

ROOM = "64m"


@contextlib.contextmanager
def small_disk(kilobytes: int) -> Iterator[Path]:
    """A mounted file system of that size."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    try:
        with small_disk(1024):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@dataclass
class Full:
    """What came of the full disks."""

    disks: int = 0
    sentences: int = 0
    intact: int = 0
    identical: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, for people."""
        return [
            f"full disks {self.disks}: ended with a sentence {self.sentences}, newest checkpoint intact {self.intact}, "
            f"identical finals once there was room {self.identical}",
            *self.wrong,
        ]


def fill(sizes: list[int], recipe: str = RECIPE) -> Full:
    """A run on a disk of each size in kilobytes."""
    found = Full()
    with tempfile.TemporaryDirectory() as elsewhere:
        place = Path(elsewhere)
        path = place / "recipe.toml"
        path.write_text(recipe, encoding="utf-8")

        def train(disk: Path, name: str, *more: str) -> int | None:
            command = ["train", str(path), f"run.output_dir={disk}", "run.name=r", *more]
            return live(command, place / f"{name}.log", Crash(kind="none")).status

        train(place, "roomy")
        expected = outcome(place / "r")
        for size in sizes:
            found.disks += 1
            with small_disk(size) as disk:
                status = train(disk, f"full-{size}")
                said = (place / f"full-{size}.log").read_text(encoding="utf-8")
                if status == 2 and "no space left on the disk" in said and "Traceback" not in said:
                    found.sentences += 1
                else:
                    found.wrong.append(f"{size} kB: exit {status}: {said[-1500:]}")
                checkpoints = list_checkpoints(disk / "r")
                found.intact += not checkpoints or damage(checkpoints[0]) is None
                os.sync()
                subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(disk)], check=True)
                again = ["--resume"] * (disk / "r" / "config.toml").exists()
                if train(disk, f"again-{size}", *again) != 0:
                    found.wrong.append(f"{size} kB: {(place / f'again-{size}.log').read_text()[-1500:]}")
                    continue
                differing = [key for key, value in outcome(disk / "r").items() if value != expected[key]]
                found.identical += not differing
                found.wrong += [f"{size} kB: differs in {', '.join(differing)}"] * bool(differing)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [4, 100, 3000, 8000, 9000, 16000, 17500, 25500]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="kilobytes of each disk")
    options = parser.parse_args()
    if not can_mount():
        print("full disks: not tried, this user may not mount a tmpfs")
        return
    found = fill(options.sizes)
    print("\n".join(found.lines()))
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()
