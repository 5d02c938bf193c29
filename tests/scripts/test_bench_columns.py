"""The benchmark of the columns scores every way of recording, and compares with the plain pass."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from conftest import make_tiny_model, write_rows
from scripts.bench.bench_columns import GUIDED, measure, ways


def test_every_way_to_record_is_measured_beside_the_plain_pass(tmp_path: Path) -> None:
    options = Namespace(
        model=make_tiny_model(tmp_path / "model", tied=True),
        rows=write_rows(tmp_path / "rows.jsonl", 24),
        count=8,
        length=64,
        tokens=256,
        dtype="float32",
        rounds=1,
        ways=None,
    )
    found = measure(options)
    assert list(found["ways"]) == list(ways()) and found["ways"]["plain"]["ratio"] == 1.0
    assert all(one["seconds"] > 0 for one in found["ways"].values())
    taken = {way for way, one in found["ways"].items() if one["references"] > 0.001}
    assert {"hidden", "fisher", "contrast", "anchor", "all", "guided without norms"} <= taken
    assert ways()["guided without norms"] == ((), GUIDED)
