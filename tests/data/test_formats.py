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
from grads_ds.data.problems import SHOWN, Faults

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
    faults = Faults()
    samples = list(load_samples([str(e) for e in entries], style, faults))
    faults.raise_if_any()
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


# ---- sources -------------------------------------------------------------------------------------


def test_a_folder_is_read_in_name_order_whatever_the_disk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a/2", "a/10", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / ".hidden.jsonl").write_text("{broken")
    (tmp_path / "README.md").write_text("no data")
    wanted = ["a/10", "a/2", "b", "c"]
    assert [s.text for s in load(tmp_path)] == wanted
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert [s.text for s in load(tmp_path)] == wanted


def test_several_sources_make_one_pool_with_names_that_differ(tmp_path: Path) -> None:
    for name in (
        "law/train.jsonl",
        "medicine/train.jsonl",
        "more/part-00000-of-00002.jsonl",
        "more/part-00001-of-00002.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    entries = [tmp_path / "law/train.jsonl", tmp_path / "medicine", tmp_path / "more"]
    assert [s.source for s in load(*entries)] == ["law/train", "medicine/train", "more", "more"]
    assert [s.source for s in load(entries[0])] == ["train"]


def test_a_saved_data_set_is_a_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROWS["messages"]] * 2).save_to_disk(str(tmp_path / "mine"))
    assert [(s.source, s.messages) for s in load(tmp_path / "mine")] == [("mine", TALK)] * 2


def test_hub_ids_go_to_the_hub_and_failures_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fetch(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("cannot reach it")
        return [ROWS["alpaca"]]

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    monkeypatch.chdir(tmp_path)
    assert [s.source for s in load("owner/name", "owner/other:test", "owner/third:en:dev")] == [
        "name",
        "other",
        "third",
    ]
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/other", None, "test"),
        ("owner/third", "en", "dev"),
    ]
    (fault,) = faults_of("no/such")
    assert "neither here nor could it be fetched" in fault and "cannot reach it" in fault


# ---- faults --------------------------------------------------------------------------------------

BAD_LINES = {
    "broken json": ('{"messages": [', "valid JSON"),
    "no object": ("[1, 2]", "an object"),
    "no answer": (
        '{"messages": [{"role": "user", "content": "q"}]}',
        "at least one assistant turn",
    ),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "q"}]}', "a role among"),
    "wrong type": ('{"messages": [{"role": "assistant", "content": 7}]}', "content as text"),
    "turns no list": ('{"messages": {"role": "user"}}', "a list of turns"),
    "no turns": ('{"messages": []}', "a list of turns"),
    "turn no object": ('{"messages": ["hi"]}', "as an object"),
    "mixed": ('{"instruction": "i", "input": "", "output": "o"}', "format messages"),
    "unknown format": ('{"question": "q"}', "messages"),
    "sharegpt role": ('{"conversations": [{"from": "wizard", "value": "v"}]}', "format messages"),
}


def test_all_faults_at_once_each_with_file_and_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS["messages"])
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([good, *(line for line, _ in BAD_LINES.values()), good]))
    found = faults_of(path, tmp_path / "missing.jsonl")
    assert len(found) == len(BAD_LINES) + 1
    assert found[0].startswith(str(tmp_path / "missing.jsonl")) and "nothing there" in found[0]
    for number, (fault, (_, wanted)) in enumerate(
        zip(found[1:], BAD_LINES.values(), strict=True), start=2
    ):
        assert fault.startswith(f"{path}:{number}: wanted "), fault
        assert wanted in fault and "; found " in fault and fault.count(";") >= 2


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"conversations": [{"from": "wizard", "value": "v"}]}, "'from' among human"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "value as text"),
        ({"instruction": "", "input": "", "output": "o"}, "a question"),
        ({"instruction": 5, "output": "o"}, "instruction as text"),
        ({"prompt": "p", "completion": ["c"]}, "both as text"),
        ({"text": 5}, "text as a string"),
        ({"messages": TALK, "tools": "[broken"}, "tools as a JSON list"),
        ({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, "weight 0 or 1"),
    ],
)
def test_faults_of_single_rows(tmp_path: Path, row: dict[str, Any], wanted: str) -> None:
    (fault,) = faults_of(write(tmp_path / "x.jsonl", [row], "jsonl"))
    assert fault.startswith(f"{tmp_path / 'x.jsonl'}:1: ") and wanted in fault


def test_a_forced_format_refuses_rows_of_another(tmp_path: Path) -> None:
    (fault,) = faults_of(write(tmp_path / "x.jsonl", [ROWS["alpaca"]], "jsonl"), style="messages")
    assert "data.format" in fault and "found format alpaca" in fault


def test_many_faults_are_counted_not_listed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{broken\n" * 500)
    found = faults_of(tmp_path / "x.jsonl")
    assert len(found) == SHOWN + 1
    assert f"{500 - SHOWN} more" in found[-1]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt", "parquet", "arrow", "jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00garbage\xff"])
def test_empty_and_garbled_files_are_faults(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content)
    (fault,) = faults_of(path)
    assert fault.startswith(str(path))


def test_broken_array_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[\n {"text": "a"},\n {"text": oops},\n {"text": "c"}\n]')
    (fault,) = faults_of(tmp_path / "x.json")
    assert fault.startswith(f"{tmp_path / 'x.json'}:3: wanted valid JSON")


def test_other_faults_of_the_entries(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_text("?")
    (tmp_path / "empty").mkdir()
    one, two, three = faults_of(tmp_path / "x.docx", tmp_path / "empty", "/no/such/folder/at/all")
    assert "convert or rename" in one and "a folder with files" in two and "nothing there" in three
    (tmp_path / "t.csv").write_text("instruction,input,output\na,b\n")
    assert ":2: wanted 3 fields" in faults_of(tmp_path / "t.csv")[0]


# ---- real rows -----------------------------------------------------------------------------------

REAL = {
    "alpaca_format_general.json": 999,
    "sharegpt_format_tools.json": 300,
    "medicine_medquad6k.jsonl": 6000,
    "general_wikitext_text.jsonl": 1000,
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_load_whole(material: Path, name: str) -> None:
    samples = load(material / "data" / name)
    assert len(samples) == REAL[name]
    assert {s.source for s in samples} == {name.partition(".")[0]}
    assert all(s.text if "text" in name else s.messages for s in samples)
