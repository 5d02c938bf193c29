"""What a digest of content sees."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conftest import REPO
from grads_ds.run_dir import digests
from grads_ds.run_dir.digests import WHOLE_BELOW, content_digest


def test_one_changed_byte_of_a_large_source_is_seen(tmp_path: Path) -> None:
    """Rows of the same length differ in single bytes, and the file's times may stay."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    os.truncate(file, WHOLE_BELOW + 2**20)
    before = content_digest(file, whole=True)
    with file.open("r+b") as content:
        content.seek(700_001)  # between two of the blocks that are read of weights
        content.write(b"x")
    assert content_digest(file, whole=True) != before
    assert content_digest(tmp_path, whole=True) != content_digest(tmp_path)


def test_a_name_that_is_no_text_has_a_digest(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text("x")
    before = content_digest(tmp_path)
    os.rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), tmp_path / os.fsdecode(b"caf\xe8.jsonl"))
    assert content_digest(tmp_path) != before


def test_a_start_reads_a_model_once_unless_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda file: (read.append(file.name), real(file))[1])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    first = content_digest(tmp_path)
    assert content_digest(tmp_path) == first and read == [weights.name]
    weights.write_bytes(b"two")
    assert content_digest(tmp_path) != first and len(read) == 2


def test_digests_of_outputs_cost_under_2_percent_of_a_stage_on_record() -> None:
    found = json.loads((REPO / "docs/results/bench_hashes.json").read_text())
    assert len(found) == 6
    assert all(stage["outputs"]["percent of the stage"] < 2 for stage in found.values())
