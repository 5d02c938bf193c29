"""The pool of planted noise holds what it says, and the documented table is the committed
numbers'.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from conftest import REPO
from scripts.study import planted_noise


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Chats whose answers share no words with one another."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"{name} {i}?"},
                {"role": "assistant", "content": " ".join(f"{name}{i}w{j}" for j in range(12))},
            ]
        }
        for i in range(count)
    ]


def test_the_pool_holds_each_kind_and_trivial_answers_keep_their_questions() -> None:
    domain = rows("d", 950)
    pool = planted_noise.make_pool(domain, rows("o", 150), seed=3)
    kinds = {
        "clean": 500,
        "wrong_answer": 100,
        "near_duplicate": 100,
        "off_domain": 100,
        "trivial": 100,
    }
    assert Counter(row["kind"] for row in pool) == kinds
    assert pool == planted_noise.make_pool(domain, rows("o", 150), seed=3)
    questions = {row["messages"][0]["content"] for row in pool if row["kind"] != "trivial"}
    for row in pool:
        if row["kind"] == "trivial":
            assert row["messages"][-1]["content"] in planted_noise.SHORT
            assert row["messages"][0]["content"] not in questions


def test_the_documented_table_is_the_committed_result() -> None:
    results = json.loads((REPO / "docs/results/planted_noise.json").read_text())
    document = (REPO / "docs/selection.md").read_text()
    assert (
        planted_noise.with_table(document, planted_noise.as_markdown(results["mean"], "kind"))
        == document
    )
    with pytest.raises(ValueError, match="put them back"):
        planted_noise.with_table("no marks", "|")
