"""The stage on files: what it writes, that it writes whole files only, and that the choice is the
same everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from grads_ds.cli import main
from grads_ds.config.errors import UserError
from grads_ds.selection import stage
from selection.pools import arrow_table, config, report, run_select, user_row, write_run

REPO = Path(__file__).resolve().parents[2]


def lines(folder: Path) -> list[Any]:
    return [
        json.loads(line)
        for line in (folder / "selected.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_files_of_the_main_choice_and_its_variants(tmp_path: Path) -> None:
    write_run(tmp_path, arrow_table(400))
    variants = {"random": {"method": "random"}, "half": {"budget": 0.5, "region": "density"}}
    run_select(config(tmp_path, budget=0.05, variants=variants), tmp_path)
    for folder, count, method in [
        (tmp_path / "selection", 20, "grads"),
        (tmp_path / "selection/variants/random", 20, "random"),
        (tmp_path / "selection/variants/half", 200, "grads"),
    ]:
        table = pq.read_table(folder / "selection.parquet")
        assert table.schema.names == [
            "sample_id",
            "signal",
            "density",
            "selected",
            "rank",
            "reason",
            "weight",
        ]
        assert [str(kind) for kind in table.schema.types] == [
            "int64",
            "double",
            "double",
            "bool",
            "int64",
            "string",
            "double",
        ]
        rows = table.to_pylist()
        assert [row["sample_id"] for row in rows] == list(range(400))
        chosen = sorted((row for row in rows if row["selected"]), key=lambda row: row["rank"])
        assert len(chosen) == count
        assert lines(folder) == [user_row(row["sample_id"]) for row in chosen]
        assert all(row["reason"].startswith("in:" if row["selected"] else "out:") for row in rows)
        told = report(folder)
        assert told["method"] == told["settings"]["method"] == method
        assert told["counts"]["selected"] == told["budget"]["samples"] == count
        kept = told["composition"]["source"]
        assert kept["big.jsonl"]["pool"] == 300
        assert sum(value["selected"] for value in kept.values()) == count
    overlap = report(tmp_path / "selection/variants/random")["versus_random"]
    assert overlap["overlap"] == 20
    mine = {row["sample_id"] for row in rows_of(tmp_path / "selection")}
    drawn = {row["sample_id"] for row in rows_of(tmp_path / "selection/variants/random")}
    assert report(tmp_path / "selection")["versus_random"]["overlap"] == len(mine & drawn)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        row for row in pq.read_table(folder / "selection.parquet").to_pylist() if row["selected"]
    ]


def test_rows_come_back_as_the_user_gave_them(tmp_path: Path) -> None:
    odd = ['line\nbreak "quoted" \\', "ünï — 漢字 \u2028", "2024-01-01", "1e400", ""]
    rows = [
        {"instruction": text, "nested": {"a": [1, None, 2.5]}, "n": i}
        for i, text in enumerate(odd * 8)
    ]
    write_run(tmp_path, arrow_table(40), rows)
    run_select(config(tmp_path, budget=1.0, order="pool"), tmp_path)
    assert lines_by_newline(tmp_path / "selection/selected.jsonl") == rows
    scored = pq.read_table(tmp_path / "selection/selected.parquet")
    assert [row["instruction"] for row in scored.to_pylist()] in (
        [row["instruction"] for row in rows],
        [],
    )
    assert scored["grads_sample_id"].to_pylist() == list(range(40))


def lines_by_newline(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_rows_without_a_common_schema_stay_json(tmp_path: Path) -> None:
    rows = [{"text": "a"} if i % 2 else {"text": {"inner": 1}} for i in range(20)]
    write_run(tmp_path, arrow_table(20), rows)
    run_select(config(tmp_path, budget=1.0, order="pool"), tmp_path)
    scored = pq.read_table(tmp_path / "selection/selected.parquet").to_pylist()
    assert [json.loads(row["row"]) for row in scored] == rows
    assert scored[0]["grads_rank"] >= 1


@pytest.mark.parametrize("order", ["preference", "signal", "shuffled", "pool"])
def test_order_of_the_rows(tmp_path: Path, order: str) -> None:
    write_run(tmp_path, arrow_table(100))
    run_select(config(tmp_path, budget=40, order=order), tmp_path)
    folder = tmp_path / "selection"
    number = {json.dumps(user_row(i)): i for i in range(100)}
    got = [number[json.dumps(row)] for row in lines(folder)]
    chosen = {row["sample_id"]: row for row in rows_of(folder)}
    wanted = {
        "preference": sorted(chosen, key=lambda i: chosen[i]["rank"]),
        "signal": sorted(chosen, key=lambda i: -chosen[i]["signal"]),
        "pool": sorted(chosen),
    }
    if order == "shuffled":
        assert sorted(got) == sorted(chosen)
        assert all(got != other for other in wanted.values())
    else:
        assert got == wanted[order]


def test_redoing_one_variant_leaves_the_others_alone(tmp_path: Path) -> None:
    write_run(tmp_path, arrow_table(100))
    run_select(config(tmp_path, variants={"a": {"budget": 10}, "b": {"budget": 20}}), tmp_path)
    before = (tmp_path / "selection/variants/a/selection.json").read_text()
    stage.run_variant(
        config(tmp_path, variants={"a": {"budget": 30}, "b": {"budget": 40}}), tmp_path, "b"
    )
    assert (tmp_path / "selection/variants/a/selection.json").read_text() == before
    assert len(lines(tmp_path / "selection/variants/b")) == 40


def test_a_failure_leaves_the_finished_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, arrow_table(100))
    run_select(config(tmp_path, budget=10), tmp_path)
    folder = tmp_path / "selection"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def torn(self: Any, positions: Any) -> Any:
        yield '{"half": 1}'
        raise OSError("disk full")

    monkeypatch.setattr("grads_ds.selection.pool.Pool.rows", torn)
    with pytest.raises(OSError, match="disk full"):
        run_select(config(tmp_path, budget=20), tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_faults_of_the_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found none at .*table.parquet; run the probe"):
        run_select(config(tmp_path), tmp_path)
    write_run(tmp_path, arrow_table(20))
    with pytest.raises(UserError, match="pool's 20 samples; found 21"):
        run_select(config(tmp_path, budget=21), tmp_path)
    with pytest.raises(UserError, match="wanted one of source, length; found colour"):
        run_select(config(tmp_path, strata="colour"), tmp_path)
    pq.write_table(arrow_table(19), tmp_path / "scores/table.parquet")
    with pytest.raises(UserError, match="19 scores for 20 samples"):
        run_select(config(tmp_path), tmp_path)
    shifted = arrow_table(20, sample_id=np.arange(1, 21))
    pq.write_table(shifted, tmp_path / "scores/table.parquet")
    with pytest.raises(UserError, match="1 missing, the first sample_id 20"):
        run_select(config(tmp_path), tmp_path)


def test_metadata_is_a_stratum_and_a_composition_table(tmp_path: Path) -> None:
    kinds = ["rare" if i % 10 == 0 else "common" for i in range(200)]
    norms = np.where(np.arange(200) % 10 == 0, 0.001, 1.0) * (1 + np.arange(200) / 1000)
    write_run(tmp_path, arrow_table(200, embedding_grad_norm=norms), kinds=kinds)
    plain = {"budget": 40, "region": "magnitude", "signal": "embedding"}
    variants = {"fair": {"strata": "kind"}, "equal": {"strata": "kind", "strata_balance": "equal"}}
    run_select(config(tmp_path, **plain, variants=variants), tmp_path)
    rare = [
        report(tmp_path / "selection" / where)["composition"]["kind"]["rare"]["selected"]
        for where in ("", "variants/fair", "variants/equal")
    ]
    assert rare == [0, 4, 20]


def test_preview_writes_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, arrow_table(300))
    text = stage.preview(config(tmp_path, variants={"random": {"method": "random"}}), tmp_path)
    assert not (tmp_path / "selection").exists()
    assert "selected: method grads, 0.05 of 300 samples" in text
    assert "chosen     15 of 300 samples (5.00%)" in text
    assert "random: method random" in text


def test_preview_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    write_run(tmp_path / "run", arrow_table(300))
    made = config(tmp_path / "run", budget=0.1, variants={"random": {"method": "random"}})
    (tmp_path / "config.yaml").write_text(made.model_dump_json())
    before = sorted(tmp_path.rglob("*"))
    assert (
        main(["select", str(tmp_path / "config.yaml"), "--preview", "--set", "select.budget=0.2"])
        == 0
    )
    assert "chosen     60 of 300 samples (20.00%)" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run/scores/table.parquet").unlink()
    assert main(["select", str(tmp_path / "config.yaml"), "--preview"]) == 2
    assert "run the probe first" in capsys.readouterr().err
