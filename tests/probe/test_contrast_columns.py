"""The columns that contrast a row with another prompt, or with what the pool has in common, equal
their definitions, computed slowly from whole float64 models, also on sharded ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from conftest import write_rows
from grads_ds.config.columns import EXTRA_COLUMNS, EXTRAS, LAYER_GROUPS, extra_columns
from grads_ds.config.config import Config
from grads_ds.gradnorm.groups import GROUPS
from grads_ds.gradnorm.reference import reference_gradients
from grads_ds.probe.prompts import behind_prompt_of, partners
from grads_ds.probe.reference_set import drawn_rows
from ranks import run_on_ranks
from tests.probe.jobs import ROWS, make_config, stage, table_of

NEW = ["surprise", "prompt_gain", "anchor", "contrast", "hidden", "fisher"]
Rows = list[dict[str, Any]]


def make_job(folder: Path, tied: bool, **probe: Any) -> Config:
    anchor = write_rows(folder / "anchor.jsonl", 5)
    settings = {
        "extras": NEW,
        "anchor": str(anchor),
        "epochs": 0,
        "other_prompts": 2,
        "contrast_rows": 9,
    }
    data = {
        "train": [str(write_rows(folder / "pool.jsonl", ROWS))],
        "validation": {"general": str(write_rows(folder / "general.jsonl", 6))},
        "max_length": 64,
    }
    return make_config(folder, tied, data=data, probe=settings | probe)


def single(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}


def at_targets(model: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, target ids and the head's input at the positions that predict a target."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
    places = [t for t, label in enumerate(row["labels"]) if t and label != -100]
    before = torch.tensor(places) - 1
    return (
        out.logits[0][before],
        torch.tensor([row["labels"][t] for t in places]),
        out.hidden_states[-1][0],
    )


def head_gradient(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """The gradient of the row's mean loss in the head's matrix alone, tied or not."""
    logits, targets, hidden = at_targets(model, row)
    places = torch.tensor([t - 1 for t, label in enumerate(row["labels"]) if t and label != -100])
    errors = logits.softmax(-1) - torch.nn.functional.one_hot(targets, logits.shape[1])
    return errors.T @ hidden[places] / len(places)


def statistics(model: Any, row: dict[str, Any]) -> dict[str, float]:
    logits, targets, _ = at_targets(model, row)
    logp = logits.log_softmax(-1)
    loss, entropy = -logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    error = (logp.exp() - torch.nn.functional.one_hot(targets, logits.shape[1])).norm(dim=-1)
    confident = (loss - entropy).clamp_min(0) * (1 - entropy / np.log(logits.shape[1]))
    return {
        "prompt_gain": loss.mean().item(),
        "el2n_gain": error.mean().item(),
        "norm_gain": head_gradient(model, row).norm().item(),
        "surprise": (loss - entropy).mean().item(),
        "conflict": confident.mean().item(),
    }


# tied embeddings: test_extra_columns.py always, here among the long ones
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.long), False])
def test_every_contrast_column_is_its_definition_on_two_sharded_ranks(
    tmp_path: Path, tied: bool
) -> None:
    config = make_job(tmp_path, tied)
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    run = Path(config.run_dir)
    table = table_of(config).set_index("sample_id")
    assert set(extra_columns(NEW, config.probe.layers)) <= set(table.columns)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    pool: Rows = list(load_from_disk(str(run / "prepared/pool")))
    anchors: Rows = list(load_from_disk(str(run / "prepared/anchor")))
    drawn = set(drawn_rows(len(pool), config).tolist())
    names = {"embedding": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    if tied:
        names["lm_head"] = names["embedding"]

    def gradient(row: dict[str, Any], group: str) -> torch.Tensor:
        return reference_gradients(model, single(row))[0][1][names[group]]

    hidden = [at_targets(model, row)[2].mean(0) for row in pool]
    like = torch.stack([at_targets(model, row)[2].mean(0) for row in anchors]).mean(0)
    fisher = sum(head_gradient(model, row).square().sum(-1) for row in anchors)
    fisher = fisher / fisher.mean()
    others = partners(len(pool), 2, config.seed)
    for place, row in enumerate(pool):
        found = table.loc[row["sample_id"]]
        own = statistics(model, row)
        behind = [behind_prompt_of(row, pool[i], config.data.max_length) for i in others[place]]
        for column, value in own.items():
            if column.endswith("gain"):
                value = np.mean([statistics(model, other)[column] for other in behind]) - value
            np.testing.assert_allclose(found[column], value, rtol=1e-4, atol=1e-5)
        centre = torch.stack([hidden[i] for i in sorted(drawn - {place})]).mean(0)
        cosine = torch.cosine_similarity(hidden[place] - centre, like - centre, dim=0).item()
        np.testing.assert_allclose(found["anchor_hidden_cosine"], cosine, atol=1e-5)
        weighted = (fisher * head_gradient(model, row).square().sum(-1)).sum().item()
        np.testing.assert_allclose(found["row_fisher"], weighted, rtol=1e-4)
    for group in names:
        own_mean = torch.stack([gradient(row, group) for row in anchors]).mean(0)
        each = {i: gradient(pool[i], group) for i in range(len(pool))}
        for place, row in enumerate(pool):
            # a row of the draw is compared with the mean of the others in it
            common = torch.stack([each[i] for i in sorted(drawn - {place})]).mean(0)
            value = [
                torch.cosine_similarity(each[place].flatten(), mean.flatten(), dim=0).item()
                for mean in (own_mean, common)
            ]
            found = table.loc[row["sample_id"]]
            np.testing.assert_allclose(found[f"anchor_cosine_{group}"], value[0], atol=1e-5)
            np.testing.assert_allclose(
                found[f"anchor_contrast_{group}"], value[0] - value[1], atol=2e-5
            )


def test_controls_are_scored_as_the_pool_is_and_kept_out_of_it(tmp_path: Path) -> None:
    config = make_job(tmp_path, tied=True, controls=0.2, extras=["ifd", *NEW])
    stage("prepare", config)
    run_on_ranks(2, stage, "probe", config)
    run = Path(config.run_dir)
    table, pool = table_of(config), load_from_disk(str(run / "prepared/pool"))
    controls = pd.read_parquet(run / "scores/controls/table.parquet")
    kinds = pd.read_parquet(run / "scores/controls/kinds.parquet").set_index("sample_id")
    assert list(controls.columns) == list(table.columns)
    assert not set(controls["sample_id"]) & set(table["sample_id"]) and len(table) == len(pool)
    assert set(kinds["kind"]) == {"swapped", "general", "reference"}
    rows = {row["sample_id"]: row for row in load_from_disk(str(run / "probe/controls"))}
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    targets = {tuple(row["labels"]) for row in pool}
    for _, found in controls[:6].iterrows():
        row = rows[found["sample_id"]]
        np.testing.assert_allclose(found["loss"], statistics(model, row)["prompt_gain"], rtol=1e-5)
        if row["kind"] == "swapped":
            own = pool[int(row["prompt_of"])]
            start = row["labels"].index(next(label for label in row["labels"] if label != -100))
            assert row["input_ids"][:start] == own["input_ids"][:start]
            assert tuple(row["labels"]) not in targets

    # a row of the reference set is compared with the mean of the others
    anchors: Rows = list(load_from_disk(str(run / "prepared/anchor")))
    hidden = [at_targets(model, row)[2].mean(0) for row in anchors]
    drawn = drawn_rows(len(pool), config).tolist()
    centre = torch.stack([at_targets(model, pool[i])[2].mean(0) for i in drawn]).mean(0)
    each = [gradient_of(model, row) for row in anchors]
    common = torch.stack([gradient_of(model, pool[i]) for i in drawn]).mean(0)
    known = controls[controls["sample_id"].map(kinds["kind"]) == "reference"]
    assert len(known) == len(anchors) == 5
    cosine = torch.nn.functional.cosine_similarity
    for _, found in known.iterrows():
        place = rows[found["sample_id"]]["reference_row"]
        assert rows[found["sample_id"]]["input_ids"] == anchors[place]["input_ids"]
        others = [i for i in range(5) if i != place]
        direction = torch.stack([hidden[i] for i in others]).mean(0) - centre
        value = cosine(hidden[place] - centre, direction, dim=0).item()
        np.testing.assert_allclose(found["anchor_hidden_cosine"], value, atol=1e-5)
        rest = torch.stack([each[i] for i in others]).mean(0)
        own = cosine(each[place].flatten(), rest.flatten(), dim=0).item()
        np.testing.assert_allclose(found["anchor_cosine_embedding"], own, atol=1e-5)
        against = cosine(each[place].flatten(), common.flatten(), dim=0).item()
        np.testing.assert_allclose(found["anchor_contrast_embedding"], own - against, atol=2e-5)
        assert np.isnan(found["row_fisher"]) and np.isnan(found["anchor_inner_product_embedding"])


def test_forwards_alone_give_the_same_columns_as_a_pass_with_norms(tmp_path: Path) -> None:
    extras = ["ifd", "el2n", "surprise", "prompt_gain", "hidden", "fisher"]
    tables = []
    for layers in (["lm_head"], []):
        (folder := tmp_path / str(len(layers))).mkdir()
        config = make_job(folder, True, extras=extras, layers=layers)
        stage("prepare", config)
        stage("probe", config)
        tables.append(table_of(config))
    with_norms, bare = tables
    assert "lm_head_grad_norm" in with_norms and not any("_grad_norm" in n for n in bare.columns)
    for name in ["loss", *extra_columns(extras, [])]:
        np.testing.assert_allclose(bare[name], with_norms[name], rtol=1e-5, atol=1e-6)


def gradient_of(model: Any, row: dict[str, Any]) -> torch.Tensor:
    return reference_gradients(model, single(row))[0][1]["model.embed_tokens.weight"]


def test_the_config_names_the_recorders_groups_and_every_extra_has_a_column() -> None:
    assert LAYER_GROUPS == GROUPS
    assert {column.extra for column in EXTRA_COLUMNS} == set(EXTRAS)
    assert len({column.name for column in EXTRA_COLUMNS}) == len(EXTRA_COLUMNS)
