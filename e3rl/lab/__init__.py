"""The lab: a tiny model that comes with the package, and procedural problems of which it solves about half."""

from __future__ import annotations

from pathlib import Path


def lab_directory() -> Path:
    """The embedded model: an ordinary Hugging Face directory inside the package."""
    return Path(__file__).parent / "weights"


def tools_directory() -> Path:
    """The embedded model that calls tools (`e3rl.lab.books`)."""
    return Path(__file__).parent / "tools"


def mazes_directory() -> Path:
    """The embedded model that searches mazes (`e3rl.lab.maze`)."""
    return Path(__file__).parent / "mazes"
