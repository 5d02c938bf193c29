"""Turns marked as not to be learned are none of the targets, whichever key says so in whichever
format; the exports carry the mark on.
"""

from __future__ import annotations

from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.formats import detect, normalise
from grads_ds.data.problems import RowProblem
from grads_ds.data.sources import RawRow
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.export.axolotl import write_rows
from tests.data import twins
from tests.data.rows import encode, targets

OFF = [
    {"weight": 0},
    {"weight": 0.0},
    {"weight": "0"},
    {"train": False},
    {"train": "false"},
    {"training": False},
    {"loss": False},
    {"loss_weight": 0.0},
    {"loss_mask": 0},
    {"Train": False},
    {"mask": True},
    {"masked": True},
    {"ignore-loss": 1},
    {"train": False, "weight": 0},
]
ON = [{}, {"weight": 1}, {"train": True}, {"loss": True}, {"masked": False}, {"weight": None}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = twins.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(ModelConfig(path=str(folder)))


def marked(first: dict[str, Any], second: dict[str, Any], style: str = "messages") -> Any:
    turns = [("user", "2+2?"), ("assistant", "BAD 5"), ("user", "again"), ("assistant", "GOOD 4")]
    role, text = ("role", "content") if style == "messages" else ("from", "value")
    said = [{role: name, text: content} for name, content in turns]
    said[1] |= first
    said[3] |= second
    return {"messages" if style == "messages" else "conversations": said}


@pytest.mark.parametrize("template", [twins.CHATML, twins.CHATML_MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("style", ["messages", "sharegpt"])
@pytest.mark.parametrize("mark", OFF, ids=str)
def test_a_marked_turn_is_context(
    base: Any, mark: dict[str, Any], style: str, template: str
) -> None:
    for other in ON:
        encoded = encode(base, template, marked(mark, other, style))
        assert targets(base, encoded) == "GOOD 4<|im_end|>"
        assert not encoded.notes


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0.5}, {"train": "perhaps"}, {"mask": 1}, {"train": True, "weight": 0}],
    ids=str,
)
def test_a_mark_that_says_neither_is_refused(base: Any, mark: dict[str, Any]) -> None:
    with pytest.raises(RowProblem, match="turn 2 of"):
        encode(base, twins.CHATML, marked(mark, {}))


def notes_of(row: dict[str, Any]) -> tuple[str, ...]:
    return normalise(RawRow("", "", "", row), detect(row) or "").notes


def test_keys_that_look_like_a_mark_are_named() -> None:
    (note,) = notes_of(marked({"trainability": 0}, {}))
    assert "'trainability'" in note
    assert notes_of(marked({"name": "ada", "id": 3}, {})) == ()
    row = marked({}, {})
    row["messages"][0]["train"] = True
    assert "answers alone are" in notes_of(row)[0]


def test_a_row_of_which_nothing_is_learned_is_dropped_with_that_reason(base: Any) -> None:
    encoded = encode(base, twins.CHATML, marked({"weight": 0}, {"train": False}))
    assert encoded.dropped == "no answer is to be learned"


@pytest.mark.parametrize("mark", OFF, ids=str)
def test_exports_carry_the_mark_on(tmp_path: Any, mark: dict[str, Any]) -> None:
    import json

    row = marked(mark, {}, "sharegpt")
    sample = normalise(RawRow("", "", "", row), "sharegpt")
    write_rows([{"messages": sample.messages}], tmp_path)
    (line,) = (tmp_path / "subset.jsonl").read_text().splitlines()
    assert [turn.get("train") for turn in json.loads(line)["messages"]] == [None, False, None, None]
