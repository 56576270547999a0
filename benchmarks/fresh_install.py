"""The wheel as a stranger meets it: a clean environment for each Python, no repository, every command with its time.

    python benchmarks/fresh_install.py --python python3.11 --python python3.13 --json out.json

Builds the wheel once, and for each Python makes an environment, installs PyTorch and the wheel into it, and then, in an empty
directory, trains the demo, decodes, evaluates, and serves to the official openai client. A step that fails ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLIENT = """
import sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none")
whole = client.completions.create(model="lab", prompt="47+5-8+3:", seed=1)
pieces = client.completions.create(model="lab", prompt="47+5-8+3:", seed=1, stream=True)
streamed = "".join(piece.choices[0].text for piece in pieces)
assert whole.choices[0].text == streamed, (whole.choices[0].text, streamed)
print(streamed)
"""


@dataclass(frozen=True)
class Step:
    """One thing that a new user does, and how long it took."""

    name: str
    seconds: float
    said: str


class Steps:
    """Commands in one environment, timed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bin = directory / "venv" / "bin"
        self._environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.done: list[Step] = []

    def run(self, name: str, *command: str) -> None:
        """Run a command of the environment and keep its time and its last line."""
        began = time.perf_counter()
        done = subprocess.run(
            [str(self._bin / command[0]) if (self._bin / command[0]).exists() else command[0], *command[1:]],
            cwd=self._directory, env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        self._note(name, began, done.stdout)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")

    def serve_and_ask(self) -> None:
        """`e3rl serve` until the openai client has its answer, whole and streamed."""
        began = time.perf_counter()
        command = [str(self._bin / "e3rl"), "serve", "lab", "--port", "0"]
        with subprocess.Popen(
            command, cwd=self._directory, env=self._environment, stdout=subprocess.PIPE, text=True
        ) as server:
            try:
                assert server.stdout is not None
                address = re.search(r"http://\S+", server.stdout.readline())
                if address is None:
                    sys.exit("e3rl serve did not start")
                asked = subprocess.run(
                    [str(self._bin / "python"), "-c", CLIENT, address[0]],
                    cwd=self._directory, env=self._environment, capture_output=True, text=True, check=False,
                )  # fmt: skip
            finally:
                server.terminate()
        self._note("serve, asked by the openai client", began, asked.stdout)
        if asked.returncode:
            sys.exit(f"the openai client failed:\n{asked.stderr}")

    def _note(self, name: str, began: float, output: str) -> None:
        lines = [line for line in output.strip().splitlines() if line.strip()]
        self.done.append(Step(name, time.perf_counter() - began, lines[-1][:120] if lines else ""))
        print(f"{self.done[-1].seconds:7.1f} s  {name}", flush=True)


def build_wheel(directory: Path) -> Path:
    """The wheel of this working tree."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(directory), str(ROOT)], check=True
    )
    (wheel,) = directory.glob("e3rl-*.whl")
    return wheel


def try_python(python: str, wheel: Path, torch: str, steps: int) -> list[Step]:
    """All steps with one Python."""
    with tempfile.TemporaryDirectory(prefix="fresh-") as name:
        directory = Path(name)
        user = Steps(directory)
        user.run("make an environment", python, "-m", "venv", "venv")
        user.run(f"install {torch}", "python", "-m", "pip", "install", "-q", torch)
        user.run("install the wheel", "python", "-m", "pip", "install", "-q", str(wheel))
        user.run("e3rl --help", "e3rl", "--help")
        few = [] if steps == 50 else [f"train.steps={steps}", "eval.limit=24"]
        user.run(f"train the demo, {steps} steps", "e3rl", "train", "demo", *few)
        user.run("decode", "e3rl", "decode", "lab")
        user.run(
            "evaluate 24 problems × 8, plain and erasable",
            "e3rl",
            "eval",
            "lab",
            "lab:chain",
            "--erase",
            "eval.limit=24",
        )
        user.run("install openai", "python", "-m", "pip", "install", "-q", "openai>=2")
        user.serve_and_ask()
        return user.done


def versions(python: str) -> str:
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(results: dict[str, list[Step]]) -> str:
    """Steps by Python as a Markdown table of seconds."""
    names = [step.name for step in next(iter(results.values()))]
    rows = [["step", *results], ["---"] * (1 + len(results))]
    rows += [[name, *(f"{steps[i].seconds:.1f}" for steps in results.values())] for i, name in enumerate(names)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", required=True, help="an interpreter; may be given several times")
    parser.add_argument("--torch", default="torch==2.13.0+cpu", help="what is installed first (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="training steps of the demo (default: all 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step with what it said there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        wheel = build_wheel(Path(name))
        results = {}
        for python in options.python:
            print(versions(python), flush=True)
            results[versions(python)] = try_python(python, wheel, options.torch, options.steps)
    print(table(results))
    if options.json:
        found = {python: [asdict(step) for step in steps] for python, steps in results.items()}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
