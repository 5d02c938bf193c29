"""The score table: every sample once, each with its own gradient's norms, whatever the ranks, and
whole after an interruption.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from deepspeed.ops.op_builder import AsyncIOBuilder
from huggingface_hub import constants
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from conftest import write_rows
from grads_ds import scores
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.gradnorm.reference import reference_gradients
from ranks import run_on_ranks
from tests.probe.jobs import ROWS, leave_unfinished, make_config, stage, table_of


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
            np.testing.assert_allclose(
                scored[f"{group}_grad_norm"], exact[group].norm().item(), rtol=1e-5
            )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any]:
    """A prepared run, and the table of two plain ZeRO-3 ranks; its scores are taken away again."""
    config = make_config(tmp_path_factory.mktemp("sharded"))
    stage("prepare", config)
    return config, scored_anew(config, {})


def test_a_hub_model_is_recorded_with_its_commit(tmp_path: Path) -> None:
    """A cache as huggingface_hub keeps it, made by hand and read offline: the manifest says which
    commit of the id was scored.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    config = make_config(
        tmp_path, data={"train": [str(write_rows(tmp_path / "pool.jsonl", 3))], "max_length": 64}
    )
    repo = tmp_path / "cache/models--acme--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    shutil.copytree(config.model.path, repo / "snapshots" / commit)
    # an older one that was fetched once
    shutil.copytree(config.model.path, repo / "snapshots" / ("f" * 40))
    named = config.model_copy(
        update={"model": config.model.model_copy(update={"path": "acme/tiny"})}
    )
    run_on_ranks(1, prepare_and_probe, named, str(tmp_path / "cache"))
    manifest = json.loads((Path(config.run_dir) / "scores/manifest.json").read_text())
    assert (manifest["model"], manifest["model commit"]) == ("acme/tiny", commit)


def prepare_and_probe(config: Config, cache: str) -> None:
    constants.HF_HUB_CACHE = cache  # looked up in the environment when it was imported
    for name in ("prepare", "probe"):
        stage(name, config)


def scored_anew(config: Config, zero: dict[str, Any]) -> Any:
    file = Path(config.deepspeed or "")
    plain = file.read_text()
    settings = json.loads(plain)
    settings["zero_optimization"] |= zero
    file.write_text(json.dumps(settings))
    run_on_ranks(2, stage, "probe", config)
    file.write_text(plain)
    table = table_of(config)
    shutil.rmtree(Path(config.run_dir, "scores"))
    for record in Path(config.run_dir, "state").glob("probe*"):
        record.unlink()
    return table


@pytest.mark.parametrize("place", ["cpu", "nvme", "hpz"])
def test_where_the_frozen_parameters_lie_changes_no_bit(
    sharded: tuple[Config, Any], tmp_path: Path, place: str
) -> None:
    """Offloading and the second partition are settings of the user's DeepSpeed file, and are really
    carried out.
    """
    config, plain = sharded
    if place == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("needs libaio's headers (Debian's libaio-dev)")
    zero = {
        "cpu": {"offload_param": {"device": "cpu"}},
        "nvme": {"offload_param": {"device": "nvme", "nvme_path": str(tmp_path)}},
        "hpz": {"zero_hpz_partition_size": 2},
    }[place]
    assert scored_anew(config, zero).equals(plain)
    assert any(tmp_path.rglob("rank1")) == (place == "nvme")  # each rank's swap folder


