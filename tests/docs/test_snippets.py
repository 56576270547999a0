"""Code on the pages works.

Python blocks compile. Those that are complete, so define every name that they use, are run in a fresh directory, unless
``<!-- not run: reason -->`` stands before them or they leave something out (``...`` or ``…``). Commands are parsed by the real
parser, and their settings must exist.
"""

from __future__ import annotations

import builtins
import re
import shlex
import symtable
from dataclasses import fields
from pathlib import Path

import pytest

from e3rl.cli.main import _COMMANDS, _OVERRIDE, _parser
from e3rl.config import build_config, load_config
from e3rl.errors import UserError
from e3rl.objectives import OBJECTIVES, options
from tests.docs.pages import PAGES, ROOT, Block, blocks, prose

ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [
    b for b in ALL if b.language == "python" and not re.match(r"(async )?def \w+\(.*\)( -> \w+)?$", b.body.strip())
]
TOML = [b for b in ALL if b.language == "toml" and not b.excused]
SHELL = [b for b in ALL if b.language in ("", "bash", "console", "sh") and not b.excused]


def free_names(code: str) -> set[str]:
    """Names that a module uses and nobody defines."""
    top = symtable.symtable(code, "snippet", "exec")
    tables, used = [top], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
        if table is top:
            used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and not s.is_assigned()}
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    return used - defined - set(dir(builtins))


def is_complete(block: Block) -> bool:
    left_out = "..." in block.body or "…" in block.body
    return not (block.excused or left_out or free_names(block.body))


COMPLETE = [b for b in PYTHON if is_complete(b)]


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: b.name)
def test_python_compiles(block: Block):
    compile(block.body, block.name, "exec")


@pytest.mark.parametrize("block", COMPLETE, ids=lambda b: b.name)
def test_complete_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block.body, block.name, "exec"), {"__name__": "snippet"})


def test_some_snippets_are_run():
    assert {b.page.name for b in COMPLETE} >= {"quickstart.md", "own-reward.md", "rewards.md"}
    assert free_names("import re\nx = re.sub\ndef f(a):\n    return a + x + y\nprint(z)") == {"y", "z"}


def commands(block: Block) -> list[str]:
    """The e3rl commands of a block, without what the shell does around them."""
    lines = (line.removeprefix("$ ").strip() for line in block.body.replace("\\\n", " ").splitlines())
    return [re.split(r"\s[>|]\s|\s&&\s", line)[0] for line in lines if line.startswith("e3rl ")]


COMMANDS = [(b.name, command) for b in SHELL for command in commands(b)]


def check_command(command: str) -> None:
    """Parse a command as `e3rl.cli.main.main` does, and check its settings."""
    given = shlex.split(command.replace("…", ""), comments=True)[1:]
    overrides = [a for a in given if _OVERRIDE.match(a)]
    rest = [a for a in given if not _OVERRIDE.match(a)]
    _parser(next((a for a in rest if not a.startswith("-")), None)).parse_args(rest)
    load_config(overrides=overrides)


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[f"{w}-{i}" for i, (w, _) in enumerate(COMMANDS)])
def test_commands_are_understood(where: str, command: str, capsys: pytest.CaptureFixture[str]):
    try:
        check_command(command)
    except SystemExit:
        pytest.fail(f"{where}: {command}\n{capsys.readouterr().err}")


def test_wrong_commands_are_noticed():
    with pytest.raises(SystemExit):
        check_command("e3rl train demo --no-such-option")
    with pytest.raises(UserError, match="learning_rte"):
        check_command("e3rl train demo train.learning_rte=1")
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_the_text_exist(page: Path):
    assert set(re.findall(r"`e3rl ([a-z][\w-]*)", prose(page))) <= _COMMANDS.keys()


@pytest.mark.parametrize("block", TOML, ids=lambda b: b.name)
def test_recipes_on_the_pages_are_valid(block: Block):
    import tomllib

    assert build_config(tomllib.loads(block.body))


def objective_options() -> set[str]:
    """The options of all objectives; one section holds those of whichever is chosen."""
    return {field.name for name in OBJECTIVES for field in options(name)}


def own_words(page: Path) -> str:
    """A page's prose; of tables that put other libraries' names beside ours, the last column alone."""
    if not page.name.startswith("from-"):
        return prose(page)
    lines = prose(page).splitlines()
    return "\n".join(line.rstrip(" |").rpartition("|")[2] if line.startswith("|") else line for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_named_in_the_text_exist(page: Path):
    config = build_config({})
    known = {section.name: {f.name for f in fields(getattr(config, section.name))} for section in fields(config)}
    known["objective"] |= objective_options()
    for section, field in re.findall(r"`(\w+)\.(\w+)(?: ?= ?[^`]*)?`", own_words(page)):
        if section in known and field != "safetensors":
            assert field in known[section], f"{section}.{field}"
