"""Clients that other people wrote, against `e3rl serve lab` as it is started from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e3rl.lab.problems import generate
from tests.clients.conftest import Lab

SUMS = generate("chain", 3, "heldout", 8)
FIRST = [{"role": "user", "content": str(SUMS[0].prompt)}]


@pytest.fixture
def client(lab_url: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{lab_url}/v1", api_key="none", max_retries=0, timeout=60)


def test_openai_asks_whole_and_in_a_stream(client: Any):
    whole = client.chat.completions.create(model="lab", messages=FIRST, seed=1)
    assert "A:" in whole.choices[0].message.content
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="lab", messages=FIRST, seed=1, stream=True, stream_options=options)
    )
    assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_openai_parses_a_structured_answer(client: Any):
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")

    class Sum(pydantic.BaseModel):
        total: int = pydantic.Field(ge=0, le=99)
        sure: bool

    answers = [
        client.chat.completions.parse(
            model="lab",
            messages=FIRST,
            seed=seed,
            response_format=Sum,
            max_tokens=200,
            extra_body={"e3rl": {"erase": False}},
        )
        for seed in range(4)
    ]
    assert all(isinstance(answer.choices[0].message.parsed, Sum) for answer in answers)


def test_openenvs_capture_finds_exact_tokens(client: Any, lab: Lab):
    """What it asks for and reads: log-probabilities, ``prompt_token_ids`` and ``token_ids``."""
    answer = client.chat.completions.create(
        model="lab", messages=FIRST, seed=1, logprobs=True, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert answer.prompt_token_ids == lab.rendered(str(SUMS[0].prompt))
    found = [entry.logprob for entry in choice.logprobs.content]
    assert found == pytest.approx(lab.logprobs(answer.prompt_token_ids, choice.token_ids), abs=1e-3)


def test_litellm_asks_whole_and_in_a_stream(lab_url: str):
    litellm = pytest.importorskip("litellm")
    asked = {"model": "hosted_vllm/lab", "api_base": f"{lab_url}/v1", "api_key": "none", "messages": FIRST, "seed": 1}
    whole = litellm.completion(**asked)
    assert "A:" in whole.choices[0].message.content
    chunks = litellm.completion(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_langchain_asks_whole_and_in_a_stream(lab_url: str):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="lab", base_url=f"{lab_url}/v1", api_key="none", seed=1, max_retries=0)
    whole = model.invoke(FIRST[0]["content"])
    assert "A:" in whole.content
    assert "".join(chunk.content for chunk in model.stream(FIRST[0]["content"])) == whole.content
    assert whole.usage_metadata["output_tokens"] > 0


TASK = """
task: lab_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 96, do_sample: false, temperature: 0.0}}
filter_list:
  - {{name: last, filter: [{{function: regex, regex_pattern: "A:(-?[0-9]+)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def test_lm_eval_scores_a_small_task(lab_url: str, tmp_path: Path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    rows = [{"question": str(p.prompt), "answer": str(p.answer)} for p in SUMS]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(path=tmp_path / "sums.jsonl"))
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=f"model=lab,base_url={lab_url}/v1/chat/completions,num_concurrent=4,max_retries=1,tokenized_requests=False",
        tasks=["lab_sums"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    score = found["results"]["lab_sums"]["exact_match,last"]
    assert 1 / 8 <= score <= 1
