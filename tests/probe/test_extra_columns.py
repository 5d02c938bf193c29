"""The rivals' extra columns equal their definitions, computed slowly from whole float64 models,
also on sharded ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from conftest import write_rows
from grads_ds.config.columns import TOKEN_LOSSES, extra_columns
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.flow.stages import STAGES, due_units
from grads_ds.gradnorm.reference import reference_gradients
from grads_ds.probe.prompts import without_prompt
from grads_ds.scores.token_losses import read_token_losses
from ranks import run_on_ranks
from selection.pools import run_select
from tests.probe.jobs import leave_unfinished, make_config, stage, table_of

ANCHOR_ROWS = 7
ALL = ["ifd", "el2n", "anchor", "early", TOKEN_LOSSES]


def make_job(folder: Path, tied: bool, **probe: Any) -> Config:
    """A pool of 41 rows and an anchor of 7, prepared as a set of its own."""
    anchor = write_rows(folder / "anchor.jsonl", ANCHOR_ROWS)
    settings = {
        "extras": ALL,
        "anchor": str(anchor),
        "epochs": 1.0,
        "batch_size": 4,
        "learning_rate": 1e-3,
    }
    return make_config(folder, tied, probe=settings | probe)


def single(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}


def error_of(model: Any, row: dict[str, Any]) -> float:
    """EL2N by its definition: the mean length of the error vectors at the target tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    lengths = []
    for t, label in enumerate(row["labels"]):
        if t and label != -100:
            wanted = torch.zeros(logits.shape[1], dtype=torch.float64)
            wanted[label] = 1
            lengths.append((logits[t - 1].softmax(-1) - wanted).norm().item())
    return float(np.mean(lengths))


