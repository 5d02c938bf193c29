"""prepare: the user's files -> tokenised samples with stable ids and target masks, one folder per set.

Reads `data.train`, `data.validation` and the tokenizer of `model.path`; writes `prepared/` in the run directory as a whole or not at
all: `pool/` and one folder per validation set (each for `datasets.load_from_disk`) and `prepared.json` with every count. Runs on
one process of one host, by `grads-ds prepare CONFIG`, or first in `grads-ds run CONFIG`.

Columns: sample_id int64 (0..N-1 over the kept rows, in the order read), input_ids and labels list<int32>, sample_hash (of the row as
given), source (file stem, folder or hub name), origin (`file:line`), row (the row as given, JSON), metadata (JSON of data.metadata).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from grads_ds.config import Config, UserError
from grads_ds.data.formats import RowFault, Sample, load_samples
from grads_ds.data.sources import Faults, find_inputs
from grads_ds.data.tokens import Encoder, check_tokenizer, fingerprint, load_tokenizer, num_target_tokens
from grads_ds.run_dir import atomic_path, publish_json

CHUNK = 512  # rows tokenised and written at a time
PROCESSES_FROM = 50_000  # rows from which starting more processes pays (each loads the tokenizer, some 5 to 10 s)
MAX_PROCESSES = 16


def check_prepare(config: Config) -> list[str]:
    """Faults that can be seen before any row is read: missing or empty files, no tokenizer, no template file."""
    faults = Faults()
    for name, entries in _sets(config).items():
        where = "data.train" if name == "pool" else f"data.validation.{name}"
        mine = Faults()
        for item in find_inputs(entries, mine):
            if item.kind.startswith(".") and os.path.getsize(item.path) == 0:
                mine.add(item.path, "at least one row", "an empty file", "fill it or remove it from the config")
        for text in mine.shown:
            faults.add_text(f"{where}: {text}")
    return faults.shown + check_tokenizer(config.model)


def run_prepare(config: Config, run_dir: Path) -> None:
    """Tokenise the pool and the validation sets into `run_dir`/prepared. Raises UserError listing every fault of the input.

    All rows of all sets are read and checked before the first is tokenised; on any fault nothing is published.
    """
    quick = check_prepare(config)
    if quick:
        raise UserError(quick)
    with atomic_path(run_dir / "prepared") as folder:
        folder.mkdir()
        faults, read = Faults(), {}
        for name, entries in _sets(config).items():
            spool = folder / f"{name}.spool"
            read[name] = _read(entries, config, name, spool, faults)
        faults.raise_if_any()

        tokenizer = load_tokenizer(config.model)
        counts: dict[str, Any] = {}
        for name in read:
            counts[name] = _tokenise(config, tokenizer, folder / name, folder / f"{name}.spool", read[name], faults)
        faults.raise_if_any()
        for name, count in counts.items():
            if not count["kept"]:
                reasons = ", ".join(f"{reason}: {number:,}" for reason, number in count["dropped"].items())
                faults.add(
                    f"data: the set {name}", "at least one usable row", f"none of {count['read']:,} ({reasons})",
                    "raise data.max_length or give other data",
                )  # fmt: skip
        faults.raise_if_any()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        publish_json(
            folder / "prepared.json",
            {
                "tokenizer": {"path": config.model.path, "fingerprint": fingerprint(tokenizer), "vocabulary": len(tokenizer)},
                "pad_token_id": pad if pad is not None else 0,
                "max_length": config.data.max_length,
                "overlong": config.data.overlong,
                "sets": counts,
            },
        )
    for name, count in counts.items():
        print(f"prepare: {name}: {_summary(count)}", flush=True)


def _sets(config: Config) -> dict[str, list[str]]:
    return {"pool": list(config.data.train)} | config.data.validation_sources()


def _summary(count: dict[str, Any]) -> str:
    dropped = "".join(f", {number:,} dropped ({reason})" for reason, number in count["dropped"].items())
    return (
        f"{count['kept']:,} of {count['read']:,} rows kept, {count['num_tokens']:,} tokens of which "
        f"{count['num_target_tokens']:,} are targets, {count['truncated']:,} rows truncated{dropped}"
    )


# ---- first pass: read and check every row ----------------------------------------------------------------------------


def _read(entries: Sequence[str], config: Config, name: str, spool: Path, faults: Faults) -> int:
    """Check all rows and lay them, normalised, in a spool file, so that memory does not grow with the pool. Returns their number."""
    rows = 0
    with spool.open("w", encoding="utf-8") as file:
        samples = load_samples(entries, config.data.format, faults)
        for sample in tqdm(samples, desc=f"reading {name}", unit=" rows", mininterval=0.5):
            if not faults.count:
                file.write(_line(sample) + "\n")
            rows += 1
    return rows


def _line(sample: Sample) -> str:
    row = json.dumps(sample.row, ensure_ascii=False, default=str)
    return json.dumps([sample.source, sample.origin, row, sample.messages, sample.text, sample.tools], default=str)


def canonical_hash(row: dict[str, Any]) -> str:
    """32 hex digits of the row's content, whatever the order of its keys."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- second pass: tokenise and write ---------------------------------------------------------------------------------

