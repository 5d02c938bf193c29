"""Every file is read once and in one order; what a folder holds and is not read is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from grads_ds.config.errors import UserError
from grads_ds.config.model_and_data import DataConfig
from grads_ds.data.formats import load_samples
from grads_ds.data.problems import Problems

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(*entries: Path | str) -> tuple[list[str | None], list[str]]:
    """(texts in order, what is said). Raises UserError."""
    problems = Problems()
    texts = [sample.text for sample in load_samples([str(e) for e in entries], "auto", problems)]
    problems.raise_if_any()
    return texts, problems.notes


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_files_are_read_whole_or_refused(tmp_path: Path, packing: str) -> None:
    texts = [f"row {n}" for n in range(5000)]
    plain = write(tmp_path / "plain.jsonl", *texts).read_bytes()
    pack = PACKINGS[packing]
    file = tmp_path / f"x.jsonl.{packing}"
    file.write_bytes(pack(plain[:1000]) + pack(plain[1000:]))  # two parts, one behind the other
    assert read(file) == (texts, [])
    file.write_bytes(pack(plain)[:-30])
    with pytest.raises(UserError, match="a readable file"):
        read(file)


@pytest.mark.parametrize("how", ["again", "dot", "relative", "link", "hard", "folder", "linked"])
def test_the_same_file_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    file = write(tmp_path / "data/a.jsonl", "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    second = {
        "again": str(file),
        "dot": f"{tmp_path}/./data/../data/a.jsonl",
        "relative": "data/a.jsonl",
        "link": "link.jsonl",
        "hard": "hard.jsonl",
        "folder": "data",
        "linked": "linked",
    }[how]
    with pytest.raises(UserError, match="each source once"):
        read(file, second)


def test_a_second_name_of_a_file_in_a_folder_is_read_once_and_named(tmp_path: Path) -> None:
    write(tmp_path / "d/a.jsonl", "a")
    (tmp_path / "d/b.jsonl").symlink_to("a.jsonl")
    texts, (note,) = read(tmp_path / "d")
    assert texts == ["a"] and "b.jsonl (the same file as a.jsonl)" in note


SPLITS = [
    ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
    ("train.jsonl", "validation.jsonl"),
    ("train/0.jsonl", "dev/0.jsonl"),
    ("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
    ("my-train-rows.jsonl", "my-eval-rows.jsonl"),
]


@pytest.mark.parametrize("names", SPLITS, ids=lambda names: names[0])
def test_of_a_folder_with_splits_train_alone_is_read(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    write(tmp_path / names[0], "train")
    write(tmp_path / names[1], "held out")
    (tmp_path / "metadata.json").write_text('{"license": "mit"}')
    texts, (note,) = read(tmp_path)
    assert texts == ["train"]
    assert f"{names[1]} (split " in note and "metadata.json" in note and "only train" in note
    # a folder of one split, and a file by itself, mean what they say
    assert read(tmp_path / names[1])[0] == ["held out"]


@pytest.mark.parametrize(
    "card",
    [
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n"
        "  - split: extra\n    path: b/*\n",
        "configs:\n- config_name: default\n  data_files:\n    train: a/*\n    extra: [b/*]\n",
        "dataset_info:\n  splits:\n  - name: a\n  - name: b\n",
    ],
    ids=["listed", "mapped", "named"],
)
def test_the_splits_of_a_dataset_card_are_followed(tmp_path: Path, card: str) -> None:
    write(tmp_path / "a/x.jsonl", "a")
    write(tmp_path / "b/y.jsonl", "b")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{card}---\n# Card\n")
    texts, notes = read(tmp_path)
    assert texts == (["a"] if "train" in card else ["a", "b"])
    assert ("b/y.jsonl (split extra" in notes[0]) == ("train" in card)


def test_what_is_not_read_is_named_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path / "d/a.jsonl", "a")
    write(tmp_path / "d/_train.jsonl", "b")
    write(tmp_path / "d/.hidden.jsonl", "c")
    write(tmp_path / "elsewhere/e.jsonl", "e")
    (tmp_path / "d/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/gone.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("x.jsonl.7z", "y.docx", "noending", "licence.txt", "z.jsonl.txt"):
        (tmp_path / "d" / name).write_text("what")
    texts, (note,) = read(tmp_path / "d")
    assert texts == ["a"]
    for said in (
        "_train.jsonl (a name that begins with _)",
        ".hidden.jsonl (a name that begins with .)",
        "linked (a linked folder)",
        "gone.jsonl (a link to nothing)",
        "x.jsonl.7z (the ending .jsonl.7z)",
        "y.docx (the ending .docx)",
        "noending (no ending)",
        "licence.txt (text beside rows)",
        "z.jsonl.txt (the ending .jsonl.txt)",
    ):
        assert said in note
    alone = tmp_path / "texts"
    alone.mkdir()
    (alone / "t.txt").write_text("story")
    assert read(alone) == (["story"], [])


def test_paths_are_expanded_once_in_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", "mine")
    data: Any = DataConfig(
        train=["~/a.jsonl", "$HOME/${ROWS}.jsonl"], validation={"v": "~/v.jsonl"}, replay="~/r"
    )
    assert data.train == [f"{tmp_path}/a.jsonl", f"{tmp_path}/mine.jsonl"]
    assert data.validation == {"v": f"{tmp_path}/v.jsonl"} and data.replay == [f"{tmp_path}/r"]
