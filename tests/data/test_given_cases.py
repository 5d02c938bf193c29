"""Small inputs that were once read wrong give what is right, on real tokenizers and models; where
they do not lie beside the checkout, tests of the same kinds on self-made ones run alone
(test_carried_tools, test_exclusions, test_carried, test_sources, test_shapes, test_model_limits).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_from_disk
from transformers import AutoTokenizer

from conftest import REPO
from grads_ds.cli import main
from grads_ds.data.collate import IGNORE_INDEX


@pytest.fixture
def cases() -> Path:
    folder = REPO.parent / "shared/cases"
    if not folder.is_dir():
        pytest.skip(f"needs the given cases at {folder}")
    return folder


@pytest.fixture
def prepare(cases: Path, material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Prepares a case: (exit status, what was said, tokens, texts of the targets)."""

    def run(data: Path, template: str = "", tokenizer: str = "", dropped: str = "refuse") -> Any:
        model = {"path": str(material / (tokenizer or "models/base-8M"))}
        if template:
            model["chat_template"] = str(cases / "templates" / template)
        run_dir = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        config = run_dir.with_suffix(".yaml")
        sources = {"train": [str(data)], "max_length": 512, "dropped_content": dropped}
        config.write_text(
            yaml.safe_dump({"run_dir": str(run_dir), "model": model, "data": sources})
        )
        status = main(["prepare", str(config)])
        said = "".join(capsys.readouterr())
        if status:
            return status, said, [], []
        rows = load_from_disk(str(run_dir / "prepared/pool"))
        decode = AutoTokenizer.from_pretrained(model["path"]).decode
        learned = [[t for t in row["labels"] if t != IGNORE_INDEX] for row in rows]
        return status, said, rows["input_ids"][:], [decode(tokens) for tokens in learned]

    return run


def test_arrow_padded_tools_are_those_of_the_text_file(cases: Path, prepare: Any) -> None:
    given = [
        prepare(cases / "data" / f"tools.{kind}", "toolaware.jinja", "tokenizers/qwen")
        for kind in ("jsonl", "parquet")
    ]
    assert [status for status, *_ in given] == [0, 0], given[0][1]
    assert given[0][2] == given[1][2] and "null" not in "".join(given[1][3])


@pytest.mark.parametrize("file", ["sgweight.jsonl", "train_false.jsonl"])
def test_excluded_turns_are_no_targets(file: str, cases: Path, prepare: Any) -> None:
    status, _, _, targets = prepare(cases / "data" / file)
    assert status == 0 and "GOOD 4" in targets[0] and "BAD 5" not in targets[0]


@pytest.mark.parametrize(
    "file, template, tokenizer, lost",
    [
        ("think2.jsonl", "think_marked.jinja", "tokenizers/qwen", "reasoning"),
        ("think2.jsonl", "think.jinja", "tokenizers/qwen", "reasoning"),
        ("system.jsonl", "nosystem.jinja", "tokenizers/qwen", "system prompt"),
        ("toolcontent.jsonl", "", "", "tool schema"),
    ],
)
def test_what_a_template_cannot_carry_is_refused_or_counted(
    file: str, template: str, tokenizer: str, lost: str, cases: Path, prepare: Any
) -> None:
    status, said, *_ = prepare(cases / "data" / file, template, tokenizer)
    assert status == 2 and f"{file}:1" in said and lost in said
    status, said, *_ = prepare(cases / "data" / file, template, tokenizer, "count")
    assert status == 0 and f"left out the {lost}" in said


def test_a_cloned_repository_gives_its_train_files_alone(cases: Path, prepare: Any) -> None:
    status, said, tokens, targets = prepare(cases / "data/cloned_repository")
    assert status == 0 and len(tokens) == 1 and "test" not in targets[0]
    assert "test-00000-of-00001.jsonl" in said


def test_what_a_folder_holds_and_was_not_read_is_named(cases: Path, prepare: Any) -> None:
    status, said, *_ = prepare(cases / "data/odd_folder")
    assert "_train.jsonl" in said and "notes.jsonl.txt" in said
    assert status == 2 and "d.jsonl.zst" in said  # breaks off inside its first frame


def test_odd_files_are_one_row_or_named_with_their_line(cases: Path, prepare: Any) -> None:
    assert len(prepare(cases / "data/one_object.json")[2]) == 1
    status, said, tokens, _ = prepare(cases / "data/bigint.jsonl")
    assert "Traceback" not in said and (len(tokens) == 2 or (status, ":2" in said) == (2, True))
