"""One prepared set: normalised samples in a spool file -> a `datasets.load_from_disk` folder of
tokenised rows.

Reads the spool that `spool_samples` wrote (one JSON line per sample, so that memory does not grow
with the pool); writes the set's folder. Columns: sample_id int64 (0..N-1 over the kept rows, in the
order read), input_ids and labels list<int32> (labels IGNORE_INDEX where no target), sample_hash (of
the row as given), source (file stem, folder or hub name), origin (`file:line`), row (the row as
given, JSON) and metadata (JSON of the fields asked for).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from grads_ds.config.config import Config
from grads_ds.data.encoding import COLUMNS, Chunk, set_worker, start_worker, work
from grads_ds.data.leaks import Leaks
from grads_ds.data.problems import Problems
from grads_ds.data.tokens import num_target_tokens

CHUNK = 512  # rows tokenised and written at a time
# rows from which more processes pay (each takes 5 to 10 s to load the tokenizer)
PROCESSES_FROM = 50_000
MAX_PROCESSES = 16


@dataclass
class Counts:
    """What became of a set's rows, as `prepared.json` shows it.

    `left_out` counts what the chat template did not carry, by kind; `notes` what was changed;
    `answer_ends` the tokens that end the answers, by id; `also_in_pool` rows with the tokens of a
    row of the pool, `near_in_pool` further ones with answers much like the pool's.
    """

    read: int
    kept: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    num_target_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    answer_ends: Counter[str] = field(default_factory=Counter)
    also_in_pool: int = 0
    near_in_pool: int = 0
    also_held_out: dict[str, int] = field(default_factory=dict)
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def record(self) -> dict[str, Any]:
        """As plain JSON, keys in a stable order."""
        sources = {
            name: dict(sorted(counter.items())) for name, counter in sorted(self.sources.items())
        }
        counters = {
            name: dict(sorted(value.items()))
            for name, value in vars(self).items()
            if isinstance(value, Counter)
        }
        return vars(self) | counters | {"sources": sources}

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

    def remarks(self) -> list[str]:
        """What was left out or changed, one sentence each."""
        lost = [
            f"{number:,} times the chat template left out the {kind} (data.dropped_content: count)"
            for kind, number in sorted(self.left_out.items())
        ]
        return lost + [f"{note}: {number:,}" for note, number in sorted(self.notes.items())]


def write_set(
    config: Config,
    tokenizer: Any,
    spool: Path,
    rows: int,
    folder: Path,
    problems: Problems,
    leaks: Leaks,
) -> Counts:
    """Tokenise the spool's `rows` samples into `folder`. The result does not depend on the number
    of processes.

    Nothing is written to `folder` when no row is kept or a problem is found.

    Args:
        config: the run's.
        tokenizer: that of `config.model`.
        spool: the file of `spool_samples`.
        rows: the number of its samples.
        folder: where the set goes.
        problems: collects what is wrong with rows.
        leaks: is given what is compared between sets.
    """
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    bar = tqdm(total=rows, desc=f"tokenising {folder.name}", unit=" rows")
    with spool.open(encoding="utf-8") as file, bar:
        if rows < PROCESSES_FROM or processes < 2:
            set_worker(config, tokenizer)
            return _write(map(work, _chunks(file)), rows, folder, bar, problems, leaks)
        # spawned, not forked: the tokenizer's threads do not survive a fork
        with multiprocessing.get_context("spawn").Pool(processes, start_worker, (config,)) as pool:
            chunks = pool.imap(work, _chunks(file))
            return _write(chunks, rows, folder, bar, problems, leaks)


def trained_ends(run_dir: Path) -> list[int]:
    """The tokens that end the pool's answers, the most frequent first; none where nothing is
    prepared.
    """
    try:
        record = json.loads((run_dir / "prepared/prepared.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    ends = record["sets"]["pool"].get("answer_ends", {})
    return [int(end) for end in sorted(ends, key=lambda end: (-ends[end], int(end)))]


# ---- writing -------------------------------------------------------------------------------------


def _chunks(file: IO[str]) -> Iterator[list[str]]:
    while lines := list(islice(file, CHUNK)):
        yield lines


def _write(
    chunks: Iterable[Chunk], rows: int, folder: Path, bar: Any, problems: Problems, leaks: Leaks
) -> Counts:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    kinds = dict.fromkeys(COLUMNS, datasets.Value("string")) | {
        "sample_id": datasets.Value("int64")
    }
    kinds |= dict.fromkeys(("input_ids", "labels"), datasets.List(datasets.Value("int32")))
    features = datasets.Features({name: kinds[name] for name in ("sample_id", *COLUMNS)})
    counts, aside, beyond = Counts(rows), folder.parent / f"{folder.name}.arrow", 0
    with ArrowWriter(features=features, path=str(aside)) as writer:
        for chunk in chunks:
            for problem in chunk.problems:
                problems.add(*problem)
            new = len(chunk.columns["row"])
            if new:
                writer.write_batch(
                    chunk.columns | {"sample_id": list(range(counts.kept, counts.kept + new))}
                )
            _count(counts, chunk)
            beyond += chunk.beyond
            leaks.add(folder.name, chunk.prints)
            bar.update(len(chunk.outcomes) + len(chunk.problems))
        if counts.kept:
            writer.finalize()
    if beyond:
        problems.add(
            "data.max_length",
            "at most as many tokens as the model has positions (its config.json)",
            f"{beyond:,} rows of {folder.name} with more",
            "lower data.max_length to that number",
        )
    if counts.kept and not problems.count:
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


def _count(counts: Counts, chunk: Chunk) -> None:
    for source, reason, cut in chunk.outcomes:
        mine = counts.sources[source]
        mine.update(read=1, kept=int(not reason), truncated=int(cut > 0))
        if reason:
            counts.dropped[reason] += 1
            mine[f"dropped: {reason}"] += 1
        counts.truncated += cut > 0
        counts.tokens_cut += cut
    counts.left_out += chunk.left_out
    counts.notes += chunk.notes
    counts.answer_ends += chunk.ends
    counts.kept += len(chunk.columns["row"])
    counts.num_tokens += sum(map(len, chunk.columns["input_ids"]))
    counts.num_target_tokens += sum(map(num_target_tokens, chunk.columns["labels"]))
