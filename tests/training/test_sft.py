"""The rows a variant trains on: its own, in the pool's order, each with its weight, and the asked
share of general rows.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from grads_ds.config.config import Config
from grads_ds.config.model_and_data import DataConfig, ModelConfig
from grads_ds.training import sft
from grads_ds.training.model_card import model_card
from grads_ds.training.sft import draw_replay, run_sft, training_rows

CHOSEN = {7: 0.5, 2: 2.0, 5: 0.5, 3: 1.0}  # sample id: weight, in the order of preference


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    pool = {
        "sample_id": list(range(10)),
        "input_ids": [[n, n] for n in range(10)],
        "labels": [[n, n] for n in range(10)],
    }
    Dataset.from_dict(pool).save_to_disk(str(tmp_path / "prepared/pool"))
    general = {"input_ids": [[100 + n] for n in range(3)], "labels": [[100 + n] for n in range(3)]}
    Dataset.from_dict(general).save_to_disk(str(tmp_path / "prepared/replay"))
    ids = [*CHOSEN, *(n for n in range(10) if n not in CHOSEN)]
    table = {
        "sample_id": ids,
        "selected": [n in CHOSEN for n in ids],
        "weight": [CHOSEN.get(n, 0.0) for n in ids],
    }
    (tmp_path / "selection").mkdir()
    pq.write_table(pa.table(table), tmp_path / "selection/selection.parquet")
    return tmp_path


def config(run_dir: Path, **sft: Any) -> Config:
    return Config(
        run_dir=str(run_dir),
        model={"path": "m"},
        data={"train": ["t"], "replay": ["g"]},
        sft=sft,
        select={"weights": "preference"},
    )


def first_tokens(rows: Any) -> list[int]:
    return [row[0] for row in rows["input_ids"]]


def test_a_subset_is_its_rows_in_the_pools_order_and_the_full_pool_is_whole(run_dir: Path) -> None:
    rows, pool = training_rows(config(run_dir), run_dir, "selected")
    assert (
        first_tokens(rows) == [2, 3, 5, 7]
        and rows.column_names == ["input_ids", "labels"]
        and pool == 10
    )
    assert first_tokens(training_rows(config(run_dir), run_dir, "full")[0]) == list(range(10))


@pytest.mark.parametrize(("equal", "selected"), [("epochs", 6), ("steps", 15)])
def test_a_variant_takes_its_own_passes_or_as_many_steps_as_the_full_pool(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, equal: str, selected: int
) -> None:
    (run_dir / "scores").mkdir()
    (run_dir / "scores/table.parquet").touch()  # whose fingerprint the model card gives
    taken = {}
    monkeypatch.setattr(
        sft,
        "train_model",
        lambda job: taken.update({job.what: (len(job.rows), job.steps, job.identity)}),
    )
    settings = config(run_dir, equal=equal, epochs=3, batch_size=2)
    for name in ("selected", "full"):
        run_sft(settings, run_dir, name, "identity")
    # rows and optimizer steps: three passes over 4 rows, or over all 10, two rows at a time
    assert taken == {
        "sft on selected (4 rows)": (4, selected, "identity"),  # which its checkpoints carry
        "sft on full (10 rows)": (10, 15, "identity"),
    }


def test_each_row_keeps_its_own_weight(run_dir: Path) -> None:
    rows, _ = training_rows(config(run_dir, weights=True), run_dir, "selected")
    assert dict(zip(first_tokens(rows), rows["weight"], strict=True)) == CHOSEN
    assert set(training_rows(config(run_dir, weights=True), run_dir, "full")[0]["weight"]) == {1.0}


def test_general_rows_make_up_the_asked_share_in_every_variant(run_dir: Path) -> None:
    settings = config(run_dir, weights=True, replay=0.5)
    rows, pool = training_rows(settings, run_dir, "selected")
    drawn = [n for n in first_tokens(rows) if n >= 100]
    assert len(rows) == 8 and len(drawn) == 4 and pool == 20
    assert sorted(Counter(drawn).values()) == [1, 1, 2]  # all three once before one comes twice
    assert [w for n, w in zip(first_tokens(rows), rows["weight"], strict=True) if n >= 100] == [
        1.0
    ] * 4
    assert len(training_rows(settings, run_dir, "full")[0]) == 20
    assert draw_replay(50, 20, seed=1) == draw_replay(50, 20, seed=1) != draw_replay(50, 20, seed=2)


def test_a_token_gate_weighs_tokens_beside_the_rows_own_weight(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "scores").mkdir()
    losses = [0.1 * n for n in range(10)]
    table = {"sample_id": range(10), "loss": losses, "num_target_tokens": [1] * 10}
    pq.write_table(pa.table(table), run_dir / "scores/table.parquet")
    seen = {}

    def look(job: Any) -> None:
        seen.update(
            {row["input_ids"][0]: row["weight"] for row in map(job.rows.__getitem__, range(4))}
        )
        seen["card"] = job.card

    monkeypatch.setattr(sft, "train_model", look)
    settings = config(run_dir, token_gate="flow", weights=True)
    settings = settings.model_copy(
        update={"probe": settings.probe.model_copy(update={"epochs": 0.0})}
    )
    run_sft(settings, run_dir, "selected", "identity")
    card = seen.pop("card")
    wanted = {n: [0, w * float(np.exp(-losses[n] / 0.4))] for n, w in CHOSEN.items()}
    assert {n: pytest.approx(w) for n, w in seen.items()} == wanted
    assert "token gate flow: 0 of 4 target tokens count nothing" in card
    assert not (run_dir / "sft/token_gates").exists()


def test_nothing_in_a_card_acts_as_markup(run_dir: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>|`code`[link](http://x)\x1b[31m"
    settings = config(run_dir).model_copy(
        update={"data": DataConfig(train=[hostile]), "model": ModelConfig(path=hostile)}
    )
    card = model_card(settings, run_dir, "full", 4, 2)
    text = card.partition("\n---\n")[2]  # the front matter is YAML, which quotes it
    assert "<img" not in text and "&lt;img" in text and "\x1b" not in card
    assert r"\|\`code\`\[link\]" in text
