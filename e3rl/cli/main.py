"""Arguments to commands. Every setting of a recipe can be overridden as ``section.field=value``."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from e3rl import __version__
from e3rl.cli.guard import Post, guarded
from e3rl.config import Config
from e3rl.errors import RunStopped, UserError
from e3rl.sections import shown
from e3rl.synonyms import place_of

_COMMANDS = {
    "init": ("e3rl.cli.init", "write a starter recipe for a model and a dataset, each choice with its reason"),
    "data": ("e3rl.cli.data", "show a recipe's prompts as the model will see them, with lengths, columns and answers"),
    "train": ("e3rl.cli.train", "train a model from a recipe, or resume a run"),
    "rehearse": ("e3rl.cli.rehearse", "run a recipe's commands and processes at a small size, before an expensive job"),
    "eval": ("e3rl.cli.evaluate", "measure Avg@k and Pass@k of a model on held-out problems"),
    "compare": ("e3rl.cli.runs:compare", "compare two evaluations on the same problems, with p-values"),
    "grade": ("e3rl.cli.grade", "check answers: a file of references and responses, graded"),
    "decode": ("e3rl.cli.decode", "answer a prompt with erasable decoding, erasures shown"),
    "calibrate": (
        "e3rl.cli.diagnose:calibrate",
        "choose erasure settings for a model, and collect its calibration statistics",
    ),
    "diagnose": ("e3rl.cli.diagnose:diagnose", "find out whether erasing can help a model on given problems"),
    "serve": ("e3rl.cli.serve:serve", "serve a model with erasable decoding to clients of OpenAI's interface"),
    "rollout-server": ("e3rl.cli.serve:rollout_server", "generate groups for a trainer on another machine"),
    "plan": ("e3rl.cli.plan", "simulate a step on 1 to 1,024 GPUs: its bottleneck and the speed-up"),
    "convert": ("e3rl.cli.convert", "turn another library's training settings into a recipe"),
    "reproduce": ("e3rl.cli.reproduce", "repeat the papers' tables and figures, at the scale that you can afford"),
    "replay": ("e3rl.cli.runs:replay", "learn a skipped step again and see where its NaN comes from"),
    "doctor": ("e3rl.cli.runs:doctor", "check this machine or a run directory, and say what to fix"),
    "view": ("e3rl.cli.runs:view", "serve the page of one or several runs"),
    "settings": ("e3rl.cli.lists:settings", "list every setting, its default and the default's source"),
    "objectives": ("e3rl.cli.lists:objectives", "list every objective with its options"),
}

"""A command's file and its help. The file has `add_arguments` and `run`; a file of several commands has `NAME_arguments` and
`NAME` for each name after a colon."""

_WITH_SETTINGS = (
    *("data", "train", "rehearse", "eval", "decode", "calibrate", "diagnose"),
    *("serve", "rollout-server", "plan", "reproduce"),
)

_OVERRIDE = re.compile(r"(--)?[a-z]\w*\.\w+=")


def settings_help() -> str:
    """Every section with its fields and defaults, a line each."""
    lines = ["settings (override any of them as section.field=value; 'e3rl settings' explains them):"]
    for section, kind in typing.get_type_hints(Config).items():
        names = ", ".join(f.name for f in dataclasses.fields(kind))
        lines += textwrap.wrap(f"{section}: {names}", 110, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


def _functions(command: str) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]:
    """What adds a command's arguments, and what runs it. Imports the command's file."""
    file, _, name = _COMMANDS[command][0].partition(":")
    module = importlib.import_module(file)
    return (getattr(module, f"{name}_arguments"), getattr(module, name)) if name else (module.add_arguments, module.run)


class _Parser(argparse.ArgumentParser):
    """Errors say where a setting of another library, or one without its section, is set."""

    def error(self, message: str) -> NoReturn:
        _, said, rest = message.partition("unrecognized arguments: ")
        names = re.findall(r"--([\w-]+)", rest) if said else []
        hints = [(name, place_of(name.replace("-", "_"), Config)) for name in names]
        found = [
            f"--{name} is set as {place}" + ("=VALUE" if " " not in place else "") for name, place in hints if place
        ]
        super().error("; ".join([message, *found]))


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="e3rl",
        description="Reinforcement learning for language models that can take back a bad step.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"e3rl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, help) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=settings_help() if name in _WITH_SETTINGS else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:  # only the chosen command's module is imported
            _functions(command)[0](sub)
    return parser


def add_setting_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command with settings shares."""
    parser.add_argument("--overlay", action="append", default=[], metavar="RECIPE", help="lay another recipe on top")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="override a setting")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error that the user can fix, 130 for a requested stop."""
    everything = list(sys.argv[1:] if arguments is None else arguments)
    given = [a for a in everything if not _OVERRIDE.match(a)]
    command = next((a for a in given if not a.startswith("-")), None)
    # overrides may stand anywhere, which argparse does not allow beside other positional arguments
    if command in _WITH_SETTINGS:
        options = _parser(command).parse_args(given)
        rest = getattr(options, "overrides", [])  # wrong ones are reported when the settings are read
        options.overrides = [*(a for a in everything if _OVERRIDE.match(a)), *rest]
    else:
        options = _parser(command).parse_args(everything)
    post = Post()
    options.guard = None if post.guarded else partial(guarded, everything)
    return post.left(_exit_code(options))


def _exit_code(options: argparse.Namespace) -> int:
    """Run the chosen command; errors that the user can fix are printed as one line."""
    try:
        return _functions(options.command)[1](options)
    except UserError as error:
        print(f"e3rl: {error}", file=sys.stderr)
        return 2
    except RunStopped as stop:
        print(f"e3rl: {stop}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise a RuntimeError
        if not _is_out_of_memory(error):
            raise
        print(f"e3rl: out of memory: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
        return 2
    except OSError as error:  # a name too long for the file system, a disk that fails
        if error.filename is None and error.errno is None:
            raise
        place = f"{shown(error.filename)}: " if error.filename else ""
        print(f"e3rl: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("e3rl: stopped", file=sys.stderr)
        return 130


def _is_out_of_memory(error: Exception) -> bool:
    signs = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


if __name__ == "__main__":
    sys.exit(main())
