"""Merging parts: every sample once or a refusal, the same table whatever the parts and ranges, sums
that catch what ids do not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grads_ds import scores
from grads_ds.config.errors import UserError
from grads_ds.scores.parts import DIGITS

NAMES = ["embedding_grad_norm", "lm_head_grad_norm"]
RECORDING = scores.Recording({"model": "m", "pool": "p"}, {"ranks": 2})


def rows_of(ids: list[int], step: int | None = None) -> pa.Table:
    draw = np.random.default_rng(0)
    values = draw.random(max(ids, default=0) + 1)
    return scores.make_rows(
        {
            "sample_id": ids,
            "sample_hash": [f"h{i}" for i in ids],
            "num_tokens": [i % 7 + 1 for i in ids],
        },
        values[ids],
        np.array(ids) % 5,
        {name: values[ids] * (n + 1) for n, name in enumerate(NAMES)},
        step=step,
    )


def write(folder: Path, *groups: list[int], with_step: bool = False) -> scores.Totals:
    """One part per group of ids; returns their totals together."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    table_schema = scores.schema(NAMES, with_step)
    totals = scores.Totals(scores.summed_columns(table_schema))
    for rank, ids in enumerate(groups):
        writer = scores.PartWriter(folder, rank, RECORDING, table_schema)
        writer.add(rows_of(ids, rank if with_step else None))
        writer.flush()
        totals = totals + writer.totals
    return totals


@pytest.mark.parametrize("range_rows", [1, 3, 1000])
@pytest.mark.parametrize(
    "ids, fault",
    [([0, 1], r"missing 1 \[2\]"), ([0, 1, 2, 7], r"unknown 1 \[7\]"), ([-1, 0, 1], "missing 1")],
)
def test_anything_but_the_pool_is_refused(
    tmp_path: Path, ids: list[int], fault: str, range_rows: int
) -> None:
    write(tmp_path / "s", ids)
    with pytest.raises(scores.IncompleteScores, match=fault):
        scores.merge(tmp_path / "s", RECORDING.key, np.arange(3), {}, range_rows=range_rows)
    assert sorted(file.name[:5] for file in (tmp_path / "s").iterdir()) == ["part-"]


