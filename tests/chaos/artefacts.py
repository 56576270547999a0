"""Artefacts that carry code in the forms by which data has become code before; `tests.chaos.canary` runs commands on them."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from e3rl.config import Config, to_toml
from e3rl.rollout.companions import RECIPE_NAME
from e3rl.train.journal import frame
from e3rl.train.trainer import Trainer
from tests.train.random_lab import lab_config, random_lab

SHORT = ("rollout.segment_length=4", "rollout.max_segments=2", "eval.limit=2", "eval.num_samples=2")
_SMALL = ("run.output_dir=runs", "train.steps=1", "train.prompts_per_step=1", "train.eval_steps=0")


class Touch:
    """Unpickling it leaves the mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


@dataclass(frozen=True)
class Payload:
    """Code in many forms. ``source`` is a Python file; running it, or any of the others, leaves ``mark``."""

    directory: Path

    @property
    def mark(self) -> Path:
        return self.directory / "OWNED"

    @property
    def source(self) -> Path:
        path = self.directory / "evil.py"
        path.write_text(f"open({str(self.mark)!r}, 'w')\nf = F = metric = Engine = None\n")
        return path

    @property
    def plugin(self) -> str:
        return f"{self.source}:F"

    def pickled(self) -> bytes:
        return pickle.dumps(Touch(self.mark))

    def template(self) -> str:
        return "{{ cycler.__init__.__globals__.os.mkdir('" + str(self.mark) + "') }}"

    def words(self) -> list[str]:
        """Texts that are code where something evaluates, formats, renders or hands them to a shell."""
        mark = str(self.mark)
        return [
            f"$(touch {mark})",
            f"; touch {mark} #",
            f"`touch {mark}`",
            f"__import__('os').mkdir({mark!r})",
            f"!!python/object/apply:os.mkdir [{mark!r}]",
            self.template(),
            "{0.__class__.__init__.__globals__}",
            r"\boxed{__import__('os').mkdir('" + mark + "')}",
        ]

    def tripped(self, work: Path) -> list[str]:
        """What was run, by the mark and by what the audit hook wrote down."""
        seen = work.read_text(encoding="utf-8").splitlines() if work.exists() else []
        return seen + ["the mark"] * self.mark.exists()


def _edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _model_edits(p: Payload) -> dict[str, Callable[[Path], Any]]:
    """What is done to a model's directory."""
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    kernels: dict[str, Any] = {
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel@v1:f",
        "_experts_implementation": {"": "evil/kernel"},
        "text_config": {"attn_implementation": "paged|evil/kernel"},
        "kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"},
    }
    plugins = (
        *("data.transform", "rollout.engine", "erasure.metric", "objective.name", "rewards.functions"),
        "environments.factory",
    )

    def recipe(setting: str) -> Callable[[Path], Any]:
        section, _, key = setting.partition(".")
        value = f'["{p.plugin}"]' if key == "functions" else f'"{p.plugin}"'
        return lambda m: (m / RECIPE_NAME).write_text(f"[{section}]\n{key} = {value}\n")

    def python(m: Path, **classes: Any) -> None:
        shutil.copy(p.source, m / "evil.py")
        _edited(m / "config.json", auto_map=classes, model_type="evil")
        _edited(m / "tokenizer_config.json", auto_map=classes, tokenizer_class="evil.T")

    def unsafe(m: Path, name: str) -> None:
        (m / "model.safetensors").unlink()
        (m / name).write_bytes(p.pickled())

    def index(m: Path) -> None:
        (m.parent / "outside.bin").write_bytes(p.pickled())
        (m / "model.safetensors").unlink()
        named = {"model.embed_tokens.weight": "../outside.bin"}
        (m / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))

    edits: dict[str, Callable[[Path], Any]] = {
        "Python of its own": lambda m: python(m, **auto),
        "Python of another repository": lambda m: python(m, **dict.fromkeys(auto, "evil/repo--evil.C")),
        "generation code": lambda m: [
            (m / "custom_generate").mkdir(),
            shutil.copy(p.source, m / "custom_generate" / "generate.py"),
        ],
        "a pickle in safetensors": lambda m: (m / "model.safetensors").write_bytes(p.pickled()),
        "an index to a pickle": index,
        "an adapter": lambda m: (m / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}'),
        "a template": lambda m: (m / "chat_template.jinja").write_text(p.template()),
        "a template in its config": lambda m: _edited(m / "tokenizer_config.json", chat_template=p.template()),
        "a tokenizer that is a pickle": lambda m: (m / "tokenizer.json").write_bytes(p.pickled()),
        "statistics that are a pickle": lambda m: (m / "e3rl_reference.json").write_bytes(p.pickled()),
        "a config that is a pickle": lambda m: (m / "config.json").write_bytes(p.pickled()),
        "words for a shell": lambda m: _edited(m / "config.json", _name_or_path=p.words()[0], torch_dtype=p.words()[3]),
        "a quantizer": lambda m: _edited(m / "config.json", quantization_config={"quant_method": "evil", "modules": "evil.C"}),
        "a type that is a module": lambda m: _edited(m / "config.json", model_type="evil", architectures=["evil.C"]),
        "a GGUF beside no weights": lambda m: [(m / "model.safetensors").unlink(), (m / "model.gguf").write_bytes(gguf(p))],
        "a GGUF named in the config": lambda m: [
            _edited(m / "config.json", gguf_file="x.gguf"),
            (m / "x.gguf").write_bytes(gguf(p)),
        ],
    }  # fmt: skip
    edits |= {f"weights in {n}": lambda m, n=n: unsafe(m, n) for n in ("pytorch_model.bin", "model.pt", "model.ckpt")}  # type: ignore[misc]
    edits |= {f"settings that name {s}": recipe(s) for s in plugins}
    edits |= {f"a kernel in {k}": lambda m, k=k, v=v: _edited(m / "config.json", **{k: v}) for k, v in kernels.items()}  # type: ignore[misc]
    return edits


