"""The real model's study: its files make runs, and its numbers are their definitions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from pydantic import ValidationError

from conftest import REPO
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.choose import choose
from grads_ds.selection.requirements import check_select
from scripts.study import orders, pools
from scripts.study.design import Study, cells, footings, read
from scripts.study.real import margins, planted_areas, pooled
from scripts.study.run_configs import method_settings, run_config
from selection.pools import score_table
from tests.scripts.test_study_pools import rows as pool_rows


@pytest.fixture
def given_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's own selection method, registered for one test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    orders.register(tmp_path)


@pytest.mark.usefixtures("given_orders")
@pytest.mark.parametrize("name", ["real", "real_small", "purity", "needle"])
def test_every_cell_of_the_studys_files_is_a_run_that_can_be_made(
    name: str, tmp_path: Path
) -> None:
    study = read(REPO / f"configs/study/{name}.yaml")
    for cell in cells(study):
        for equal in footings(study, cell):
            config = Config.model_validate(run_config(study, tmp_path, cell, tmp_path, equal))
            methods = {**study.methods, **study.chosen}
            variants = {
                name: {"budget": 0.25, **method_settings(given, tmp_path / equal)}
                for name, given in methods.items()
            }
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
    found = margins(tmp_path, "guided_25", 36)
    assert found["guided_25"]["margin"] == 1.0 and not found["guided_25"]["void"]
    assert found["random_25"]["void"]
    mean, low, high = found["guided_25"]["margin_minus_random"]
    assert mean == pytest.approx(np.mean([0.9, 0.6, 0.6]), abs=1e-4) and low <= mean <= high
    assert "margin_minus_random" not in found["random_25"]
    assert margins(tmp_path / "nothing", "guided_25", 36) == {}


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


def rows_to(file: Path, rows: list[dict[str, str]]) -> None:
    turns = [
        {
            "kind": row["kind"],
            "messages": [
                {"role": "user", "content": row["ask"]},
                {"role": "assistant", "content": row["answer"]},
            ],
        }
        for row in rows
    ]
    file.write_text("".join(json.dumps(turn) + "\n" for turn in turns))


@pytest.mark.usefixtures("given_orders")
def test_the_oracle_draws_clean_rows_alone_through_the_products_own_choice(tmp_path: Path) -> None:
    kinds = ["clean", "wrong_answer", "off_domain"] * 21
    rows_to(tmp_path / "pool.jsonl", [{"kind": k, "ask": "a", "answer": "b"} for k in kinds])
    orders.write_orders(tmp_path, seed=1, with_words=False)
    # prepare dropped the first two rows and the last
    dropped = {"origin": [f"pool.jsonl:{line}" for line in range(3, 63)]}
    Dataset.from_dict(dropped).save_to_disk(tmp_path / "run/prepared/pool")
    given = {"method": orders.METHOD, "plugin_options": {"order": "oracle"}, "budget": 0.25}
    settings = SelectConfig(**method_settings(given, tmp_path / "run"))
    choice = choose(score_table(60), settings, 0)
    assert choice.selected.sum() == 15
    assert {kinds[i + 2] for i in np.flatnonzero(choice.selected)} == {"clean"}
    other = {**given, "plugin_options": {"order": "x"}}
    wrong = SelectConfig(**method_settings(other, tmp_path / "run"))
    with pytest.raises(UserError, match="wanted one of oracle"):
        choose(score_table(60), wrong, 0)
    orders_file = tmp_path / orders.FILE
    orders_file.write_text(json.dumps({"oracle": [0.5] * 61}))
    with pytest.raises(UserError, match="found 61, and line 62"):
        choose(score_table(60), settings, 0)
    # and in the processes that the study starts
    code = "from grads_ds.config.select import SelectConfig; SelectConfig(method='given_order')"
    command = [sys.executable, "-c", code]
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(REPO)])
    subprocess.run(command, check=True, cwd=REPO, env=os.environ | {"PYTHONPATH": path})


def test_bm25_finds_the_rows_with_the_reference_rows_words(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="of the scripts extra")
    pool = ["fever and cough in winter", "shares fell on the market", "a dog ran to the park"]
    found = orders.word_likeness(pool, ["what helps against a cough", "high fever"])
    assert found.argmax() == 0 and found[0] > 2 * max(found[1:])


def test_a_needle_pool_holds_the_share_that_its_study_names() -> None:
    clean = pool_rows(60, seed=1)
    others = {"law": pool_rows(200, seed=2), "stories": pool_rows(200, seed=3)}
    pool = pools.needles(clean, others, 120, 0.1, seed=5)
    counts = {kind: sum(row["kind"] == kind for row in pool) for kind in ("clean", *others)}
    assert counts == {"clean": 12, "law": 54, "stories": 54}
    assert pool == pools.needles(clean, others, 120, 0.1, seed=5)
    assert [row["kind"] for row in pool[:12]] != ["clean"] * 12
    with pytest.raises(ValidationError, match="noise"):
        read_needle_with_noise()


def read_needle_with_noise() -> Study:
    study = read(REPO / "configs/study/needle.yaml")
    return Study.model_validate(study.model_dump() | {"noise": [0.4]})


def test_pools_are_pooled_by_their_share_of_noise_and_one_pool_has_no_interval() -> None:
    def record(noise: float, clean: int, margin: float) -> dict[str, Any]:
        model = {"margin_minus_random": [margin, 0, 0], "domain_minus_random": [-margin, 0, 0]}
        return {
            "noise": noise,
            "kept": {"guided": {"kept": {"clean": clean, "wrong_answer": 10 - clean}}, "x": {}},
            "models": {"guided_25": model, "base": {}},
        }

    records = [record(0.4, 9, 0.1), record(0.4, 7, 0.3), record(0.0, 10, 0.2)]
    found = pooled(records, 0.4)["guided"]
    assert (found["pools"], found["trained"], found["clean"], found["clean_least"]) == (
        2,
        2,
        0.8,
        0.7,
    )
    mean, low, high = found["margin_minus_random"]
    assert mean == pytest.approx(0.2) and low < 0.1 < 0.3 < high
    assert found["domain_minus_random"][0] == pytest.approx(-0.2)
    assert pooled(records, 0.0)["guided"]["margin_minus_random"] == [0.2, None, None]
    assert pooled(records, 0.4)["x"] == {"pools": 0} and pooled(records, 0.2) == {}
