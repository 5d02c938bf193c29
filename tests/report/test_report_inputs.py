"""The report of runs that lack parts, were resumed or are large; and the plain-text table."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.report.row_choice import HELD
from grads_ds.report.stage import run_report
from grads_ds.report.text_table import report_table
from tests.report.browser import PROGRAM, browser
from tests.report.html_page import SECTIONS, Page, block, report
from tests.report.synthetic_run import LOSSES, make_run, write_json


def test_optional_parts_may_be_absent(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=300, variants=False)
    run_dir = Path(config.run_dir)
    for name in ("tensorboard", "state", "prepared"):
        shutil.rmtree(run_dir / name)
    for name in ("evaluation.json", "resolved.yaml", "selection/comparison.json"):
        (run_dir / name).unlink()
    path = run_dir / "selection/selection.parquet"
    pq.write_table(
        pq.read_table(path, columns=["sample_id", "signal", "density", "selected"]), path
    )
    write_json(run_dir / "selection/selection.json", {"method": "grads"})
    page = report(config)
    assert [attrs["id"] for _, attrs in page.elements if "id" in attrs] == SECTIONS
    assert "Nothing has been evaluated yet" in page.text["verdict"]
    assert "The methods were not compared" in page.text["methods"]
    assert "No preliminary training was logged" in page.text["training"]
    assert "holds no text of this sample" in page.text["samples"]
    assert "models/base-8M" in page.text["settings"]  # from the config that was given
    assert report_table(run_dir) == "no evaluation yet (evaluation.json is not there)"


def test_missing_scores_or_a_selection_of_other_samples_is_refused(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=100, variants=False)
    run_dir = Path(config.run_dir)
    path = run_dir / "selection/selection.parquet"
    whole = pq.read_table(path)
    pq.write_table(whole.slice(0, 50), path)
    with pytest.raises(UserError, match=r"50 rows for 100 scores.*--to select"):
        run_report(config, run_dir)
    path.unlink()
    with pytest.raises(UserError, match="--to select"):
        run_report(config, run_dir)
    (run_dir / "scores/table.parquet").unlink()
    with pytest.raises(UserError, match="--to probe"):
        run_report(config, run_dir)
    assert not list(run_dir.glob("*report.html*"))


def test_a_failed_report_leaves_the_earlier_one(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=100, variants=False)
    report(config)
    before = (Path(config.run_dir) / "report.html").read_bytes()
    (Path(config.run_dir) / "selection/selection.json").unlink()
    with pytest.raises(UserError):
        run_report(config, Path(config.run_dir))
    assert (Path(config.run_dir) / "report.html").read_bytes() == before


def test_curves_of_a_resumed_run_are_one_curve(tmp_path: Path) -> None:
    from grads_ds.report.run_logs import read_curve
    from tests.report.synthetic_run import write_curve

    write_curve(tmp_path / "log", 5, 4.0)
    time.sleep(1.1)  # event files are named by the second
    write_curve(tmp_path / "log", 8, 2.0)
    curve = read_curve(tmp_path / "log")
    assert curve is not None
    assert curve[0].tolist() == list(range(1, 9))
    assert curve[1] == pytest.approx([2.0 * (0.7 + 0.3 / s**0.5) for s in range(1, 9)], rel=1e-6)


def test_a_curve_that_cannot_be_read_is_the_file_systems_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard takes a folder for deleted when the system fails under it."""
    from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from grads_ds.report.run_logs import read_curve

    def stale(*_: object) -> Iterator[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    def gone(*_: object) -> None:
        monkeypatch.setattr(Path, "iterdir", stale)
        raise DirectoryDeletedError("has been permanently deleted")

    monkeypatch.setattr(EventAccumulator, "Reload", gone)
    with pytest.raises(OSError, match="Stale"):
        read_curve(tmp_path)


def test_subsets_of_an_earlier_config_are_not_shown(tmp_path: Path) -> None:
    config = make_run(tmp_path, n=200)
    fewer = Config.model_validate(
        config.model_dump()
        | {"select": {"variants": {"random_5": {"method": "random"}}}, "sft": {}}
    )
    run_report(fewer, Path(config.run_dir))
    page = Page((Path(config.run_dir) / "report.html").read_text())
    assert "random_5" in page.text["composition"] and "grads_50" not in page.text["composition"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "seconds"), [(100_000, 8), pytest.param(1_000_000, 30, marks=pytest.mark.long)]
)
def test_many_samples_stay_small_and_quick(tmp_path: Path, samples: int, seconds: float) -> None:
    config = make_run(tmp_path, n=samples)
    began = time.process_time()
    page = report(config)
    assert time.process_time() - began < seconds
    assert len(page.html.encode()) < 15_000_000
    assert f"{samples:,}" in page.text["headline"]
    data = block(page)
    assert sum(line[-2] for line in data["counts"]) == data["total"] == samples
    assert sum(line[-1] for line in data["counts"]) == samples // 20
    assert 1_000 < len(data["ids"]) <= HELD and "and a seeded draw" in page.text["rows"]
    if PROGRAM is not None:
        with browser(tmp_path / "profile") as window:
            # the best of three: the machine is shared
            file = Path(config.run_dir) / "report.html"
            assert min(window.open(file) for _ in range(3)) < 2.0
            assert window.text(".place") == ["1 to 50"]


def test_plain_table_has_every_model_in_order_with_its_numbers(run: tuple[Config, Page]) -> None:
    lines = report_table(Path(run[0].run_dir)).splitlines()
    assert lines[0].split() == [
        "model",
        "method",
        "trained",
        "on",
        "domain",
        "loss",
        "to",
        "base",
        "general",
        "loss",
        "to",
        "base",
    ]
    rows = [line.split() for line in lines[2:8]]
    assert [row[0] for row in rows] == [
        "base",
        "full",
        "random_5",
        "selected",
        "random_50",
        "grads_50",
    ]
    assert [row[2] for row in rows] == ["-", "1,200", "60", "60", "600", "600"]
    for row in rows:
        domain, general = LOSSES[row[0]]
        assert row[3] == f"{domain:.4f}" and row[5] == f"{general:.4f}"
        expected = (
            ["-", "-"]
            if row[0] == "base"
            else [f"{domain - LOSSES['base'][0]:+.4f}", f"{general - LOSSES['base'][1]:+.4f}"]
        )
        assert [row[4], row[6]] == expected


def test_pool_rows_are_found_whatever_the_shard(tmp_path: Path) -> None:
    from grads_ds.report.read_run import read_rows

    config = make_run(tmp_path, n=300, variants=False)
    rows = read_rows(Path(config.run_dir), [0, 149, 150, 299, 10_000])
    assert sorted(rows) == [0, 149, 150, 299]
    assert all(
        json.loads(rows[i]["row"])["messages"][1]["content"].startswith(f"Answer {i}.")
        for i in rows
    )
    assert (
        pa.types.is_string(pa.array([rows[0]["source"]]).type) and rows[0]["source"] == "wiki.jsonl"
    )