def gguf(p: Payload) -> bytes:
    """A GGUF file whose texts, its chat template among them, are code."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    pairs = {"general.architecture": "llama", "general.name": p.words()[0], "tokenizer.chat_template": p.template()}
    body = b"".join(text(k) + struct.pack("<I", 8) + text(v) for k, v in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + body + p.pickled()


def models(p: Payload) -> Iterator[tuple[str, list[list[str]]]]:
    """A model's directory with each of the edits, and the commands that read models."""
    for name, edit in _model_edits(p).items():
        model = p.directory / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(random_lab(), model)
        edit(model)
        data = "lab:chain:1"
        yield f"model: {name}", [
            ["decode", "model", "1+1", "--samples", "2", *SHORT],
            ["eval", "model", data, "--output", "out", *SHORT],
            ["calibrate", "model", data, *SHORT],
            ["diagnose", "model", data, *SHORT],
            ["train", "demo", "model.path=model", "train.steps=1", "train.prompts_per_step=1", "run.output_dir=runs", *SHORT],
            ["data", "demo", "model.path=model"],
            ["init", "model", data],
        ]  # fmt: skip


def ggufs(p: Payload) -> Iterator[tuple[str, list[list[str]]]]:
    """GGUF files in a model's place."""
    for name, content in {"a template": gguf(p), "a pickle": p.pickled(), "cut short": gguf(p)[:40]}.items():
        (p.directory / "model.gguf").write_bytes(content)
        yield (
            f"GGUF: {name}",
            [
                ["decode", "model.gguf", "1+1", *SHORT],
                ["eval", "model.gguf", "lab:chain:1", *SHORT],
                ["calibrate", "model.gguf", "lab:chain:1", *SHORT],
                ["train", "demo", "model.path=model.gguf"],
                ["init", "model.gguf", "lab:chain:1"],
            ],
        )


