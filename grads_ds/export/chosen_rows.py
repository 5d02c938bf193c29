"""The chosen rows as every exporter takes them, and how their files are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.data.formats import Sample, detect, normalise
from grads_ds.data.problems import Problems, RowProblem
from grads_ds.data.sources import RawRow

DATA = "subset.jsonl"
NAME = "grads_subset"
ELSEWHERE = "export to axolotl, which can tell turn by turn, or leave the row out"


def chosen_rows(file: Path, style: str) -> Iterator[dict[str, Any]]:
    """Each chosen row as {"messages": [...], "tools": [...]?}, {"text": ...} or, of plain text,
    {"prompt": ..., "completion": ...}; `style` is data.format.
    """
    problems = Problems()
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            try:
                found = (detect(row) or "") if style == "auto" else style
                sample: Sample = normalise(RawRow("", f"{file}:{number}", str(file), row), found)
            except RowProblem as problem:
                problems.add(f"{file}:{number}", problem.wanted, problem.found, problem.change)
                continue
            if sample.messages is None and sample.context:
                yield {key: row[key] for key in ("prompt", "completion")}
            elif sample.messages is None:
                yield {"text": sample.text}
            else:
                yield {"messages": sample.messages} | (
                    {"tools": sample.tools} if sample.tools else {}
                )
    problems.raise_if_any()


def of_one_kind(rows: list[dict[str, Any]], tool: str) -> list[dict[str, Any]]:
    texts = sum("text" in row for row in rows)
    if 0 < texts < len(rows):
        raise UserError(
            f"export: {tool} wants conversations or plain texts in one data set; found"
            f" {len(rows) - texts} and {texts}; select from one kind, or split selected.jsonl by"
            " its keys"
        )
    return rows


def each(
    rows: list[dict[str, Any]], convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every row converted.

    Raises UserError with the line of each that the tool cannot hold as it is.
    """
    problems, converted = Problems(), []
    for number, row in enumerate(rows, 1):
        try:
            converted.append(convert(row))
        except RowProblem as problem:
            problems.add(
                f"export: selected.jsonl:{number}", problem.wanted, problem.found, problem.change
            )
    problems.raise_if_any()
    return converted


def is_context(message: dict[str, Any]) -> bool:
    """Whether the message is an answer that is not to be learnt."""
    return message["role"] == "assistant" and not message.get("weight", 1)


def without(record: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}


def write_lines(rows: list[dict[str, Any]], to: Path) -> None:
    with to.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
