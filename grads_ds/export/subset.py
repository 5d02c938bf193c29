"""A chosen subset in the data formats of other tools, ready to train on there.

Reads selection/selected.jsonl (for Megatron also prepared/pool and selection.parquet); writes a
folder: the data and the tool's own description of it. docs/exports.md shows how each is used. No
torch import.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.export import TOOLS
from grads_ds.export.chosen_rows import chosen_rows
from grads_ds.export.megatron import write_indexed
from grads_ds.run_dir.layout import selection_folder
from grads_ds.run_dir.ownership import new_folder_problems
from grads_ds.run_dir.publish import atomic_path, sweep


def export_subset(config: Config, run_dir: Path, name: str, tool: str, out: Path) -> int:
    """Write subset `name` for `tool` (a key of `TOOLS`) to the folder `out`; the number of rows.

    Raises UserError.
    """
    chosen = run_dir / selection_folder(name) / "selected.jsonl"
    if not chosen.is_file():
        raise UserError(
            f"export: wanted a finished selection; found no {chosen}; run: grads-ds run CONFIG --to"
            " select"
        )
    if problems := new_folder_problems("--out", out):
        raise UserError(problems)
    rows = list(chosen_rows(chosen, config.data.format))
    if tool != "trl" and any("completion" in row for row in rows):
        raise UserError(
            f"export: {tool} has no form for a prompt and a completion of plain text; found"
            " data.format prompt_completion_text; export to trl"
        )
    file, _ = TOOLS[tool]
    writer = import_module(f"grads_ds.export.{file}")
    sweep(out)
    with atomic_path(out) as folder:
        folder.mkdir()
        writer.write_rows(rows, folder)
        if tool == "megatron":
            write_indexed(config, run_dir, name, folder / "subset_text_document")
    return len(rows)
