"""`grads-ds check RUN` finds every flipped bit, says what to do, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grads_ds import scores
from grads_ds.cli import main
from grads_ds.config.config import Config
from grads_ds.run_dir.digests import sha256
from grads_ds.run_dir.ownership import claim
from grads_ds.run_dir.provenance import save_config
from grads_ds.run_dir.units import begin, mark_done
from grads_ds.training.checkpoint_mark import write_mark


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Outputs, a part, a checkpoint and the resolved config."""
    run = tmp_path / "run"
    claim(run)
    for name in ("prepared/pool/data.arrow", "report.html"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(np.random.default_rng(0).bytes(300))
    mark_done(run, "prepare", {}, ["prepared"], 1.0)
    mark_done(run, "report", {}, ["report.html"], 1.0)
    config = {"run_dir": str(run), "model": {"path": "m"}, "data": {"train": ["x"]}}
    save_config(Config.model_validate(config), run)
    schema = scores.schema(["lm_head_grad_norm"])
    writer = scores.PartWriter(run / "scores", 0, scores.Recording({"model": "m"}), schema)
    row = {"sample_id": [0], "sample_hash": ["a"], "num_tokens": [1]}
    norms = {"lm_head_grad_norm": np.ones(1)}
    writer.add(scores.make_rows(row, np.ones(1), np.ones(1, np.int64), norms))
    writer.flush()
    checkpoint = run / "sft/checkpoints/checkpoint-2"
    checkpoint.mkdir(parents=True)
    part = checkpoint / "optim_states.pt"
    part.write_bytes(b"moments" * 40)
    files = {part.name: {"size": part.stat().st_size, "sha256": sha256(part)}}
    write_mark(checkpoint, {"ranks": 1, "step": 2, "identity": "x", "files": files})
    return run


def test_a_whole_run_is_said_to_be_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run)]) == 0
    assert capsys.readouterr().out == "check: 5 files as they were written, 0 damaged\n"


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("prepared/pool/data.arrow", "makes it again"),
        ("report.html", "makes it again"),
        ("state/prepare.json", "makes it again"),
        ("resolved.yaml", "writes it again"),
        ("scores/part-*", "scores its samples again"),
        ("sft/checkpoints/checkpoint-2/optim_states.pt", "the one before it"),
        ("sft/checkpoints/checkpoint-2/complete", "the one before it"),
    ],
)
def test_a_flipped_bit_is_found_and_what_to_do_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], pattern: str, advice: str
) -> None:
    (file,) = run.glob(pattern)
    content = bytearray(file.read_bytes())
    # inside a value, where the file is text: blanks between values may change
    content[content.index(b"sha256") + 1 if b"sha256" in content else len(content) // 2] ^= 1
    file.write_bytes(content)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert main(["check", str(run)]) == 1
    damaged, counts = capsys.readouterr().out.strip().splitlines()
    assert damaged.startswith("damaged") and advice in damaged and "1 damaged" in counts
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_what_is_gone_is_damaged_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["check", str(run)]) == 1
    assert "report.html is gone" in capsys.readouterr().out


def test_a_folder_in_the_place_of_a_record_is_damage(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "state/report.json").unlink()
    (run / "state/report.json").mkdir()
    assert main(["check", str(run)]) == 1
    assert "report: its record is damaged" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state/x.json").write_text(json.dumps({}))
    assert main(["check", str(tmp_path)]) == 2
    assert "wanted a run" in capsys.readouterr().err


def test_a_unit_whose_record_is_gone_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks like one that was begun and not finished; both are made again."""
    begin(run, "select/random", ["selection"])
    assert main(["check", str(run)]) == 0
    unknown, counts = capsys.readouterr().out.strip().splitlines()
    assert unknown.startswith("unknown  select.random: begun") and "makes it again" in unknown
    assert counts.endswith("0 damaged, units without a record: 1")
