"""One prepared set: normalised samples in a spool file -> a `datasets.load_from_disk` folder of
tokenised rows.

Reads the spool that `spool_samples` wrote (one JSON line per sample, so that memory does not grow
with the pool); writes the set's folder. Columns: sample_id int64 (0..N-1 over the kept rows, in the
order read), input_ids and labels list<int32> (labels IGNORE where no target), sample_hash (of the
row as given), source (file stem, folder or hub name), origin (`file:line`), row (the row as given,
JSON) and metadata (JSON of the fields asked for).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from grads_ds.config.config import Config
from grads_ds.data.formats import Sample
from grads_ds.data.problems import Faults, RowFault
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.data.tokens import Encoder, num_target_tokens

ROW_LARGEST = 64 * 2**20  # characters of a row as JSON
CHUNK = 512  # rows tokenised and written at a time
# rows from which more processes pay (each takes 5 to 10 s to load the tokenizer)
PROCESSES_FROM = 50_000
MAX_PROCESSES = 16
_COLUMNS = ("input_ids", "labels", "sample_hash", "source", "origin", "row", "metadata")


@dataclass
class Counts:
    """What became of a set's rows, as `prepared.json` shows it."""

    read: int
    kept: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_target_tokens: int = 0
    also_in_pool: int = 0
    also_held_out: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def record(self) -> dict[str, Any]:
        """As plain JSON, keys in a stable order."""
        sources = {
            name: dict(sorted(counter.items())) for name, counter in sorted(self.sources.items())
        }
        return vars(self) | {"dropped": dict(sorted(self.dropped.items())), "sources": sources}

    def summary(self) -> str:
        """One line for the log."""
        cut = f" (losing {self.tokens_cut:,} tokens)" if self.truncated else ""
        dropped = "".join(
            f", {n:,} dropped ({reason})" for reason, n in sorted(self.dropped.items())
        )
        return (
            f"{self.kept:,} of {self.read:,} rows kept, {self.num_tokens:,} tokens of which"
            f" {self.num_target_tokens:,} are targets, {self.truncated:,} rows"
            f" truncated{cut}{dropped}"
        )


