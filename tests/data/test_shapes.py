"""Odd shapes of rows are read as what they mean, or named with file and line; none ends in a
traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds.config.errors import UserError
from grads_ds.data.formats import Sample, load_samples
from grads_ds.data.problems import Problems

ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
TALK = json.loads(ROW)["messages"]


def load(path: Path, style: str = "auto") -> list[Sample]:
    problems = Problems()
    samples = list(load_samples([str(path)], style, problems))
    problems.raise_if_any()
    return samples


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def fault_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    (fault,) = caught.value.problems
    return fault


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "q"}],
        [{"type": "text", "content": "q"}],
        [{"type": "text", "value": "q"}],
        [{"type": "input_text", "text": "q"}],
        [{"text": "q"}],
        ["q"],
        {"type": "text", "text": "q"},
        [{"type": "text", "text": "q", "image_url": None}],
    ],
    ids=str,
)
def test_text_parts_under_any_key_are_the_text(tmp_path: Path, content: Any) -> None:
    row = {"messages": [{"role": "user", "content": content}, TALK[1]]}
    assert load(written(tmp_path / "x.jsonl", json.dumps(row)))[0].messages == TALK


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": "u"}],
        [{"type": "text"}],
        [{"type": "text", "text": "q", "content": "other"}],
        [{"type": "text", "text": 7}],
        [],
        7,
    ],
    ids=str,
)
def test_parts_that_are_no_text_are_refused(tmp_path: Path, content: Any) -> None:
    row = {"messages": [{"role": "user", "content": content}, TALK[1]]}
    assert "content as text" in fault_of(written(tmp_path / "x.jsonl", json.dumps(row)))


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    turns = {"role": ["user", "assistant", "user"], "content": ["q", "a"]}
    fault = fault_of(written(tmp_path / "x.jsonl", json.dumps({"messages": turns})))
    assert "columns of one length" in fault and "x.jsonl:1" in fault
    turns["role"].pop()
    again = written(tmp_path / "x.jsonl", json.dumps({"messages": turns}))
    assert load(again)[0].messages == TALK


def test_one_object_is_one_row_and_an_object_around_rows_a_table(tmp_path: Path) -> None:
    assert load(written(tmp_path / "x.json", ROW))[0].messages == TALK
    assert len(load(written(tmp_path / "y.json", f'{{"data": [{ROW}, {ROW}]}}'))) == 2
    assert len(load(written(tmp_path / "z.json", json.dumps(json.loads(ROW), indent=2)))) == 1


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a", "text": "b"}', "'text' twice"),
        ('{"messages": [{"role": "user", "role": "user", "content": "q"}]}', "'role' twice"),
        (ROW[:-1] + ', "n": ' + "9" * 5000 + "}", "thousands of digits"),
        (ROW[:-1] + ', "n": ' + "[" * 300 + "]" * 300 + "}", "levels of nesting"),
        (ROW[:-1] + ', "n": ' + "[" * 90_000 + "]" * 90_000 + "}", "levels of nesting"),
        ('{"text": "a"} {"text": "b"}', "Extra data"),
    ],
    ids=["key", "turn key", "digits", "deep", "deepest", "two"],
)
def test_json_that_would_be_changed_is_refused_with_its_line(
    tmp_path: Path, line: str, found: str
) -> None:
    for name in ("x.jsonl", "x.json"):
        fault = fault_of(written(tmp_path / name, f'{{"text": "fine"}}\n{line}\n'))
        assert f"{name}:2: " in fault and found in fault
    fault = fault_of(written(tmp_path / "y.json", f'[{{"text": "fine"}},\n{line}]'))
    assert "y.json:2: " in fault


def test_pretty_printed_lines_are_one_sentence(tmp_path: Path) -> None:
    pretty = json.dumps(json.loads(ROW), indent=2)
    for text in (pretty + "\n" + pretty, ROW + "\n" + pretty + "\n" + pretty):
        fault = fault_of(written(tmp_path / "x.jsonl", text))
        assert "spread over several lines" in fault


def test_a_pair_is_a_chat_or_plain_text_as_the_format_says(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jsonl", '{"prompt": "The sky is", "completion": " blue."}\n')
    (chat,), (text,) = load(path), load(path, "prompt_completion_text")
    assert chat.messages and [m["content"] for m in chat.messages] == ["The sky is", " blue."]
    assert (text.text, text.context) == ("The sky is blue.", 10)


def test_padding_of_arrow_is_no_part_of_calls_and_schemas(tmp_path: Path) -> None:
    """At every depth, as structs and as maps; a null in JSON stays one."""
    rows = [
        calling("rain", {"city": "Oslo", "day": {"of": "May"}}),
        calling("add", {"a": 2, "b": [1, None]}),
        calling("now", {}),
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [s.messages for s in load(path)] == [row["messages"] for row in rows]
    assert [s.tools for s in load(path)] == [row["tools"] for row in rows]
    assert [s.row for s in load(path)] == rows
    line = json.dumps(calling("rain", {"city": None}))
    (given,) = load(written(tmp_path / "y.jsonl", line))
    assert given.messages and given.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "city": None
    }
    kind = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    turn = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(kind))]
    )
    call = {"name": "rain", "arguments": [("city", "Oslo")]}
    turns = [TALK[0], {"role": "assistant", "tool_calls": [call]}]
    pq.write_table(pa.table({"messages": pa.array([turns], pa.list_(turn))}), path)
    assert (load(path)[0].messages or [])[1]["tool_calls"][0]["function"] == {
        "name": "rain",
        "arguments": {"city": "Oslo"},
    }


def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    properties = {key: {"type": "string"} for key in arguments}
    call = {"type": "function", "function": function}
    schema = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {
        "messages": [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": schema}],
    }