_encoder: Encoder | None = None  # each worker process's own
_metadata: tuple[str, ...] = ()


def _start_worker(config: Config) -> None:
    global _encoder, _metadata
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(load_tokenizer(config.model), config.data.max_length, config.data.overlong)
    _metadata = tuple(config.data.metadata)


def _work(lines: list[str]) -> tuple[dict[str, list[Any]], list[tuple[str, str, str]], list[tuple[str, str, str, str]]]:
    """One chunk of spool lines -> (columns of the kept rows, (source, outcome, detail) of every row, faults)."""
    assert _encoder is not None
    samples = []
    for line in lines:
        source, origin, row, messages, text, tools = json.loads(line)
        samples.append(Sample(source, origin, {"row": row}, messages, text, tools))
    columns: dict[str, list[Any]] = defaultdict(list)
    outcomes, faults = [], []
    for sample, encoded in zip(samples, _encoder.encode(samples), strict=True):
        if isinstance(encoded, RowFault):
            faults.append((sample.origin, encoded.wanted, encoded.found, encoded.change))
            continue
        if encoded.dropped:
            outcomes.append((sample.source, "dropped", encoded.dropped))
            continue
        outcomes.append((sample.source, "truncated" if encoded.truncated else "whole", ""))
        row = json.loads(sample.row["row"])
        columns["input_ids"].append(encoded.input_ids)
        columns["labels"].append(encoded.labels)
        columns["sample_hash"].append(canonical_hash(row))
        columns["source"].append(sample.source)
        columns["origin"].append(sample.origin)
        columns["row"].append(sample.row["row"])
        columns["metadata"].append(json.dumps({k: row.get(k) for k in _metadata}, ensure_ascii=False, sort_keys=True))
    return dict(columns), outcomes, faults


def _chunks(file: IO[str]) -> Iterator[list[str]]:
    while lines := list(islice(file, CHUNK)):
        yield lines


def _tokenise(config: Config, tokenizer: Any, target: Path, spool: Path, total: int, faults: Faults) -> dict[str, Any]:
    """Write the set's folder and return its counts. The result does not depend on the number of processes."""
    global _encoder, _metadata
    processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    bar = tqdm(total=total, desc=f"tokenising {target.name}", unit=" rows", mininterval=0.5)
    with spool.open(encoding="utf-8") as file, bar:
        if total < PROCESSES_FROM or processes < 2:
            _encoder = Encoder(tokenizer, config.data.max_length, config.data.overlong)
            _metadata = tuple(config.data.metadata)
            count = _write(map(_work, _chunks(file)), target, bar, faults)
        else:
            # spawned, not forked: the tokenizer's threads do not survive a fork
            with multiprocessing.get_context("spawn").Pool(processes, _start_worker, (config,)) as pool:
                count = _write(pool.imap(_work, _chunks(file)), target, bar, faults)
    spool.unlink()
    return {"read": total, **count}


def _write(results: Iterable[Any], target: Path, bar: Any, faults: Faults) -> dict[str, Any]:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    text, ids = datasets.Value("string"), datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        {"sample_id": datasets.Value("int64"), "input_ids": ids, "labels": ids, "sample_hash": text, "source": text,
         "origin": text, "row": text, "metadata": text}
    )  # fmt: skip
    kept = tokens = targets = truncated = 0
    by_source: dict[str, Counter[str]] = defaultdict(Counter)
    dropped: Counter[str] = Counter()
    aside = target.parent / f"{target.name}.arrow"
    with ArrowWriter(features=features, path=str(aside)) as writer:
        for columns, outcomes, wrong in results:
            for fault in wrong:
                faults.add(*fault)
            for source, outcome, reason in outcomes:
                by_source[source]["read"] += 1
                by_source[source]["kept"] += outcome != "dropped"
                by_source[source]["truncated"] += outcome == "truncated"
                truncated += outcome == "truncated"
                if reason:
                    dropped[reason] += 1
                    by_source[source][f"dropped: {reason}"] += 1
            rows = len(columns.get("row", ()))
            if rows:
                writer.write_batch(columns | {"sample_id": list(range(kept, kept + rows))})
            kept += rows
            tokens += sum(map(len, columns.get("input_ids", ())))
            targets += sum(map(num_target_tokens, columns.get("labels", ())))
            bar.update(len(outcomes) + len(wrong))
        if kept:
            writer.finalize()
    if kept and not faults.count:
        datasets.disable_progress_bars()
        datasets.Dataset.from_file(str(aside)).save_to_disk(str(target))
        datasets.enable_progress_bars()
    aside.unlink(missing_ok=True)
    return {
        "kept": kept, "truncated": truncated, "dropped": dict(sorted(dropped.items())), "num_tokens": tokens,
        "num_target_tokens": targets, "sources": {name: dict(c) for name, c in sorted(by_source.items())},
    }  # fmt: skip
