"""What a study needs, and its cells run as processes: finished cells are skipped, and failures are reported."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from e3rl.config import Config, load_config
from e3rl.data.benchmarks import load_benchmark
from e3rl.errors import UserError
from e3rl.files import write_json
from e3rl.model_files import BUILT_IN
from e3rl.plan.memory import GIB, make_plan
from e3rl.plugins import own_python
from e3rl_reproduce.cells import ERROR, Cell, merged, missing
from e3rl_reproduce.paper import deviations, paper_of, stated
from e3rl_reproduce.study import Scale, Study, models_of, row_config, varied


def _prompts(config: Config) -> int:
    """Problems that a training goes through; 0 if that depends on the data."""
    if config.train.steps:
        return config.train.steps * config.train.prompts_per_step
    return int(config.train.epochs * config.data.train_limit)


def training_tokens(config: Config) -> int:
    """Most tokens that a training generates if nothing is erased; 0 if that depends on the data."""
    return _prompts(config) * config.rollout.num_generations * config.rollout.completion_limit


def gpus(config: Config) -> float:
    """GPUs that the processes of a config take."""
    train, rollout = config.train, config.rollout
    return max(1, train.workers * train.worker_gpus + rollout.workers * rollout.worker_gpus)


def _missing_gpus(config: Config) -> list[str]:
    import torch

    needed, there = gpus(config), torch.cuda.device_count()
    if not there:
        return ["GPUs: PyTorch sees none here"]
    if needed > there and not config.rollout.address:
        return [f"{needed:g} GPUs, and this machine has {there}: a Ray cluster (rollout.address)"]
    return []


def requirements(config: Config) -> list[str]:
    """What is missing here to run a config, in words."""
    found = []
    if config.model.path not in BUILT_IN:
        if not Path(config.model.path).is_dir():
            found.append(f"the model {config.model.path}: a local directory (model.path=DIR), or a hub to load it from")
        if config.model.device != "cpu":
            found += _missing_gpus(config)
    source = config.data.train
    if not source.startswith("lab:") and not Path(source).exists():
        found.append(f"the training data {source}: a local file (data.train=FILE), or a hub to load it from")
    if config.rollout.erase and config.erasure.baseline == "static" and not config.erasure.static_baseline:
        found.append(
            "a static baseline of the model, for 'w/o group dynamics': erasure.static_baseline=VALUE (e3rl calibrate)"
        )
    extras = {
        "lora": ("peft", config.model.lora_r > 0),
        "ray": ("ray", config.train.workers or config.rollout.workers),
        "deepspeed": ("deepspeed", config.train.parallel.startswith("deepspeed")),
        "vllm": ("vllm", config.rollout.engine == "vllm"),
    }
    wanted = {extra: package for extra, (package, needed) in extras.items() if needed}
    absent = [extra for extra, package in wanted.items() if importlib.util.find_spec(package) is None]
    return found + [f"{wanted[extra]}: pip install 'e3rl[{extra}]'" for extra in absent]


def missing_benchmarks(scale: Scale) -> list[str]:
    """Benchmarks of the papers that are in no directory of files (data.directory=DIR), so that a hub must give them."""
    if all(source.startswith("lab:") for source in scale.benchmarks.values()):
        return []
    directory = load_config(overrides=scale.overrides).data.directory
    if not directory:
        return ["the benchmarks: a directory with their files (data.directory=DIR), or a hub to load them from"]
    found = []
    for source in scale.benchmarks.values():
        try:
            load_benchmark(source, directory)
        except UserError as error:
            found.append(str(error))
    return found


def departures(study: Study, scale: Scale) -> list[str]:
    """Where the scale 'paper' differs from what the papers state, except settings that a row varies and the paths of model and
    data."""
    if scale.name != "paper":
        return []
    found: dict[str, None] = {}
    for model in models_of(study, scale):
        entries = stated(paper_of(scale.models[model]))
        for row in study.rows(scale):
            config = row_config(scale, model, row, seed=scale.seeds[0], learning_rate=None)
            found |= dict.fromkeys(deviations(config, entries, but={"model.path", "data.train", *varied(row)}))
    return list(found)


def _size(count: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} "


def _demands(trained: Sequence[Cell], tokens: float) -> list[str]:
    """Memory on each device and arithmetic of the most demanding method, as `e3rl train --plan` counts them."""
    try:
        plans = {
            cell.config.objective.name: (make_plan(cell.config, max(1, cell.config.train.workers), on_cpu=False), cell)
            for cell in trained
        }
    except UserError as error:
        return [f"  memory: not known, {error}"]
    if not plans:
        return []
    name, (counted, cell) = max(plans.items(), key=lambda item: item[1][0].largest)
    ranks = max(1, cell.config.train.workers)
    where = f"on each of {ranks} devices that train" if ranks > 1 else "on one device"
    lines = [
        f"  memory: {counted.trainer.largest / GIB:.1f} GiB {where} at the worst moment ({name}), as e3rl train --plan counts it"
    ]
    lines += [
        f"  beside them {p.count} {p.name}s with a device each: {p.largest / GIB:.1f} GiB"
        for p in counted.processes[1:]
    ]
    if tokens:
        lines.append(f"  arithmetic: about {10 * counted.parameters * tokens:.1e} operations (generate, score, learn)")
    return lines


def plan(study: Study, scale: Scale, cells: Mapping[str, Sequence[Cell]], out: Path) -> list[str]:
    """Lines for the terminal, a block per model."""
    lines = [f"{study.title}, scale {scale.name}: {len(scale.seeds)} seeds, {len(scale.benchmarks)} benchmarks"]
    for model, wanted in cells.items():
        together = merged(wanted)
        left = [cell for cell in together if missing(cell, out)]
        trained = [cell for cell in left if cell.trained]
        lines += ["", f"{model}: {len(together)} cells, {len(together) - len(left)} done; {len(trained)} to train"]
        tokens = sum(training_tokens(cell.config) for cell in trained)
        known = f"at most {_size(tokens)}tokens" if tokens else "as many tokens as the data ask for"
        lines.append(f"  generate {known} in training, if nothing is erased")
        lines += _demands(trained, tokens) if scale.name == "paper" else []
        needs = dict.fromkeys(need for cell in left for need in requirements(cell.config))
        lines += [f"  missing: {need}" for need in needs]
    lines += [f"  missing: {need}" for need in missing_benchmarks(scale)]
    lines += [f"  not as in the paper: {departure}" for departure in departures(study, scale)]
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free / 2**30
    lines += ["", f"results go to {out} ({free:.0f} GiB free)"]
    return lines


LOG = "log.txt"


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and its error or last line of output."""

    cell: Cell
    reason: str


