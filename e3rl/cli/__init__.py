"""The command line. Importing it imports neither torch nor transformers; each command imports what it needs."""

from e3rl.cli.main import main

__all__ = ["main"]