def test_a_sample_that_is_not_finite_is_flagged_and_its_batch_mates_are_not(tmp_path: Path) -> None:
    config = make_config(tmp_path, tied=False)
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    stage("prepare", config)
    pool = load_from_disk(str(Path(config.run_dir) / "prepared/pool"))
    # a token of some samples whose embedding is zero, which a norm without epsilon divides by: such
    # weights are finite, so that the model itself is not refused
    counts = np.bincount(np.concatenate([np.unique(row["input_ids"]) for row in pool]))
    token = int(np.abs(counts - ROWS // 4).argmin())
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[0] = weight[1]  # padding is not zero as well
        weight[token] = 0.0
    model.config.rms_norm_eps = 0.0
    model.save_pretrained(config.model.path)
    stage("prepare", config)  # the model's folder has changed
    run_on_ranks(2, stage, "probe", config)
    table = table_of(config)
    broken = [row["sample_id"] for row in pool if token in row["input_ids"]]
    assert 0 < len(broken) < ROWS
    assert table[table["status"] == "nonfinite"]["sample_id"].tolist() == broken
    assert np.isfinite(
        table[table["status"] == "ok"][["loss", "embedding_grad_norm", "lm_head_grad_norm"]]
    ).all(axis=None)
    manifest = json.loads((Path(config.run_dir) / "scores/manifest.json").read_text())
    assert manifest["status"] == {
        "ok": ROWS - len(broken),
        "no_target": 0,
        "nonfinite": len(broken),
    }
    # what was going on and what came out, for TensorBoard
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard/probe"))
    events.Reload()
    rates = {
        f"scoring/{name}"
        for name in ("samples_per_second", "tokens_per_second", "padding", "lag_seconds")
    }
    assert rates < set(events.Tags()["scalars"])
    assert events.Scalars("scoring/padding")[-1].step == ROWS
    assert {"scores/loss", "scores/lm_head_grad_norm"} <= set(events.Tags()["histograms"])
    assert sum(events.Histograms("scores/loss")[-1].histogram_value.bucket) == ROWS - len(broken)


def test_an_interrupted_probe_scores_only_what_is_missing_to_the_same_bits(tmp_path: Path) -> None:
    config = make_config(tmp_path, probe={"flush_seconds": 0})
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    folder = Path(config.run_dir) / "scores"
    whole = pq.read_table(folder / "table.parquet")
    parts = sorted(folder.glob("part-*.parquet"))
    assert len(parts) > 4
    leave_unfinished(folder, 3)
    kept = {file: file.stat().st_mtime_ns for file in parts[:3]}
    run_on_ranks(3, stage, "probe", config)
    # other ranks, the same micro-batches: equal to the bit, and what was there was not scored again
    assert pq.read_table(folder / "table.parquet").equals(whole)
    assert {file: file.stat().st_mtime_ns for file in parts[:3]} == kept
    assert sum(pq.read_metadata(file).num_rows for file in folder.glob("part-*.parquet")) == ROWS
    assert not list(folder.glob(".part-*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {start["ranks"] for start in manifest["starts"]} == {2, 3}
    assert (
        manifest["world_size"] == 3
        and manifest["rows"] == ROWS
        and manifest["status"]["ok"] == ROWS
    )


def probe_says(config: Config) -> str:
    """What the probe prints, or refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            stage("probe", config)
    except UserError as error:
        return str(error)
    return said.getvalue()


def test_unfinished_scores_of_another_model_or_pool_are_set_aside(tmp_path: Path) -> None:
    config = make_config(tmp_path, probe={"flush_seconds": 0})
    stage("prepare", config)
    run_on_ranks(1, stage, "probe", config)
    folder = Path(config.run_dir) / "scores"
    leave_unfinished(folder, 1)
    (folder / "manifest.json").unlink()
    (kept,) = folder.glob("part-*")
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    (said,) = run_on_ranks(1, probe_says, config)
    assert re.search(r"1 part of an unfinished probe.*model files was \w+, now \w+", said)
    (aside,) = folder.glob("other-inputs.*/part-*")
    assert aside.name == kept.name and len(table_of(config)) == ROWS
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["starts"] and "scored already" not in said
    leave_unfinished(folder, 1)
    (folder / "manifest.json").unlink()
    longer = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 20})})
    stage("prepare", longer)
    (said,) = run_on_ranks(1, probe_says, longer)
    assert "pool was" in said
    (folder / "part-00000-bbbb.parquet").write_bytes(b"not a part")
    stage("prepare", config)
    (fault,) = run_on_ranks(1, probe_says, config)
    assert "wanted a part of the score table" in fault
    (folder / "part-00000-bbbb.parquet").unlink()
    run_on_ranks(1, stage, "probe", config)
    assert len(table_of(config)) == ROWS


def test_a_value_that_is_not_finite_is_flagged_and_kept() -> None:
    samples = {"sample_id": [0, 1, 2], "sample_hash": ["h"] * 3, "num_tokens": [1] * 3}
    rows = scores.make_rows(
        samples,
        np.array([1.0, 0.0, np.nan]),
        np.array([4, 0, 4]),
        {"lm_head_grad_norm": np.array([1.0, 0.0, 1.0])},
    )
    assert rows["status"].to_pylist() == ["ok", "no_target", "nonfinite"]
