"""`e3rl decode`: decodes a prompt and shows erasures as they happen."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import open_model
from e3rl.cli.recipes import find_recipes
from e3rl.config import layered
from e3rl.errors import UserError
from e3rl.parsing import parse_json
from e3rl.types import Problem

if TYPE_CHECKING:
    from e3rl.generation import Generation


LAB_PROBLEM = "81-7+3+1-6-8:"
"""The default prompt: a held-out problem of the embedded model's training level."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument(
        "prompt", nargs="?", help="the prompt; '-' reads it from standard input; default: a lab problem"
    )
    parser.add_argument("--plain", action="store_true", help="no erasing, for comparison")
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers to draw; K > 1 are one group")
    parser.add_argument("--json", action="store_true", help="print one JSON object a sample instead of text")
    parser.add_argument("--row", metavar="JSON", help="with environments.factory: the row passed to its reset()")
    parser.add_argument("--html", metavar="FILE", help="also write a page with every token's entropy")
    add_setting_arguments(parser)


def _prompt(given: str | None) -> str:
    if given is None:
        return LAB_PROBLEM
    prompt = sys.stdin.read().strip() if given == "-" else given
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt


def _row(options: argparse.Namespace, factory: str) -> dict[str, Any]:
    if options.row is None:
        return {}
    if not factory:
        raise UserError("--row is for an environment: name it, environments.factory=…")
    row = parse_json(options.row, "--row")
    if not isinstance(row, dict):
        raise UserError("--row must be a JSON object")
    return row


def _problem(options: argparse.Namespace, factory: str) -> Problem:
    """The prompt with its row, or a lab problem."""
    if options.prompt is None and factory == "books":
        from e3rl.lab.problems import generate

        return generate("books", 4, "heldout", 1)[0]
    return Problem("prompt-0", _prompt(options.prompt), columns=_row(options, factory))


def run(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise UserError("--samples must be at least 1")

    opened = open_model(options)
    problem = _problem(options, opened.config.environments.factory)

    from rich.console import Console

    from e3rl.cli.live import LiveText
    from e3rl.generation import generate

    chosen = layered({}, find_recipes(options.overlay), options.overrides).get("rollout", {})
    policy = opened.load_policy()
    text = None if options.json else LiveText(Console(), str(problem.prompt), policy.tokenizer)
    generations = generate(
        policy,
        problem,
        erase=not options.plain,
        samples=options.samples,
        config=opened.config,
        whole=not chosen.keys() & {"max_segments", "max_completion_length"},
        observe=text.observe if text else None,
    )[0]
    if text:
        text.close(generations)
    else:
        for generation in generations:
            print(json.dumps(_record(generation, policy.tokenizer), ensure_ascii=False))
    if options.html:
        from e3rl.report import write_token_view

        write_token_view(Path(options.html), [g.trajectory for g in generations], policy.tokenizer)
        print(f"page: {options.html}", file=sys.stderr)
    return 0


def _record(generation: Generation, tokenizer: Any) -> dict[str, Any]:
    from e3rl.data.pieces import Pieces
    from e3rl.train.ledger import response_columns

    return {"text": generation.text, **response_columns(generation.trajectory, Pieces(tokenizer))}
