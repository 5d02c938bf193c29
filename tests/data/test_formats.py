"""Every common format says the same conversation; every fault names its file, its line and what to
change.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds.config.errors import UserError
from grads_ds.data.formats import Sample, load_samples
from grads_ds.data.problems import Problems

TALK = [
    {"role": "user", "content": "Which colour?\n\nOf the sky"},
    {"role": "assistant", "content": "Blue,\nmostly"},
]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TALK},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": TALK[0]["content"]},
            {"from": "gpt", "value": TALK[1]["content"]},
        ]
    },
    "alpaca": {"instruction": "Which colour?", "input": "Of the sky", "output": "Blue,\nmostly"},
    "prompt_completion": {"prompt": TALK[0]["content"], "completion": TALK[1]["content"]},
}
FILES = [
    "json",
    "jsonl",
    "jsonl.gz",
    "lines.json",
    "object.json",
    "parquet",
    "arrow",
    "stream.arrow",
    "csv",
    "tsv",
]


def write(path: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """Write rows as the named kind of file."""
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    if kind in ("jsonl", "lines.json"):
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "object.json":
        path.write_text(json.dumps({"data": rows}, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind.endswith("arrow"):
        table = pa.Table.from_pylist(rows)
        make = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        with path.open("w", newline="") as file:
            table_writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if kind == "tsv" else ","
            )
            table_writer.writeheader()
            for row in rows:
                table_writer.writerow(
                    {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                )
    return path


def load(*entries: Path | str, style: str = "auto") -> list[Sample]:
    problems = Problems()
    samples = list(load_samples([str(e) for e in entries], style, problems))
    problems.raise_if_any()
    return samples


def faults_of(*entries: Path | str, style: str = "auto") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(*entries, style=style)
    return caught.value.problems


# ---- formats and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ROWS)
def test_every_format_in_every_file_says_the_same(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path / f"pool.{kind}", [ROWS[name]] * 3, kind)
    for style in ("auto", name):
        samples = load(path, style=style)
        assert [s.messages for s in samples] == [TALK] * 3
        assert [s.row.keys() for s in samples] == [ROWS[name].keys()] * 3


def test_origins_are_lines_that_can_be_opened(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", [ROWS["alpaca"]] * 3, "json")
    lines = array.read_text().split("\n")
    for sample in load(array):
        line = int(sample.origin.rpartition(":")[2])
        assert lines[line - 1].strip() == "{"
    blank = tmp_path / "b.jsonl"
    blank.write_text("\n" + json.dumps(ROWS["messages"]) + "\n\n" + json.dumps(ROWS["messages"]))
    assert [s.origin for s in load(blank)] == [f"{blank}:2", f"{blank}:4"]
    # the output has a line break in it
    table = write(tmp_path / "c.csv", [ROWS["alpaca"]] * 2, "csv")
    assert [s.origin for s in load(table)] == [f"{table}:2", f"{table}:4"]


def test_text_files_are_split_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\none\ntwo\n\n \nthree\n")
    assert [(s.text, s.origin.rpartition(":")[2]) for s in load(tmp_path / "t.txt")] == [
        ("one\ntwo", "2"),
        ("three", "6"),
    ]
    (tmp_path / "t.jsonl").write_text('{"text": "a\\n\\nb"}\n')
    assert load(tmp_path / "t.jsonl")[0].text == "a\n\nb"


def test_a_line_separator_inside_json_does_not_break_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert [s.text for s in load(tmp_path / "t.jsonl")] == ["a\u2028b", "c"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert load(tmp_path / "t.jsonl")[0].text == "a"


def test_sharegpt_roles_and_function_calls(tmp_path: Path) -> None:
    turns = [
        ("system", "s"),
        ("human", "h"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "o"),
        ("gpt", "g"),
    ]
    row = {"conversations": [{"from": a, "value": b} for a, b in turns], "tools": '[{"name": "f"}]'}
    (sample,) = load(write(tmp_path / "x.json", [row], "json"))
    assert sample.messages is not None
    assert [m["role"] for m in sample.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert sample.messages[2]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    ]
    assert sample.tools == [{"type": "function", "function": {"name": "f"}}]


def test_message_lists_as_prompt_train_on_the_completion_alone(tmp_path: Path) -> None:
    row = {"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]}
    (sample,) = load(write(tmp_path / "x.jsonl", [row], "jsonl"))
    assert [m.get("weight", 1) for m in sample.messages or []] == [1, 0, 1, 1]


def test_openai_parts_tool_calls_and_nulls_of_arrow(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "tool_calls": None},
            ]
        },
    ]
    first, second = load(write(tmp_path / "x.parquet", rows, "parquet"))
    assert first.messages == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "f", "arguments": {}}}],
        },
    ]
    assert second.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    parts = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"},
        ]
    }
    assert load(write(tmp_path / "y.jsonl", [parts], "jsonl"))[0].messages == second.messages
