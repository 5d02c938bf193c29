"""prepare: the user's files -> tokenised samples with stable ids and target masks, one folder per
set.

Reads `data.train`, `data.validation` and the tokenizer of `model.path`; writes `prepared/` in the
run directory as a whole or not at all: `pool/` and one folder per validation set (each for
`datasets.load_from_disk`, columns in `data/prepared.py`) and `prepared.json` with every count. Runs
on one host, by `grads-ds prepare CONFIG`, or first in `grads-ds run CONFIG`; of large pools other
hosts may have made the parts before (`data/shares.py`).
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from grads_ds.config.config import ANCHOR_SET, Config
from grads_ds.config.errors import UserError
from grads_ds.data.all_parts import begin_parts, find_sets, made_in_order, make_parts
from grads_ds.data.crew import Crew
from grads_ds.data.leaks import SHARED, Leaks
from grads_ds.data.model_limits import fit_problems
from grads_ds.data.prepared import Counts, write_set
from grads_ds.data.problems import Problems
from grads_ds.data.sources import find_inputs
from grads_ds.data.tokenizer import check_tokenizer, fingerprint, load_tokenizer
from grads_ds.data.tokens import ENDLESS
from grads_ds.run_dir.layout import PARTS
from grads_ds.run_dir.publish import atomic_path, publish_json


def check_prepare(config: Config) -> list[str]:
    """Problems that can be seen before any row is read: missing or empty files, no tokenizer, no
    template file.
    """
    problems = Problems()
    for name, entries in config.prepared_sets().items():
        where = {"pool": "data.train", "replay": "data.replay"}.get(name, f"data.validation.{name}")
        if config.anchor_sources() and name == ANCHOR_SET:
            where = "probe.anchor"
        mine = Problems()
        for item in find_inputs(entries, mine):
            if item.kind.startswith(".") and os.path.getsize(item.path) == 0:
                mine.add(
                    item.path,
                    "at least one row",
                    "an empty file",
                    "fill it or remove it from the config",
                )
        for text in mine.shown:
            problems.add_text(f"{where}: {text}")
    return problems.shown + check_tokenizer(config.model)


def run_prepare(config: Config, run_dir: Path, identity: str | None = None) -> None:
    """Tokenise the pool and the validation sets into `run_dir`/prepared.

    All rows of all sets are read and checked, also once one cannot be right; on any problem nothing
    is published and UserError lists what was found. `identity`: digest of all that the result
    depends on; with it, parts that an earlier start of the same identity left are taken over.
    """
    quick = check_prepare(config)
    if quick:
        raise UserError(quick)
    work = run_dir / PARTS
    begin_parts(work, identity)
    try:
        _prepare(config, run_dir, work)
    except UserError:  # once it is put right, the parts are of other input
        shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def _prepare(config: Config, run_dir: Path, work: Path) -> None:
    tokenizer = load_tokenizer(config.model)
    misfits = fit_problems(config, tokenizer)
    leaks = Leaks()
    sets = find_sets(config)
    with Crew(config, tokenizer) as crew:
        make_parts(config, work, crew, leaks, sets, made_in_order(sets), wanted=not misfits)
    reading = Problems()
    for parts in sets.values():
        reading.take(parts.read_problems(config.data.format))
    _tell(reading.notes)
    reading.raise_if_any()
    if misfits:
        raise UserError(misfits)
    with atomic_path(run_dir / "prepared") as folder:
        folder.mkdir()
        problems, written = Problems(), {}
        for name in made_in_order(sets):
            written[name] = write_set(sets[name].outcomes, folder / name, problems)
        counts = {name: written[name] for name in sets}
        _refuse_empty(counts, problems)
        problems.raise_if_any()
        anchor = ANCHOR_SET if config.anchor_sources() else None
        _count_shared(leaks, counts, anchor)
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        publish_json(
            folder / "prepared.json",
            {
                "tokenizer": {
                    "path": config.model.path,
                    "fingerprint": fingerprint(tokenizer),
                    "vocabulary": len(tokenizer),
                },
                "pad_token_id": pad if pad is not None else 0,
                "max_length": config.data.max_length,
                "overlong": config.data.overlong,
                "dropped_content": config.data.dropped_content,
                "remarks": reading.notes,
                "sets": {name: count.record() for name, count in counts.items()},
            },
        )
    for name, count in counts.items():
        print(f"prepare: {name}: {count.summary()}", flush=True)
        _tell([f"{name}: {remark}" for remark in count.remarks()])
        if name != anchor:
            _tell_of_leaks(name, count)
    if counts["pool"].notes[ENDLESS] and not counts["pool"].answer_ends:
        _tell(
            [
                "WARNING: no answer of the pool ends with a token of its own: training does not"
                " teach the model to stop; use a chat template that ends answers with one"
            ]
        )
    if anchor:
        _warn_of_leaks(counts[anchor])


def _tell(remarks: list[str]) -> None:
    for remark in remarks:
        print(f"prepare: {remark}", file=sys.stderr, flush=True)


def _refuse_empty(counts: dict[str, Counts], problems: Problems) -> None:
    for name, count in counts.items():
        if not count.kept and not problems.count:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in sorted(count.dropped.items()))
            problems.add(
                f"data: {name}",
                "at least one usable row",
                f"none of {count.read:,} ({reasons})",
                "raise data.max_length or give other data",
            )


def _tell_of_leaks(name: str, count: Counts) -> None:
    if count.also_in_pool:
        print(
            f"prepare: {name}: {count.also_in_pool:,} of its rows are in the pool too, token for"
            " token",
            flush=True,
        )
    if count.near_in_pool:
        print(
            f"prepare: {name}: {count.near_in_pool:,} further rows are near-duplicates of the"
            f" pool: more than {SHARED:.0%} of their answers' word 8-grams are in it",
            flush=True,
        )


def _warn_of_leaks(anchor: Counts) -> None:
    """What the anchor shares with what it is to be compared with. Told and not refused: large
    corpora share a few rows, and a choice by a held-out set itself is allowed too, with a warning
    of its own (docs/selection.md).
    """
    for name, shared in anchor.also_held_out.items():
        print(
            f"prepare: WARNING: probe.anchor: {shared:,} of its {anchor.kept:,} rows are in"
            f" data.validation.{name} too, token for token: a choice that looks at the anchor is"
            f" fitted to them, and the loss on {name} is no fair test of it; take them out of one"
            " of the two",
            file=sys.stderr,
            flush=True,
        )
    if anchor.also_in_pool:
        print(
            f"prepare: WARNING: probe.anchor: {anchor.also_in_pool:,} of its {anchor.kept:,} rows"
            " are in data.train too, token for token: each of them is compared with a gradient that"
            " holds its own; take them out of one of the two",
            file=sys.stderr,
            flush=True,
        )


def _count_shared(leaks: Leaks, counts: dict[str, Counts], anchor: str | None) -> None:
    """Held-out rows that are also in the pool: their loss says nothing about new text, so the
    number is shown. Of an anchor of its own also those that are in a held-out set.
    """
    for name, count in counts.items():
        if name not in ("pool", "replay"):
            count.also_in_pool, count.near_in_pool = leaks.shared(name), leaks.near(name)
    for name in counts if anchor else ():
        if name not in ("pool", "replay", anchor) and (rows := leaks.shared(str(anchor), name)):
            counts[str(anchor)].also_held_out[name] = rows
