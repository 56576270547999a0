"""`e3rl rollout-server`: generates groups for a trainer elsewhere."""

from __future__ import annotations

import argparse
import os

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import announce_foreign_code, quiet_libraries, read_recipe
from e3rl.cli.recipes import recipe_names
from e3rl.cluster import TOKEN_VARIABLE
from e3rl.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"the run's own: a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=int, default=8100, help="default: 8100; 0 takes any free one")
    parser.add_argument("--token", help=f"asked of the trainer; default: ${TOKEN_VARIABLE}; needed with --host")
    parser.add_argument(
        "--longest-prompt", type=int, default=1024, metavar="TOKENS", help="longest prompt that rows have room for"
    )
    add_setting_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from e3rl.web.access import Access

    access = Access(options.host, options.token or os.environ.get(TOKEN_VARIABLE))
    if options.longest_prompt < 1:
        raise UserError("--longest-prompt must be at least 1")
    config = read_recipe(options)
    announce_foreign_code(config)

    from e3rl.cluster.server import make_server
    from e3rl.cluster.worker import RolloutWorker
    from e3rl.models import load_policy

    quiet_libraries()
    policy = load_policy(config.model)
    largest = 2**24 + 2 * sum(p.numel() * p.element_size() for p in policy.model.parameters())

    worker = RolloutWorker(config, options.longest_prompt, policy)
    with make_server(worker, access, options.port, largest) as server:
        server.run_until_interrupted()
    return 0
