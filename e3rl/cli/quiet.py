"""Keeps the progress bars and notices of other libraries out of a command's output."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Only errors of transformers, datasets and the hub are shown."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
