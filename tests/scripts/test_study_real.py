"""The real model's study: its files make runs, and its numbers are their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import REPO
from grads_ds.config.config import Config
from grads_ds.selection.requirements import check_select
from scripts.study.design import cells, footings, read, run_config
from scripts.study.real import margins, planted_areas
from selection.pools import score_table


@pytest.mark.parametrize("name", ["real", "real_small"])
def test_every_cell_of_the_studys_files_is_a_run_that_can_be_made(
    name: str, tmp_path: Path
) -> None:
    study = read(REPO / f"configs/study/{name}.yaml")
    for cell in cells(study):
        for equal in footings(study, cell):
            config = Config.model_validate(run_config(study, tmp_path, cell, tmp_path, equal))
            methods = {**study.methods, **study.chosen}
            variants = {name: {"budget": 0.25, **given} for name, given in methods.items()}
            whole = config.model_copy(
                update={"select": config.select.model_copy(update={"variants": variants})}
            )
            assert check_select(whole, tmp_path) == []
            assert ("full" in config.sft.variants) is study.full


def test_margins_are_paired_over_questions_and_void_where_the_truth_was_unlearnt(
    tmp_path: Path,
) -> None:
    losses = {
        "base": {"domain": [2.0, 2.0, 2.0], "swapped": [2.5, 2.5, 2.5]},
        "selected": {"domain": [1.0, 1.5, 2.0], "swapped": [2.0, 2.5, 3.0]},
        "random_25": {"domain": [2.5, 2.0, 2.1], "swapped": [2.6, 2.4, 2.5]},
    }
    models: dict[str, dict[str, dict[str, str]]] = {}
    for model, sets in losses.items():
        for which, values in sets.items():
            file = f"{model}.{which}.parquet"
            pq.write_table(pa.table({"loss": values}), tmp_path / file)
            models.setdefault(model, {})[which] = {"sample_losses_file": file}
    (tmp_path / "evaluation.json").write_text(json.dumps({"models": models}))
    found = margins(tmp_path, "guided_25")
    assert found["guided_25"]["margin"] == 1.0 and not found["guided_25"]["void"]
    assert found["random_25"]["void"]
    mean, low, high = found["guided_25"]["margin_minus_random"]
    assert mean == pytest.approx(np.mean([0.9, 0.6, 0.6]), abs=1e-4) and low <= mean <= high
    assert "margin_minus_random" not in found["random_25"]
    assert margins(tmp_path / "nothing", "guided_25") == {}


def test_planted_noise_is_held_against_the_clean_rows_alone() -> None:
    table = score_table(400)
    draw = np.random.default_rng(5)
    kinds = draw.choice(["clean", "wrong_answer", "off_domain"], 400)
    loss = draw.random(400) + 5.0 * (kinds == "off_domain")
    found = planted_areas(
        type(table)(
            table.sample_id, table.status, table.status_words, {**table.columns, "loss": loss}
        ),
        kinds,
    )["loss"]
    assert found["off_domain"] > 0.95 and abs(found["wrong_answer"] - 0.5) < 0.1
