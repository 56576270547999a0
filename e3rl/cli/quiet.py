"""Keeps the progress bars and notices of other libraries out of a command's output."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Only errors of transformers, datasets and the hub are shown."""
    import warnings

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # what they will rename is nothing that a user can put right
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
