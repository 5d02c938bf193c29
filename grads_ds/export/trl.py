"""The subset for TRL: conversations, prompts and completions, or plain texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grads_ds.data.problems import RowProblem
from grads_ds.export.chosen_rows import (
    DATA,
    ELSEWHERE,
    each,
    is_context,
    of_one_kind,
    without,
    write_lines,
)


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Conversations for SFTTrainer with assistant_only_loss; plain texts for the same trainer
    without it.

    Where an answer anywhere is not to be learnt (weight 0), every row is split into prompt and
    completion, of which the prompt is not.
    """
    rows = of_one_kind(rows, "trl")
    if any(is_context(message) for row in rows for message in row.get("messages", ())):
        rows = each(rows, _as_prompt_and_completion)
    write_lines(rows, folder / DATA)


def _as_prompt_and_completion(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    first = next((place for place in answers if not is_context(messages[place])), None)
    if first is None:
        raise RowProblem("an answer to learn", "weight 0 on every one", "leave the row out")
    if first == 0:
        raise RowProblem("a turn before the first answer", "the answer first", "leave the row out")
    if any(is_context(messages[place]) for place in answers if place > first):
        raise RowProblem(
            "answers of weight 0 before all others", f"one after turn {first + 1}", ELSEWHERE
        )
    plain = [without(message, "weight") for message in messages]
    return {"prompt": plain[:first], "completion": plain[first:]} | without(row, "messages")
