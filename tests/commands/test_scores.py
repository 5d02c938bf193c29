"""`grads-ds scores`: what it shows is what the tables hold, runs compare by content, exports read
back as they were.
"""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import REPO
from grads_ds import scores
from grads_ds.cli import main
from grads_ds.commands.scores_compare import _matched
from grads_ds.run_dir.ownership import MARKER
from grads_ds.run_dir.publish import publish_json

ROWS = 40


def make_run(folder: Path, norms: np.ndarray, order: list[int] | None = None) -> Path:
    """A run directory with a prepared pool and a finished table whose lm_head norm of content i is
    norms[i].
    """
    from datasets import Dataset

    order = order or list(range(ROWS))
    pool = {
        "sample_id": range(ROWS),
        "sample_hash": [f"content {i}" for i in order],
        "source": ["medicine" if i % 2 else "law" for i in order],
        "row": [
            json.dumps({"messages": [{"role": "user", "content": f"question\n{i}"}]}) for i in order
        ],
    }
    Dataset.from_dict(pool).save_to_disk(str(folder / "prepared/pool"))
    recording = scores.Recording({"model": "m"})
    writer = scores.PartWriter(
        folder / "scores", 0, recording, scores.schema(["lm_head_grad_norm"])
    )
    samples = {
        "sample_id": list(range(ROWS)),
        "sample_hash": pool["sample_hash"],
        "num_tokens": [9] * ROWS,
    }
    targets = np.full(ROWS, 4)
    writer.add(
        scores.make_rows(
            samples, np.arange(ROWS) / 10, targets, {"lm_head_grad_norm": norms[order]}
        )
    )
    writer.flush()
    scores.merge(
        folder / "scores",
        recording.key,
        np.arange(ROWS),
        {"model": "m", "world_size": 3, "hosts": ["a", "b"]},
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    norms = np.arange(1.0, ROWS + 1)
    norms[7] = np.nan
    return make_run(tmp_path / "run", norms)


def test_show_tells_quantiles_sources_and_both_ends(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scores", "show", str(run), "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert "40 samples (1 nonfinite, 39 ok)" in said and "model m, 3 ranks on a, b" in said
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    good = np.delete(np.arange(1.0, ROWS + 1), 7)
    wanted = [
        f"{q:.4g}" for q in np.quantile(good, [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1])
    ]
    assert lines["lm_head_grad_norm"] == wanted
    assert lines["medicine"][0] == "19" and lines["law"][0] == "20"
    assert lines["law"][2] == "20"  # the median of 1, 3, ... 39
    top, bottom = said.split("highest lm_head_grad_norm")[1].split("lowest lm_head_grad_norm")
    assert [line.split()[0] for line in top.strip().splitlines()] == ["40", "39"]
    assert [line.split()[0] for line in bottom.strip().splitlines()] == ["1", "2"]
    assert "sample 39, 4 target tokens: question 39" in top


def test_runs_compare_by_content_whatever_their_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    norms = np.arange(1.0, ROWS + 1)
    other = make_run(tmp_path / "other", norms**2, order)
    assert main(["scores", "compare", str(run), str(other), "--top", "10", "50"]) == 0
    said = capsys.readouterr().out
    # the one without a finite norm in one run is left out
    assert "39 samples in common (of 40 and 40)" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("lm_head_grad_norm"))
    assert row[1:] == ["1.0000", "100.0%", "100.0%"]
    reversed_ = make_run(tmp_path / "reversed", -norms, order)
    main(["scores", "compare", str(run), str(reversed_), "--top", "10"])
    row = next(
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("lm_head_grad_norm")
    )
    assert row[1:] == ["-1.0000", "0.0%"]


def test_equal_rows_pair_in_order_and_rows_of_one_run_alone_are_left_out(tmp_path: Path) -> None:
    """A slow match, row by row, is the truth."""
    draw = np.random.default_rng(0)
    tables = [
        pa.table({"sample_hash": [f"content {i}" for i in draw.integers(0, 12, size)]})
        for size in (40, 25)
    ]
    one, other = (table["sample_hash"].to_pylist() for table in tables)
    left, pairs = list(enumerate(other)), []
    for i, text in enumerate(one):
        match = next((item for item in left if item[1] == text), None)
        if match:
            left.remove(match)
            pairs.append((i, match[0]))
    first, second = _matched(*tables)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == pairs


def test_exports_read_back(run: Path, tmp_path: Path) -> None:
    table = pq.read_table(run / "scores/table.parquet").to_pylist()
    for form in ("csv", "jsonl"):
        assert (
            main(
                [
                    "scores",
                    "export",
                    str(run),
                    "--format",
                    form,
                    "--rows",
                    "--output",
                    str(tmp_path / form),
                ]
            )
            == 0
        )
    with open(tmp_path / "csv") as file:
        found = list(csv.DictReader(file))
    assert [int(row["sample_id"]) for row in found] == list(range(ROWS))
    assert [float(row["loss"]) for row in found] == pytest.approx([row["loss"] for row in table])
    records = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert records[7]["lm_head_grad_norm"] is None and records[7]["status"] == "nonfinite"
    assert records[8] == table[8] | {
        "source": "law",
        "row": {"messages": [{"role": "user", "content": "question\n8"}]},
    }


def test_a_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    command = (
        f"{shlex.quote(sys.executable)} -m grads_ds scores export {shlex.quote(str(run))} | head"
        " -n 1"
    )
    done = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, text=True)
    assert done.stdout.startswith('"sample_id"') and done.stderr == ""


def test_wrong_words_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_json(tmp_path / "empty/scores/manifest.json", {})
    publish_json(run / MARKER, {})
    publish_json(run / "state/probe.record.owned", ["scores"])
    for words, fault in (
        (["show", str(tmp_path / "empty")], "run the probe first"),
        (["show", str(run), "--by", "mlp"], "wanted one of loss, lm_head_grad_norm"),
        (["compare", str(run), str(run), "--top", "0"], "percentages above 0"),
        (
            ["export", str(run), "--output", str(tmp_path / "no/where")],
            "wanted a file in an existing folder",
        ),
        (["export", str(run), "--output", str(run / "scores/x.csv")], "the run itself writes"),
    ):
        assert main(["scores", *words]) == 2
        assert fault in capsys.readouterr().err
