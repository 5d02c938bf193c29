"""`grads-ds scores show RUN | compare RUN1 RUN2 | export RUN`: look at finished score tables.

Reads run directories (scores/table.parquet, scores/manifest.json, prepared/pool); `export` writes
one csv or jsonl file or standard output. Works while other runs go on; needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_ds.config.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
TOP_PERCENT = (1.0, 5.0, 10.0, 50.0)
TEXT_SHOWN = 160  # characters of a sample's text


def add(commands: Any) -> None:
    """Declare `scores` and what it can do."""
    top = commands.add_parser("scores", help="look at score tables: show, compare, export")
    actions = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", help="quantiles, by source, the samples at the top and the bottom with their text"
    )
    show.add_argument("run", metavar="RUN", type=Path, help="run directory")
    show.add_argument(
        "--by", metavar="COLUMN", help="column that orders the samples (default: the last norm)"
    )
    show.add_argument(
        "--samples", type=int, default=5, metavar="N", help="samples shown at each end (default 5)"
    )
    compare = actions.add_parser(
        "compare", help="rank correlation and overlap of the top p %% of two runs' samples"
    )
    compare.add_argument("run", metavar="RUN1", type=Path)
    compare.add_argument("other", metavar="RUN2", type=Path)
    compare.add_argument(
        "--top", type=float, nargs="+", default=list(TOP_PERCENT), metavar="P", help="percentages"
    )
    export = actions.add_parser("export", help="the table as csv or jsonl")
    export.add_argument("run", metavar="RUN", type=Path)
    export.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    export.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    export.add_argument(
        "--rows", action="store_true", help="with each sample's source and row as the user gave it"
    )
    top.set_defaults(handler=handle)


def handle(args: argparse.Namespace) -> int:
    """Do it; the exit status."""
    if args.action == "show":
        print(show(args.run, args.by, args.samples))
    elif args.action == "compare":
        print(compare(args.run, args.other, args.top))
    else:
        try:
            export(args.run, args.format, args.output, args.rows)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def show(run: Path, by: str | None, samples: int) -> str:
    """The table in words: counts, quantiles of every value, medians by source, the samples at both
    ends of `by`.
    """
    import numpy as np

    table = _table(run)
    names = _values(table)
    by = by or names[-1]
    if by not in names:
        raise UserError(f"--by: wanted one of {', '.join(names)}; found {by}")
    statuses = table["status"].to_numpy()
    counted = ", ".join(
        f"{int((statuses == status).sum()):,} {status}" for status in np.unique(statuses)
    )
    lines = [f"{run}: {table.num_rows:,} samples ({counted})", *_made_by(run), ""]
    ok = statuses == "ok"
    head = ["", *(f"{quantile:.0%}" for quantile in QUANTILES)]
    values = {name: table[name].to_numpy().astype(float) for name in names}
    body = [
        [name, *(f"{q:.4g}" for q in np.quantile(x[ok], QUANTILES))]
        for name, x in values.items()
        if ok.any()
    ]
    lines += [*_aligned([head, *body]), ""]
    pool = _pool(run)
    places = pool.positions(table["sample_id"].to_numpy())
    codes, sources = pool.fields()["source"]
    found = codes[places]
    by_source = [["source", "samples", *(f"median {name}" for name in names)]]
    for code, source in enumerate(sources):
        here = ok & (found == code)
        if here.any():
            by_source.append(
                [
                    source,
                    f"{int(here.sum()):,}",
                    *(f"{np.median(x[here]):.4g}" for x in values.values()),
                ]
            )
    lines += [*_aligned(by_source), ""]
    order = np.flatnonzero(ok)[np.argsort(-values[by][ok], kind="stable")]
    count = min(max(0, samples), len(order))
    for title, chosen in (
        (f"highest {by}", order[:count]),
        (f"lowest {by}", order[len(order) - count :][::-1]),
    ):
        lines.append(title)
        for i, row in zip(chosen.tolist(), pool.rows(places[chosen]), strict=True):
            tokens = table["num_target_tokens"][i].as_py()
            lines.append(
                f"  {values[by][i]:.4g}  sample {table['sample_id'][i]}, {tokens} target tokens:"
                f" {_shortened(row)}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def compare(run: Path, other: Path, top: list[float]) -> str:
    """Rank correlation of every shared value, and how many of the top p % of one are in the top p %
    of the other.

    Samples are matched by their content, so that runs of one pool with different tokenizers or
    orders compare.
    """
    import numpy as np

    from grads_ds.statistics import spearman

    wrong = [percent for percent in top if not 0 < percent <= 100]
    if wrong:
        raise UserError(f"--top: wanted percentages above 0 and up to 100; found {wrong}")
    tables = [_table(run), _table(other)]
    places = _matched(*tables)
    good = np.ones(len(places[0]), bool)
    for table, place in zip(tables, places, strict=True):
        good &= table["status"].to_numpy()[place] == "ok"
    count = int(good.sum())
    if count < 2:
        raise UserError(
            f"wanted samples that both runs scored; found {count} in common; compare runs of one"
            " pool"
        )
    names = [name for name in _values(tables[0]) if name in tables[1].column_names]
    sizes = " and ".join(f"{table.num_rows:,}" for table in tables)
    lines = [f"{count:,} samples in common (of {sizes})", ""]
    rows = [["", "rank correlation", *(f"top {percent:g} %" for percent in top)]]
    for name in names:
        a, b = (
            t[name].to_numpy().astype(float)[p][good] for t, p in zip(tables, places, strict=True)
        )
        correlation = spearman(a, b)
        shares = []
        for percent in top:
            size = max(1, round(count * percent / 100))
            firsts = [set(np.argsort(-x, kind="stable")[:size].tolist()) for x in (a, b)]
            shares.append(f"{len(firsts[0] & firsts[1]) / size:.1%}")
        rows.append([name, "-" if correlation is None else f"{correlation:.4f}", *shares])
    lines += _aligned(rows)
    lines.append(
        "top p %: share of one run's p % highest samples that are among the other's; by chance it"
        " is p %"
    )
    return "\n".join(lines)


def export(run: Path, form: str, output: Path | None, with_rows: bool) -> None:
    """Write the table, a batch of rows at a time, to `output` (published when it is whole) or
    standard output.
    """
    import pyarrow.parquet as pq

    from grads_ds.run_dir.publish import atomic_path

    file = _table_file(run)
    pool = _pool(run) if with_rows else None
    with contextlib.ExitStack() as stack:
        if output is None:
            sink = sys.stdout.buffer
        else:
            if output.is_dir() or not output.parent.is_dir():
                raise UserError(
                    f"--output: wanted a file in an existing folder; found {output}; give another"
                    " path"
                )
            sink = stack.enter_context(open(stack.enter_context(atomic_path(output)), "wb"))
        first = True
        for batch in pq.ParquetFile(file).iter_batches(50_000):
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


def _matched(one: pa.Table, other: pa.Table) -> tuple[Any, Any]:
    """Positions in both tables of the samples that both hold, by content; of equal rows the first
    goes with the first.
    """
    import pandas as pd

    frames = []
    for table in (one, other):
        frame = table.select(["sample_hash"]).to_pandas()
        frame["nth"] = frame.groupby("sample_hash").cumcount()
        frame["place"] = range(len(frame))
        frames.append(frame)
    both = pd.merge(*frames, on=["sample_hash", "nth"])
    return both["place_x"].to_numpy(), both["place_y"].to_numpy()


def _table_file(run: Path) -> Path:
    file = run / "scores/table.parquet"
    if not file.is_file():
        raise UserError(
            f"{run}: wanted a run directory with scores/table.parquet; found none; run the probe"
            " first"
        )
    return file


def _table(run: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(_table_file(run), page_checksum_verification=True)


def _pool(run: Path) -> Any:
    from grads_ds.selection.pool import read_pool

    return read_pool(run / "prepared/pool")


def _values(table: pa.Table) -> list[str]:
    """Columns that say something about a sample's size of gradient: the loss, then the norms and
    what else was recorded.
    """
    import pyarrow as pa

    return [field.name for field in table.schema if pa.types.is_floating(field.type)]


def _made_by(run: Path) -> list[str]:
    """How the table came to be, from its manifest."""
    try:
        manifest = json.loads((run / "scores/manifest.json").read_text())
    except (OSError, ValueError):
        return []
    hosts = manifest.get("hosts") or []
    return [
        f"model {manifest.get('model')}, {manifest.get('world_size')} ranks on"
        f" {', '.join(map(str, hosts))}"
    ]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _shortened(row: str) -> str:
    """The words of a user's row, on one line."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in ("role", "from", "id"):
                    collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(json.loads(row))
    text = " | ".join(" ".join(words.split()) for words in found if words.strip())
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
