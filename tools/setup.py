"""Makes .venv and installs e3rl into it, editable, with the extras named on the command line. Standard library only.

Run by `make setup`. Does nothing where nothing changed. E3RL_VENV names another directory than .venv. On a machine without
an NVIDIA GPU it takes a CPU build of PyTorch where pip's configured indexes offer one; E3RL_TORCH="torch==X.Y.Z" overrides
the choice.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / os.environ.get("E3RL_VENV", ".venv")
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "e3rl-setup"
TORCH = "2.13.0"
OLDEST = (3, 11)


def stop(reason: str) -> None:
    sys.exit(f"setup: {reason}")


def run(*command: str, quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=output, stderr=output, check=False).returncode == 0


def check_python() -> None:
    if sys.version_info < OLDEST:
        found = platform.python_version()
        stop(
            f"Python {'.'.join(map(str, OLDEST))} or newer is needed, this is {found}. Name another: make PYTHON=python3.12 …"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("this Python has no venv module; on Debian and Ubuntu: apt-get install python3-venv")


def check_extras(extras: list[str]) -> None:
    import tomllib  # not before `check_python`

    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        stop(f"no extra {', '.join(map(repr, unknown))}; there are {', '.join(known)}")


def make_environment() -> None:
    if PYTHON.exists() and run(str(PYTHON), "-c", "import pip", quiet=True):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    print(f"setup: making {VENV}", flush=True)
    if not run(sys.executable, "-m", "venv", str(VENV)):
        stop("the virtual environment could not be made (see above)")


def pip(*arguments: str, quiet: bool = False) -> bool:
    return run(str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments, quiet=quiet)


def install_torch() -> None:
    if run(str(PYTHON), "-c", "import torch", quiet=True):
        return
    chosen = os.environ.get("E3RL_TORCH")
    if chosen:
        if not pip("install", "-q", chosen):
            stop(f"{chosen} (from E3RL_TORCH) could not be installed")
        return
    linux_without_gpu = platform.system() == "Linux" and not Path("/dev/nvidia0").exists()
    if linux_without_gpu:
        print("setup: no NVIDIA GPU here, looking for a CPU build of PyTorch", flush=True)
        if pip("install", "-q", f"torch=={TORCH}+cpu", quiet=True):
            return
        print(
            "setup: pip's indexes offer no CPU build. The default build brings several GB of CUDA libraries; to avoid that "
            "stop here, add PyTorch's CPU index to pip's configuration (PIP_EXTRA_INDEX_URL) and run this again.",
            flush=True,
        )
    if not pip("install", "-q", f"torch=={TORCH}"):
        stop("PyTorch could not be installed (see above); is there a network connection?")


def main(extras: list[str]) -> None:
    check_python()
    check_extras(extras)
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + ",".join(sorted(extras)).encode()).hexdigest()
    known = STAMP.read_text().split() if STAMP.exists() else []
    if wanted in known and (VENV / "bin" / "e3rl").exists():
        return
    make_environment()
    install_torch()
    print("setup: installing e3rl" + (f" with {', '.join(extras)}" if extras else ""), flush=True)
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    if not pip("install", "-q", "-e", target):
        stop("e3rl could not be installed (see above); is there a network connection, and space on the disk?")
    STAMP.write_text("\n".join([*known, wanted]))


if __name__ == "__main__":
    main(sys.argv[1:])
