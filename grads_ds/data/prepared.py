"""One prepared set: its parts -> a `datasets.load_from_disk` folder of tokenised rows, and what
became of every row.

Reads the parts that `encoding.make_part` wrote; writes the set's folder. Columns: sample_id int64
(0..N-1 over the kept rows, in the order read), input_ids and labels list<int32> (labels
IGNORE_INDEX where no target), sample_hash (of the row as given), source (file stem, folder or hub
name), origin (`file:line`), row (the row as given, JSON) and metadata (JSON of the fields asked
for).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grads_ds.data.encoding import COLUMNS, Outcome
from grads_ds.data.problems import Problems


@dataclass
class Counts:
    """What became of a set's rows, as `prepared.json` shows it.

    `left_out` counts what the chat template did not carry, by kind; `notes` what was changed;
    `answer_ends` the tokens that end the answers, by id; `also_in_pool` rows with the tokens of a
    row of the pool, `near_in_pool` further ones with answers much like the pool's.
    """

    read: int = 0
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

    def add(self, outcome: Outcome) -> None:
        """Add what became of some rows."""
        counted = outcome.counts
        if not counted["read"]:
            return
        own = self.sources[outcome.source]
        for name in ("read", "kept", "truncated", "tokens_cut", "num_tokens", "num_target_tokens"):
            setattr(self, name, getattr(self, name) + counted[name])
        own.update(read=counted["read"], kept=counted["kept"], truncated=counted["truncated"])
        own.update({f"dropped: {reason}": n for reason, n in outcome.dropped.items()})
        for name in ("dropped", "left_out", "notes", "answer_ends"):
            getattr(self, name).update(getattr(outcome, name))

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


def write_set(parts: Mapping[Path, Outcome], folder: Path, problems: Problems) -> Counts:
    """Put the parts of a set together in `folder`; what is wrong goes to `problems`.

    Nothing is written when no row is kept or a problem is found.
    """
    counts = Counts()
    beyond = 0
    for outcome in parts.values():
        for problem in outcome.problems:
            problems.add(*problem)
        counts.add(outcome)
        beyond += outcome.counts["beyond"]
    if beyond:
        problems.add(
            "data.max_length",
            "at most as many tokens as the model has positions (its config.json)",
            f"{beyond:,} rows of {folder.name} with more",
            "lower data.max_length to that number",
        )
    if counts.kept and not problems.count:
        kept = [file for file, outcome in parts.items() if outcome.counts["kept"]]
        _put_together(kept, [parts[file].digest for file in kept], folder)
    return counts


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


def prints_in(parts: Mapping[Path, Outcome]) -> Iterator[tuple[np.ndarray, pa.ListArray]]:
    """Of each part what is compared between sets: hashes of tokens where a row has one, uint64, and
    of 8-grams, a list for each row.
    """
    for file, outcome in parts.items():
        if not (outcome.digest and outcome.counts["kept"]):
            continue
        with pa.memory_map(str(file)) as content:
            table = pa.ipc.open_stream(content).read_all().select(["print", "grams"])
            tokens = table["print"].combine_chunks().drop_null().to_numpy()
            yield tokens.astype(np.uint64), table["grams"].combine_chunks()


# ---- writing -------------------------------------------------------------------------------------


def _put_together(files: Sequence[Path], digests: Sequence[str], folder: Path) -> None:
    """One copy of the rows, from the parts' own files; 8 bytes a row in memory."""
    import datasets

    datasets.disable_progress_bars()
    tables = [datasets.table.MemoryMappedTable.from_file(str(file)) for file in files]
    rows = datasets.table.concat_tables(tables)
    ids = pa.table({"sample_id": pa.array(np.arange(len(rows)))})
    both = [datasets.table.InMemoryTable(ids), rows.select(list(COLUMNS))]
    # the fingerprint would otherwise hang on the clock: the same input is to give the same bytes
    content = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]
    whole = datasets.table.concat_tables(both, axis=1)
    datasets.Dataset(whole, fingerprint=content).save_to_disk(str(folder))
    datasets.enable_progress_bars()
