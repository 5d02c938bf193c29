"""Times density and selection on made-up score tables: seconds, processor seconds and peak memory
by size.

Writes a score table of each size to a temporary folder, then, in a process of its own on two cores,
reads it, chooses 5 % by the main method and writes selection.parquet. Prints a line per size; --out
keeps them as JSON, with the machine and the growth from size to size (1: time is proportional to
rows). Needs about 1 GB of disk at 10^7 rows.

    python scripts/bench/bench_selection.py [--rows 100000 1000000 10000000]
        [--set region=density ...] [--out docs/results/bench_selection.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CORES = 2


def make_table(n: int, path: Path) -> None:
    """A score table of n rows: log-normal norms that fall with length, one row in a thousand
    without target.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, 2000, n, dtype=np.int32)
    table = {
        "sample_id": np.arange(n, dtype=np.int64),
        "sample_hash": pa.array(np.arange(n)).cast(pa.string()),
        "num_tokens": tokens + 20,
        "num_target_tokens": tokens,
        "loss": rng.gamma(4.0, 0.5, n).astype(np.float32),
        "embedding_grad_norm": (rng.lognormal(0, 0.6, n) * tokens**-0.3).astype(np.float32),
        "lm_head_grad_norm": rng.lognormal(1.5, 0.4, n).astype(np.float32),
        "status": (
            pa.DictionaryArray.from_arrays(
                pa.array((np.arange(n) % 1000 == 7).astype(np.int8)), pa.array(["ok", "no_target"])
            ).cast(pa.string())
        ),
    }
    pq.write_table(pa.table(table), path)


def measure(path: Path, settings: dict[str, object]) -> dict[str, float]:
    """Read, choose, write; seconds of each part and the process's peak memory."""
    from grads_ds.config.select import SelectConfig
    from grads_ds.scores.read import read_table
    from grads_ds.selection.choose import choose
    from grads_ds.selection.output import write_choice

    import KDEpy  # noqa: F401, isort: skip  # its import is not the selection's time

    before = sum(os.times()[:2])
    start = time.perf_counter()
    table = read_table(path)
    read = time.perf_counter()
    choice = choose(table, SelectConfig.model_validate(settings), seed=0)
    chosen = time.perf_counter()
    write_choice(choice, path.parent / "selection.parquet")
    end = time.perf_counter()
    return {
        "rows": len(table),
        "selected": len(choice.chosen),
        "read_s": round(read - start, 2),
        "choose_s": round(chosen - read, 2),
        "write_s": round(end - chosen, 2),
        "total_s": round(end - start, 2),
        "cpu_s": round(sum(os.times()[:2]) - before, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--set", nargs="*", default=[], help="settings of select, key=value")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {
        key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in args.set)
    }
    if args.measure:
        print(json.dumps(measure(args.measure, settings)))
        return
    lines: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        for n in args.rows:
            make_table(n, path)
            # a fresh process, or the peak would be that of the making
            again = [sys.executable, __file__, "--measure", str(path), "--set", *args.set]
            root = str(Path(__file__).resolve().parents[2])
            cores = sorted(os.sched_getaffinity(0))[:CORES]
            printed = subprocess.run(
                again,
                check=True,
                env=os.environ | {"PYTHONPATH": root},
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
            ).stdout
            print(printed, end="", flush=True)
            lines.append(json.loads(printed))
    if args.out:
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cores": CORES,
            "machine": platform.machine(),
            # above the cores: seconds are other work's too, cpu_s are not
            "load_at_end": round(os.getloadavg()[0], 1),
            "settings": settings,
            "sizes": lines,
            "growth": [growth(small, large) for small, large in pairwise(lines)],
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def growth(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """How many times the processor seconds per row grew from one size to the next."""
    per_row = [line["cpu_s"] / line["rows"] for line in (small, large)]
    return {
        "from": small["rows"],
        "to": large["rows"],
        "cpu_per_row": round(per_row[1] / per_row[0], 3),
    }


if __name__ == "__main__":
    main()
