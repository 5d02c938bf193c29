"""`grads-ds scores compare RUN1 RUN2`: do two probes order the samples alike?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grads_ds.commands.score_tables import aligned, score_table, value_columns
from grads_ds.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TOP_PERCENT = (1.0, 5.0, 10.0, 50.0)


def add(actions: Any) -> None:
    """Declare `compare`."""
    compare = actions.add_parser(
        "compare", help="rank correlation and overlap of the top p %% of two runs' samples"
    )
    compare.add_argument("run", metavar="RUN1", type=Path)
    compare.add_argument("other", metavar="RUN2", type=Path)
    compare.add_argument(
        "--top", type=float, nargs="+", default=list(TOP_PERCENT), metavar="P", help="percentages"
    )
    compare.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    """Print the comparison; exit status 0."""
    print(compare(args.run, args.other, args.top))
    return 0


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
    tables = [score_table(run), score_table(other)]
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
    names = [name for name in value_columns(tables[0]) if name in tables[1].column_names]
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
    lines += aligned(rows)
    lines.append(
        "top p %: share of one run's p % highest samples that are among the other's; by chance it"
        " is p %"
    )
    return "\n".join(lines)


def _matched(one: pa.Table, other: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Positions in both tables of the samples that both hold, by content, in the first one's order;
    of equal rows the n-th goes with the n-th. Two int64 arrays of one length.
    """
    import numpy as np
    import pyarrow as pa

    chunks = [chunk for table in (one, other) for chunk in table["sample_hash"].chunks]
    encoded = pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices, dtype=np.int64)
    halves = codes[: one.num_rows], codes[one.num_rows :]
    nth = [_occurrence(half) for half in halves]
    most = 1 + max((int(found.max()) for found in nth if len(found)), default=0)
    ours, theirs = (half * most + found for half, found in zip(halves, nth, strict=True))
    _, first, second = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    order = np.argsort(first)
    return first[order], second[order]


def _occurrence(codes: np.ndarray) -> np.ndarray:
    """How many equal codes stand before each, int64 [N]."""
    import numpy as np

    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    nth = np.empty(len(codes), np.int64)
    nth[order] = np.arange(len(codes)) - np.searchsorted(ordered, ordered)
    return nth
