"""Makes .venv-ranks: e3rl with DeepSpeed, built for what is here. Standard library only.

Run by `make test-ranks`, with E3RL_VENV=.venv-ranks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setup

DEEPSPEED = "deepspeed==0.19.8"


def install_deepspeed() -> None:
    """Its build looks at the PyTorch that is installed; its operations are compiled where they are first used."""
    setup.install_torch()
    print(f"setup: installing {DEEPSPEED}", flush=True)
    os.environ.setdefault("DS_BUILD_OPS", "0")
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not setup.pip("install", "-q", "setuptools>=77", "wheel", "ninja"):
        setup.stop("what DeepSpeed is built with could not be installed (see above)")
    if not setup.pip("install", "-q", "--no-build-isolation", DEEPSPEED):
        setup.stop(f"{DEEPSPEED} could not be installed (see above)")


def main() -> None:
    if sys.argv[1:]:
        setup.stop(f"{Path(__file__).name} takes no arguments, and got {' '.join(sys.argv[1:])}")
    setup.check_python()
    setup.make_environment()
    if not setup.run(str(setup.PYTHON), "-c", "import deepspeed", quiet=True):
        install_deepspeed()
    setup.main(["test", "deepspeed"])


if __name__ == "__main__":
    main()
