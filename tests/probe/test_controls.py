"""Controls of unusual pools: what cannot be made is left out, counted and said; nothing right is
called wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from pydantic import ValidationError

from grads_ds.config.columns import extra_columns
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.probe import ProbeConfig
from grads_ds.config.select import SelectConfig
from grads_ds.probe.controls import FOLDER, SCORES, prepare_controls
from grads_ds.probe.extra_columns import ExtraColumns
from grads_ds.probe.prompts import has_prompt, partners
from grads_ds.scores.read import read_table
from grads_ds.selection.choose import choose
from grads_ds.selection.requirements import check_select
from selection.pools import arrow_table

Row = dict[str, Any]


def row(number: int, prompt: list[int], answer: list[int]) -> Row:
    return {
        "sample_id": number,
        "sample_hash": f"h{number}",
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
    }


def chats(count: int) -> list[Row]:
    return [row(i, [1, 100 + i, 2], [200 + i, 300 + i, 3]) for i in range(count)]


def job(folder: Path, pool: list[Row], reference: list[Row] | None = None, **probe: Any) -> Config:
    """A run whose prepared sets are these rows."""
    Dataset.from_list(pool).save_to_disk(str(folder / "prepared/pool"))
    if reference is not None:
        Dataset.from_list(reference).save_to_disk(str(folder / "prepared/anchor"))
        probe = {"anchor": "reference.jsonl", "extras": ["hidden"]} | probe
    return Config.model_validate(
        {
            "run_dir": str(folder),
            "model": {"path": "m"},
            "data": {"train": ["x"], "max_length": 32},
            "probe": {"epochs": 0, "controls": 0.05} | probe,
        }
    )


def made(config: Config) -> tuple[dict[str, int], str]:
    """Controls by kind, as both files have them, and what was said."""
    run = Path(config.run_dir)
    count, said = prepare_controls(config, run)
    kinds = pq.read_table(run / SCORES / "kinds.parquet")["kind"].to_pylist()
    rows = load_from_disk(str(run / FOLDER))["kind"] if count else []
    assert list(rows) == kinds and len(kinds) == count
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}, said


@pytest.mark.parametrize(
    ("pool", "short"),
    [
        ([row(i, [], [1, 20 + i, 3]) for i in range(20)], "20 of 20 swapped"),
        ([row(i, [1], [20 + i, 3]) for i in range(20)], "20 of 20 swapped"),
        ([row(i, [1, 5, 2], [7, 8, 3]) for i in range(20)], "20 of 20 swapped"),
        (chats(1), "1 of 1 swapped"),
        ([row(i, [1, 5, 2], []) for i in range(3)], "3 of 3 swapped"),
    ],
    ids=["texts", "texts with a first mark", "all alike", "one row", "no answers"],
)
def test_where_nothing_wrong_can_be_made_there_is_no_control_and_it_says_why(
    pool: list[Row], short: str, tmp_path: Path
) -> None:
    kinds, said = made(job(tmp_path, pool))
    assert kinds == {} and f"{short} could not be made" in said and "no general set" in said


def test_a_tiny_pool_gives_as_many_controls_as_it_has_rows(tmp_path: Path) -> None:
    config = job(tmp_path, chats(20), chats(3))
    kinds, said = made(config)
    assert kinds == {"reference": 3, "swapped": 20} and "could not be made" not in said
    pool, avoided = chats(20), partners(20, 1, config.seed)
    for found in load_from_disk(str(tmp_path / FOLDER)):
        if found["kind"] == "reference":
            assert found["prompt_of"] == -1 and found["input_ids"][0] == 1
            assert found["input_ids"] == chats(3)[found["reference_row"]]["input_ids"]
            continue
        own, answered = pool[found["prompt_of"]], found["input_ids"][3] - 200
        assert found["input_ids"][:3] == own["input_ids"][:3]
        assert answered != found["prompt_of"] and answered not in avoided[found["prompt_of"]]


def test_rows_without_a_prompt_give_no_swapped_control_beside_rows_that_have_one(
    tmp_path: Path,
) -> None:
    pool = [r if r["sample_id"] % 2 else row(r["sample_id"], [], [9, 8]) for r in chats(20)]
    kinds, said = made(job(tmp_path, pool))
    assert kinds == {"swapped": 10} and "10 of 20 swapped could not be made" in said
    assert all(found["prompt_of"] % 2 for found in load_from_disk(str(tmp_path / FOLDER)))
    assert [has_prompt(r) for r in pool[:4]] == [False, True, False, True]


def test_a_single_reference_row_has_no_others_to_be_compared_with(tmp_path: Path) -> None:
    assert made(job(tmp_path, chats(20), chats(1)))[0] == {"swapped": 20}


def test_without_controls_guided_is_random_in_strata_and_says_why(tmp_path: Path) -> None:
    config = job(tmp_path, [row(i, [], [1, 20 + i, 3]) for i in range(20)])
    prepare_controls(config, tmp_path)
    pq.write_table(arrow_table(20), tmp_path / "scores/table.parquet")
    table = read_table(tmp_path / "scores/table.parquet")
    assert table.no_controls and not table.controls
    settings = SelectConfig(method="guided", budget=0.5)
    choice = choose(table, settings, 0)
    random = choose(table, SelectConfig(method="random", budget=0.5), 0)
    assert np.array_equal(choice.selected, random.selected)
    assert any("made no controls that are wrong" in text for text in choice.warnings)
    named = choose(table, SelectConfig(method="guided", filters=[{"column": "loss"}]), 0)
    assert "could make no controls" in named.report["filters"][0]["why_none"]
    # never asked for is another thing
    (tmp_path / SCORES / "kinds.parquet").unlink()
    with pytest.raises(UserError, match=r"set probe\.controls"):
        choose(read_table(tmp_path / "scores/table.parquet"), settings, 0)


def test_nearness_without_a_reference_set_is_refused_before_the_probe(tmp_path: Path) -> None:
    config = job(tmp_path, chats(4))
    wish = SelectConfig(method="guided", spread="reference")
    (problem,) = check_select(config.model_copy(update={"select": wish}), tmp_path)
    assert "add hidden to probe.extras and name its set in probe.anchor" in problem
    named = SelectConfig(filters=[{"column": "loss", "against": "reference"}])
    (problem,) = check_select(config.model_copy(update={"select": named}), tmp_path)
    assert "reference rows" in problem and "probe.anchor" in problem


def test_without_layers_what_is_recorded_per_group_is_refused() -> None:
    for extras in (["anchor"], ["hidden", "contrast"]):
        with pytest.raises(ValidationError, match=rf"{extras[-1]} are recorded per layer group"):
            ProbeConfig(layers=[], extras=extras, anchor="x")
    with pytest.raises(ValidationError, match="record: during records the norms of layers"):
        ProbeConfig(layers=[], record="during")
    bare = ProbeConfig(layers=[], extras=["ifd", "hidden"], anchor="x", epochs=0)
    assert extra_columns(bare.extras, bare.layers) == ["ifd", "anchor_hidden_cosine"]


def test_norms_are_asked_for_by_name_where_none_are_recorded(tmp_path: Path) -> None:
    config = job(tmp_path, chats(4), layers=[])
    problems = check_select(config, tmp_path)
    assert len(problems) == 2 and all("probe.layers records none" in text for text in problems)
    assert "set probe.layers: [embedding]" in problems[0]


def test_a_row_is_left_out_of_the_mean_hidden_state_it_has_a_part_in() -> None:
    draw = torch.Generator().manual_seed(3)
    pool, known = (torch.randn(n, 6, generator=draw, dtype=torch.float64) for n in (9, 4))
    columns = ExtraColumns.__new__(ExtraColumns)
    columns.drawn = {10 + i: i for i in range(5)}
    centre, like = pool[:5].mean(0), known.mean(0)
    columns.kept = {"hidden.direction": like - centre, "reference_rows": torch.tensor(4.0)}
    samples = [{"sample_id": 10 + i} for i in range(9)]
    samples += [{"sample_id": 50 + i, "reference_row": i} for i in range(4)]
    rows = torch.cat([pool, known]) - centre
    direction = like - centre + columns._own_part(samples, rows)
    found = torch.cosine_similarity(rows, direction)
    for place, value in enumerate(found):
        own, mean = pool[place] if place < 9 else known[place - 9], centre
        towards = like
        if place < 5:
            mean = (5 * centre - own) / 4
        elif place >= 9:
            towards = (4 * like - own) / 3
        wanted = torch.cosine_similarity(own - mean, towards - mean, dim=0)
        torch.testing.assert_close(value, wanted)
