"""The selection stage: reads scores/table.parquet and prepared/pool, writes selection/.

    selection/selected.jsonl     the chosen rows as the user gave them
    selection/selected.parquet   the same rows as columns, with their scores:
                                 load_dataset("parquet", ...)
    selection/selection.parquet  sample_id, signal, density, selected, rank (1 is best), reason,
                                 weight: every
                                 row of the table
    selection/selection.json     settings, thresholds, counts, composition, overlap with random,
                                 warnings
    selection/comparison.json    every method at 5 % and 50 %: kinds kept, overlap (main choice, up
                                 to 200,000
                                 samples)
    selection/variants/<name>/   the same four for each of select.variants

Run it with `grads-ds select CONFIG`. One process, no torch.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, printable
from grads_ds.run_dir.publish import atomic_files, publish_json
from grads_ds.scores.read import ScoreTable, read_table
from grads_ds.selection import compare
from grads_ds.selection.baselines import length_bins
from grads_ds.selection.choose import Choice, choose
from grads_ds.selection.duplicates import COMPARED, seen_before
from grads_ds.selection.output import ordered, to_text, write_choice, write_dataset
from grads_ds.selection.pool import Pool, composition, read_pool
from grads_ds.selection.requirements import anchor_leak
from grads_ds.statistics import Ints

Fields = dict[str, tuple[NDArray[np.int64], list[str]]]
LENGTH_STRATA = 10  # of strata: length


def run_variant(config: Config, run_dir: Path, name: str | None) -> dict[str, Any]:
    """Choose one subset (None: the main one), publish its files, say so, return what stands in
    selection.json."""
    settings = config.select.resolve(name)
    started = time.perf_counter()
    table, pool, fields, choice, report = decide(config, name, run_dir)
    folder = selection_dir(run_dir, name)
    order = ordered(choice, settings.order, config.seed)
    positions = pool.positions(choice.sample_id[order])
    # all aside, then all in place: a choice that fails leaves the one before it whole
    with atomic_files(folder, last="selection.json") as aside:
        with (aside / "selected.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for row in pool.rows(positions):
                file.write(row + "\n")
        write_dataset(aside / "selected.jsonl", choice, order, aside / "selected.parquet")
        write_choice(choice, aside / "selection.parquet")
        if name is None:
            with_rivals(aside / "comparison.json", config, table, fields, choice)
        seconds = round(time.perf_counter() - started, 3)
        report = {"name": name or "selected", **report, "seconds": seconds}
        publish_json(aside / "selection.json", report)
    if name is None and len(table) > compare.LARGEST:
        (folder / "comparison.json").unlink(missing_ok=True)  # an older pool's
    lines = printable(to_text(report["name"], report)).splitlines()
    print("select: " + "\nselect: ".join(lines), flush=True)
    return report


def with_rivals(
    path: Path, config: Config, table: ScoreTable, fields: Fields, choice: Choice
) -> None:
    """Write the comparison of all methods at 5 % and 50 %, unless the pool is too large."""
    if len(table) <= compare.LARGEST:
        publish_json(
            path, compare.compare(table, fields, config.select, config.seed, choice.selected)
        )


def preview(config: Config, run_dir: Path) -> str:
    """What the stage would choose, as text for a terminal. Writes nothing."""
    return "\n\n".join(
        printable(to_text(name or "selected", decide(config, name, run_dir)[-1]))
        for name in (None, *config.select.variants)
    )


def selection_dir(run_dir: Path, name: str | None) -> Path:
    """Where a subset's files lie."""
    return run_dir / "selection" if name is None else run_dir / "selection" / "variants" / name


def decide(
    config: Config, name: str | None, run_dir: Path
) -> tuple[ScoreTable, Pool, Fields, Choice, dict[str, Any]]:
    """Everything but writing: the inputs (fields: per row of the table), the choice of one subset
    and its report.
    """
    settings, seed = config.select.resolve(name), config.seed
    table = read_table(run_dir / "scores" / "table.parquet")
    pool = read_pool(run_dir / "prepared" / "pool")
    if len(pool.sample_id) != len(table):
        raise UserError(
            f"select: wanted one score per sample of the pool; found {len(table)} scores for "
            f"{len(pool.sample_id)} samples; run the probe again"
        )
    positions = pool.positions(table.sample_id)
    fields = pool.fields()
    strata = strata_codes(fields, settings.strata_field(), positions, table)
    leak = anchor_leak(config, settings)
    seen, said = None, [leak] if leak else []
    if (similarity := settings.similarity()) is not None:
        if settings.near_duplicates == "auto" and len(table) > COMPARED:
            said.append(
                f"near-duplicates are not looked for: the pool has {len(table):,} rows, auto"
                f" compares up to {COMPARED:,}; set select.near_duplicates: {similarity:g}"
            )
        else:
            seen = seen_before(pool.row_reader(positions), similarity)
    choice = choose(table, settings, seed, strata, seen)
    in_pool = np.zeros(len(pool.sample_id), dtype=bool)
    in_pool[positions[choice.chosen]] = True
    report = {
        **choice.report,
        "composition": composition(fields, in_pool),
        "seed": seed,
        "settings": settings.model_dump(mode="json", exclude={"variants"}),
        "warnings": choice.warnings + said,
    }
    of_rows = {name: (codes[positions], values) for name, (codes, values) in fields.items()}
    return table, pool, of_rows, choice, report


def strata_codes(
    fields: Fields, name: str | None, positions: Ints, table: ScoreTable
) -> NDArray[np.int64] | None:
    """The stratum of each row of the table, which stands at `positions` of the pool. Raises
    UserError when the pool has no such field.
    """
    if name is None:
        return None
    if name == "length":
        return length_bins(table.floats("num_target_tokens"), LENGTH_STRATA)
    if name not in fields:
        raise UserError(
            f"select.strata: wanted one of {', '.join([*fields, 'length'])}; found {name}; choose"
            " one of these or add it to data.metadata"
        )
    return fields[name][0][positions]
