"""How long merging, checking and reloading a score table takes and how much memory, over numbers of
rows.

    python scripts/bench/bench_scores.py [--rows 250000 500000 1000000 2000000] [--output
    docs/results/bench_scores.json]

Writes synthetic parts (8 ranks, random order of ids, ten columns) for each size in a folder of its
own, merges them in a process of its own, reads the table back the way `select` does, and fits lines
through the sizes. Processor time is printed beside the time that passed, which another load on the
machine stretches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from grads_ds import scores
from grads_ds.config.columns import norm_columns
from grads_ds.scores.totals import Totals, summed_columns

LAYERS = ["embedding", "lm_head", "attention", "mlp", "norm"]
RANKS, PART_ROWS = 8, 2_000  # a part every few seconds of work holds about so many
RECORDING = scores.Recording({"model": "synthetic"}, {"ranks": RANKS})


def write_parts(folder: Path, rows: int) -> None:
    """Parts of every rank, ids in the order a batch plan by length gives them: any."""
    table_schema = scores.schema(norm_columns(LAYERS))
    writers = [scores.PartWriter(folder, rank, RECORDING, table_schema) for rank in range(RANKS)]
    draw = np.random.default_rng(0)
    order = draw.permutation(rows)
    for number, start in enumerate(range(0, rows, PART_ROWS)):
        ids = order[start : start + PART_ROWS]
        size = len(ids)
        columns = {
            "sample_id": ids,
            "sample_hash": [f"{i:032x}" for i in ids.tolist()],
            "num_tokens": draw.integers(5, 2048, size, dtype=np.int32),
            "num_target_tokens": draw.integers(1, 1024, size, dtype=np.int32),
            **{name: draw.random(size, np.float32) for name in ("loss", *norm_columns(LAYERS))},
            "status": ["ok"] * size,
        }
        writer = writers[number % RANKS]
        writer.add(pa.table(columns, schema=table_schema))
        writer.flush()


def merge(folder: Path, rows: int) -> None:
    """What rank 0 does at the end of a probe: find what is there, then merge and check it."""
    table_schema = scores.schema(norm_columns(LAYERS))
    done, totals, _ = scores.finished(folder, RECORDING.key, table_schema)
    assert len(done) == rows
    scores.merge(folder, RECORDING.key, np.arange(rows), {}, totals)


def reload(folder: Path, rows: int) -> None:
    """What `select` does, and the sums once more from the table."""
    from grads_ds.scores.read import read_table

    assert len(read_table(folder / "table.parquet").sample_id) == rows
    totals = Totals(summed_columns(scores.schema(norm_columns(LAYERS))))
    for batch in pq.ParquetFile(folder / "table.parquet").iter_batches(500_000):
        totals.add(pa.Table.from_batches([batch]))
    assert totals.counts[0] == rows


def _measured(work: Callable[[Path, int], None], folder: Path, rows: int) -> dict[str, float]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, used = time.monotonic(), time.process_time()
    work(folder, rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_gb": round(peak / 2**20, 3),
        "peak_gb_above_start": round((peak - before) / 2**20, 3),
    }


def alone(work: Callable[[Path, int], None], folder: Path, rows: int) -> dict[str, float]:
    """Run `work` in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measured, work, folder, rows).result()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000, 2_000_000]
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    measured = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_parts(folder, rows)
            parts = list(folder.glob("part-*"))
            entry: dict[str, Any] = {
                "rows": rows,
                "parts": len(parts),
                "parts_gb": round(sum(file.stat().st_size for file in parts) / 2**30, 3),
                "merge": alone(merge, folder, rows),
                "reload": alone(reload, folder, rows),
                "table_gb": round((folder / "table.parquet").stat().st_size / 2**30, 3),
            }
        print(json.dumps(entry), flush=True)
        measured.append(entry)
    slopes = {}
    if len(measured) > 1:
        sizes = [entry["rows"] / 1e6 for entry in measured]
        for what in ("merge", "reload"):
            for unit in ("cpu_seconds", "peak_gb"):
                slope, start = np.polyfit(sizes, [entry[what][unit] for entry in measured], 1)
                slopes[f"{what} {unit}"] = {
                    "per_million_rows": round(float(slope), 3),
                    "at_none": round(float(start), 3),
                }
        print(json.dumps({"slopes": slopes}), flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({"measured": measured, "slopes": slopes}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
