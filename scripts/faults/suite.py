"""Breaks the probe on purpose, at random points of every stage, and looks at what the resumed runs
leave.

    python scripts/faults/suite.py --faults 50 --seed 0 --output docs/results/fault_suite.txt

A fault is one of: SIGKILL of one rank, of all ranks and their launcher, Ctrl-C, a full disk, a host
gone with everything on it, a cut network link. Each strikes a real job (DeepSpeed's launcher,
ZeRO-3, gloo, float32) in the start-up, the preliminary training, the recording or the merge; the
job is then started again, with the same or another number of ranks, until it is struck again or
done. Every finished table is compared with an undisturbed run's. Works in a folder of its own under
the temporary folder; as root it mounts a small file system (full disks) and makes two hosts
(scripts/local_cluster.sh), without root those faults are left out and that is said. Prints what was
injected where; ends with status 1 when a row was lost, doubled or is not the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
from scripts.faults.job import DISTANT, LOCAL, Job, stage_of, strike, wait
from scripts.faults.workload import MODES, ROWS, WORLD, Tally, compare, forget, place

START_SECONDS = 150.0

# ---- where a fault strikes -----------------------------------------------------------------------


def draw_point(draw: random.Random, mode: str) -> tuple[str, float]:
    """(what is waited for, how much of it), e.g.

    the third new part of the table, or a second of start-up.
    """
    kinds = ["start-up", "recording", "recording", "recording", "merge"]
    if mode != "record":
        kinds += ["training"] * 4
    kind = draw.choice(kinds)
    return (
        kind,
        {
            "start-up": draw.uniform(0.5, 8.0),
            "training": float(draw.randint(0, ROWS // 8)),
            "recording": float(draw.randint(1, 12)),
            "merge": 0.0,
        }[kind],
    )


def reached(job: Job, scores: Path, before: int, point: tuple[str, float]) -> bool:
    """Whether the job has come to this point.

    A later stage counts as well: the point was passed.
    """
    kind, amount = point
    if kind == "start-up":
        return time.monotonic() - job.started > amount
    parts = sum(1 for _ in scores.glob("part-*")) - before if scores.is_dir() else 0
    if kind == "recording":
        return parts >= amount
    if kind == "merge":
        return any(scores.glob(".table.parquet*")) or (scores / "table.parquet").exists()
    steps = re.findall(r"preliminary training:[^\r\n]*? (\d+)/\d+ ", job.output())
    return (bool(steps) and int(steps[-1]) >= amount) or "recording gradient norms" in job.output()


# ---- one run after another -----------------------------------------------------------------------


def suffer(
    folder: Path, mode: str, faults: list[str], draw: random.Random, tally: Tally, truth: Path
) -> None:
    """Run the probe in `mode` through all the faults and compare every table that comes out."""
    run_dir = folder / "run" / mode
    waiting = list(faults)
    struck = elsewhere = False
    while True:
        scores = run_dir / "scores"
        before = sum(1 for _ in scores.glob("part-*")) if scores.is_dir() else 0
        fault = waiting[0] if waiting else ""
        on_hosts = fault in DISTANT
        # training goes on with its number of ranks; what is planned for them is scored by any
        # number
        free = before > 0 and (
            mode == "record"
            or (mode == "train, record" and (run_dir / "state/probe.train.json").exists())
        )
        world = draw.randint(1, 3) if free and not on_hosts else WORLD
        if struck and on_hosts != elsewhere:
            # only its own host can tell that a lock's holder is dead; from another one, the
            # operator says so (or waits two minutes)
            (run_dir / "lock.json").unlink(missing_ok=True)
        elsewhere = on_hosts
        job = Job(folder, mode, world, on_hosts)
        tally.starts += 1
        tally.resumed += struck
        point = draw_point(draw, mode)
        if not fault:
            wait(job, START_SECONDS)
        while fault and not job.over() and not reached(job, scores, before, point):
            if time.monotonic() - job.started > START_SECONDS:
                break
            time.sleep(0.003)
        if fault and not job.over():
            stage = stage_of(job)
            strike(fault, job, draw, run_dir)
            # else it had written all it had to before the disk was full: no fault
            if job.process.returncode != 0:
                waiting.pop(0)
                struck = True
                tally.faults[fault] += 1
                tally.points[stage] += 1
                where = "2 hosts" if on_hosts else f"{world} ranks"
                tally.say(
                    f"{sum(tally.faults.values()):3d}  {mode:24s}{fault:12s}{where:9s}in {stage}"
                )
                continue
        job.end()
        done = (scores / "table.parquet").exists() and job.process.returncode == 0
        if not done:
            raise SystemExit(
                "a start that was left alone failed (status"
                f" {job.process.returncode}):\n{job.output()[-4000:]}"
            )
        compare(scores / "table.parquet", truth, tally, mode)
        if not waiting:
            return
        forget(run_dir)
        struck = False


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--output", type=Path, help="file for what is printed, as well")
    options = parser.parse_args()
    draw, tally = random.Random(options.seed), Tally()
    kinds = (*LOCAL, *DISTANT)
    tally.say(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores, torch {version('torch')},"
        f" deepspeed {version('deepspeed')}"
    )
    if os.geteuid() != 0:
        kinds = tuple(kind for kind in LOCAL if kind != "disk full")
        tally.say(
            f"not root: no {', '.join(kind for kind in (*LOCAL, *DISTANT) if kind not in kinds)}"
        )
    # every kind and every mode in turn, in drawn order
    faults = [kinds[i % len(kinds)] for i in range(options.faults)]
    draw.shuffle(faults)
    per_mode = {mode: faults[i :: len(options.modes)] for i, mode in enumerate(options.modes)}
    # so that mounts and hosts go away with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    with place(faults) as folder:
        for mode in [mode for mode in options.modes if per_mode[mode]]:
            run_dir = folder / "run" / mode
            job = Job(folder, mode, WORLD, on_hosts=False)
            wait(job, START_SECONDS)
            job.end()
            if not (run_dir / "scores/table.parquet").exists():
                raise SystemExit(f"the undisturbed run failed:\n{job.output()[-4000:]}")
            truth = folder / f"{mode}.parquet"
            shutil.copy(run_dir / "scores/table.parquet", truth)
            forget(run_dir)
            waiting = per_mode[mode]
            while waiting:  # a run directory suffers a few faults on its way to a finished table
                some, waiting = waiting[:5], waiting[5:]
                suffer(folder, mode, some, draw, tally, truth)
                forget(run_dir)
    tally.say("")
    tally.say(
        f"seed {options.seed}; faults by kind {json.dumps(dict(sorted(tally.faults.items())))}"
    )
    tally.say(f"by stage {json.dumps(dict(sorted(tally.points.items())))}")
    tally.say(
        f"faults injected {sum(tally.faults.values())}, runs resumed {tally.resumed}, tables"
        f" finished {tally.tables}, equal to the bit {tally.equal}, rows lost {tally.lost}, rows"
        f" doubled {tally.doubled}; {time.monotonic() - began:.0f} s"
    )
    if options.output:
        options.output.write_text("\n".join(tally.lines) + "\n")
    return int(bool(tally.lost or tally.doubled or tally.equal < tally.tables))


if __name__ == "__main__":
    sys.exit(main())
