"""Weights that are read to their places: those that transformers loads, by the bit, and of divided ones a rank's part alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from e3rl.cluster.ranks import Ranks
from e3rl.cluster.sharding import shard
from e3rl.config import ModelConfig, TrainConfig
from e3rl.errors import UserError
from e3rl.models import Policy, ReferencePolicy, load_policy
from e3rl.weights.files import WeightFiles
from tests.engine.models import ARCHITECTURES, build, sliding, tiny
from tests.train.random_lab import random_lab

WORLD = 3


def saved(model: Any, directory: Path, **settings: Any) -> ModelConfig:
    """The model with the lab's tokenizer, as a user has it."""
    for file in Path(random_lab()).iterdir():
        if file.name.startswith("token") or file.name == "generation_config.json":
            (directory / file.name).write_bytes(file.read_bytes())
    model.generation_config.eos_token_id = 1
    model.save_pretrained(directory, **settings)
    return ModelConfig(path=str(directory), device="cpu", dtype="bfloat16")


def loaded(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def empty(config: ModelConfig) -> Policy:
    policy = load_policy(config, empty=True)
    assert all(p.is_meta for p in policy.model.parameters()), "nothing was read"
    assert policy.device == torch.device("cpu")
    return policy


@pytest.mark.parametrize("family", [*ARCHITECTURES, "Gemma3", "tied", "several files"])
def test_what_is_read_is_what_transformers_loads(family: str, tmp_path: Path):
    name = family if family[0].isupper() else "Qwen2"
    model = (
        build(name, tie_word_embeddings=True) if family == "tied" else tiny(name) if name != "Gemma3" else sliding(name)
    )
    config = saved(model, tmp_path, **({"max_shard_size": "20KB"} if family == "several files" else {}))
    assert (family == "several files") == (tmp_path / "model.safetensors.index.json").exists()
    whole, read = load_policy(config), empty(config)
    copied = read.copied()
    read.fill()
    assert read.eos_ids == whole.eos_ids
    assert read.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert not read.model.training
    for policy in (read, copied):
        ours, theirs = loaded(policy.model), loaded(whole.model)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in theirs)
        assert [n for n, p in policy.trainable()] == [n for n, p in whole.trainable()]
    ids = torch.tensor([[5, 9, 2, 7, 11]])
    assert torch.equal(read.model(ids).logits, whole.model(ids).logits)
    tied = read.model.get_output_embeddings().weight is read.model.get_input_embeddings().weight
    assert tied == (whole.model.get_output_embeddings().weight is whole.model.get_input_embeddings().weight)


@contextlib.contextmanager
def one_of_three(rank: int) -> Iterator[Ranks]:
    """A rank the others of which are not there."""
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    yield Ranks(rank, WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_reads_its_own_rows_of_policy_and_reference(rank: int, tied: bool, tmp_path: Path, monkeypatch):
    """53 rows of the embeddings among three: 18, 18 and 17."""
    config = saved(build("Qwen3", head_dim=8, tie_word_embeddings=tied), tmp_path)
    whole, policy, rows = load_policy(config), empty(config), dict[str, int]()
    read = WeightFiles.read

    def note(files: WeightFiles, name: str, part: slice, like: Tensor) -> Tensor:
        rows[name] = rows.get(name, 0) + len(range(10**9)[part])
        return read(files, name, part, like)

    monkeypatch.setattr(WeightFiles, "read", note)
    frozen = ReferencePolicy(policy.model).frozen
    for model, is_frozen in ((policy.model, False), (frozen, True)):
        rows.clear()
        with one_of_three(rank) as ranks:
            shard(model, policy.device, TrainConfig(parallel="fsdp2"), ranks, frozen=is_frozen)
            policy.fill(model)
        parts = dict(model.named_parameters())
        for name, weight in whole.model.named_parameters():
            part = parts[name]
            assert isinstance(part, DTensor)
            wanted = [*weight.chunk(WORLD), *[weight[:0]] * WORLD][rank]
            assert torch.equal(part.to_local(), wanted), name
            assert rows[name] == len(wanted)
            assert part.requires_grad is not is_frozen
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_files_that_are_not_the_model_s_own_are_left_to_transformers(tmp_path: Path):
    """Names and shapes that transformers would convert, or tied weights that are in the files twice: such models load whole."""
    for number, change in enumerate(("pickle", "missing", "other shape", "tied apart")):
        directory = tmp_path / str(number)
        directory.mkdir()
        config = saved(build("Qwen2", tie_word_embeddings=change == "tied apart"), directory)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        if change == "pickle":
            file.unlink()
            torch.save(tensors, directory / "pytorch_model.bin")
        elif change == "missing":
            del tensors["model.norm.weight"]
        elif change == "other shape":
            tensors["model.norm.weight"] = torch.ones(5)
        else:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        if change != "pickle":
            save_file(tensors, file, {"format": "pt"})
        if change in ("missing", "other shape"):
            with pytest.raises(UserError, match=r"incomplete|mismatch"):
                load_policy(config, empty=True)
        else:
            policy = load_policy(config, empty=True)
            assert policy.files is None
            assert not any(p.is_meta for p in policy.model.parameters())


def test_numbers_that_are_none_are_said_by_name(tmp_path: Path):
    config = saved(tiny("Qwen3"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"hold NaN or infinity: tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        empty(config).fill()


def test_a_copy_without_weights_has_names_shapes_and_types(tmp_path: Path):
    policy = load_policy(saved(tiny("Qwen3"), tmp_path))
    twin = policy.emptied()
    assert [(n, p.shape, p.dtype, p.is_meta) for n, p in twin.trainable()] == [
        (n, p.shape, p.dtype, True) for n, p in policy.trainable()
    ]
    assert twin.vocabulary == policy.vocabulary
