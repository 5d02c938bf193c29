"""Every fault names its file, its line and what to change; real files load whole; where rows come
from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grads_ds.data.problems import SHOWN
from tests.data.test_formats import ROWS, TALK, faults_of, load, write


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


# ---- problems ----------------------------------------------------------------------------------

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
