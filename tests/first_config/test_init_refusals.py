"""What `grads-ds init` refuses or leaves out, it says, all of it at once and before it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import write_rows
from grads_ds.cli import main
from grads_ds.config.errors import UserError
from grads_ds.first_config.write_config import Request, write_config


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_rows_that_cannot_be_read_are_left_out_with_count_and_reason(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("a.jsonl"), 60)
    with open("a.jsonl", "a") as file:
        file.write('{"messages": [{"role": "user", "content": "what"}]}\n{"messages": 3}\nno\n')
    assert main(["init", "a.jsonl", "--model", str(tiny_model)]) == 0
    assert "left out, of rows and files: 3; the first: a.jsonl:61: wanted" in (
        capsys.readouterr().out
    )
    assert main(["prepare", "grads.yaml"]) == 0


def test_files_that_are_not_understood_are_refused_and_nothing_is_written(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.jsonl").write_text('{"question": "what", "reply": "that"}\n' * 9)
    before = sorted(Path().iterdir())
    words = ["init", "a.jsonl", "missing.jsonl", "--general", "gone", "--model", "none"]
    assert main(words) == 2
    told = capsys.readouterr().err
    for place in ("missing.jsonl: wanted a file", "gone: wanted a file", "nothing at none"):
        assert place in told
    assert main(["init", "a.jsonl", "--model", str(tiny_model)]) == 2
    told = capsys.readouterr().err
    assert "a.jsonl:1: wanted one of the formats" in told and "can be used; found none" in told
    assert main(["init", "--seed", "-1"]) == 2
    assert capsys.readouterr().err.count("wanted") == 3
    assert sorted(Path().iterdir()) == before


def test_what_is_there_is_never_overwritten(tiny_model: Path) -> None:
    write_rows(Path("a.jsonl"), 30)
    Path("grads.yaml").write_text("mine")
    assert main(["init", "a.jsonl", "--model", str(tiny_model)]) == 2
    assert Path("grads.yaml").read_text() == "mine" and not Path("grads_data").exists()


def test_no_general_row_is_one_of_the_pool_s(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("a.jsonl"), 60)
    write_rows(Path("b.jsonl"), 90, seed=2)
    with open("b.jsonl", "a") as file:
        file.write(Path("a.jsonl").read_text())
    words = ["init", "a.jsonl", "--model", str(tiny_model), "--general"]
    assert main([*words, "a.jsonl"]) == 2
    assert "--general: wanted rows that DATA has not" in capsys.readouterr().err
    assert main([*words, "b.jsonl"]) == 0
    (file,) = Path("grads_data/general/held_out").iterdir()
    rows = set(file.read_text().splitlines())
    pool = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert len(rows) > 30 and not any(json.loads(row) in pool for row in rows)


def test_an_empty_file_among_others_is_named_and_alone_refused(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(Path("a.jsonl"), 30)
    Path("empty.jsonl").touch()
    assert main(["init", "empty.jsonl", "--model", str(tiny_model)]) == 2
    assert "DATA: wanted rows that can be used; found none" in capsys.readouterr().err
    assert main(["init", "a.jsonl", "empty.jsonl", "--model", str(tiny_model)]) == 0
    assert "left out, of rows and files: 1; the first: empty.jsonl" in capsys.readouterr().out


def test_a_model_without_tokenizer_is_told_before_any_row_is_read() -> None:
    write_rows(Path("a.jsonl"), 30)
    Path("model").mkdir()
    with pytest.raises(UserError) as caught:
        write_config(Request(["a.jsonl"], "model", [], Path("c.yaml")))
    told = "\n".join(caught.value.problems)
    assert "wanted a tokenizer in model" in told and "wanted weights" in told
    assert not Path("c_data").exists()
