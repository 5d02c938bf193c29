"""One choice from a table in memory, for the tests."""

from __future__ import annotations

from typing import Any

from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.choose import Choice, choose


def pick(table: ScoreTable, seed: int = 0, **select: Any) -> Choice:
    return choose(table, SelectConfig(**select), seed)


def ids(choice: Choice) -> list[int]:
    return choice.sample_id[choice.chosen].tolist()
