"""Where evaluation keeps every row's numbers, and how they are written and read.

One parquet file for each model and set: loss, num_target_tokens, target_bytes, choice (whether the
prompt's half chooses or audits), kl_sum, kl_positions; of the base model also every token's loss.
One for each model and multiple-choice task: right, choice. No torch import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.config.config import Config
from grads_ds.evaluate.measured_sets import MeasuredSet, in_choice_half
from grads_ds.evaluate.task_files import read_choices
from grads_ds.run_dir.publish import atomic_path

if TYPE_CHECKING:
    from grads_ds.evaluate.token_pass import SetResult

OWN = "own answers"  # the set of the base model's own answers; no set of a config has a space


def rows_file(model: str, measured: str) -> str:
    """Where a model's numbers on a set lie in the run directory."""
    if measured == OWN:
        return f"evaluation/own_answers/{model}.parquet"
    return f"evaluation/{model}.{measured}.parquet"


def tasks_file(model: str, task: str) -> str:
    """Where a model's answers to a multiple-choice task lie in the run directory."""
    return f"evaluation/tasks/{model}.{task}.parquet"


def write_rows(file: Path, measured: MeasuredSet, result: SetResult, tokens: bool) -> None:
    """One set's rows; with `tokens` every token's loss too."""
    columns = {
        "loss": result.loss,
        "num_target_tokens": result.targets,
        "target_bytes": measured.target_bytes,
        "choice": measured.choice,
        "kl_sum": result.kl_sum,
        "kl_positions": result.kl_positions,
    }
    table = pa.table(columns)
    if tokens:
        losses = pa.array(result.token_losses, pa.list_(pa.float32()))
        table = table.append_column("token_losses", losses)
    _write(file, table)


def write_right(config: Config, file: Path, task: str, right: np.ndarray) -> None:
    """One task's answers."""
    questions = read_choices(Path(config.evaluate.multiple_choice[task]))
    choice = np.array([in_choice_half(row["question"]) for row in questions], bool)
    _write(file, pa.table({"right": right.astype(np.int8), "choice": choice}))


def read_columns(file: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Columns of such a file. Raises OSError and ValueError."""
    table = pq.read_table(file, columns=names, page_checksum_verification=True)
    return {name: table[name].to_numpy() for name in names}


def _write(file: Path, table: pa.Table) -> None:
    with atomic_path(file) as aside:
        pq.write_table(table, aside, write_page_checksum=True)