def _unpickling_type(p: Payload) -> pa.Table:
    """A table whose metadata ask Arrow to unpickle a type."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": p.pickled()}
    fields = [pa.field("prompt", pa.string(), metadata=metadata), pa.field("answer", pa.string(), metadata=metadata)]
    schema = pa.schema(fields, metadata={b"pandas": p.pickled(), b"huggingface": p.words()[3].encode()})
    return pa.table({"prompt": ["1+1"], "answer": ["2"]}, schema=schema)


def _data_files(p: Payload) -> dict[str, Callable[[], str]]:
    """Files and directories of data; each writes itself and returns its name."""
    root = p.directory

    def file(name: str, content: bytes) -> Callable[[], str]:
        return lambda: ((root / name).write_bytes(content) and name) or name

    def directory(name: str, files: dict[str, bytes]) -> Callable[[], str]:
        def write() -> str:
            for inner, content in files.items():
                (root / name / inner).parent.mkdir(parents=True, exist_ok=True)
                (root / name / inner).write_bytes(content)
            return name

        return write

    def parquet() -> str:
        pq.write_table(_unpickling_type(p), root / "data.parquet")
        return "data.parquet"

    def saved() -> str:
        inner = root / "saved"
        inner.mkdir(exist_ok=True)
        table = _unpickling_type(p)
        with (
            pa.OSFile(str(inner / "data-00000-of-00001.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(table)
        (inner / "state.json").write_text(
            json.dumps(
                {
                    "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
                    "_format_type": p.plugin,
                    "_fingerprint": "x",
                    "_split": None,
                    "_format_columns": None,
                    "_format_kwargs": {},
                    "_output_all_columns": False,
                }
            )
        )
        (inner / "dataset_info.json").write_text(
            json.dumps({"features": {"prompt": {"_type": "evil.F"}}, "builder_name": p.plugin})
        )
        return "saved"  # fmt: skip

    rows = [{"prompt": w, "answer": w, "id": str(i), "tests": w} for i, w in enumerate(p.words())]
    lines = "\n".join(map(json.dumps, rows)).encode()
    script = p.source.read_bytes()
    chat = json.dumps({"messages": [{"role": "user", "content": p.template()}], "answer": "1"}).encode()
    yaml = f"---\nconfigs:\n- config_name: default\n  data_files: '*.pkl'\nbuilder: {p.words()[4]}\n---\n".encode()
    scripts = dict.fromkeys(("conftest.py", "__init__.py", "json.py", "datasets.py"), script)
    return {
        "words in JSON lines": file("data.jsonl", lines),
        "words in JSON": file("data.json", json.dumps(rows).encode()),
        "words in CSV": file("data.csv", b"prompt,answer\n" + b"\n".join(b'"=cmd|x!A0","%d"' % i for i in range(4))),
        "messages that are templates": file("chat.jsonl", chat),
        "a pickle in JSON lines": file("pickle.jsonl", p.pickled()),
        "a pickle in CSV": file("pickle.csv", p.pickled()),
        "a pickle in Parquet": file("pickle.parquet", p.pickled()),
        "a type that is a pickle": parquet,
        "a saved dataset": saved,
        "a loading script": directory("evilset", {"evilset.py": script, "data.jsonl": lines}),
        "pickles in a directory": directory("pickles", {"data.pkl": p.pickled(), "train.pt": p.pickled()}),
        "metadata that name code": directory("meta", {"README.md": yaml, "x.pkl": p.pickled()}),
        "Python beside the data": directory("beside", {"train.jsonl": lines, **scripts}),
    }  # fmt: skip


def datasets(p: Payload) -> Iterator[tuple[str, list[list[str]]]]:
    """Data of every form, and the commands that read it."""
    (p.directory / "sitecustomize.py").write_bytes(p.source.read_bytes())
    (p.directory / "tomllib.py").write_bytes(p.source.read_bytes())
    for name, write in _data_files(p).items():
        source = write()
        lab = random_lab()
        shutil.rmtree(p.directory / "runs", ignore_errors=True)
        yield f"data: {name}", [
            ["train", "demo", f"data.train={source}", f"model.path={lab}", 'rewards.functions=["math"]', *_SMALL, *SHORT],
            ["eval", random_lab(), source, "--output", "out", *SHORT],
            ["data", "demo", f"data.train={source}"],
            ["init", "lab", source],
            ["diagnose", random_lab(), source, *SHORT],
            *([["grade", source]] if source.endswith("jsonl") else []),
        ]  # fmt: skip


def recipes(p: Payload) -> Iterator[tuple[str, list[list[str]]]]:
    """Recipes whose texts are code where something evaluates them; and another library's settings."""
    for number, word in enumerate(p.words()):
        quoted = json.dumps(word)
        tables = f"[run]\nname = {quoted}\n[data]\ntrain = {quoted}\neval = [{quoted}]\n[model]\npath = {quoted}\n"
        (p.directory / "recipe.toml").write_text(tables)
        (p.directory / "trl.py").write_text(
            f"from trl import GRPOConfig\nGRPOConfig(output_dir={word!r})\n{p.source.read_text()}"
        )
        (p.directory / "verl.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{p.mark}']\ndata: {quoted}\n")
        yield f"recipe: words {number + 1}", [
            ["train", "recipe.toml"],
            ["train", "recipe.toml", "--plan"],
            ["data", "recipe.toml"],
            ["plan", "recipe.toml"],
            ["train", "demo", f"run.name={word}", *_SMALL],
            ["convert", "trl", "trl.py"],
            ["convert", "trl", "verl.yaml"],
        ]  # fmt: skip


