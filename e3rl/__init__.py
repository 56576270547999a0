"""e3rl: reinforcement learning for reasoning language models that can take back a bad step.

from e3rl import Trainer, generate, load_config
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Generation", "Trainer", "UserError", "generate", "load_config"]

if TYPE_CHECKING:
    from e3rl.config import load_config
    from e3rl.errors import UserError
    from e3rl.generation import Generation, generate
    from e3rl.train.trainer import Trainer

_HOMES = {
    "Generation": "e3rl.generation",
    "Trainer": "e3rl.train.trainer",
    "UserError": "e3rl.errors",
    "generate": "e3rl.generation",
    "load_config": "e3rl.config",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import e3rl` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'e3rl' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
