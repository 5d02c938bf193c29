"""The whole road on two sharded ranks under the real launcher: every artefact, nothing redone
without need, all redone with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from conftest import make_tiny_model, write_rows
from grads_ds.config.config import Config
from grads_ds.config.load import load_config
from grads_ds.flow.stages import STAGES
from tests import forked_ranks
from tests.flow.whole_runs import (
    ARTEFACTS,
    CHANGES,
    DELETED,
    ROWS,
    call,
    free_port,
    grads_ds,
    redone,
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run: its folder holds config.yaml, the data, and the run directory `run`."""
    folder = tmp_path_factory.mktemp("end to end")  # with a space
    make_tiny_model(folder / "model")
    for number, name in enumerate(("pool", "domain", "general")):
        write_rows(folder / f"{name}.jsonl", ROWS if name == "pool" else 12, seed=number)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (folder / "hosts").write_text("localhost slots=2\n")
    training = {"learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 4}
    config = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "data": {
            "train": ["pool.jsonl"],
            "validation": {"domain": "domain.jsonl", "general": "general.jsonl"},
            "max_length": 64,
        },
        "probe": {"epochs": 0.5, "tokens_per_microbatch": 512} | training,
        "select": {"budget": 0.25, "variants": {"random": {"method": "random"}}},
        "sft": {"epochs": 1, "variants": ["full", "random"]} | training,
        "deepspeed": "zero3.json",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    # the stages one by one the way a user may start them: our launcher, DeepSpeed's own on a
    # hostfile, our launcher again
    grads_ds(folder, "run", "config.yaml", "--ranks", "2", "--to", "sft")
    deepspeed = [
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        "hosts",
        "--no_ssh",
        "--node_rank",
        "0",
    ]
    deepspeed += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    call(folder, *deepspeed, "--module", "grads_ds", "evaluate", "config.yaml", FORK_ALL="1")
    grads_ds(folder, "run", "config.yaml", "--ranks", "2")
    return folder


@pytest.fixture
def config(job: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(job)
    return load_config("config.yaml")


def test_every_artefact_is_there(job: Path) -> None:
    assert [name for name in ARTEFACTS if not (job / "run" / name).is_file()] == []
    assert list((job / "run/tensorboard/probe").glob("events*"))
    assert list((job / "run/tensorboard/sft/selected").glob("events*"))
    leftovers = [
        f
        for f in (job / "run").rglob("*")
        if f.name.endswith((".tmp", ".old")) or f.name == "checkpoints"
    ]
    assert leftovers == [] and not (job / "run/lock.json").exists()


def test_the_model_card_says_what_the_model_was_made_of(job: Path) -> None:
    card = (job / "run/sft/model/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "model" and front["tags"][-1] == "selected"
    digest = hashlib.sha256((job / "run/scores/table.parquet").read_bytes()).hexdigest()
    for fact in (
        f"{ROWS} samples of pool.jsonl",
        "| selection method | grads |",
        f"0.25: {ROWS // 4} of {ROWS}",
        digest,
    ):
        assert fact in card
    assert "none: the whole pool" in (job / "run/sft/variants/full/model/README.md").read_text()


def test_every_sample_is_scored_once_and_the_budget_is_met(job: Path) -> None:
    table = pq.read_table(job / "run/scores/table.parquet")
    assert table["sample_id"].to_pylist() == list(range(ROWS))
    chosen = pq.read_table(job / "run/selection/selection.parquet").to_pandas()
    assert chosen["selected"].sum() == ROWS // 4
    given = (job / "pool.jsonl").read_text().splitlines()
    kept = [
        json.dumps(json.loads(line), sort_keys=True)
        for line in (job / "run/selection/selected.jsonl").open()
    ]
    assert sorted(kept) == sorted(
        json.dumps(json.loads(given[i]), sort_keys=True) for i in chosen[chosen.selected].sample_id
    )


def test_training_on_the_subset_lowers_the_domain_loss_and_the_table_shows_it(job: Path) -> None:
    models = json.loads((job / "run/evaluation.json").read_text())["models"]
    assert set(models) == {"base", "selected", "full", "random"}
    assert models["selected"]["domain"]["loss"] < models["base"]["domain"]["loss"] - 0.1
    table = grads_ds(job, "run", "config.yaml")  # all is done: the table alone is printed
    for model in models.values():
        assert f"{model['domain']['loss']:.4f}" in table


def test_a_finished_run_does_nothing_and_says_so(job: Path) -> None:
    before = {f: f.stat().st_mtime_ns for f in (job / "run").rglob("*") if f.is_file()}
    output = grads_ds(job, "run", "config.yaml")
    for stage in STAGES:
        assert f"{stage.name}: done already, nothing to do" in output
    assert {f: f.stat().st_mtime_ns for f in (job / "run").rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_key_redoes_exactly_what_it_touches(
    job: Path, config: Config, change: str
) -> None:
    assert redone(load_config("config.yaml", [change])) == CHANGES[change]


@pytest.mark.parametrize("name", DELETED)
def test_a_deleted_output_redoes_its_stage_and_those_after_it(
    job: Path, config: Config, name: str
) -> None:
    file = Path(config.run_dir) / name
    aside = file.with_suffix(".aside")
    file.rename(aside)
    try:
        assert redone(config) == DELETED[name]
    finally:
        aside.rename(file)


def test_a_deleted_report_is_really_made_again(job: Path) -> None:
    page = job / "run/report.html"
    page.unlink()
    output = grads_ds(job, "run", "config.yaml")
    assert "report: report.html is gone" in output and page.is_file()


def test_a_failing_rank_is_the_last_word_and_the_status_tells(job: Path, tmp_path: Path) -> None:
    broken: Any = yaml.safe_load((job / "config.yaml").read_text())
    broken["run_dir"] = str(tmp_path / "broken")
    broken["deepspeed"] = str(tmp_path / "broken.json")
    # no check here knows every value that DeepSpeed takes: a rank finds out
    settings = {"zero_optimization": {"stage": 3}, "communication_data_type": "no such"}
    (tmp_path / "broken.json").write_text(json.dumps(settings))
    (job / "broken.yaml").write_text(yaml.safe_dump(broken))
    environment = os.environ | {"PYTHONPATH": forked_ranks.python_path()}
    result = subprocess.run(
        [sys.executable, "-m", "grads_ds", "run", "broken.yaml", "--to", "probe", "--ranks", "2"],
        cwd=job,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "probe: failed first on rank" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("ValueError: Invalid communication")
