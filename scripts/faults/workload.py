"""The probe that scripts/faults/suite.py breaks: its model, rows and configurations, and the
comparison of its finished table with an undisturbed one.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from conftest import make_tiny_model, write_rows
from scripts.faults.job import CLUSTER, DISTANT, REPO

ROWS, WORLD = 100, 2
MODES = {
    "record": {"epochs": 0},
    "train, record": {"epochs": 1},
    "record during training": {"epochs": 1, "record": "during"},
}


@dataclass
class Tally:
    """What was done and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    resumed: int = 0
    tables: int = 0
    equal: int = 0
    lost: int = 0
    doubled: int = 0
    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)


def compare(table_file: Path, truth_file: Path, tally: Tally, mode: str) -> None:
    """Count what is missing, there twice, or not the undisturbed run's to the bit."""
    table, truth = pq.read_table(table_file), pq.read_table(truth_file)
    ids = table["sample_id"].to_numpy()
    wanted = truth["sample_id"].to_numpy()
    lost, doubled = len(np.setdiff1d(wanted, ids)), len(ids) - len(np.unique(ids))
    # else a sample that training saw twice stands in two parts, on purpose
    if "step" not in table.schema.names:
        in_parts = sum(pq.read_metadata(file).num_rows for file in table_file.parent.glob("part-*"))
        doubled += max(0, in_parts - len(wanted))
    tally.tables += 1
    tally.lost += lost
    tally.doubled += doubled
    equal = table.equals(truth)
    tally.equal += equal
    tally.say(
        f"     {mode:24s}table finished: {'equal to the bit' if equal else 'DIFFERENT'}, lost"
        f" {lost}, doubled {doubled}"
    )
    if not equal and not lost and not doubled:
        for name in table.schema.names:
            if not table[name].equals(truth[name]):
                a, b = (t[name].to_numpy() for t in (table, truth))
                tally.say(
                    f"       {name}: {int((a != b).sum())} rows"
                    + (f", at most {np.abs(a / b - 1).max():.1e}" if a.dtype.kind == "f" else "")
                )


def forget(run_dir: Path) -> None:
    """Back to the prepared pool."""
    for name in ("scores", "probe", "tensorboard", "logs"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for record in (run_dir / "state").glob("probe*"):
        record.unlink()


def make(folder: Path) -> None:
    """Model, pool, one configuration per mode, each with a prepared run directory."""
    make_tiny_model(folder / "model")
    write_rows(folder / "pool.jsonl", ROWS)
    (folder / "grads_ds").symlink_to(REPO / "grads_ds")
    (folder / "launcher").symlink_to(REPO / "launcher")
    # equal bits want equal threads; DeepSpeed's launcher carries only what this file names to other
    # hosts
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    (folder / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    for mode, probe in MODES.items():
        training = {
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 0.01,
            "checkpoint_steps": 2,
        }
        config = {
            "run_dir": f"run/{mode}",
            "deepspeed": "zero3.json",
            "model": {"path": "model", "dtype": "float32"},
            "data": {"train": ["pool.jsonl"], "max_length": 64},
            "probe": {"tokens_per_microbatch": 128, "flush_seconds": 0} | training | probe,
        }
        (folder / f"{mode}.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(
            [sys.executable, "-m", "grads_ds", "prepare", f"{mode}.yaml"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def place(faults: list[str]) -> Iterator[Path]:
    """A folder to work in, its `run` on a small file system when disks are to be filled; two hosts
    when hosts are to fail.
    """
    folder = Path(tempfile.mkdtemp(prefix="fault_suite."))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "run").mkdir()
        if "disk full" in faults:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder / "run")], check=True
            )
            stack.callback(subprocess.run, ["umount", "-l", str(folder / "run")], check=True)
        if set(DISTANT) & set(faults):
            subprocess.run([*CLUSTER, "up", "2"], check=True, stdout=subprocess.DEVNULL)
            stack.callback(subprocess.run, [*CLUSTER, "down"], check=True)
        make(folder)
        yield folder
