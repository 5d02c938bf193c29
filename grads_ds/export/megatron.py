"""The subset for Megatron-LM: messages for its --sft, and the prepared tokens in its index."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.config import Config
from grads_ds.data.problems import RowProblem
from grads_ds.export.chosen_rows import DATA, ELSEWHERE, each, is_context, write_lines
from grads_ds.run_dir.layout import selection_folder

_INDEX_MAGIC = b"MMIDIDX\x00\x00"


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """The rows for Megatron-LM's --sft (its tokenizer applies the template); the indexed tokens are
    written beside them.
    """
    write_lines(each(rows, _as_megatron), folder / DATA)


def _as_megatron(row: dict[str, Any]) -> dict[str, Any]:
    for number, message in enumerate(row.get("messages", ()), 1):
        if is_context(message):
            raise RowProblem("answers that are all learnt", f"weight 0 at turn {number}", ELSEWHERE)
        lost = [key for key in ("tool_calls", "reasoning_content") if message.get(key)]
        if message["role"] not in ("system", "user", "assistant") or lost:
            found = lost[0].replace("_", " ") if lost else f"role {message['role']}"
            raise RowProblem(
                "text of system, user and assistant", f"{found} at turn {number}", ELSEWHERE
            )
    return row


def write_indexed(config: Config, run_dir: Path, name: str, prefix: Path) -> None:
    """The chosen rows' tokens as prepared, as Megatron's .bin and .idx (version 1, int32 tokens, a
    document per row).

    .idx, little-endian: magic, version uint64, dtype code uint8 (4 is int32), number of sequences
    uint64, of document bounds uint64; then int32 lengths, int64 byte offsets, int64 document
    bounds.
    """
    import pyarrow.parquet as pq
    from datasets import load_from_disk

    pool = load_from_disk(str(run_dir / "prepared/pool"))
    table = pq.read_table(
        run_dir / selection_folder(name) / "selection.parquet",
        columns=["sample_id", "selected"],
        page_checksum_verification=True,
    )
    wanted = table["sample_id"].to_numpy()[table["selected"].to_numpy(zero_copy_only=False)]
    places = np.flatnonzero(np.isin(np.asarray(pool["sample_id"], np.int64), wanted))
    lengths = []
    with open(f"{prefix}.bin", "wb") as file:
        for row in pool.select(places.tolist()):
            tokens = np.asarray(row["input_ids"], "<i4")
            lengths.append(len(tokens))
            file.write(tokens.tobytes())
    sizes = np.array(lengths, "<i4")
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)[:-1] * 4]).astype("<i8")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(_INDEX_MAGIC + struct.pack("<QBQQ", 1, 4, len(sizes), len(sizes) + 1))
        file.write(
            sizes.tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
        )
