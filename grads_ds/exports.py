"""A chosen subset in the data formats of other tools, ready to train on there.

Reads selection/selected.jsonl (for Megatron also prepared/pool and selection.parquet); writes a folder: the data and the tool's
own description of it. docs/exports.md shows how each is used. No torch import.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from grads_ds.config import Config, UserError
from grads_ds.data.faults import Faults, RowFault
from grads_ds.data.formats import Sample, detect, normalise
from grads_ds.data.sources import RawRow
from grads_ds.run_dir import atomic_path
from grads_ds.stages import selection_folder

DATA = "subset.jsonl"
NAME = "grads_subset"
_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


def export_subset(config: Config, run_dir: Path, name: str, tool: str, out: Path) -> int:
    """Write subset `name` for `tool` (a key of TOOLS) to the folder `out`; the number of rows. Raises UserError."""
    chosen = run_dir / selection_folder(name) / "selected.jsonl"
    if not chosen.is_file():
        raise UserError(f"export: wanted a finished selection; found no {chosen}; run: grads-ds run CONFIG --to select")
    if out.exists():
        raise UserError(f"export: wanted a new folder; {out} exists; give another --out or remove it")
    rows = list(_rows(chosen))
    with atomic_path(out) as folder:
        folder.mkdir()
        TOOLS[tool](rows, folder)
        if tool == "megatron":
            _write_indexed(config, run_dir, name, folder / "subset_text_document")
    return len(rows)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Each chosen row as {"messages": [...], "tools": [...]?} or {"text": ...}, whatever format it was given in."""
    faults = Faults()
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            found = detect(row)
            try:
                sample: Sample = normalise(RawRow("", f"{file}:{number}", str(file), row), found or "")
            except RowFault as fault:
                faults.add(f"{file}:{number}", fault.wanted, fault.found, fault.change)
                continue
            if sample.messages is None:
                yield {"text": sample.text}
            else:
                yield {"messages": sample.messages} | ({"tools": sample.tools} if sample.tools else {})
    faults.raise_if_any()


def _write_trl(rows: list[dict[str, Any]], folder: Path) -> None:
    """Conversations for SFTTrainer with assistant_only_loss; plain texts for the same trainer without it."""
    _write_lines(_of_one_kind(rows, "trl"), folder / DATA)


def _write_llama_factory(rows: list[dict[str, Any]], folder: Path) -> None:
    """ShareGPT formatting with OpenAI tags, and the dataset_info.json that names it."""
    if "text" in _of_one_kind(rows, "llamafactory")[0]:
        entry: dict[str, Any] = {"file_name": DATA, "columns": {"prompt": "text"}}
    else:
        # its sharegpt format wants tools as JSON text, and the same columns in every row
        rows = [{"messages": _plain(row["messages"]), "tools": json.dumps(row.get("tools") or [])} for row in rows]
        entry = {
            "file_name": DATA, "formatting": "sharegpt", "columns": {"messages": "messages", "tools": "tools"}, "tags": _TAGS,
        }  # fmt: skip
    _write_lines(rows, folder / DATA)
    (folder / "dataset_info.json").write_text(json.dumps({NAME: entry}, indent=2) + "\n")


def _write_axolotl(rows: list[dict[str, Any]], folder: Path) -> None:
    """chat_template or completion data, and the `datasets` part of an Axolotl config."""
    if "text" in _of_one_kind(rows, "axolotl")[0]:
        entry: dict[str, Any] = {"path": DATA, "ds_type": "json", "type": "completion", "field": "text"}
    else:
        entry = {
            "path": DATA, "ds_type": "json", "type": "chat_template", "field_messages": "messages", "field_tools": "tools",
            "message_property_mappings": {"role": "role", "content": "content"}, "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }  # fmt: skip
    _write_lines(rows, folder / DATA)
    (folder / "axolotl.yaml").write_text(yaml.safe_dump({"datasets": [entry]}, sort_keys=False))


def _write_megatron(rows: list[dict[str, Any]], folder: Path) -> None:
    """The rows for Megatron-LM's --sft (its tokenizer applies the template); the indexed tokens are written beside them."""
    _write_lines(rows, folder / DATA)


TOOLS: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    "trl": _write_trl,
    "llamafactory": _write_llama_factory,
    "axolotl": _write_axolotl,
    "megatron": _write_megatron,
}


def _write_indexed(config: Config, run_dir: Path, name: str, prefix: Path) -> None:
    """The chosen rows' tokens as prepared, as Megatron's .bin and .idx (version 1, int32 tokens, a document per row).

    .idx, little-endian: magic, version uint64, dtype code uint8 (4 is int32), number of sequences uint64, of document bounds
    uint64; then int32 lengths, int64 byte offsets, int64 document bounds.
    """
    import pyarrow.parquet as pq
    from datasets import load_from_disk

    pool = load_from_disk(str(run_dir / "prepared/pool"))
    table = pq.read_table(run_dir / selection_folder(name) / "selection.parquet", columns=["sample_id", "selected"])
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
        file.write(sizes.tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes())


def _of_one_kind(rows: list[dict[str, Any]], tool: str) -> list[dict[str, Any]]:
    texts = sum("text" in row for row in rows)
    if 0 < texts < len(rows):
        raise UserError(
            f"export: {tool} wants conversations or plain texts in one data set; found {len(rows) - texts} and {texts}; "
            "select from one kind, or split selected.jsonl by its keys"
        )
    return rows


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Role and text alone, function calls as JSON text."""
    plain = []
    for message in messages:
        text = message.get("content") or ""
        if message.get("tool_calls"):
            text = json.dumps([call.get("function", call) for call in message["tool_calls"]], ensure_ascii=False)
        plain.append({"role": message["role"], "content": text})
    return plain


def _write_lines(rows: list[dict[str, Any]], to: Path) -> None:
    with to.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
