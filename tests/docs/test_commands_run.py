"""Every e3rl command of the README and the quickstart is run, made small, and says what the pages say of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from e3rl.cli import main
from tests.docs.pages import ROOT, blocks
from tests.docs.test_snippets import commands

README, QUICKSTART = ROOT / "README.md", ROOT / "docs" / "quickstart.md"
SMALL = "train.steps=1 train.prompts_per_step=2 rollout.num_generations=2"
HELD_OUT = "eval.limit=2 eval.num_samples=2"
OWN = "train.steps=1"

RUN: tuple[tuple[str, str, str], ...] = (
    ("e3rl train demo --again", f"{SMALL} {HELD_OUT}", r"report  runs/demo/report\.html"),
    (
        "e3rl train demo run.name=grpo objective.name=grpo rollout.erase=false",
        f"{SMALL} {HELD_OUT}",
        "GRPO, 1 step .* erase rate 0.000",
    ),
    ("e3rl train demo run.name=paper --overlay paper-uncertainty", f"{SMALL} {HELD_OUT}", "E³RL, 1 step"),
    ('e3rl decode lab "81-7+3+1-6-8:"', "", "A:64\n2 segments erased"),
    ('e3rl decode lab "81-7+3+1-6-8:" --plain', "", r"\n81-7=75.*\n0 segments erased"),
    ('e3rl decode lab "81-7+3+1-6-8:" --samples 8', "", r"\[7\] (.|\n)*segments? erased"),
    (
        "e3rl train my.toml",
        "",
        r"step 1/20  reward 0\.[12](.|\n)*reward 0\.[78]\d+ → (0\.9|1\.0)(.|\n)*model   runs/mine/model",
    ),
    ("e3rl train my.toml --resume", "train.steps=21", "E³RL, 21 steps"),
    (
        "e3rl train my.toml run.name=plain rollout.erase=false objective.name=grpo",
        OWN,
        r"GRPO(.|\n)*erase rate 0\.000",
    ),
    ("e3rl eval lab lab:chain --erase", HELD_OUT, r"Avg@2(.|\n)*Pass@2(.|\n)*erasable"),
    ("e3rl eval runs/demo/model lab:chain --erase", HELD_OUT, r"Avg@2(.|\n)*erasable"),
    ("e3rl diagnose lab lab:path:2", "--problems 4 --retries 1 --temperatures 1 --settings whole", "page: diagnosis/"),
    ("e3rl train qwen3-8b --plan --device-memory 139 --ranks 8", "", r"optimizer(.|\n)*GiB"),
    ("e3rl init Qwen/Qwen3-0.6B problems.jsonl", "", r"recipe\.toml"),
    ("e3rl data recipe.toml", "", r"4 with an answer \(column 'answer'\)"),
)
"""Commands as they stand on the pages, what is added to make them small, and what they print, in an order that works."""

ELSEWHERE = {
    "e3rl view runs/demo": "tests/report/test_server.py",
    "e3rl view runs/demo runs/grpo runs/paper": "tests/report/test_server.py",
    "e3rl serve runs/demo/model": "tests/serve/test_server.py",
}
"""Commands that go on until they are stopped, and the tests that start them."""


def on_the_pages() -> set[str]:
    found = [c for page in (README, QUICKSTART) for b in blocks(page) for c in commands(b) if b.language != "json"]
    return {re.split(r"\s+# ", command)[0].strip() for command in found}


def test_no_command_is_forgotten():
    assert on_the_pages() == {command for command, _, _ in RUN} | ELSEWHERE.keys()
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


def test_the_commands_do_what_the_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = {b.language: b.body for b in blocks(QUICKSTART)}  # the last of each language
    for name, language in (("problems.jsonl", "json"), ("my_rewards.py", "python"), ("my.toml", "toml")):
        (tmp_path / name).write_text(found[language], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for command, more, words in RUN:
        given = shlex.split(f"{command} {more}".removeprefix("e3rl ").replace("Qwen/Qwen3-0.6B", "lab"))
        assert main(given) == 0, (command, capsys.readouterr().err)
        said = "".join(capsys.readouterr())
        assert re.search(words, said), (command, said)
