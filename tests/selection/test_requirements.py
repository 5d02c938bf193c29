"""What a selection lacks is said before the probe runs, and nothing is said of a selection that
will work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grads_ds.config.columns import EXTRAS
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.selection.requirements import check_select
from selection.pools import arrow_table, config, run_select, write_run


def faults(select: dict[str, Any], tmp_path: Path, **change: Any) -> list[str]:
    tree = config(tmp_path, **select).model_dump() | change
    return check_select(Config.model_validate(tree), tmp_path)


def test_defaults_ask_for_what_the_defaults_record(tmp_path: Path) -> None:
    assert faults({}, tmp_path) == []
    assert faults({"signal": "total"}, tmp_path, probe={"layers": "all"}) == []


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"signal": "total"}, "set probe.layers: all"),
        ({"signal": "mlp"}, "set probe.layers: [embedding, lm_head, mlp]"),
        ({"groups": ["attention"]}, "norms of group attention"),
        ({"forget_less": 0.5}, "anchor_cosine_<group>"),
        ({"method": "ifd"}, "wanted column ifd"),
        ({"method": "mixture", "mixture": {"loss": 1, "el2n": 1}}, "wanted column el2n"),
        ({"strata": "kind"}, "wanted one of source, length; found kind"),
        ({"method": "guided"}, "set probe.controls: 0.05"),
        ({"filters": [{"column": "loss"}]}, "by which guided and filters on auto go"),
        ({"filters": [{"column": "ifd", "reject": "high", "cut": 1.0}]}, "wanted column ifd"),
        ({"method": "hidden_nearest"}, "add hidden to probe.extras and name its set"),
        (
            {"variants": {"v": {"signal": "norm"}}},
            "select.variants.v: wanted the norms of group norm",
        ),
    ],
)
def test_each_lack_is_a_fault_and_the_stage_agrees(
    select: dict[str, Any], said: str, tmp_path: Path
) -> None:
    found = faults(select, tmp_path)
    assert len(found) == 1
    assert said in found[0]
    write_run(tmp_path, arrow_table(30))
    with pytest.raises(UserError):
        run_select(config(tmp_path, **select), tmp_path)


def test_what_the_probe_will_record_is_no_fault(tmp_path: Path) -> None:
    probe = {"extras": list(EXTRAS), "anchor": "a.jsonl", "controls": 0.05}
    methods = {m: {"method": m} for m in SelectConfig.METHODS if m != "mixture"}
    assert faults({"variants": methods, "forget_less": 0.5}, tmp_path, probe=probe) == []
    (said,) = faults({"method": "less"}, tmp_path)
    assert "add anchor to probe.extras and name its set in probe.anchor" in said


def test_an_anchor_that_is_evaluated_too_is_said_of_the_choices_that_look_at_it(
    tmp_path: Path,
) -> None:
    names = ("anchor_cosine_embedding", "anchor_inner_product_embedding")
    write_run(tmp_path, arrow_table(40, **{name: np.linspace(-1, 1, 40) for name in names}))
    variants = {"less": {"method": "less"}, "random": {"method": "random"}}
    tree = config(tmp_path, forget_less=0.5, variants=variants).model_dump()
    tree["data"]["validation"] = {"general": "g.jsonl"}
    for anchor, leaks in (("general", True), ("own.jsonl", False)):
        run_select(
            Config.model_validate(tree | {"probe": {"extras": ["anchor"], "anchor": anchor}}),
            tmp_path,
        )
        for name, looks in ((".", True), ("variants/less", True), ("variants/random", False)):
            told = json.loads((tmp_path / "selection" / name / "selection.json").read_text())
            assert any("held-out set general" in text for text in told["warnings"]) is (
                leaks and looks
            )


def test_columns_of_a_finished_table_count(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        arrow_table(30, ifd=np.linspace(0, 2, 30), anchor_cosine_lm_head=np.linspace(-1, 1, 30)),
    )
    assert (
        faults(
            {"method": "ifd", "variants": {"f": {"method": "grads", "forget_less": 1.0}}}, tmp_path
        )
        == []
    )
