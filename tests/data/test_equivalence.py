"""The same rows through every format and every kind of file become the same tokens and targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.formats import load_samples
from grads_ds.data.problems import Problems
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoded, Encoder
from tests.data import twins
from tests.data.test_formats import write

TALKS: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    # system, question, answer, what was said before
    ("", "What colour is the sky?", "Blue,\nmostly é 🙂", []),
    (
        "Be kind.",
        '"quoted", with a comma',
        "<think>\nhm\n</think>\n\nYes",
        [("Hi", "Hello there!")],
    ),
    ("Be kind.", " \n a line\u2028separator", "```\n  code\n```", [("a", "b"), ("c", "d")]),
    ("", "NaN", "null", []),
]


def messages(system: str, question: str, answer: str, before: Any) -> list[dict[str, str]]:
    said = [{"role": "system", "content": system}] if system else []
    for asked, answered in [*before, (question, answer)]:
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return said


def sharegpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(t["role"], t["role"]), "value": t["content"]} for t in turns]


def in_format(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for system, question, answer, before in TALKS:
        turns = messages(system, question, answer, before)
        beside = {"system": system}
        if name == "messages":
            rows.append({"messages": turns})
        elif name == "messages, system beside":
            rows.append({"messages": messages("", question, answer, before)} | beside)
        elif name == "sharegpt":
            rows.append({"conversations": sharegpt(turns)})
        else:
            pairs = [list(pair) for pair in before]
            alpaca = {"instruction": question, "input": "", "output": answer, "history": pairs}
            rows.append(alpaca | beside)
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow", "csv", "jsonl.gz"])
def test_every_format_and_file_gives_the_same_tokens_and_targets(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(
        ModelConfig(path=str(twins.make_tokenizer(tmp_path / "tokenizer", twins.CHATML)))
    )
    results = {}
    for name in ("messages", "messages, system beside", "sharegpt", "alpaca"):
        path = write(tmp_path / f"rows.{kind}", in_format(name), kind)
        problems = Problems()
        samples = list(load_samples([str(path)], "auto", problems))
        assert not problems.count, problems.shown
        results[name] = Encoder(tokenizer, 4096).encode(samples)
    assert all(isinstance(row, Encoded) for row in results["messages"])
    assert len(results["messages"]) == len(TALKS)
    for name, rows in results.items():
        assert rows == results["messages"], name
    ids = [row.input_ids for row in results["messages"] if isinstance(row, Encoded)]
    for row, talk in zip(ids, TALKS, strict=True):
        text = tokenizer.decode(row)
        assert talk[2] in text and talk[1] in text


def test_tools_through_parquet_and_json_give_the_same_tokens(tmp_path: Path) -> None:
    """Rows whose calls and schemas have nothing in common, which Arrow pads with nulls."""
    from tests.data.test_carried_tools import TOOLS
    from tests.data.test_shapes import calling

    rows = [
        calling("rain", {"city": "Oslo", "days": [{"a": "b"}, {}]}),
        calling("add", {"a": "2", "b": "3"}),
        calling("now", {}),
    ]
    tokenizer = load_tokenizer(
        ModelConfig(path=str(twins.make_tokenizer(tmp_path / "tokenizer", TOOLS)))
    )
    found = []
    for kind in ("jsonl", "parquet", "arrow", "csv"):
        path = write(tmp_path / f"rows.{kind}", rows, kind)
        samples = list(load_samples([str(path)], "auto", Problems()))
        found.append(Encoder(tokenizer, 4096).encode(samples))
    assert all(result == found[0] for result in found)
    text = tokenizer.decode(found[0][1].input_ids)  # type: ignore[union-attr]
    assert "null" not in text and json.dumps({"a": "2", "b": "3"}) in text
