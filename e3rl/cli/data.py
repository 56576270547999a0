"""`e3rl data`: what a recipe's data are, and its prompts as the model will see them. Loads no weights."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import announce_foreign_code, quiet_libraries, read_recipe
from e3rl.cli.recipes import recipe_names
from e3rl.errors import UserError

if TYPE_CHECKING:
    from e3rl.config import Config
    from e3rl.models import Outline
    from e3rl.types import Problem, Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--show", type=int, default=2, metavar="N", help="prompts to print in full (default 2)")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.show < 0:
        raise UserError("--show must be at least 0")
    config = read_recipe(options)
    if config.data.transform:
        announce_foreign_code(config)
    quiet_libraries()

    from e3rl.data.loading import held_out_sources, load_problems
    from e3rl.models import load_outline

    outline = load_outline(config.model)
    shares = config.data.sources
    sources: list[tuple[str, Any]] = [(source, "train") for source in shares]
    sources += [(source, "eval") for source in held_out_sources(config.data)]
    for source, split in sources:
        problems = load_problems(source, config=config.data, split=split)
        part = f" ({100 * shares[source]:.3g} % of the prompts)" if split == "train" and len(shares) > 1 else ""
        name = f"training data{part}" if split == "train" else "held-out data"
        print(f"{name}: {source}", *_lines(problems, outline, config, options.show), "", sep="\n")
    return 0


def _lines(problems: Sequence[Problem], outline: Outline, config: Config, show: int) -> Iterator[str]:
    from e3rl.data.loading import spread
    from e3rl.data.prompts import prompt_limit, render_prompts
    from e3rl.data.starter import percentile

    unlimited = replace(config.data, max_prompt_length=0)  # what is too long is counted here, not refused
    prompts = render_prompts(problems, outline.tokenizer, unlimited, context_limit=2**31, completion_limit=1)
    limit = prompt_limit(config.data, outline.context_length, config.rollout.completion_limit)
    lengths = [len(p.ids) for p in prompts]
    columns = list(dict.fromkeys(name for p in problems for name in p.columns))
    answered = sum(p.answer is not None for p in problems)
    yield f"  problems      {len(problems)}, {answered} with an answer (column '{config.data.answer_column}')"
    if config.data.transform:
        yield f"  rows          as {config.data.transform} makes them"
    yield f"  other columns {', '.join(columns) or 'none'}: reward functions get them by name"
    yield (
        f"  prompt tokens {min(lengths)} to {max(lengths)}, median {statistics.median(lengths):.0f}, "
        f"95 % have at most {percentile(lengths, 0.95)}"
    )
    longer = sum(length > limit for length in lengths)
    told = f", and {longer} are longer, which training refuses" if longer else ""
    yield f"  limit         {limit} tokens a prompt beside responses of up to {config.rollout.completion_limit}{told}"
    for prompt in spread(prompts, show) if show else []:
        yield from _shown(prompt, outline.tokenizer)


def _shown(prompt: Prompt, tokenizer: Any) -> Iterator[str]:
    yield f"  --- problem '{prompt.problem.id}', {len(prompt.ids)} tokens, special tokens included"
    yield from (f"  | {line}" for line in tokenizer.decode(list(prompt.ids)).split("\n"))
    yield f"  answer: {prompt.problem.answer!r}"