def losses_of(model: Any, row: dict[str, Any]) -> list[float]:
    """The cross-entropy of each target token, in the order of the text."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    places = [t for t, label in enumerate(row["labels"]) if t and label != -100]
    return [-logits[t - 1].log_softmax(-1)[row["labels"][t]].item() for t in places]


# a head of its own: test_contrast_columns.py always, here among the long ones
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_every_extra_column_is_its_definition_on_two_sharded_ranks(
    tmp_path: Path, tied: bool
) -> None:
    config = make_job(tmp_path, tied)
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    run = Path(config.run_dir)
    table = table_of(config).set_index("sample_id")
    assert list(table.columns)[-1] == "status"
    wanted = set(extra_columns(config.probe.extras, config.probe.layers))
    assert wanted - set(table.columns) == {TOKEN_LOSSES}  # in the parts alone
    by_token = read_token_losses(run / "scores", table.index.tolist())
    assert len(by_token) == len(table)
    assert set(table["status"]) == {"ok"}
    now = AutoModelForCausalLM.from_pretrained(run / "probe/model", dtype=torch.float64)
    before = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    names = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    if tied:
        names["lm_head"] = names["embedding"]
    anchors = [
        reference_gradients(now, single(row))[0][1]
        for row in load_from_disk(str(run / "prepared/anchor"))
    ]
    assert len(anchors) == ANCHOR_ROWS
    anchor = {
        group: torch.stack([grads[name] for grads in anchors]).mean(0)
        for group, name in names.items()
    }
    for row in load_from_disk(str(run / "prepared/pool")):
        found = table.loc[row["sample_id"]]
        ((loss, grads),) = reference_gradients(now, single(row))
        ((alone, _),) = reference_gradients(now, single(without_prompt(row)))
        ((_, earlier),) = reference_gradients(before, single(row))
        np.testing.assert_allclose(found["ifd"], loss / alone, rtol=1e-5)
        np.testing.assert_allclose(found["el2n"], error_of(now, row), rtol=1e-5)
        np.testing.assert_allclose(by_token[row["sample_id"]], losses_of(now, row), rtol=1e-4)
        for group, name in names.items():
            inner = (grads[name] * anchor[group]).sum().item()
            cosine = inner / (grads[name].norm() * anchor[group].norm()).item()
            np.testing.assert_allclose(
                found[f"{group}_grad_norm"], grads[name].norm().item(), rtol=1e-5
            )
            np.testing.assert_allclose(found[f"anchor_cosine_{group}"], cosine, atol=1e-5)
            np.testing.assert_allclose(
                found[f"anchor_inner_product_{group}"], inner, atol=1e-5 * abs(inner / cosine)
            )
            np.testing.assert_allclose(
                found[f"{group}_grad_norm_early"], earlier[name].norm().item(), rtol=1e-5
            )


def test_extras_survive_an_interruption_and_are_due_when_they_change(tmp_path: Path) -> None:
    config = make_job(
        tmp_path, tied=False, epochs=0, extras=["ifd", "el2n", "anchor"], flush_seconds=0.0
    )
    stage("prepare", config)
    stage("probe", config)
    variants = {
        name: {"method": name}
        for name in ("ifd", "el2n", "anchor_conflict", "orthogonal", "less", "length_matched")
    }
    whole, parts = (
        table_of(config),
        sorted((Path(config.run_dir) / "scores").glob("part-*.parquet")),
    )
    assert len(parts) > 2
    for file in (parts[0], *Path(config.run_dir, "scores").glob("table.parquet")):
        file.unlink()
    stage("probe", config)  # scores again what the lost part held, against the same anchor
    pd.testing.assert_frame_equal(table_of(config), whole)
    chosen = Config.model_validate(
        config.model_dump() | {"select": {"variants": variants, "forget_less": 0.5}}
    )
    run_select(chosen, Path(config.run_dir))
    for name in variants:
        told = json.loads(
            (Path(config.run_dir) / f"selection/variants/{name}/selection.json").read_text()
        )
        assert told["counts"]["selected"] == 2
    probe = next(stage for stage in STAGES if stage.name == "probe")
    assert due_units(probe, config, Path(config.run_dir)) == []
    less = Config.model_validate(
        config.model_dump()
        | {"probe": config.probe.model_dump() | {"extras": ["ifd"], "anchor": None}}
    )
    assert due_units(probe, less, Path(config.run_dir))


def test_a_probe_resumed_on_other_ranks_gives_the_same_columns_to_the_bit(tmp_path: Path) -> None:
    """The anchor's gradient, a sum over ranks, is taken once: on one rank it would differ in its
    last bits.
    """
    config = make_job(
        tmp_path, tied=True, epochs=0, extras=["ifd", "el2n", "anchor"], flush_seconds=0
    )
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    folder = Path(config.run_dir) / "scores"
    whole = pq.read_table(folder / "table.parquet")
    leave_unfinished(folder, 2)
    run_on_ranks(1, stage, "probe", config)
    assert pq.read_table(folder / "table.parquet").equals(whole)


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"extras": ["ifdd"]}, "did you mean ifd"),
        ({"extras": ["anchor"]}, "give both or neither"),
        ({"anchor": "general"}, "give both or neither"),
        ({"extras": ["early"], "epochs": 0}, "set epochs above 0"),
        ({"extras": ["ifd"], "record": "during"}, "set record: after"),
    ],
)
def test_extras_that_cannot_be_are_refused(
    probe: dict[str, Any], said: str, tmp_path: Path
) -> None:
    tree = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["x"]}, "probe": probe}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=said):
        load_config(tmp_path / "c.yaml")


def test_an_anchor_is_a_held_out_set_or_a_set_of_its_own() -> None:
    tree = {
        "run_dir": "r",
        "model": {"path": "m"},
        "data": {"train": ["x"], "validation": {"general": "g.jsonl"}},
        "probe": {"extras": ["anchor"], "anchor": "general"},
    }
    config = Config.model_validate(tree)
    assert (config.anchor_set(), config.anchor_sources()) == ("general", [])
    own = Config.model_validate(
        tree | {"probe": {"extras": ["anchor"], "anchor": ["a.jsonl", "b.jsonl"]}}
    )
    assert (own.anchor_set(), own.anchor_sources()) == ("anchor", ["a.jsonl", "b.jsonl"])
    assert own.prepared_sets() == {
        "pool": ["x"],
        "general": ["g.jsonl"],
        "anchor": ["a.jsonl", "b.jsonl"],
    }
    with pytest.raises(UserError, match="rename the set there"):
        Config.model_validate(
            tree
            | {
                "data": {"train": ["x"], "validation": {"anchor": "g.jsonl"}},
                "probe": own.probe.model_dump(),
            }
        )
