"""Held-out rows that are in the pool are found by what is trained on; near-duplicates are
counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.config import Config
from grads_ds.data.leaks import word_grams
from grads_ds.data.stage import run_prepare

LONG = (
    "the sky is blue because small particles scatter short waves of light more than long ones and"
    " the eye sees what is left of the sun as yellow"
)


def answered(text: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": text},
        ],
        **more,
    }


def prepared(tmp_path: Path, model: Path, pool: list[Any], held: list[Any]) -> dict[str, Any]:
    for name, rows in (("pool", pool), ("held", held)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    config = Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(model)},
            "data": {
                "train": str(tmp_path / "pool.jsonl"),
                "validation": {"held": str(tmp_path / "held.jsonl")},
            },
        }
    )
    run_prepare(config, tmp_path / "run")
    return json.loads((tmp_path / "run/prepared/prepared.json").read_text())["sets"]["held"]  # type: ignore[no-any-return]


def test_shared_rows_are_found_whatever_else_is_in_them(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = [answered("red", id=1), answered("blue", tags=["old"]), answered("no")]
    turns = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "blue"}]
    held = [{"conversations": turns, "id": 2}, {"conversations": turns, "tags": []}]
    record = prepared(tmp_path, tiny_model, pool, held)
    assert (record["also_in_pool"], record["near_in_pool"]) == (2, 0)
    assert "2 of its rows are in the pool too, token for token" in capsys.readouterr().out


def test_near_duplicates_are_counted_beside_the_shared(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = LONG.split()
    held = [
        answered(LONG),  # the same
        answered(" ".join(["well,", *words[:-2]]).upper()),  # nearly
        answered(" ".join(words[:9] + ["and"] + words[12:18])),  # 2 of its 9 8-grams: above 20 %
        answered(" ".join(reversed(words))),  # the same words in another order
        answered("yes"),  # short answers are alike by nature
    ]
    record = prepared(tmp_path, tiny_model, [answered(LONG), answered("yes", n=1)], held)
    assert (record["also_in_pool"], record["near_in_pool"]) == (2, 2)
    assert "2 further rows are near-duplicates" in capsys.readouterr().out


def test_word_grams_are_those_of_a_slow_count() -> None:
    words = LONG.split()
    slow = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    assert len(word_grams(LONG)) == len(slow)
    assert len(word_grams(f"{LONG} {LONG}")) == len(slow) + 7
    assert set(word_grams(LONG)) <= set(word_grams(f"So {LONG.upper()}!"))
    assert len(word_grams("one two three four five six seven")) == 0
