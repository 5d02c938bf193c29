"""Runs of a study go side by side: first footings first, each training its own where it must."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPO
from grads_ds.config.config import Config
from grads_ds.flow.unit_inputs import sft_units
from grads_ds.run_dir.units import mark_done, why_due
from scripts.study import footings
from scripts.study.design import Cell, Footing, Study, read
from scripts.study.run_configs import run_config

CELL = Cell("medicine", 0.4, 0)
EVERY = (
    "prepared/pool/data.arrow",
    "scores/table.parquet",
    "selection/variants/random_25/selected.jsonl",
    "sft/model/model.safetensors",
    "sft/variants/full/model/model.safetensors",
    "sft/variants/random_25/model/model.safetensors",
    "best/model/model.safetensors",
    "best/choice.json",
    "evaluation/base.domain.parquet",
    "evaluation/own_answers/answers.key.json",
    "evaluation/own_answers/base.parquet",
    "evaluation.json",
    "tensorboard/sft/full/events",
    "state/sft.full.json",
)


def study_of(tmp_path: Path, **trainings: dict[str, Any]) -> Study:
    """The study's file with one footing for each training."""
    given = read(REPO / "configs/study/forgetting.yaml")
    sft = {name: Footing(equal="epochs", sft=s, budgets=[0.25]) for name, s in trainings.items()}
    methods = {name: given.methods[name] for name in ("guided", "random")}
    return given.model_copy(update={"out": str(tmp_path), "footings": sft, "methods": methods})


class Runner:
    """Stands for `grads-ds run`: writes what a run leaves, and notes what ran when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...] = ()) -> None:
        self.broken, self.began, self.most = broken, list[str](), 0
        self.found: dict[str, set[str]] = {}
        self.now, self.lock = 0, threading.Lock()
        monkeypatch.setattr(footings, "grads_ds", self.run)
        monkeypatch.setattr(footings, "make_pool", self.make_pool)
        monkeypatch.setattr(footings.orders, "register", lambda out: None)

    def make_pool(self, study: Study, material: Path, cell: Cell, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "anchor.jsonl").write_text("")

    def run(self, config: Path, ranks: int, threads: int, last: str) -> None:
        run, name = config.with_suffix(""), f"{config.parent.name}/{config.stem}"
        with self.lock:
            self.began.append(name)
            self.now += 1
            self.most = max(self.most, self.now)
            self.found[name] = {
                str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()
            }
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        if name in self.broken:
            raise SystemExit(f"{name} broke")
        for file in EVERY:
            (run / file).parent.mkdir(parents=True, exist_ok=True)
            (run / file).write_text("content")


def test_a_cells_first_footing_runs_before_its_others_and_runs_go_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, plain={}, slow={"learning_rate": 1e-5}, replay={"replay": 0.2})
    wanted, runner = [Cell("medicine", 0.4, seed) for seed in (0, 1)], Runner(monkeypatch)
    ended: list[int] = []
    place = footings.Place(tmp_path, jobs=3)
    assert footings.run_cells(study, wanted, place, lambda: ended.append(1)) == []
    assert len(runner.began) == len(ended) == 6 and runner.most == 3
    assert set(runner.began[:2]) == {f"{cell.folder}/plain" for cell in wanted}
    # what is finished is not run again
    again = Runner(monkeypatch)
    assert footings.run_cells(study, wanted, place, lambda: None) == [] and again.began == []


def test_earlier_cells_are_finished_before_later_ones_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, plain={}, slow={"learning_rate": 1e-5})
    wanted, runner = [Cell("law", 0.4, seed) for seed in (0, 1)], Runner(monkeypatch)
    footings.run_cells(study, wanted, footings.Place(tmp_path), lambda: None)
    one, two = (cell.folder for cell in wanted)
    assert runner.began == [f"{one}/plain", f"{one}/slow", f"{two}/plain", f"{two}/slow"]
    probed = Runner(monkeypatch)
    shutil.rmtree(tmp_path / one)
    footings.run_cells(study, wanted, footings.Place(tmp_path, last="probe"), lambda: None)
    assert probed.began == [f"{one}/plain"] and not (tmp_path / one / "slow").exists()


def test_a_failure_is_told_at_the_end_and_the_other_runs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, plain={}, slow={"learning_rate": 1e-5}, fast={"learning_rate": 1e-3})
    wanted = [Cell("law", 0.4, seed) for seed in (0, 1)]
    one, two = (cell.folder for cell in wanted)
    runner = Runner(monkeypatch, (f"{one}/plain", f"{two}/slow"))
    failed = footings.run_cells(study, wanted, footings.Place(tmp_path, jobs=2), lambda: None)
    assert set(runner.began) == {f"{one}/plain", *(f"{two}/{n}" for n in ("plain", "slow", "fast"))}
    assert sorted(failed) == [
        f"{one}/plain: {one}/plain broke; 2 footings that wait for it were not run",
        f"{two}/slow: {two}/slow broke",
    ]
    with pytest.raises(SystemExit, match="2 failed") as ended:
        footings.tell_failures(failed)
    assert ended.value.code != 0


def test_a_footing_takes_over_what_it_shares_and_weights_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, plain={"frontier": True}, steps={}, slow={"learning_rate": 1e-5})
    runner = Runner(monkeypatch)
    footings.run_cells(study, [CELL], footings.Place(tmp_path), lambda: None)
    shared = {
        "prepared/pool/data.arrow",
        "scores/table.parquet",
        "selection/variants/random_25/selected.jsonl",
        "evaluation/own_answers/answers.key.json",
        "state/sft.full.json",
    }
    full = {"sft/variants/full/model/model.safetensors"}
    assert runner.found[f"{CELL.folder}/plain"] == set()
    assert runner.found[f"{CELL.folder}/steps"] == shared | full
    assert runner.found[f"{CELL.folder}/slow"] == shared
    sizes = {file.stat().st_size for file in (tmp_path / CELL.folder).rglob("*.safetensors")}
    assert sizes == {0}


@pytest.mark.parametrize(
    "differs",
    [{"token_gate": "stm"}, {"replay": 0.2}, {"learning_rate": 1e-5}, {"frontier": True}, {}],
    ids=lambda given: next(iter(given), "nothing"),
)
def test_a_copied_model_of_the_whole_pool_counts_only_where_training_is_alike(
    tmp_path: Path, differs: dict[str, Any]
) -> None:
    study = study_of(tmp_path, plain={"frontier": True}, other=differs)
    folder = tmp_path / CELL.folder

    def full(equal: str) -> Any:
        given = run_config(study, tmp_path, CELL, folder, equal)
        config = Config.model_validate(yaml.safe_load(yaml.safe_dump(given)))
        return next(u for u in sft_units(config, folder / equal) if u.name == "sft/full")

    model = folder / "plain/sft/variants/full/model/config.json"
    model.parent.mkdir(parents=True)
    model.write_text(json.dumps({}))
    unit = full("plain")
    mark_done(folder / "plain", unit.name, unit.inputs, unit.outputs, 1.0)
    shutil.copytree(folder / "plain", folder / "other")
    due = why_due(folder / "other", "sft/full", full("other").inputs)
    alike = not set(differs) - {"frontier"}
    assert (due is None) == alike
    assert footings._train_alike(study, "plain", "other") == alike
    assert alike or next(iter(differs)) in str(due)
