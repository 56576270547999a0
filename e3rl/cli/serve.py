"""Servers: `e3rl serve` for clients of OpenAI's interface, `e3rl rollout-server` for a trainer elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from e3rl.cli.main import add_setting_arguments
from e3rl.cli.opening import announce_foreign_code, open_model, quiet_libraries, read_recipe
from e3rl.cli.recipes import recipe_names
from e3rl.cluster import TOKEN_VARIABLE
from e3rl.errors import UserError

if TYPE_CHECKING:
    from e3rl.serve.service import Service
    from e3rl.web.access import Access


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory, a hub id, 'lab' or 'smollm2'")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes any free one")
    parser.add_argument("--token", help="asked of every client as Authorization: Bearer TOKEN; needed with --host")
    parser.add_argument("--name", help="the model's name to clients; default: MODEL as given")
    parser.add_argument(
        "--max-length", type=int, default=4096, metavar="TOKENS", help="longest prompt and answer together"
    )
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="groups that may wait; more are refused")
    parser.add_argument(
        "--drain",
        type=float,
        default=30,
        metavar="SECONDS",
        help="for requests in progress to finish at a stop; default: 30",
    )
    parser.add_argument(
        "--replicas", type=int, default=0, metavar="N", help="copies of the model, each in a process, on Ray Serve"
    )
    parser.add_argument("--page", action="store_true", help="serve a page at / that shows erasures live")
    add_setting_arguments(parser)


def serve(options: argparse.Namespace) -> int:
    """`e3rl serve`: erasable decoding for clients of OpenAI's interface."""
    from e3rl.web.access import Access

    access = Access(options.host, options.token)
    if options.max_length < 2 or options.queue < 1:
        raise UserError("--max-length must be at least 2 and --queue at least 1")
    if not 0 <= options.drain < float("inf"):
        raise UserError("--drain must be a number of seconds, at least 0")

    if options.replicas:
        return _serve_replicas(options, access)

    from e3rl.serve.server import make_server

    service = _open_service(options)
    with make_server(service, access, options.port, drain_s=options.drain) as server:
        try:
            server.run_until_interrupted("/v1")
        finally:
            service.close()
    return 0


def _open_service(options: argparse.Namespace) -> Service:
    """The model that ``options`` name, ready to decode."""
    from e3rl.serve.service import Service

    opened = open_model(options)
    if opened.calibration is None:
        print(
            'no calibration statistics beside the model: single samples need "e3rl": {"erase": false}', file=sys.stderr
        )
    return Service(
        opened.load_policy(),
        opened.config,
        opened.calibration,
        name=options.name or options.model,
        max_length=options.max_length,
        queue_limit=options.queue,
        live=options.page,
    )


def _serve_replicas(options: argparse.Namespace, access: Access) -> int:
    """Copies on Ray Serve until Ctrl+C or SIGTERM."""
    if options.replicas < 0:
        raise UserError("--replicas must be at least 1")
    if options.page:
        raise UserError("--page shows one process: leave out --replicas")

    from e3rl.serve.replicas import run_replicas

    open_model(options)  # reports mistakes before Ray starts
    run_replicas(
        partial(_open_service, options),
        access,
        count=options.replicas,
        port=options.port,
        queue=options.queue,
        drain_s=options.drain,
    )
    return 0


def rollout_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help=f"the run's own: a TOML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: only this machine")
    parser.add_argument("--port", type=int, default=8100, help="default: 8100; 0 takes any free one")
    parser.add_argument("--token", help=f"asked of the trainer; default: ${TOKEN_VARIABLE}; needed with --host")
    parser.add_argument(
        "--longest-prompt", type=int, default=1024, metavar="TOKENS", help="longest prompt that rows have room for"
    )
    add_setting_arguments(parser)


def rollout_server(options: argparse.Namespace) -> int:
    """`e3rl rollout-server`: generates groups for a trainer elsewhere."""
    from e3rl.web.access import Access

    access = Access(options.host, options.token or os.environ.get(TOKEN_VARIABLE))
    if options.longest_prompt < 1:
        raise UserError("--longest-prompt must be at least 1")
    config = read_recipe(options)
    announce_foreign_code(config)

    from e3rl.cluster.server import make_server
    from e3rl.cluster.worker import RolloutWorker
    from e3rl.models import load_policy
    from e3rl.plan.fit import require_generation_fits

    quiet_libraries()
    require_generation_fits(config, options.longest_prompt)
    policy = load_policy(config.model)
    largest = 2**24 + 2 * sum(p.numel() * p.element_size() for p in policy.model.parameters())

    worker = RolloutWorker(config, options.longest_prompt, policy)
    with make_server(worker, access, options.port, largest) as server:
        server.run_until_interrupted()
    return 0
