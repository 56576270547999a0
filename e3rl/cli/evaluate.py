"""`e3rl eval`: a model's held-out accuracy, plain and erasable."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.recipes import find_recipe, find_recipes
from e3rl.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("data", help="held-out problems: a file, a hub id or lab:FAMILY[:LEVEL]")
    parser.add_argument("--erase", action="store_true", help="evaluate erasable decoding beside plain")
    parser.add_argument(
        "--recipe", help="take the other settings from this recipe; default: those saved beside the model"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from e3rl.cli.quiet import quiet_libraries
    from e3rl.data.loading import load_problems
    from e3rl.data.prompts import render_prompts
    from e3rl.evaluate.evaluation import evaluate, spread
    from e3rl.evaluate.tables import results_table
    from e3rl.files import write_json
    from e3rl.models import load_policy, resolve_model_path
    from e3rl.rewards.scorer import Scorer
    from e3rl.rollout.companions import find_companions
    from e3rl.rollout.engines import build_engine

    quiet_libraries()
    companions = find_companions(resolve_model_path(options.model))
    recipe = find_recipe(options.recipe) if options.recipe else companions.recipe
    config = load_config(recipe, find_recipes(options.overlay), options.overrides)
    problems = load_problems(options.data, config=config.data, split="eval")
    problems = spread(problems, config.eval.limit)
    policy = load_policy(replace(config.model, path=options.model))
    prompts = render_prompts(
        problems,
        policy.tokenizer,
        config.data,
        context_limit=policy.context_length,
        completion_limit=config.rollout.completion_limit,
    )
    engine = build_engine(config.rollout, policy.model, policy.eos_ids, max(len(p.ids) for p in prompts))
    records = {}
    with Scorer(config.rewards, max_completion_length=config.rollout.completion_limit) as scorer:
        for erase in (False, True) if options.erase else (False,):
            result = evaluate(
                engine, prompts, scorer, policy.tokenizer, config, erase=erase, reference=companions.reference
            )
            records[result.mode] = result.record()
    Console().print(results_table(f"{options.model} on {options.data}", list(records.items())))
    if options.output:
        write_json(options.output, {"model": options.model, "data": options.data, **records})
    return 0
