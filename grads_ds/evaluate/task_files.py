"""The files of the evaluate stage's own tasks, read and checked. JSONL of {"question", "choices",
"answer": index} for multiple choice, {"prompt", "answer": text} for exact match. Writes nothing; no
torch import.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grads_ds.config.errors import UserError
from grads_ds.config.evaluate import EvaluateConfig
from grads_ds.config.text_file import text_of


def read_choices(file: Path) -> list[dict[str, Any]]:
    """Rows of a multiple-choice file. Raises UserError with every wrong line."""

    def problem(row: Any) -> bool:
        choices = row.get("choices")
        known = (
            isinstance(choices, list)
            and len(choices) > 1
            and all(isinstance(c, str) and c for c in choices)
        )
        answer = row.get("answer")
        return not (
            known
            and isinstance(row.get("question"), str)
            and type(answer) is int
            and 0 <= answer < len(choices)
        )

    return _read(
        file,
        problem,
        '{"question": text, "choices": [text, text, ...], "answer": index of the right one}',
    )


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Rows of an exact-match file. Raises UserError with every wrong line."""
    return _read(
        file,
        lambda row: (
            not all(isinstance(row.get(key), str) and row[key] for key in ("prompt", "answer"))
        ),
        '{"prompt": text, "answer": text}',
    )


def task_problems(settings: EvaluateConfig) -> list[str]:
    """What is wrong with the task files and the harness, found before anything is computed."""
    problems: list[str] = []
    for read, files in (
        (read_choices, settings.multiple_choice),
        (read_prompts, settings.exact_match),
    ):
        for file in files.values():
            try:
                read(Path(file))
            except UserError as error:
                problems += error.problems
    if settings.lm_eval and importlib.util.find_spec("lm_eval") is None:
        problems.append(
            "evaluate.lm_eval: wanted lm-evaluation-harness; found none; pip install"
            " 'grads-ds[eval]'"
        )
    return problems


def _read(file: Path, wrong: Callable[[Any], bool], wanted: str) -> list[dict[str, Any]]:
    text = text_of(file, str(file), f"a JSONL file of {wanted}")
    lines = [line for line in text.split("\n") if line.strip()]
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or wrong(row):
            problems.append(f"{file}:{number}: wanted {wanted}; found {line[:80]}; mend that line")
        rows.append(row)
    if problems or not rows:
        raise UserError(
            problems
            or f"{file}: wanted at least one row of {wanted}; found none; fill it or remove it"
        )
    return rows
