"""Settings of forgetting: what a limit wants of the other sections, and the frontier's variants."""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.evaluate import set_roles
from grads_ds.config.frontier_variants import BUDGETS


def config(**sections: Any) -> Config:
    data = {"train": ["t"], "validation": {"domain": "d", "general": "g"}}
    return Config(**{"run_dir": "r", "model": {"path": "m"}, "data": data} | sections)


def test_a_frontier_is_random_variants_and_the_whole_pool() -> None:
    select = {"method": "guided", "strata": "source", "near_duplicates": 0.8, "weights": "none"}
    found = config(select=select, sft={"frontier": True, "variants": ["full"]})
    names = [f"frontier-{b:g}" for b in BUDGETS]
    assert found.sft.variants == ["full", *names]
    for name, budget in zip(names, BUDGETS, strict=True):
        chosen = found.select.resolve(name)
        assert (chosen.method, chosen.budget, chosen.strata_field()) == ("random", budget, None)
        assert chosen.near_duplicates is None and chosen.filters == []
    own = config(sft={"frontier": [0.3]})
    assert own.sft.variants == ["frontier-0.3", "full"]
    assert config(sft={"frontier": False}).sft.variants == []
    # as it is saved and read again
    assert Config.model_validate(found.model_dump(mode="json")) == found


def test_a_trained_model_stays_finished_when_a_frontier_is_added() -> None:
    plain, more = config(), config(sft={"frontier": [0.3]})
    assert plain.sft.inputs(exclude={"variants"}) == more.sft.inputs(exclude={"variants"})


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"sft": {"frontier": [1.5]}}, "sft.frontier"),
        ({"evaluate": {"interpolate": [0.5, 1.0]}}, "above 0 and below 1; found 1"),
        ({"evaluate": {"max_forgetting": 0.1}}, "evaluate.retention, which measures kl"),
        ({"evaluate": {"max_forgetting": 0.1, "forgetting": "los"}}, "did you mean loss?"),
        (
            {"evaluate": {"retention": {}}, "data": {"train": ["t"], "validation": {"a": "b"}}},
            "a general set",
        ),
        (
            {"evaluate": {"max_forgetting": 0.1, "forgetting": "loss"}, "data": {"train": ["t"]}},
            "a domain and a general set",
        ),
    ],
)
def test_what_a_limit_lacks_is_told(sections: dict[str, Any], told: str) -> None:
    with pytest.raises((UserError, ValueError)) as caught:
        config(**sections)
    assert told in str(caught.value)


def test_a_task_can_be_what_is_limited() -> None:
    evaluate = {"max_forgetting": 2, "forgetting": "mc", "multiple_choice": {"mc": "f.jsonl"}}
    assert config(evaluate=evaluate).evaluate.forgetting == "mc"


def test_sets_have_their_roles_by_name() -> None:
    assert set_roles(["general", "domain"]) == (["domain"], ["general"])
    assert set_roles(["a", "b", "c"]) == (["a"], ["b", "c"])
    assert set_roles(["domain_x", "domain_y", "general_z", "other"]) == (
        ["domain_x", "domain_y"],
        ["general_z"],
    )
    assert set_roles([]) == ([], [])
