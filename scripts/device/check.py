"""Runs the steps of the device check, each in a process of its own under a time limit; writes JSON.

Called by check.sh. Writes OUT/device.json after every step (status, seconds, what the step found,
the last lines of one that failed), OUT/device.log (all output) and what a step packed for the way
home (OUT/STEP.*.xz). Exit status 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step import run_within

HERE = Path(__file__).resolve().parent
LEAST = 5  # seconds under which no step is started


@dataclass(frozen=True)
class Limit:
    """A step and the most seconds it may take, on a GPU and in a dry run on a CPU."""

    name: str
    gpu: float
    cpu: float


# in the order of what is to be known first; limits are for a machine that hangs, not estimates
STEPS = (
    Limit("machine", 60, 120),
    Limit("kit_model", 90, 300),
    Limit("exactness", 120, 400),
    Limit("zero3_nccl", 90, 200),
    Limit("throughput", 150, 200),
    Limit("kernels", 60, 60),
    Limit("stages", 200, 400),
    Limit("capacity", 120, 120),
    Limit("fused", 150, 120),
    Limit("study_cells", 600, 600),
)


def published(out: Path, result: dict[str, Any]) -> None:
    """Write the whole result, so that it is never half a file."""
    aside = out / "device.json.part"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(out / "device.json")


def run_step(command: list[str], log: Path, seconds: float) -> str:
    """Run to the end or to the time limit, with everything that it started: how it ended."""
    with log.open("w") as output:
        status = run_within(command, output, seconds)
    if status is None:
        return f"stopped after {seconds:.0f} s"
    return "ok" if status == 0 else f"failed with status {status}"


def last_lines(log: Path) -> list[str]:
    """The end of a log, progress bars left out."""
    lines = log.read_text(errors="replace").split("\n")
    return [line[:300] for line in lines if line.strip() and "\r" not in line][-25:]


def check(args: argparse.Namespace, work: Path) -> bool:
    """Run the steps that were asked for; whether none failed."""
    deadline = time.monotonic() + args.minutes * 60
    steps: dict[str, Any] = {}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "host": platform.platform(),
        "dry_run_on_cpu": args.cpu,
        "minutes": args.minutes,
        "steps": steps,
    }
    (args.out / "device.log").write_text("")
    for limit in (limit for limit in STEPS if limit.name in args.only):
        left = deadline - time.monotonic()
        if left < LEAST:
            steps[limit.name] = {"status": "skipped", "why": f"{left:.0f} s were left"}
            print(f"device check: {limit.name}: skipped, no time left", flush=True)
            published(args.out, result)
            continue
        seconds = min(left, limit.cpu if args.cpu else limit.gpu)
        print(f"device check: {limit.name}, at most {seconds:.0f} s", flush=True)
        found, log = work / f"{limit.name}.json", work / f"{limit.name}.log"
        command = [sys.executable, str(HERE / f"{limit.name}.py"), "--out", str(found)]
        command += ["--seconds", str(seconds), *(["--cpu"] if args.cpu else [])]
        command += ["--kit", str(args.kit)] if args.kit else []
        began = time.monotonic()
        status = run_step(command, log, seconds)
        entry = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        entry["found"] = json.loads(found.read_text()) if found.exists() else None
        if entry["found"] and "skipped" in entry["found"] and status == "ok":
            entry |= {"status": "skipped", "why": entry["found"]["skipped"]}
        if status != "ok":
            entry["last_lines"] = last_lines(log)
        steps[limit.name] = entry
        for more in work.glob(f"{limit.name}.*.xz"):  # what a step brings home besides its facts
            shutil.copy(more, args.out)
        with (args.out / "device.log").open("a") as all_logs:
            all_logs.write(f"== {limit.name}: {status}\n{log.read_text(errors='replace')}\n")
        published(args.out, result)
        told = f": {entry['why']}" if "why" in entry else ""
        print(
            f"device check: {limit.name}: {entry['status']}, {entry['seconds']} s{told}", flush=True
        )
    return all(entry["status"] in ("ok", "skipped") for entry in steps.values())


def main() -> None:
    """Command line."""
    names = [limit.name for limit in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, a dry run")
    parser.add_argument("--out", type=Path, default=Path("runs/device"))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    parser.add_argument("--kit", type=Path, help="where the pieces were unpacked")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="grads_ds_device.") as work:
        good = check(args, Path(work))
    print(f"device check: {args.out / 'device.json'} written", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
