"""The work of `train_step.py`: models with tokenizers as directories, and a fixed file of prompt and completion ids."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

SIBLINGS, LIMIT = 8, 128


@dataclass(frozen=True)
class Work:
    """Prompts (as text and ids), the completions of each, and their rewards."""

    texts: list[str]
    prompts: list[list[int]]
    completions: list[list[list[int]]]
    rewards: list[list[float]]

    @property
    def longest_prompt(self) -> int:
        return max(map(len, self.prompts))

    @property
    def lengths(self) -> list[int]:
        return [len(c) for completions in self.completions for c in completions]


def fixed_work(prompt_count: int, vocabulary: int, path: Path) -> Work:
    """Prompts of 16 to 32 tokens and log-normal completions (median 48, sigma 0.6, at most 128), from a seed.

    Written to ``path``, a file of ids, and read from it where it is there already.
    """
    if path.exists():
        return Work(**json.loads(path.read_text(encoding="utf-8")))
    rng = random.Random(f"train step/{prompt_count}")

    def ids(size: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(size)]

    prompts = [ids(rng.randint(16, 32)) for _ in range(prompt_count)]
    lengths = [
        [min(LIMIT, max(4, round(rng.lognormvariate(math.log(48), 0.6)))) for _ in range(SIBLINGS)] for _ in prompts
    ]
    lengths[0][0] = LIMIT  # as in any batch of some size, one reaches the limit
    completions = [[ids(size) for size in sizes] for sizes in lengths]
    rewards = [[float(rng.random() < 0.5) for _ in range(SIBLINGS)] for _ in prompts]
    for values in rewards:
        values[:2] = [0.0, 1.0]  # every group teaches something
    work = Work([f"w{index}" for index in range(prompt_count)], prompts, completions, rewards)
    path.write_text(json.dumps(asdict(work)), encoding="utf-8")
    return work


def text_work(directory: Path, prompt_count: int) -> Work:
    """Prompts as text for whole steps, in which both sides generate; rewards are made up."""
    from transformers import AutoTokenizer

    rng = random.Random(7)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    if tokenizer.chat_template:
        questions = [
            f"What is {rng.randint(10, 99)} + {rng.randint(10, 99)}? Explain briefly." for _ in range(prompt_count)
        ]
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
            for q in questions
        ]
    else:
        texts = [
            " ".join(f"w{rng.randrange(10, 2048)}" for _ in range(rng.randint(16, 32))) for _ in range(prompt_count)
        ]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return Work(texts, prompts, [], [[0.0, 1.0] * (SIBLINGS // 2)] * prompt_count)


def random_model(directory: Path) -> Path:
    """A random Qwen3 of 3M parameters that ends a response at a token with a chance of about 1 in 90, with a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():  # a channel that is the same for every token tells nothing, but lifts the end token's logit
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.5
        embeddings[1, 0] = 0.5 + END_LIFT
    model.save_pretrained(directory)
    marks = ["<pad>", "<end>", "<unknown>"]
    words = Tokenizer(
        WordLevel({w: i for i, w in enumerate([*marks, *(f"w{i}" for i in range(3, 2048))])}, unk_token=marks[2])
    )
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=marks[0], eos_token=marks[1], unk_token=marks[2], padding_side="left"
    ).save_pretrained(directory)
    return directory


END_LIFT = 1.15


def model_directory(name: str, where: Path) -> Path:
    """'3m' or '135m' as a directory that both sides load."""
    if name == "135m":
        from e3rl.lab.smollm2 import smollm2_directory

        return smollm2_directory()
    directory = where / name
    return directory if directory.exists() else random_model(directory)
