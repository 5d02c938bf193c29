"""best/model is what the limit chose: a trained model, a merge or a snapshot, with a card of its
own; nothing where nothing fits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.evaluate.best import run_best
from grads_ds.flow.unit_inputs import evaluate_units, report_units
from grads_ds.report.forgetting import read_forgetting
from grads_ds.report.what_to_do import advice
from tests.evaluate.test_retention import trained_from
from tests.report.synthetic_forgetting import LINE, write_forgetting

BETWEEN = {
    "selected@0.5": ("selected", 0.5, None, 0.20, 0.03),
    "selected~0.5": ("selected", None, 0.5, 0.15, 0.01),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = make_tiny_model(tmp_path / "base")
    (trained_from(folder, tmp_path / "run/sft/model") / "README.md").write_text("its own card")
    trained_from(folder, tmp_path / "run/sft/snapshots/0.5", seed=2)
    models = {"selected": ("grads", 3000, 0.30, 0.09)}
    write_forgetting(tmp_path / "run", models, BETWEEN)
    return folder


def config(base: Path, limit: float | None, **evaluate: Any) -> Config:
    limited = {"max_forgetting": limit, "retention": {}, "bootstrap": 100} | evaluate
    return Config(
        run_dir=str(base.parent / "run"),
        model={"path": str(base)},
        data={"train": ["t"], "validation": {"domain": "d", "general": "g"}},
        evaluate=limited if limit is not None else {},
    )


def published(base: Path, limit: float) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    run = base.parent / "run"
    run_best(config(base, limit), run)
    model = run / "best/model"
    state = AutoModelForCausalLM.from_pretrained(model).state_dict() if model.exists() else None
    return json.loads((run / "best/choice.json").read_text()), state


def test_the_chosen_model_is_published_and_the_others_when_the_limit_falls(base: Path) -> None:
    run = base.parent / "run"
    start, end, half = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (base, run / "sft/model", run / "sft/snapshots/0.5")
    )
    choice, state = published(base, 1.0)
    assert choice["chosen"]["name"] == "selected" and choice["cost_in_gain"]["value"] == 0
    assert state is not None and all(torch.equal(state[n], end[n]) for n in end)
    card = (run / "best/model/README.md").read_text()
    audited = f"| forgetting on the audit half | {choice['audit']['forgetting']:.4f} |"
    assert audited in card and "| limit | 1 |" in card
    assert (run / "sft/model/README.md").read_text() == "its own card"
    choice, state = published(base, 0.05)
    assert choice["chosen"]["name"] == "selected@0.5" and choice["audit"]["within"]
    assert choice["cost_in_gain"]["value"] == pytest.approx(0.10, abs=0.01)
    assert state is not None
    assert all(torch.equal(state[n], start[n] + 0.5 * (end[n] - start[n])) for n in end)
    choice, state = published(base, 0.02)
    assert choice["chosen"]["name"] == "selected~0.5"
    assert state is not None and all(torch.equal(state[n], half[n]) for n in half)
    choice, state = published(base, 0.001)
    assert choice["chosen"] is None and choice["unlimited"]["name"] == "selected"
    assert state is None and len(choice["candidates"]) == 3


def test_a_limit_adds_a_unit_and_changing_it_evaluates_nothing_again(base: Path) -> None:
    run = base.parent / "run"
    none, one, other = (config(base, limit) for limit in (None, 0.1, 0.2))
    assert [unit.name for unit in evaluate_units(none, run)] == ["evaluate"]
    units = [evaluate_units(c, run) for c in (one, other)]
    assert [unit.name for unit in units[0]] == ["evaluate", "evaluate/best"]
    assert units[0][0].identity == units[1][0].identity
    assert units[0][1].identity != units[1][1].identity
    assert "best" in report_units(one, run)[0].inputs
    assert "best" not in report_units(none, run)[0].inputs


def test_too_few_prompts_choose_nothing_and_are_told(base: Path) -> None:
    run = base.parent / "run"
    for file in (run / "evaluation/own_answers").glob("*.parquet"):
        table = pq.read_table(file)
        half = pa.array(np.zeros(len(table), bool))  # nobody is left to choose by
        column = table.column_names.index("choice")
        pq.write_table(table.set_column(column, "choice", half), file, write_page_checksum=True)
    choice, state = published(base, 1.0)
    assert choice["chosen"] is None and state is None
    assert {c["bound"] for c in choice["candidates"]} == {None}
    resolved = {"evaluate": {"max_forgetting": 1.0, "forgetting": "kl", "bootstrap": 50}}
    found = read_forgetting(run, json.loads((run / "evaluation.json").read_text()), resolved)
    assert found is not None and "too few prompts" in advice(found).reasons[0]


def test_a_frontier_subset_can_be_the_best(base: Path) -> None:
    run = base.parent / "run"
    write_forgetting(run, {"selected": ("grads", 3000, 0.20, 0.09)} | LINE)
    trained_from(base, run / "sft/variants/frontier-0.25/model", seed=4)
    choice, state = published(base, 0.07)
    assert choice["chosen"]["name"] == "frontier-0.25" and choice["chosen"]["kind"] == "random"
    assert state is not None
