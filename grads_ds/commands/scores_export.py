"""`grads-ds scores export RUN`: the score table as csv or jsonl, to a file or standard output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_ds.commands.score_tables import prepared_pool, table_file
from grads_ds.config.errors import UserError, problem

if TYPE_CHECKING:
    import pyarrow as pa


def add(actions: Any) -> None:
    """Declare `export`."""
    export = actions.add_parser("export", help="the table as csv or jsonl")
    export.add_argument("run", metavar="RUN", type=Path)
    export.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    export.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    export.add_argument(
        "--rows", action="store_true", help="with each sample's source and row as the user gave it"
    )
    export.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    """Write the table; exit status 0, also when the reader stops early."""
    try:
        export(args.run, args.format, args.output, args.rows)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def export(run: Path, form: str, output: Path | None, with_rows: bool) -> None:
    """Write the table, a batch of rows at a time, to `output` (published when it is whole) or
    standard output.
    """
    import pyarrow.parquet as pq

    from grads_ds.run_dir.ownership import owned_by
    from grads_ds.run_dir.publish import atomic_path

    file = table_file(run)
    pool = prepared_pool(run) if with_rows else None
    with contextlib.ExitStack() as stack:
        if output is None:
            sink = sys.stdout.buffer
        else:
            if output.is_dir() or not output.parent.is_dir():
                raise UserError(
                    f"--output: wanted a file in an existing folder; found {output}; give another"
                    " path"
                )
            if owner := owned_by(output):
                found = f"{output}, in {owner}, which the run itself writes"
                raise UserError(problem("--output", "a file of its own", found, "give another"))
            sink = stack.enter_context(open(stack.enter_context(atomic_path(output)), "wb"))
        first = True
        for batch in pq.ParquetFile(file, page_checksum_verification=True).iter_batches(50_000):
            _write(_with_rows(batch, pool) if pool is not None else batch, sink, form, first)
            first = False
        sink.flush()


def _write(batch: pa.RecordBatch, sink: Any, form: str, first: bool) -> None:
    import math

    if form == "csv":
        import pyarrow.csv

        pyarrow.csv.write_csv(batch, sink, pyarrow.csv.WriteOptions(include_header=first))
        return
    for record in batch.to_pylist():
        # JSON has no NaN and no infinity; the status says why the value is not there
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        if "row" in plain:
            plain["row"] = json.loads(str(plain["row"]))
        sink.write((json.dumps(plain, ensure_ascii=False) + "\n").encode())


def _with_rows(batch: pa.RecordBatch, pool: Any) -> pa.RecordBatch:
    import pyarrow as pa

    places = pool.positions(batch["sample_id"].to_numpy())
    batch = batch.append_column("source", pa.array(pool.table["source"].take(places).to_pylist()))
    return batch.append_column("row", pa.array(list(pool.rows(places))))