def _threads(jobs: int) -> dict[str, str]:
    """Each process its share of the cores; waiting threads must not spin."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share), "OMP_WAIT_POLICY": "PASSIVE"}


def cell_command(cells: Sequence[Cell], out: Path) -> list[str]:
    """Write each cell's cell.json; returns the command that runs the cells one after the other."""
    directories = [cell.directory(out) for cell in cells]
    for cell, directory in zip(cells, directories, strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "cell.json", cell.to_table())
        (directory / ERROR).unlink(missing_ok=True)
    return [*own_python("e3rl_reproduce.worker"), *(str(d.resolve()) for d in directories)]


def _run(cells: Sequence[Cell], out: Path, launcher: Sequence[str], jobs: int) -> list[Failure]:
    """Run cells in one process, one after the other."""
    directories = [cell.directory(out) for cell in cells]
    command = [*launcher, *cell_command(cells, out)]
    with (directories[0] / LOG).open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, **_threads(jobs)}
            )
        except OSError as error:
            raise UserError(f"--launcher: {shlex.join(launcher)} can't be run: {error.strerror}") from None
    said = (directories[0] / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    otherwise = f"exit code {done.returncode}" + (f", {said[-1]}" if said else "")
    left = [(cell, directory) for cell, directory in zip(cells, directories, strict=True) if missing(cell, out)]
    return [Failure(cell, reason(directory / ERROR) or otherwise) for cell, directory in left]


def reason(path: Path) -> str:
    """Why a cell failed; empty if it left no message."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int = 1,
    together: int = 1,
    launcher: Sequence[str] = (),
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Failure]:
    """Run what is missing of ``cells``, in their order, ``jobs`` processes at a time; returns those that failed.

    ``together``: cells that one process runs, use more than 1 if a cell takes less time than starting a process.
    ``launcher`` is put before each process's command. None is started after ``deadline`` (seconds since the epoch).
    """
    distinct = merged(cells)
    waiting = [cell for cell in distinct if missing(cell, out)]
    say(f"{len(distinct)} cells, {len(distinct) - len(waiting)} done before")

    def work(first: int) -> list[Failure]:
        batch = waiting[first : first + together]
        if deadline is not None and time.time() > deadline:
            return [Failure(cell, "not started: the time was up") for cell in batch]
        began = time.perf_counter()
        failures = _run(batch, out, launcher, jobs)
        seconds = time.perf_counter() - began
        said = "".join(f"; {f.cell.address} failed: {f.reason}" for f in failures)
        say(f"cells {first + 1} to {first + len(batch)} of {len(waiting)}: {seconds:.0f} s{said}")
        return failures

    with ThreadPoolExecutor(jobs) as pool:
        return [failure for found in pool.map(work, range(0, len(waiting), together)) for failure in found]
