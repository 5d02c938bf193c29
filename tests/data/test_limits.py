"""Data that would hang a run or fill its memory is refused in words."""

from __future__ import annotations

import gzip
import json
import os
import resource
import tracemalloc
from pathlib import Path

import pytest

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data import input_files, readers, row_text, template
from grads_ds.data.stage import run_prepare
from grads_ds.flow.unit_inputs import prepare_units

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"


def prepare(folder: Path, model: Path, source: str, **settings: str) -> list[str]:
    """The problems that preparing `source` ends with; none when it is prepared."""
    config = Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(model), **settings},
            "data": {"train": [source]},
        }
    )
    prepare_units(config, folder / "run")  # what a start looks at first must not hang either
    try:
        run_prepare(config, folder / "run")
    except UserError as error:
        assert not (folder / "run/prepared").exists()
        return error.problems
    return []


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_a_source_is_a_regular_file(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    source = "/dev/zero" if kind == "device" else str(tmp_path / "rows.jsonl")
    if kind == "pipe":
        os.mkfifo(source)
    elif kind == "link to a device":
        os.symlink("/dev/zero", source)
    (found,) = prepare(tmp_path, tiny_model, source)
    assert "wanted a file or a folder; found a pipe, a socket or a device" in found


def test_a_line_has_a_largest_size_however_small_its_file(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "LINE_LARGEST", 10_000)
    source = tmp_path / "rows.jsonl.gz"
    with gzip.open(source, "wt") as file:
        file.write(json.dumps(ROW) + "\n" + "x" * 10_000_000 + "\n")
    found = prepare(tmp_path, tiny_model, str(source))
    assert any(f"{source}:2: wanted lines of at most 10,000 bytes" in text for text in found)


def test_a_row_has_a_largest_size(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_text, "ROW_LARGEST", 200)
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"more": "x" * 200}) + "\n")
    (found,) = prepare(tmp_path, tiny_model, str(source))
    assert f"{source}:2: wanted rows of at most 200 characters" in found


@pytest.mark.timeout(120, func_only=True)
def test_a_template_that_does_not_end_is_ended(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.5)
    source = tmp_path / "rows.jsonl"
    source.write_text((json.dumps(ROW) + "\n") * 3)
    (tmp_path / "slow.jinja").write_text(SLOW)
    (found,) = prepare(
        tmp_path, tiny_model, str(source), chat_template=str(tmp_path / "slow.jinja")
    )
    assert found.startswith("model.chat_template: wanted a template that renders")


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize(
    "text", ["{{ 'x' * 10 ** 11 }}", "{% set x = 10 ** 11 %}{{ messages[0].content * x }}"]
)
def test_a_template_that_wants_all_memory_is_refused(
    tmp_path: Path, tiny_model: Path, text: str
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text((json.dumps(ROW) + "\n") * 2)
    (tmp_path / "large.jinja").write_text(text)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    found = prepare(tmp_path, tiny_model, str(source), chat_template=str(tmp_path / "large.jinja"))
    assert found and all("refuses them (MemoryError" in problem for problem in found)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_what_a_template_raises_acts_on_no_terminal(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    text = "{{ raise_exception('\x1b]0;owned\x07\u202e') }}"
    (tmp_path / "own.jinja").write_text(text)
    template = str(tmp_path / "own.jinja")
    found = prepare(tmp_path, tiny_model, str(tmp_path / "rows.jsonl"), chat_template=template)
    assert any("\\x1b]0;owned" in text for text in found)
    assert not set("\x1b\x07\u202e") & set("".join(found))


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.txt.gz", "rows.csv.gz"])
def test_many_short_lines_of_one_text_have_a_largest_size_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An object, an array, a paragraph or a quoted field that goes on over all lines."""
    monkeypatch.setattr(input_files, "LINE_LARGEST", 100_000)
    monkeypatch.setattr(readers, "TEXT_LARGEST", 100_000)
    opened = {"rows.jsonl.gz": '{"text":', "rows.json.gz": "[", "rows.csv.gz": 'text\n"'}
    tracemalloc.start()
    with gzip.open(tmp_path / name, "wt") as file:
        file.write(opened.get(name, "") + "\n")
        for _ in range(50):
            file.write(('"' + "x" * 98 + '"\n' if "json" in name else "x" * 100 + "\n") * 1000)
    assert prepare(tmp_path, tiny_model, str(tmp_path / name))
    assert tracemalloc.get_traced_memory()[1] < 4_000_000  # of 5 MB
    tracemalloc.stop()