def _config(p: Payload, name: str, *overrides: str) -> Config:
    """The config of a small run of that name."""
    return lab_config(p.directory, f"run.name={name}", "train.steps=2", "train.save_steps=1", *overrides)


def _run_edits(p: Payload) -> dict[str, Callable[[Path], Any]]:
    """What is done to a run's directory."""
    settings = {
        **dict.fromkeys(("rollout.engine", "erasure.metric", "objective.name", "filter.name"), p.plugin),
        **dict.fromkeys(("rewards.functions", "train.report_to"), f'["{p.plugin}"]'),
        "data.transform": p.plugin,
        "environments.factory": p.plugin,
        "model.trust_remote_code": "true",
    }

    def named(setting: str, value: str) -> Callable[[Path], Any]:
        return lambda run: (run / "config.toml").write_text(to_toml(_config(p, "run", f"{setting}={value}")))

    def pickle_at(pattern: str) -> Callable[[Path], Any]:
        return lambda run: [f.write_bytes(p.pickled()) for f in run.rglob(pattern) if f.is_file()]

    def journal(run: Path) -> None:
        (run / "journal").mkdir(exist_ok=True)
        frames = b"".join(map(frame, (p.pickled(), b"c" + p.pickled(), b"g" + p.pickled(), b"r" + p.pickled())))
        (run / "journal" / "step-000002.journal").write_bytes(frames)

    def skipped(run: Path) -> None:
        kept = run / "skipped" / "step-000001"
        kept.mkdir(parents=True)
        for name in ("finding.json", "batch.arrow", "weights.safetensors", "batch.pt", "rollouts.parquet"):
            (kept / name).write_bytes(p.pickled())

    def ledgers(run: Path) -> None:
        for path in run.rglob("*.parquet"):
            pq.write_table(_unpickling_type(p), path)

    edits = {f"a config that names {s}": named(s, value) for s, value in settings.items()}
    patterns = (
        "*.jsonl",
        "*.json",
        "*.parquet",
        "*.safetensors",
        "*.toml",
        "state.json",
        "MANIFEST.json",
        "rng.safetensors",
    )
    edits |= {f"pickles for {x}": pickle_at(x) for x in patterns}
    return edits | {
        "a journal of pickles": journal,
        "skipped steps of pickles": skipped,
        "types that are pickles": ledgers,
    }


def runs(p: Payload) -> Iterator[tuple[str, list[list[str]]]]:
    """Runs and their checkpoints with each of the edits, and the commands that read runs."""
    whole = p.directory / "whole"
    Trainer(_config(p, "whole")).train()
    for name, edit in _run_edits(p).items():
        run = p.directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        (run / "config.toml").write_text(to_toml(_config(p, "run")))
        (run / "summary.json").unlink()
        edit(run)
        yield (
            f"run: {name}",
            [
                ["doctor", "run"],
                ["train", "run/config.toml", "--resume"],
                ["train", "recipe.toml", "run.output_dir=.", "run.name=run", "--resume", f"model.path={random_lab()}"],
                ["train", "run/config.toml", "--plan"],
                ["replay", "run"],
                ["compare", "run", "whole"],
                ["eval", "run/model", "lab:chain:1", "--output", "out", *SHORT],
                ["decode", "run/model", "1+1", *SHORT],
                ["doctor", "run", "--repair"],
            ],
        )


KINDS = {"models": models, "GGUFs": ggufs, "datasets": datasets, "recipes": recipes, "runs and checkpoints": runs}
