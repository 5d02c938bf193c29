"""Controls on the user's own pool: rows known to be wrong, scored as the pool is, never selected or
trained on (`probe.controls`).

    swapped   a drawn row's prompt with the answer of another drawn row: wrong, in the pool's words
    general   rows of the general set: right, but not of this domain; only where there is one

Writes `probe/controls` (sample_id behind the pool's, sample_hash, input_ids, labels, kind,
prompt_of: the pool sample whose prompt it bears, -1 for none). Their scores become
`scores/controls/table.parquet`, which selection compares the pool with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from grads_ds.config.config import Config
from grads_ds.probe.prompts import behind_prompt_of, first_target, partners
from grads_ds.run_dir.publish import atomic_path

FEWEST = 32  # of a kind, where the pool has them: an area under fewer is an anecdote
FOLDER, SCORES = "probe/controls", "scores/controls"
_KINDS = ("sample_id", "kind", "prompt_of")  # what selection reads of the controls
GENERAL = "general"  # the set of data.validation, or else the rows of data.replay


def prepare_controls(config: Config, run_dir: Path) -> str:
    """Write `probe/controls`; returns in words what they are. Only rank 0 calls this."""
    pool = load_from_disk(str(run_dir / "prepared/pool"))
    wanted = min(len(pool), max(FEWEST, round(config.probe.controls * len(pool))))
    first = int(np.max(pool["sample_id"])) + 1
    rows = _swapped(pool, wanted, config)
    source = general_source(config)
    if source is not None:
        rows += _general(load_from_disk(str(run_dir / "prepared" / source)), wanted, config)
    for number, row in enumerate(rows):
        row |= {"sample_id": first + number, "sample_hash": f"control-{number}"}
    (run_dir / SCORES).mkdir(parents=True, exist_ok=True)
    aside, folder = run_dir / f"{FOLDER}.part", run_dir / FOLDER
    shutil.rmtree(aside, ignore_errors=True)
    Dataset.from_list(rows).save_to_disk(str(aside))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    with atomic_path(run_dir / SCORES / "kinds.parquet") as file:
        pq.write_table(pa.table({name: [row[name] for row in rows] for name in _KINDS}), file)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
    lacking = "" if source else "; no general set, so none of general text"
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) + lacking


def general_source(config: Config) -> str | None:
    """The prepared set that general text is taken from; None where the run has none."""
    if GENERAL in config.data.validation and config.probe.anchor != GENERAL:
        return GENERAL
    return "replay" if config.data.replay else None


def _swapped(pool: Any, wanted: int, config: Config) -> list[dict[str, Any]]:
    """Drawn prompts with drawn answers: no row keeps its own, none gets the answer whose prompt
    the column prompt_gain puts it to.
    """
    draw = np.random.default_rng([config.seed, 13])
    avoided = partners(len(pool), config.probe.other_prompts, config.seed)
    rows = []
    for place in np.sort(draw.choice(len(pool), wanted, replace=False)).tolist():
        own = pool[place]
        for other in draw.permutation(len(pool))[:50].tolist():
            source = pool[other]
            if other == place or other in avoided[place] or _answer(source) == _answer(own):
                continue
            if not _answer(source):
                continue
            row = behind_prompt_of(source, own, config.data.max_length)
            rows.append({**row, "kind": "swapped", "prompt_of": int(own["sample_id"])})
            break
    return rows


def _general(source: Any, wanted: int, config: Config) -> list[dict[str, Any]]:
    draw = np.random.default_rng([config.seed, 17])
    places = np.sort(draw.choice(len(source), min(wanted, len(source)), replace=False))
    return [
        {
            "input_ids": list(source[place]["input_ids"]),
            "labels": list(source[place]["labels"]),
            "kind": "general",
            "prompt_of": -1,
        }
        for place in places.tolist()
    ]


def _answer(row: Any) -> list[int]:
    return list(row["input_ids"][first_target(row) :])
