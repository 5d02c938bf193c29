"""Controls on the user's own pool: rows of a known kind, scored as the pool is, never selected or
trained on (`probe.controls`).

    swapped    a drawn row's prompt with the answer of another drawn row: wrong, in the pool's words
    general    rows of the general set: right, but not of this domain; only where there is one
    reference  rows of the reference set (`probe.anchor`): right; only where the probe takes one.
               Each is compared with the mean of the others (`probe/extra_columns.py`)

Writes `probe/controls` (sample_id behind the pool's, sample_hash, input_ids, labels, kind,
prompt_of: the pool sample whose prompt it bears, reference_row: its place in the reference set; -1
for none). Their scores become `scores/controls/table.parquet`, which selection compares the pool
with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from grads_ds.config.columns import REFERENCE, wants_reference
from grads_ds.config.config import Config
from grads_ds.probe.prompts import behind_prompt_of, first_target, has_prompt, partners
from grads_ds.run_dir.publish import atomic_path

FEWEST = 32  # of a kind, where the pool has them: an area under fewer is an anecdote
FOLDER, SCORES = "probe/controls", "scores/controls"
GENERAL = "general"  # the set of data.validation, or else the rows of data.replay


def prepare_controls(config: Config, run_dir: Path) -> tuple[int, str]:
    """Write `probe/controls`; returns how many there are and in words what they are. Only rank 0
    calls this. Where none can be made, `scores/controls/kinds.parquet` is empty.
    """
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    wanted = min(len(pool), max(FEWEST, round(config.probe.controls * len(pool))))
    first = int(np.max(pool["sample_id"])) + 1
    rows = _swapped(pool, wanted, config)
    source = general_source(config)
    if source is not None:
        general = load_from_disk(str(run_dir / "prepared" / source))
        rows += _rows_of(general, "general", wanted, [config.seed, 17])
    if wants_reference(config.probe.extras):
        known = load_from_disk(str(run_dir / "prepared" / config.anchor_set()))
        if len(known) > 1:  # a single row is left with no others to be compared with
            rows += _rows_of(known, REFERENCE, wanted, [config.seed, 19])
    for number, row in enumerate(rows):
        row |= {"sample_id": first + number, "sample_hash": f"control-{number}"}
    (run_dir / SCORES).mkdir(parents=True, exist_ok=True)
    aside, folder = run_dir / f"{FOLDER}.part", run_dir / FOLDER
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    if rows:
        Dataset.from_list(rows).save_to_disk(str(aside))
        aside.rename(folder)
    names = {"sample_id": pa.int64(), "kind": pa.string(), "prompt_of": pa.int64()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in names.items()}
    with atomic_path(run_dir / SCORES / "kinds.parquet") as file:
        pq.write_table(pa.table(columns), file)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
    found = [f"{count} {kind}" for kind, count in counts.items()]
    if swapped_short := wanted - counts.get("swapped", 0):
        found.append(
            f"{swapped_short} of {wanted} swapped could not be made (rows without a prompt, or with"
            " no other answer to swap)"
        )
    if source is None:
        found.append("no general set, so none of general text")
    return len(rows), "; ".join(found)


def general_source(config: Config) -> str | None:
    """The prepared set that general text is taken from; None where the run has none."""
    if GENERAL in config.data.validation and config.probe.anchor != GENERAL:
        return GENERAL
    return "replay" if config.data.replay else None


def _swapped(pool: Any, wanted: int, config: Config) -> list[dict[str, Any]]:
    """Drawn prompts with drawn answers: no row keeps its own, none gets the answer whose prompt
    the column prompt_gain puts it to. A row without a prompt gives none.
    """
    draw = np.random.default_rng([config.seed, 13])
    avoided = partners(len(pool), config.probe.other_prompts, config.seed)
    rows = []
    for place in np.sort(draw.choice(len(pool), wanted, replace=False)).tolist():
        own = pool[place]
        if not has_prompt(own):
            continue
        for other in draw.permutation(len(pool))[:50].tolist():
            source = pool[other]
            if other == place or other in avoided[place] or _answer(source) == _answer(own):
                continue
            if not _answer(source):
                continue
            row = behind_prompt_of(source, own, config.data.max_length)
            known = {"kind": "swapped", "prompt_of": int(own["sample_id"]), "reference_row": -1}
            rows.append(row | known)
            break
    return rows


def _rows_of(source: Any, kind: str, wanted: int, seed: list[int]) -> list[dict[str, Any]]:
    """Drawn rows of a prepared set as they are."""
    draw = np.random.default_rng(seed)
    places = np.sort(draw.choice(len(source), min(wanted, len(source)), replace=False))
    return [
        {
            "input_ids": list(source[place]["input_ids"]),
            "labels": list(source[place]["labels"]),
            "kind": kind,
            "prompt_of": -1,
            "reference_row": place if kind == REFERENCE else -1,
        }
        for place in places.tolist()
    ]


def _answer(row: Any) -> list[int]:
    return list(row["input_ids"][first_target(row) :])
