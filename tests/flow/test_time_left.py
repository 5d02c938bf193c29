"""The time that a run still takes follows from what its own units took; what nothing tells of is
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.config import Config
from grads_ds.flow.stages import STAGES
from grads_ds.flow.time_left import long_units, time_left
from grads_ds.run_dir.provenance import resolved_text
from tests.report.synthetic_run import write_json

POOL, HELD = 1000, 50


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two subsets to be trained on and the base model to be evaluated: 100 rows selected, 500 in
    half.
    """
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path),
            "model": {"path": "m"},
            "data": {"train": ["a"], "validation": {"domain": "d", "general": "g"}},
            "probe": {"epochs": 1.0},
            "select": {"variants": {"half": {"budget": 0.5}}},
            "sft": {"epochs": 2, "variants": ["half"]},
        }
    )
    (tmp_path / "resolved.yaml").write_text(resolved_text(config.model_dump(mode="json")))
    sets = {"pool": {"kept": POOL}, "domain": {"kept": HELD}, "general": {"kept": HELD}}
    write_json(tmp_path / "prepared/prepared.json", {"sets": sets})
    write_json(tmp_path / "selection/selection.json", {"counts": {"selected": 100}})
    write_json(tmp_path / "selection/variants/half/selection.json", {"counts": {"selected": 500}})
    return tmp_path


def seen(stage: str, eta: float | None, **took: float) -> dict[str, Any]:
    finished = [
        {"unit": unit.replace("__", "/"), "seconds": s, "finished": ""} for unit, s in took.items()
    ]
    return {"finished": finished, "job": {"stage": stage, "eta_seconds": eta, "outcome": None}}


def test_trainings_go_by_samples_and_the_evaluation_by_the_recording(run: Path) -> None:
    took = {"prepare": 5.0, "probe__train": 2000.0, "probe__record": 1000.0}
    took |= {"select__selected": 1.0, "select__half": 1.0}
    # 60 s of the training at work, 500 x 2 samples at 2 s, 3 models x 100 held-out rows at 1 s
    assert time_left(run, seen("sft", 60.0, **took)) == "about 39 min left"


def test_what_nothing_tells_of_is_named(run: Path) -> None:
    (run / "selection/selection.json").unlink()
    said = time_left(run, seen("probe", 120.0, prepare=5.0))
    assert said.startswith("about 2 min at least, without probe/record, sft/selected")
    assert said.endswith("evaluate")


@pytest.mark.parametrize("probe", [{"epochs": 0}, {"epochs": 1}, {"epochs": 1, "record": "during"}])
def test_its_units_are_those_of_the_flow(probe: dict[str, Any], run: Path) -> None:
    config = Config.model_validate(
        {
            "run_dir": str(run),
            "model": {"path": "m"},
            "data": {"train": ["a"], "validation": {"domain": "d"}},
            "probe": probe,
            "select": {"variants": {"half": {"budget": 0.5}}},
            "sft": {"variants": ["full", "half"]},
        }
    )
    names = [unit.name for stage in STAGES for unit in stage.units(config, run)]
    quick = ("select", "report")
    assert long_units(config) == [n for n in names if n.split("/")[0] not in quick]


def test_nothing_is_said_before_a_first_step_or_without_a_config(run: Path) -> None:
    assert time_left(run, seen("probe", None, prepare=5.0)) == ""
    (run / "resolved.yaml").unlink()
    assert time_left(run, seen("probe", 60.0, prepare=5.0)) == ""
