"""The comparison counts what each method keeps of planted kinds and lists what could not run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grads_ds.selection import compare
from scripts.study.planted_noise import as_markdown
from selection.pools import arrow_table, config, run_select, write_run


def test_planted_kinds_are_counted_as_kept(tmp_path: Path) -> None:
    n = 1000
    kinds = ["loud" if i % 20 == 0 else "plain" for i in range(n)]
    loud = np.array([kind == "loud" for kind in kinds])
    rng = np.random.default_rng(0)
    norms = {
        f"{g}_grad_norm": np.exp(rng.normal(0, 0.3, n)) * np.where(loud, 50.0, 1.0)
        for g in ("embedding", "lm_head")
    }
    write_run(tmp_path, arrow_table(n, **norms), kinds=kinds)
    run_select(config(tmp_path, budget=0.05, region="magnitude"), tmp_path)
    found = json.loads((tmp_path / "selection/comparison.json").read_text())
    methods = found["methods"]
    assert methods["grads magnitude"]["0.05"]["kept"]["kind"] == {"loud": 1.0, "plain": 0.0}
    assert methods["grads magnitude"]["0.05"]["jaccard_with_selected"] == 1.0
    assert methods["grand"]["0.05"]["kept"]["kind"]["loud"] == 1.0
    assert methods["grads density"]["0.05"]["kept"]["kind"]["loud"] == 0.0
    assert methods["random"]["0.5"]["kept"]["kind"]["plain"] == pytest.approx(0.5, abs=0.03)
    assert methods["random"]["0.5"]["samples"] == 500
    assert "ifd" in found["skipped"]
    assert "wanted column ifd" in found["skipped"]["ifd"]
    table = as_markdown(found, "kind").splitlines()
    assert table[0].startswith("| method | loud at 5% | plain at 5% | loud at 50%")
    assert "| grads magnitude | 100.0% | 0.0% | 100.0% |" in table[3] + table[4] + table[5]


def test_a_large_pool_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, arrow_table(60))
    run_select(config(tmp_path), tmp_path)
    assert (tmp_path / "selection/comparison.json").is_file()
    monkeypatch.setattr(compare, "LARGEST", 59)
    run_select(config(tmp_path), tmp_path)
    assert not (tmp_path / "selection/comparison.json").exists()
    assert pq.read_table(tmp_path / "selection/selection.parquet").num_rows == 60
