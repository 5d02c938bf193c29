"""The benchmark of the columns scores every way of recording, and compares with the plain pass."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from conftest import make_tiny_model, write_rows
from grads_ds.config.columns import EXTRAS
from scripts.bench.bench_columns import GUIDED, NORMS, measure, ways

OTHERWISE = ("early", "token_losses")  # of another model; losses token by token


JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_ways_to_record_are_measured_beside_the_plain_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in JOB:  # a world of one sets them; commands that later tests start are no ranks of it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    options = Namespace(
        model=make_tiny_model(tmp_path / "model", tied=True),
        rows=write_rows(tmp_path / "rows.jsonl", 24),
        count=8,
        length=64,
        tokens=256,
        dtype="float32",
        rounds=1,
        ways=["all", "guided without norms"],
    )
    found = measure(options)
    assert list(found["ways"]) == ["plain", "all", "guided without norms"]
    plain, whole, bare = found["ways"].values()
    assert plain["ratio"] == 1.0 < whole["ratio"] and bare["seconds"] > 0
    assert found["references"] > 0
    layers, extras = ways()["all"]
    assert layers == NORMS and set(extras) == set(EXTRAS) - set(OTHERWISE)
    assert ways()["guided without norms"] == ((), GUIDED)
