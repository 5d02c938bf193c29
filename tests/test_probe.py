"""The score table: every sample once, each with its own gradient's norms, whatever the ranks, and whole after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model, write_rows
from grads_ds import scores
from grads_ds.config import Config
from grads_ds.gradnorm.reference import reference_gradients
from grads_ds.stages import STAGES, execute
from ranks import run_on_ranks

ROWS = 41


def make_config(folder: Path, tied: bool = True, **sections: Any) -> Config:
    folder.mkdir(exist_ok=True)
    settings = folder / "zero3.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    return Config(
        run_dir=str(folder / "run"), deepspeed=str(settings),
        model={"path": str(make_tiny_model(folder / "model", tied=tied)), "dtype": "float32"},
        data={"train": [str(write_rows(folder / "pool.jsonl", ROWS))], "max_length": 64},
        probe={"epochs": 0, "tokens_per_microbatch": 256} | sections.pop("probe", {}), **sections,
    )  # fmt: skip


def stage(name: str, config: Config) -> None:
    execute(next(stage for stage in STAGES if stage.name == name), config)


def table_of(config: Config) -> Any:
    return pq.read_table(Path(config.run_dir) / "scores/table.parquet").to_pandas()


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_ranks_give_each_sample_its_own_norms(tmp_path: Path, tied: bool) -> None:
    config = make_config(tmp_path, tied)
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    table = table_of(config)
    assert table["sample_id"].tolist() == list(range(ROWS))
    assert set(table["status"]) == {"ok"}
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    pool = load_from_disk(str(Path(config.run_dir) / "prepared/pool"))
    for row in pool:
        batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
        ((loss, gradients),) = reference_gradients(model, batch)
        exact = {
            "embedding": gradients["model.embed_tokens.weight"],
            "lm_head": gradients["model.embed_tokens.weight" if tied else "lm_head.weight"],
        }
        scored = table.iloc[row["sample_id"]]
        assert scored["sample_hash"] == row["sample_hash"]
        assert scored["num_tokens"] == len(row["input_ids"])
        np.testing.assert_allclose(scored["loss"], loss, rtol=1e-5)
        for group in ("embedding", "lm_head"):
            np.testing.assert_allclose(scored[f"{group}_grad_norm"], exact[group].norm().item(), rtol=1e-5)


def test_an_interrupted_probe_scores_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    stage("prepare", config)
    run_on_ranks(1, stage, "probe", config)
    whole = table_of(config)
    folder = Path(config.run_dir) / "scores"
    parts = sorted(folder.glob("part-*.parquet"))
    key = (pq.read_schema(parts[0]).metadata)[scores.KEY_FIELD]
    # what a killed run leaves: some rows published, a file half written, no table, no record
    kept = pq.read_table(parts[0]).slice(0, 10)
    for file in parts:
        file.unlink()
    pq.write_table(kept.replace_schema_metadata({scores.KEY_FIELD: key}), folder / "part-00000-aaaa.parquet")
    (folder / ".part-00001-bbbb.parquet.99.tmp").write_bytes(b"half")
    pq.write_table(
        kept.replace_schema_metadata({scores.KEY_FIELD: b"another model"}), folder / "part-00000-cccc.parquet"
    )
    (folder / "table.parquet").unlink()
    run_on_ranks(2, stage, "probe", config)
    again = table_of(config)
    assert sum(pq.read_metadata(file).num_rows for file in folder.glob("part-*.parquet")) == ROWS
    assert not list(folder.glob(".part-*"))
    assert again["sample_id"].tolist() == whole["sample_id"].tolist()
    np.testing.assert_allclose(again["embedding_grad_norm"], whole["embedding_grad_norm"], rtol=1e-6)


def test_merging_refuses_missing_doubled_and_unknown_samples(tmp_path: Path) -> None:
    table_schema = scores.schema(["lm_head_grad_norm"])
    sample = {"sample_hash": "h", "input_ids": [1, 2]}

    def write(*ids: int) -> None:
        shutil.rmtree(tmp_path, ignore_errors=True)
        writer = scores.PartWriter(tmp_path, 0, "key", table_schema)
        ones = np.ones(len(ids))
        writer.add(
            scores.make_rows(
                [sample | {"sample_id": i} for i in ids], ones, ones.astype(int), {"lm_head_grad_norm": ones}
            )
        )
        writer.flush()

    for ids, fault in (((0, 1), "missing 1"), ((0, 1, 1, 2), "doubled 1"), ((0, 1, 2, 7), "unknown 1")):
        write(*ids)
        with pytest.raises(scores.IncompleteScores, match=fault):
            scores.merge(tmp_path, "key", np.arange(3), {})
        assert not (tmp_path / "table.parquet").exists()
    write(2, 0, 1)
    assert scores.merge(tmp_path, "key", np.arange(3), {})["sample_id"].to_pylist() == [0, 1, 2]


def test_a_value_that_is_not_finite_is_flagged_and_kept() -> None:
    sample = {"sample_id": 0, "sample_hash": "h", "input_ids": [1]}
    rows = scores.make_rows(
        [sample] * 3,
        np.array([1.0, 0.0, np.nan]),
        np.array([4, 0, 4]),
        {"lm_head_grad_norm": np.array([1.0, 0.0, 1.0])},
    )
    assert [row["status"] for row in rows] == ["ok", "no_target", "nonfinite"]
