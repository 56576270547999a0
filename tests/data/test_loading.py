"""What `load_problems` makes of good files, and what it says about bad ones."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from e3rl.config import DataConfig
from e3rl.data import readers
from e3rl.data.loading import load_problems
from e3rl.errors import UserError
from e3rl.types import Message, Problem

DEFAULT = DataConfig()
ROWS = [
    {"prompt": "1+1?", "answer": 2, "id": "a", "level": 3},
    {"prompt": "1/2 of 1?", "answer": "0.5", "id": "b", "level": 4},
]
EXPECTED = [
    Problem("a", "1+1?", "2", {"level": 3}),
    Problem("b", "1/2 of 1?", "0.5", {"level": 4}),
]


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(source: str, config: DataConfig = DEFAULT, split: str = "train") -> list[Problem]:
    return load_problems(source, config=config, split=split)  # type: ignore[arg-type]


def error(source: str, config: DataConfig = DEFAULT) -> str:
    with pytest.raises(UserError) as caught:
        load(source, config)
    return str(caught.value)


def test_jsonl(tmp_path: Path) -> None:
    assert load(jsonl(tmp_path / "d.jsonl", *ROWS)) == EXPECTED


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n  \n" + json.dumps(ROWS[1]).encode())
    assert load(str(file)) == EXPECTED


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps(ROWS))
    assert load(str(file)) == EXPECTED


def test_parquet(tmp_path: Path) -> None:
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load(str(tmp_path / "d.parquet")) == EXPECTED


def test_csv_values_are_strings_and_blank_cells_are_absent(tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text('prompt,answer,id,level\n"say ""hi"",\nthen 1+1?",2,a,3\n1/2 of 1?,,,4\n')
    assert load(str(file)) == [
        Problem("a", 'say "hi",\nthen 1+1?', "2", {"level": "3"}),
        Problem("1", "1/2 of 1?", None, {"level": "4"}),
    ]


def test_saved_dataset_directories(tmp_path: Path) -> None:
    import datasets

    rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    assert load(str(tmp_path / "one")) == EXPECTED
    assert load(str(tmp_path / "splits")) == EXPECTED
    assert load(str(tmp_path / "splits"), split="eval") == EXPECTED[1:]
    message = error(str(tmp_path / "splits"), DataConfig(train_split="training"))
    assert "no split 'training'" in message
    assert "train, test" in message


def test_hub_dataset_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str, subset: str | None, *, split: str) -> Any:
        assert (name, subset, split) == ("openai/gsm8k", "main", "train")
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr("e3rl.data.readers.hub_silent", lambda: "")
    message = error("openai/gsm8k:main")
    assert "dataset 'openai/gsm8k:main' (split 'train') can't be loaded: Couldn't reach" in message
    assert "long trace" not in message


def test_lab_halves_differ_and_train_limit_counts() -> None:
    train = load("lab:chain:2", DataConfig(train_limit=5))
    held_out = load("lab:chain:2", DataConfig(train_limit=5), split="eval")
    assert len(train) == 5
    assert len(held_out) > 5
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_train_limit_leaves_evaluation_whole(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", *ROWS)
    assert load(source, DataConfig(train_limit=1)) == EXPECTED[:1]
    assert load(source, DataConfig(train_limit=1), split="eval") == EXPECTED


def test_columns_are_mapped_by_name_and_the_answer_keeps_its_own(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"question": "q", "solution": 7, "key": 5, "prompt": "other"})
    config = DataConfig(prompt_column="question", answer_column="solution", id_column="key")
    assert load(source, config) == [Problem("5", "q", "7", {"solution": 7, "prompt": "other"})]


def test_dotted_names_reach_into_nested_fields(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "4", "style": "rule"}}
    (problem,) = load(jsonl(tmp_path / "d.jsonl", row), DataConfig(answer_column="reward_model.ground_truth"))
    assert problem.answer == "4"
    assert problem.columns["reward_model"] == {"ground_truth": "4", "style": "rule"}


def test_chat_messages_as_a_list_and_encoded_as_json(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    messages = (Message("system", "be brief"), Message("user", "hi"))
    assert load(jsonl(tmp_path / "d.jsonl", {"prompt": turns}))[0].prompt == messages
    for rows, expected in (
        ([turns], messages),
        ([json.dumps(turns)], messages),
        (["[1, 2] sums to?"], "[1, 2] sums to?"),
    ):
        pq.write_table(pa.table({"prompt": rows}), tmp_path / "d.parquet")
        assert load(str(tmp_path / "d.parquet"))[0].prompt == expected
    assert load(jsonl(tmp_path / "d.jsonl", {"prompt": json.dumps(turns)}))[0].prompt == json.dumps(turns)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(5, "5"), (5.0, "5"), (0.25, "0.25"), (-3, "-3"), (" x ", "x"), ("", None), (None, None), (10**30, str(10**30))],
)
def test_answers(tmp_path: Path, answer: Any, expected: str | None) -> None:
    assert load(jsonl(tmp_path / "d.jsonl", {"prompt": "q", "answer": answer}))[0].answer == expected


BAD_LINES = [
    (b'{"prompt": "x"', "malformed JSON"),
    (b"[1, 2]", "expected a JSON object"),
    (b"null", "got null"),
    (b'{"prompt": ""}', "the prompt is empty"),
    (b'{"prompt": " \\n"}', "the prompt is empty"),
    (b'{"prompt": []}', "the list of messages is empty"),
    (b'{"prompt": 5}', "expected a string or a list of chat messages, got int"),
    (b'{"prompt": ["hi"]}', "message 1: expected"),
    (b'{"prompt": [{"role": "user", "content": ""}]}', "every message of the prompt is empty"),
    (b'{"prompt": [{"role": "user"}]}', "'content' must be a string, got NoneType"),
    (b'{"prompt": [{"content": "x"}]}', "'role' must be a string"),
    (b'{"prompt": [{"role": "user", "content": "x", "tool_calls": [1]}]}', "found also: tool_calls"),
    (b'{"prompt": "x", "answer": [1]}', "expected a string or a number, got list"),
    (b'{"prompt": "x", "answer": true}', "expected a string or a number, got bool"),
    (b'{"prompt": "x", "answer": NaN}', "nan is not a number"),
    (b'{"prompt": "x", "id": {}}', "id: expected a string or a number, got dict"),
    (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    (b'{"prompt": "x\xff"}', "not valid UTF-8"),
    (b'{"prompt": "x\x00"}', "null byte"),
    (b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_bad_lines_name_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n")
    message = error(str(file))
    assert message.startswith(f"{file}:3: ")
    assert reason in message


def test_utf16_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "x"}', encoding="utf-16")
    assert "d.jsonl:1: not valid UTF-8 (it looks like UTF-16)" in error(str(tmp_path / "d.jsonl"))


def test_gigantic_line_is_refused_without_reading_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n' + b"x" * 2**21)
    assert f"{file}:2: the line is longer than 1 MiB" in error(str(file))


def test_duplicate_ids_name_both_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"prompt": "x"}, {"prompt": "y", "id": 7}, {"prompt": "z", "id": "7"})
    assert error(source) == f"{source}:3: id '7' is already the id of {source}:2; ids must be unique"


def test_numbers_given_to_rows_do_not_hide_a_clash(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"prompt": "x", "id": "1"}, {"prompt": "y"})
    assert "id '1' is already the id of" in error(source)


def test_missing_prompt_column_suggests_the_setting(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", {"problem": "x", "answer": 1})
    message = error(source)
    assert message.startswith(f"{source}:1: no column 'prompt'.")
    assert "Set data.prompt_column, perhaps to 'problem'." in message
    assert "Columns found: problem, answer." in message
    assert "perhaps to 'promt'" in error(jsonl(tmp_path / "e.jsonl", {"promt": "x"}))


def test_a_named_optional_column_must_exist_somewhere(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "d.jsonl", *ROWS)
    assert "no row has the column 'gold' that data.answer_column names" in error(
        source, DataConfig(answer_column="gold")
    )
    assert "data.id_column" in error(source, DataConfig(id_column="uid"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    assert "holds no rows" in error(str(tmp_path / "d.jsonl"))


def test_json_that_is_no_array(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text('{"prompt": "x"}\n{"prompt": "y"}')
    assert f"{file}:2: malformed JSON" in error(str(file))
    file.write_text('{"prompt": "x"}')
    assert "expected a JSON array of objects, got an object" in error(str(file))
    file.write_text('[{"prompt": "x"}, 3]')
    assert f"{file}: row 2: expected a JSON object" in error(str(file))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,answer\nx\n", "d.csv:2: 1 fields, but the header has 2 columns"),
        ("prompt,answer\nx,1,2\n", "d.csv:2: 3 fields"),
        ("prompt,prompt\nx,1\n", "d.csv:1: the header names a column twice: prompt"),
        ('prompt,answer\n"x,1\n', "malformed CSV"),
        ("prompt,answer\n", "holds no rows"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    assert reason in error(str(tmp_path / "d.csv"))


def test_truncated_parquet(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"prompt": [f"question {i}" for i in range(5000)]}), file)
    whole = file.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert "not a readable Parquet file" in error(str(file))


def test_damage_inside_a_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"prompt": [f"question {i}" for i in range(5000)]}), file)
    whole = bytearray(file.read_bytes())
    whole[100:400] = bytes(300)
    file.write_bytes(whole)
    assert "not a readable Parquet file" in error(str(file))


def test_text_in_a_parquet_file_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pq.write_table(pa.table({"prompt": ["question"]}), file, use_dictionary=False, compression="none")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"question", b"quest\x80on"))
    assert "not a readable Parquet file" in error(str(file))


def test_sources_that_are_nothing(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", *ROWS)
    assert f"Did you mean '{tmp_path / 'train.jsonl'}'?" in error(str(tmp_path / "trian.jsonl"))
    assert f"there is no directory {tmp_path / 'x'}" in error(str(tmp_path / "x" / "d.jsonl"))
    (tmp_path / "d.xlsx").write_text("")
    assert "unknown extension '.xlsx'; known are .jsonl, .json, .csv, .parquet" in error(str(tmp_path / "d.xlsx"))
    assert "no such data: 'a b'" in error("a b")
    assert "unknown lab family 'chian'" in error("lab:chian")


def test_reading_is_fast_enough_to_forget(tmp_path: Path) -> None:
    rows = [{"prompt": f"How much is {i} + {i}?", "answer": 2 * i, "source": "made"} for i in range(20_000)]
    source = jsonl(tmp_path / "d.jsonl", *rows)
    began = time.process_time()
    assert len(load(source)) == 20_000
    assert time.process_time() - began < 5


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
JSON_LINES = st.fixed_dictionaries(
    {}, optional={"prompt": JSON_VALUES, "answer": JSON_VALUES, "id": JSON_VALUES, "x": JSON_VALUES}
)
BYTES = st.binary() | st.lists(JSON_LINES.map(json.dumps)).map("\n".join).map(str.encode)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES)
def test_no_bytes_raise_anything_but_user_error(tmp_path: Path, extension: str, content: bytes) -> None:
    file = tmp_path / f"d.{extension}"
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        problems = load(str(file))
        assert all(p.prompt and p.id for p in problems)
        assert len({p.id for p in problems}) == len(problems) > 0


def test_lab_families_can_be_joined_and_share_the_limit():
    joined = load("lab:chain:1+lab:path:1-2", DataConfig(train_limit=5))
    assert [p.columns["family"] for p in joined] == ["chain"] * 3 + ["path"] * 2
    assert joined[:3] == load("lab:chain:1", DataConfig(train_limit=3))
    with pytest.raises(UserError, match="at least 2"):
        load("lab:chain:1+lab:path:1", DataConfig(train_limit=1))


TRANSFORM = """
def shorter(row):
    if row["level"] == 3:
        return None
    return {"prompt": "Say " + row.pop("q"), "answer": row["answer"], "id": row["id"]}

