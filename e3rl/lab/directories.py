"""Where the models that come with the package live."""

from __future__ import annotations

from pathlib import Path


def lab_directory() -> Path:
    """The embedded model: an ordinary Hugging Face directory inside the package."""
    return Path(__file__).parent / "weights"
