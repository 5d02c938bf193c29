"""The score table: parts written while the probe goes, merged into one table that holds every sample exactly once.

Writes `scores/part-*.parquet` (atomically, every few seconds), `scores/table.parquet` and `scores/manifest.json`; reads them
back on resume. Each part carries the key of what it was scored with, so that rows of another model or pool never mix in.
No torch import.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grads_ds.run_dir import atomic_path

FLUSH_SECONDS = 5.0
KEY_FIELD = b"grads_ds.key"
STATUSES = ("ok", "no_target", "nonfinite")


class IncompleteScores(RuntimeError):
    """The merged parts are not exactly the pool."""


def columns(layers: Sequence[str] | str) -> list[str]:
    """Names of the norm columns for the recorded groups, e.g. embedding_grad_norm; total only when all are recorded."""
    from grads_ds.config import LAYER_GROUPS

    names = [*LAYER_GROUPS, "other"] if layers == "all" else list(layers)
    return [f"{name}_grad_norm" for name in names] + (["total_grad_norm"] if layers == "all" else [])


def schema(norm_columns: Sequence[str]) -> pa.Schema:
    """The table's columns and types."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("sample_hash", pa.string()),
            ("num_tokens", pa.int32()),
            ("num_target_tokens", pa.int32()),
            ("loss", pa.float32()),
            *((name, pa.float32()) for name in norm_columns),
            ("status", pa.string()),
        ]
    )


def recording_key(inputs: Mapping[str, Any]) -> str:
    """A digest of everything a score depends on."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


class PartWriter:
    """Collects one rank's rows and publishes them as parts."""

    def __init__(self, folder: Path, rank: int, key: str, table_schema: pa.Schema):
        self.folder, self.rank = folder, rank
        self.schema = table_schema.with_metadata({KEY_FIELD: key.encode()})
        self._rows: list[dict[str, Any]] = []
        self._last = time.monotonic()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take rows; publish a part when the last one is FLUSH_SECONDS old."""
        self._rows.extend(rows)
        if time.monotonic() - self._last > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Publish what has been collected."""
        if self._rows:
            name = f"part-{self.rank:05d}-{uuid.uuid4().hex[:12]}.parquet"
            with atomic_path(self.folder / name) as aside:
                pq.write_table(pa.Table.from_pylist(self._rows, schema=self.schema), aside)
            self._rows = []
        self._last = time.monotonic()


def parts(folder: Path, key: str) -> list[Path]:
    """The parts scored with `key`, in the order of their names."""
    return [file for file in sorted(folder.glob("part-*.parquet")) if _key_of(file) == key]


def clear_other_parts(folder: Path, key: str) -> int:
    """Remove parts of another model, pool or setting, and files a killed rank left half written; returns how many parts."""
    for leftover in folder.glob(".part-*.tmp"):
        leftover.unlink(missing_ok=True)
    strangers = [file for file in folder.glob("part-*.parquet") if _key_of(file) != key]
    for file in strangers:
        file.unlink()
    return len(strangers)


def finished_ids(folder: Path, key: str) -> np.ndarray:
    """Sample ids already scored with `key`, int64, sorted."""
    ids = [pq.read_table(file, columns=["sample_id"])["sample_id"].to_numpy() for file in parts(folder, key)]
    return np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)


def make_rows(
    samples: Sequence[Mapping[str, Any]],
    loss: np.ndarray,
    num_target_tokens: np.ndarray,
    norms: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Table rows of one micro-batch. `norms` maps column names to [B]. A value that is not finite is flagged, and kept."""
    rows = []
    for b, sample in enumerate(samples):
        values = {name: float(column[b]) for name, column in norms.items()}
        finite = bool(np.isfinite([float(loss[b]), *values.values()]).all())
        status = "nonfinite" if not finite else "no_target" if num_target_tokens[b] == 0 else "ok"
        rows.append(
            {
                "sample_id": int(sample["sample_id"]),
                "sample_hash": sample["sample_hash"],
                "num_tokens": len(sample["input_ids"]),
                "num_target_tokens": int(num_target_tokens[b]),
                "loss": float(loss[b]),
                **values,
                "status": status,
            }
        )
    return rows


def merge(folder: Path, key: str, expected_ids: np.ndarray, manifest: Mapping[str, Any]) -> pa.Table:
    """Merge the parts into `table.parquet`, ordered by id, and write `manifest.json`.

    Raises IncompleteScores unless every expected id is there exactly once; then nothing is published.
    """
    files = parts(folder, key)
    if not files:
        raise IncompleteScores(f"{folder}: no parts to merge")
    table = pa.concat_tables([pq.read_table(file) for file in files])
    ids = table["sample_id"].to_numpy()
    expected = np.sort(np.asarray(expected_ids, np.int64))
    found, counts = np.unique(ids, return_counts=True)
    missing, strange = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    doubled = found[counts > 1]
    if len(missing) or len(strange) or len(doubled):
        raise IncompleteScores(
            f"{folder}: wanted every one of {len(expected)} samples exactly once; missing {len(missing)} {missing[:5].tolist()}, "
            f"doubled {len(doubled)} {doubled[:5].tolist()}, unknown {len(strange)} {strange[:5].tolist()}"
        )
    table = table.take(pa.array(np.argsort(ids, kind="stable"))).replace_schema_metadata({KEY_FIELD: key.encode()})
    counts_by_status = {s: int(pc.sum(pc.equal(table["status"], s)).as_py() or 0) for s in STATUSES}
    with atomic_path(folder / "table.parquet") as aside:
        pq.write_table(table, aside)
    record = {"key": key, "rows": table.num_rows, "status": counts_by_status, "columns": table.column_names, **manifest}
    with atomic_path(folder / "manifest.json") as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n")
    return table


def _key_of(file: Path) -> str | None:
    try:
        found = (pq.read_schema(file).metadata or {}).get(KEY_FIELD)
    except (OSError, pa.ArrowInvalid):
        return None
    return found.decode() if found else None
