"""Parts: what each rank appends to `scores/` while it scores, and what a later start finds of them.

Writes `scores/part-*.parquet`, atomically, every few seconds. Each part carries what it was scored
with (model, pool, settings), so that rows of another model or pool never mix in, and how (ranks,
versions), which the manifest sums up. No torch import.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grads_ds.config.errors import UserError, printable, problem
from grads_ds.run_dir.digests import sha256_once
from grads_ds.run_dir.publish import atomic_path
from grads_ds.scores.totals import Totals, summed_columns

DIGITS = 24  # of the sha256 of a part, in its name
_NAME = re.compile(rf"part-\d{{5}}-([0-9a-f]{{{DIGITS}}})\.parquet")
FIELD = b"grads_ds"  # the parts' metadata: {"inputs": ..., "start": ...}
PATIENCE = (
    # parts grow rarer as a probe goes on, so that a day of it leaves hundreds of files per rank,
    # not thousands
    0.02
)


@dataclass(frozen=True)
class Recording:
    """What a score depends on (`inputs`, flat names and plain values) and how this start makes it
    (`start`).
    """

    inputs: dict[str, Any]
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A digest of the inputs."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:32]

    def metadata(self) -> dict[bytes, bytes]:
        """As a part carries it."""
        return {
            FIELD: json.dumps({"inputs": self.inputs, "start": self.start}, sort_keys=True).encode()
        }


class PartWriter:
    """Collects one rank's rows and publishes them as parts; at most `seconds` of work, or 2 % of
    all of it, is unpublished.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        recording: Recording,
        table_schema: pa.Schema,
        seconds: float = 5.0,
    ):
        self.folder, self.rank, self.seconds = folder, rank, seconds
        self.schema = table_schema.with_metadata(recording.metadata())
        self.totals = Totals(summed_columns(table_schema))  # of what this writer has published
        self._tables: list[pa.Table] = []
        self._began = self._last = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        """Take the rows of a micro-batch; publish a part when the last one is old enough."""
        self._tables.append(rows.select(self.schema.names))
        now = time.monotonic()
        if now - self._last > max(self.seconds, PATIENCE * (now - self._began)):
            self.flush()

    def flush(self) -> None:
        """Publish what has been collected."""
        if self._tables:
            table = pa.concat_tables(self._tables).cast(self.schema).combine_chunks()
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, write_page_checksum=True)
            content = sink.getvalue().to_pybytes()
            digest = hashlib.sha256(content).hexdigest()[:DIGITS]
            with atomic_path(self.folder / f"part-{self.rank:05d}-{digest}.parquet") as aside:
                aside.write_bytes(content)
            self.totals.add(table)
            self._tables = []
        self._last = time.monotonic()


def parts(folder: Path, key: str | None = None) -> Iterator[tuple[Path, Recording]]:
    """The parts (those scored with `key`, if one is given) in the order of their names, each with
    what it was scored with.

    Raises UserError for a file that is no part: somebody's, or damaged since `prepare_parts`.
    """
    for file in sorted(folder.glob("part-*.parquet")):
        named = _NAME.fullmatch(file.name)
        try:
            if named is None or named[1] != _digest(file):
                raise ValueError("its name does not hold the digest of its content")
            found = json.loads((pq.read_schema(file).metadata or {})[FIELD])
            recording = Recording(found["inputs"], found["start"])
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
            raise UserError(
                problem(
                    str(file),
                    "a part of the score table",
                    f"something else ({type(error).__name__}: {error})",
                    "remove the file, the samples it may have held are scored again",
                )
            ) from None
        if key is None or recording.key == key:
            yield file, recording


def prepare_parts(folder: Path, recording: Recording) -> int:
    """Make `folder` ready for parts of `recording`; returns how many parts of an earlier, finished
    table were removed.

    Unfinished parts that were scored with something else are set aside with a sentence: they are
    neither mixed in nor thrown away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _set_damaged_aside(folder)
    for leftover in folder.glob(".part-*.tmp"):  # half written by a rank that was killed
        leftover.unlink(missing_ok=True)
    finished_key = _finished_key(folder)
    strangers = [(file, other) for file, other in parts(folder) if other.key != recording.key]
    replaced = [file for file, other in strangers if other.key == finished_key]
    for file in replaced:
        file.unlink()
    unfinished = [entry for entry in strangers if entry[1].key != finished_key]
    if unfinished:
        _set_others_aside(folder, unfinished, recording)
    return len(replaced)


def _set_others_aside(
    folder: Path, others: list[tuple[Path, Recording]], recording: Recording
) -> None:
    """Move unfinished parts of other recordings into a folder for each of those."""
    for file, other in others:
        target = folder / f"other-inputs.{other.key[:8]}"
        target.mkdir(exist_ok=True)
        file.replace(target / file.name)
    count, place = len(others), folder / f"other-inputs.{others[0][1].key[:8]}"
    print(
        printable(
            f"scores: {count} part{'s' if count > 1 else ''} of an unfinished probe with other"
            f" inputs ({_difference(others[0][1].inputs, recording.inputs)}): set aside in"
            f" {place}, every sample is scored anew; remove that folder when it is not wanted"
        ),
        flush=True,
    )


def _set_damaged_aside(folder: Path) -> None:
    """Rename parts whose content is not what was written; their samples are scored again."""
    for file in sorted(folder.glob("part-*.parquet")):
        named = _NAME.fullmatch(file.name)
        if named is not None and named[1] != _digest(file):
            file.replace(file.with_suffix(".damaged"))
            print(
                f"scores: {file.name} was altered since it was written: set aside as"
                f" {file.with_suffix('.damaged').name}, its samples are scored again",
                flush=True,
            )


def _digest(file: Path) -> str:
    """What a part's name says of its content; empty where it is no file."""
    return sha256_once(file)[:DIGITS] if file.is_file() else ""


def finished(
    folder: Path, key: str, table_schema: pa.Schema
) -> tuple[np.ndarray, Totals, dict[str, Any]]:
    """What is scored with `key` already: sample ids int64 sorted, their totals, and how the first
    part was made ({}: no parts).
    """
    ids, totals = [np.empty(0, np.int64)], Totals(summed_columns(table_schema))
    start: dict[str, Any] = {}
    for file, recording in parts(folder, key):
        table = pq.read_table(file, page_checksum_verification=True)
        ids.append(table["sample_id"].to_numpy())
        totals.add(table)
        start = start or recording.start
    return np.unique(np.concatenate(ids)), totals, start


def _finished_key(folder: Path) -> str | None:
    try:
        key = json.loads((folder / "manifest.json").read_text())["key"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return str(key) if (folder / "table.parquet").is_file() else None


def _difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return ", ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in names)
