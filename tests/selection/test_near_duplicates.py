"""Near-duplicates are dropped, named, and their places refilled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grads_ds.config.select import SelectConfig
from grads_ds.selection import stage
from grads_ds.selection.duplicates import shingles
from selection.pools import arrow_table, config, report, run_select, write_run


def passage(i: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(f"word{k}" for k in rng.integers(0, 5000, 120))


def test_near_duplicates_are_dropped_and_their_places_refilled(tmp_path: Path) -> None:
    rows = [{"text": passage(i // 4) + (f" tail {i}" if i % 4 else "")} for i in range(80)]
    write_run(tmp_path, arrow_table(80), rows)
    run_select(config(tmp_path, budget=15, near_duplicates=0.8), tmp_path)
    table = pq.read_table(tmp_path / "selection/selection.parquet").to_pylist()
    chosen = [row["sample_id"] for row in table if row["selected"]]
    assert len(chosen) == 15
    assert len({i // 4 for i in chosen}) == 15  # none alike
    dropped = [row for row in table if "near-duplicate" in row["reason"]]
    assert dropped
    for row in dropped:
        like = int(row["reason"].rsplit(" ", 1)[1])
        assert like // 4 == row["sample_id"] // 4
        assert table[like]["rank"] < row["rank"]
    assert report(tmp_path / "selection")["counts"]["near_duplicates_dropped"] == len(dropped)
    run_select(config(tmp_path, budget=40, near_duplicates=0.8), tmp_path)
    told = report(tmp_path / "selection")
    assert told["counts"]["selected"] == 20
    assert any("all others are near-duplicates" in text for text in told["warnings"])


def test_the_likeliest_of_near_duplicates_stays_at_every_budget(tmp_path: Path) -> None:
    rows = [{"text": passage(i // 4) + (f" tail {i}" if i % 4 else "")} for i in range(80)]
    loss = np.random.default_rng(1).permutation(80) / 10.0
    write_run(tmp_path, arrow_table(80, loss=loss.astype(np.float32)), rows)
    best = {min(range(4 * g, 4 * g + 4), key=lambda i: loss[i]) for g in range(20)}
    smaller: set[int] = set()
    for budget in (3, 11, 20):
        kept = {"near_duplicates": 0.8, "near_duplicate_kept": "likeliest"}
        run_select(config(tmp_path, budget=budget, **kept), tmp_path)
        table = pq.read_table(tmp_path / "selection/selection.parquet").to_pylist()
        chosen = {row["sample_id"] for row in table if row["selected"]}
        assert len(chosen) == budget and smaller <= chosen <= best
        smaller = chosen
        for row in table:
            if "near-duplicate" in row["reason"]:
                like = int(row["reason"].rsplit(" ", 1)[1])
                assert like // 4 == row["sample_id"] // 4 and like in best
    # of equal losses the first in the order stays, as without the wish
    write_run(equal := tmp_path / "equal", arrow_table(80, loss=np.ones(80, np.float32)), rows)
    choices = []
    for which in ("first", "likeliest"):
        settings = {"near_duplicates": 0.8, "near_duplicate_kept": which, "budget": 9}
        run_select(config(equal, **settings), equal)
        choices.append(pq.read_table(equal / "selection/selection.parquet")["selected"].to_pylist())
    assert choices[0] == choices[1]


def test_rows_like_no_other_come_before_the_likeliest_of_near_duplicates(tmp_path: Path) -> None:
    # 12 rows alone, and 4 groups of 3
    group = [*range(12), *(12 + i // 3 for i in range(12))]
    rows = [{"text": passage(g) + (f" tail {i}" if i % 3 else "")} for i, g in enumerate(group)]
    loss = np.random.default_rng(2).permutation(24) / 10.0
    write_run(tmp_path, arrow_table(24, loss=loss.astype(np.float32)), rows)
    best = {min(range(g, g + 3), key=lambda i: loss[i]) for g in range(12, 24, 3)}
    for budget in (5, 12, 14, 16):
        kept = {"near_duplicates": 0.8, "near_duplicate_kept": "likeliest_last"}
        run_select(config(tmp_path, budget=budget, **kept), tmp_path)
        table = pq.read_table(tmp_path / "selection/selection.parquet").to_pylist()
        chosen = {row["sample_id"] for row in table if row["selected"]}
        assert len(chosen) == budget
        assert len(chosen & set(range(12))) == min(budget, 12)
        assert chosen - set(range(12)) <= best


def test_guided_looks_for_near_duplicates_and_the_others_when_they_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guided, random = SelectConfig(method="guided"), SelectConfig(method="random")
    assert (guided.similarity(), guided.duplicate_kept()) == (0.5, "likeliest_last")
    assert (random.similarity(), random.duplicate_kept()) == (None, "first")
    assert SelectConfig(method="guided", near_duplicates=None).similarity() is None
    assert SelectConfig(near_duplicates=0.8).resolve(None).similarity() == 0.8
    # a variant of another method does not take over what guided looks for by itself
    both = SelectConfig(method="guided", variants={"random": {"method": "random"}})
    assert both.resolve("random").similarity() is None
    with pytest.raises(ValueError):
        SelectConfig(near_duplicates=0.0)

    rows = [{"text": passage(i // 2) + f" tail {i}"} for i in range(40)]
    write_run(tmp_path, arrow_table(40), rows)
    wish = {
        "method": "guided",
        "filters": [{"column": "loss", "reject": "high", "cut": 1e9, "by_length": False}],
    }
    run_select(config(tmp_path, budget=0.25, **wish), tmp_path)
    told = report(tmp_path / "selection")
    assert told["counts"]["near_duplicates_dropped"] == 20
    # a large pool is not compared, and that is said, unless it is asked for
    monkeypatch.setattr(stage, "COMPARED", 39)
    for asked, dropped in (({}, 0), ({"near_duplicates": 0.5}, 20)):
        run_select(config(tmp_path, budget=0.25, **wish, **asked), tmp_path)
        told = report(tmp_path / "selection")
        assert told["counts"]["near_duplicates_dropped"] == dropped
        assert any("compares up to 39" in text for text in told["warnings"]) == (not asked)


def test_shingles_pass_over_roles_and_punctuation() -> None:
    one = json.dumps({"messages": [{"role": "user", "content": "One two, three four five SIX."}]})
    assert shingles(one) == {"one two three four five", "two three four five six"}