def broken(row):
    return row["nothing"]

def wrong(row):
    return [row]

def none(row):
    return None
"""


def test_rows_are_used_as_a_function_of_the_user_s_makes_them(tmp_path: Path) -> None:
    """A row that it gives no row for is left out; ``train_limit`` counts what is left."""
    (tmp_path / "my_rows.py").write_text(TRANSFORM)
    rows = [{"q": f"{n}?", "answer": n, "id": f"r{n}", "level": level} for n, level in enumerate((3, 4, 3, 5, 6))]
    source, name = jsonl(tmp_path / "d.jsonl", *rows), str(tmp_path / "my_rows.py")
    made = DataConfig(transform=f"{name}:shorter")
    expected = [Problem(f"r{n}", f"Say {n}?", str(n), {}) for n in (1, 3, 4)]
    assert load(source, made) == load(source, made, "eval") == expected
    assert load(source, replace(made, train_limit=2)) == expected[:2]
    place = f"{source}:1: data.transform '{name}"
    assert (
        error(source, DataConfig(transform=f"{name}:broken"))
        == f"{place}:broken' raised KeyError: 'nothing' (my_rows.py:8)"
    )
    assert (
        error(source, DataConfig(transform=f"{name}:wrong")) == f"{place}:wrong' gave list; it must give a row, or None"
    )
    assert "data.transform leaves no rows" in error(source, DataConfig(transform=f"{name}:none"))
    assert "names no function" in error(source, DataConfig(transform="my_rows.py"))