def canonical_hash(row: dict[str, Any]) -> str:
    """32 hex digits of the row's content, whatever the order of its keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def spool_samples(samples: Iterable[Sample], spool: Path, faults: Faults) -> int:
    """Write the samples to `spool` until the first fault (reading on, so that all faults are
    found); the number read.
    """
    rows = 0
    with spool.open("w", encoding="utf-8") as file:
        for sample in samples:
            rows += 1
            row = json.dumps(sample.row, ensure_ascii=False, default=str)
            try:
                row.encode()
            # JSON may spell half a character as an escape: "\ud83d"
            except UnicodeEncodeError as error:
                found = f"half a surrogate pair ({row[error.start]!r})"
                faults.add(
                    sample.origin,
                    "text that is valid Unicode",
                    found,
                    "mend or remove that character",
                )
            if len(row) > ROW_LARGEST:
                wanted, found = f"rows of at most {ROW_LARGEST:,} characters", f"{len(row):,}"
                faults.add(sample.origin, wanted, found, "split it or leave it out")
            if not faults.count:
                line = [
                    sample.source,
                    sample.origin,
                    row,
                    sample.messages,
                    sample.text,
                    sample.tools,
                ]
                file.write(json.dumps(line, default=str) + "\n")
    return rows


def write_set(
    config: Config, tokenizer: Any, spool: Path, rows: int, folder: Path, faults: Faults
) -> Counts:
    """Tokenise the spool's `rows` samples into `folder`. The result does not depend on the number
    of processes.

    Nothing is written to `folder` when no row is kept or a fault is found.
    """
    global _worker
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    bar = tqdm(total=rows, desc=f"tokenising {folder.name}", unit=" rows")
    with spool.open(encoding="utf-8") as file, bar:
        if rows < PROCESSES_FROM or processes < 2:
            _worker = _Worker(config, tokenizer)
            return _write(map(_work, _chunks(file)), rows, folder, bar, faults)
        # spawned, not forked: the tokenizer's threads do not survive a fork
        with multiprocessing.get_context("spawn").Pool(processes, _start_worker, (config,)) as pool:
            return _write(pool.imap(_work, _chunks(file)), rows, folder, bar, faults)


# ---- workers -------------------------------------------------------------------------------------


@dataclass
class _Chunk:
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    # source, reason dropped or "", tokens cut
    outcomes: list[tuple[str, str, int]] = field(default_factory=list)
    faults: list[tuple[str, str, str, str]] = field(default_factory=list)


class _Worker:
    def __init__(self, config: Config, tokenizer: Any):
        self.encoder = Encoder(tokenizer, config.data.max_length, config.data.overlong)
        self.metadata = config.data.metadata


_worker: _Worker | None = None  # each process's own


def _start_worker(config: Config) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = _Worker(config, load_tokenizer(config.model))


def _work(lines: Sequence[str]) -> _Chunk:
    assert _worker is not None
    chunk, given = _Chunk(), [json.loads(line) for line in lines]
    samples = [Sample(source, origin, {}, *rest) for source, origin, _, *rest in given]
    for sample, (_, _, text, *_), encoded in zip(
        samples, given, _worker.encoder.encode(samples), strict=True
    ):
        if isinstance(encoded, RowFault):
            chunk.faults.append((sample.origin, encoded.wanted, encoded.found, encoded.change))
            continue
        chunk.outcomes.append((sample.source, encoded.dropped or "", encoded.cut))
        if encoded.dropped:
            continue
        row = json.loads(text)
        asked = {name: row.get(name) for name in _worker.metadata}
        metadata = json.dumps(asked, ensure_ascii=False, sort_keys=True)
        values = (
            encoded.input_ids,
            encoded.labels,
            canonical_hash(row),
            sample.source,
            sample.origin,
            text,
            metadata,
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            chunk.columns[name].append(value)
    return chunk


def _chunks(file: IO[str]) -> Iterator[list[str]]:
    while lines := list(islice(file, CHUNK)):
        yield lines


# ---- writing -------------------------------------------------------------------------------------


def _write(chunks: Iterable[_Chunk], rows: int, folder: Path, bar: Any, faults: Faults) -> Counts:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    kinds = dict.fromkeys(_COLUMNS, datasets.Value("string")) | {
        "sample_id": datasets.Value("int64")
    }
    kinds |= dict.fromkeys(("input_ids", "labels"), datasets.List(datasets.Value("int32")))
    features = datasets.Features({name: kinds[name] for name in ("sample_id", *_COLUMNS)})
    counts, aside = Counts(rows), folder.parent / f"{folder.name}.arrow"
    with ArrowWriter(features=features, path=str(aside)) as writer:
        for chunk in chunks:
            for fault in chunk.faults:
                faults.add(*fault)
            new = len(chunk.columns["row"])
            if new:
                writer.write_batch(
                    chunk.columns | {"sample_id": list(range(counts.kept, counts.kept + new))}
                )
            _count(counts, chunk)
            bar.update(len(chunk.outcomes) + len(chunk.faults))
        if counts.kept:
            writer.finalize()
    if counts.kept and not faults.count:
        datasets.disable_progress_bars()
        table = datasets.table.MemoryMappedTable.from_file(str(aside))
        # the fingerprint would otherwise hang on the clock: the same input is to give the same
        # bytes
        with aside.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        datasets.Dataset(table, fingerprint=content).save_to_disk(str(folder))
        datasets.enable_progress_bars()
    aside.unlink(missing_ok=True)
    return counts


def _count(counts: Counts, chunk: _Chunk) -> None:
    for source, reason, cut in chunk.outcomes:
        mine = counts.sources[source]
        mine.update(read=1, kept=int(not reason), truncated=int(cut > 0))
        if reason:
            counts.dropped[reason] += 1
            mine[f"dropped: {reason}"] += 1
        counts.truncated += cut > 0
        counts.tokens_cut += cut
    counts.kept += len(chunk.columns["row"])
    counts.num_tokens += sum(map(len, chunk.columns["input_ids"]))
    counts.num_target_tokens += sum(map(num_target_tokens, chunk.columns["labels"]))