@pytest.mark.parametrize("range_rows", [1, 3, 1000])
@pytest.mark.parametrize("counted", ["by nobody", "by a later start"])
def test_rows_that_are_doubled_and_equal_are_taken_once(
    tmp_path: Path, range_rows: int, counted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks of a killed launcher wrote beside the new start's. A norm that is not finite equals
    itself.
    """
    folder, table_schema = tmp_path / "s", scores.schema(NAMES)
    write(folder)
    own = scores.Totals(scores.summed_columns(table_schema))
    rows = rows_of([0, 1, 2, 3, 4])
    norms = pa.array([np.nan, 1, np.inf, 2, 3], pa.float32())
    rows = rows.set_column(rows.column_names.index(NAMES[0]), NAMES[0], norms)
    for rank, ids in enumerate(([0, 3, 4], [1, 2], [2, 0, 1])):  # the last rank's launcher is gone
        writer = scores.PartWriter(folder, rank, RECORDING, table_schema)
        writer.add(rows.take(ids))
        writer.flush()
        own = own + writer.totals if rank < 2 else own
    if counted == "by a later start":
        own = scores.finished(folder, RECORDING.key, table_schema)[1]
    scores.merge(folder, RECORDING.key, np.arange(5), {}, own, range_rows)
    table = pq.read_table(folder / "table.parquet")
    assert table["sample_id"].to_pylist() == [0, 1, 2, 3, 4]
    assert np.array_equal(table[NAMES[0]].to_numpy(), norms.to_numpy(), equal_nan=True)
    assert "3 rows stood there twice, the same" in capsys.readouterr().out


@pytest.mark.parametrize("range_rows", [1, 1000])
def test_rows_that_are_doubled_and_differ_are_refused_by_name(
    tmp_path: Path, range_rows: int
) -> None:
    folder, table_schema = tmp_path / "s", scores.schema(NAMES)
    write(folder, [0, 1], [2])
    rows = rows_of([1, 1])
    loss = rows.column_names.index("loss")
    rows = rows.set_column(loss, "loss", pa.array([1.5, rows["loss"][1].as_py()], pa.float32()))
    writer = scores.PartWriter(folder, 5, RECORDING, table_schema)
    writer.add(rows)  # once different, once the same
    writer.flush()
    holders = [file.name for file in (*folder.glob("part-00000*"), *folder.glob("part-00005*"))]
    with pytest.raises(scores.IncompleteScores, match=r"doubled 1 \[1\]") as told:
        scores.merge(folder, RECORDING.key, np.arange(3), {}, range_rows=range_rows)
    assert f"differ in {', '.join(holders)}: remove one" in str(told.value)
    assert not (folder / "table.parquet").exists()


@pytest.mark.parametrize("range_rows", [7, 50, 1000])
def test_parts_and_ranges_do_not_show_in_the_table(tmp_path: Path, range_rows: int) -> None:
    pool = np.random.default_rng(1).permutation(300)[:200] * 3  # ids with gaps, scored out of order
    folder = tmp_path / "s"
    totals = write(folder, *(part.tolist() for part in np.array_split(pool, 13)))
    found = scores.merge(folder, RECORDING.key, pool, {"note": 1}, totals, range_rows)
    wanted = rows_of(sorted(pool.tolist()))
    assert pq.read_table(folder / "table.parquet").equals(wanted)
    assert not found.differences(totals)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == 200 and manifest["id_sum"] == pool.sum() and manifest["note"] == 1
    assert manifest["status"] == {
        "ok": int((pool % 5 != 0).sum()),
        "no_target": int((pool % 5 == 0).sum()),
        "nonfinite": 0,
    }
    assert manifest["starts"] == [{"ranks": 2}]
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("place", [10, 300, -40, -1])
def test_a_damaged_part_is_set_aside_and_its_samples_scored_again(
    tmp_path: Path, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table_schema = tmp_path / "s", scores.schema(NAMES)
    write(folder, [0, 1], [2, 3])
    file = sorted(folder.glob("part-*"))[0]
    content = bytearray(file.read_bytes())
    content[place] ^= 2
    file.write_bytes(content)
    with pytest.raises(UserError, match="digest of its content"):  # never read as it is
        scores.merge(folder, RECORDING.key, np.arange(4), {})
    assert scores.prepare_parts(folder, RECORDING) == 0
    assert f"{file.name} was altered" in capsys.readouterr().out
    assert file.with_suffix(".damaged").is_file() and not file.exists()
    ids, *_ = scores.finished(folder, RECORDING.key, table_schema)
    assert ids.tolist() in ([0, 1], [2, 3])


def test_a_value_lost_on_the_way_to_the_table_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    totals = write(folder, [0, 1], [2, 3])
    file = sorted(folder.glob("part-*"))[0]
    table = pq.read_table(file)
    changed = table["loss"].to_numpy().copy()
    changed[0] *= 1 + 1e-5
    # by whoever writes parts, not by the disk: the part is whole
    sink = pa.BufferOutputStream()
    pq.write_table(table.set_column(4, table.schema.field(4), pa.array(changed)), sink)
    content = sink.getvalue().to_pybytes()
    file.unlink()
    digest = hashlib.sha256(content).hexdigest()[:DIGITS]
    (folder / f"part-00000-{digest}.parquet").write_bytes(content)
    with pytest.raises(scores.IncompleteScores, match="sum of loss"):
        scores.merge(folder, RECORDING.key, np.arange(4), {}, totals)
    assert not (folder / "table.parquet").exists()


def test_ids_that_add_up_by_chance_do_not_pass() -> None:
    table_schema = scores.schema(NAMES)
    first, second = (scores.Totals(scores.summed_columns(table_schema)) for _ in range(2))
    first.add(rows_of([1, 4]))
    second.add(rows_of([2, 3]))
    assert first.counts[1] == second.counts[1]
    assert any("digest" in difference for difference in first.differences(second))


def test_the_earliest_step_counts_where_training_saw_a_sample_twice(tmp_path: Path) -> None:
    write(tmp_path / "s", [2, 0], [1, 2, 0], with_step=True)
    scores.merge(tmp_path / "s", RECORDING.key, np.arange(3), {})
    assert pq.read_table(tmp_path / "s/table.parquet")["step"].to_pylist() == [0, 1, 0]


def test_a_later_start_finds_what_is_there_and_how_it_was_made(tmp_path: Path) -> None:
    folder, table_schema = tmp_path / "s", scores.schema(NAMES)
    totals = write(folder, [4, 2], [9])
    assert scores.prepare_parts(folder, RECORDING) == 0
    ids, found, start = scores.finished(folder, RECORDING.key, table_schema)
    assert ids.tolist() == [2, 4, 9] and not found.differences(totals) and start == {"ranks": 2}
    other = scores.Recording({"model": "m", "pool": "q"})
    assert scores.finished(folder, other.key, table_schema)[0].size == 0
    scores.merge(folder, RECORDING.key, ids, {})
    # a finished table's parts give way to another model's
    assert scores.prepare_parts(folder, other) == 2
    assert not list(folder.glob("part-*"))


def test_parts_grow_rarer_and_a_value_beyond_float32_is_flagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("grads_ds.scores.parts.time.monotonic", lambda: now[0])
    writer = scores.PartWriter(tmp_path, 0, RECORDING, scores.schema(NAMES), seconds=5)
    published = []
    for second in range(2000):
        now[0] = float(second)
        writer.add(rows_of([second]))
        published.append(len(list(tmp_path.glob("part-*"))))
    assert published[100] == pytest.approx(100 / 6, abs=2)
    assert 0 < published[1999] - published[1500] < 500 / 28
    writer.flush()
    assert writer.totals.counts[0] == 2000
    row = scores.make_rows(
        {"sample_id": [0], "sample_hash": ["h"], "num_tokens": [1]},
        np.ones(1),
        np.ones(1, int),
        {NAMES[0]: np.array([1e300])},
    )
    assert row["status"].to_pylist() == ["nonfinite"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "seconds", "peak_gb"),
    [(100_000, 6, 0.4), pytest.param(1_000_000, 30, 1, marks=pytest.mark.long)],
)
def test_many_rows_take_seconds_and_little_memory(
    rows: int, seconds: float, peak_gb: float
) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts/bench/bench_scores.py"
    done = subprocess.run(
        [sys.executable, script, "--rows", str(rows)], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout.splitlines()[0])
    assert measured["rows"] == rows
    assert measured["merge"]["seconds"] + measured["reload"]["seconds"] < seconds
    assert max(measured["merge"]["peak_gb"], measured["reload"]["peak_gb"]) < peak_gb
