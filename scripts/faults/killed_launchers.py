"""`kill -9` of the launcher of a probe over two hosts, and a start in the same second, again and
again: no rank works beside another start's, and every table is the undisturbed run's.

    python scripts/faults/killed_launchers.py [--rounds 10] [--write]

Needs root (network namespaces), pdsh and sshd. Each round has a run directory of its own. Every
second one is killed before the first part of the score table is written, each later than the one
before it; the others once more and more parts are. --write puts the rounds into
docs/results/killed_launchers.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]) + end for end in ("", "/tests")]
import pyarrow.parquet as parquet
import yaml

from conftest import REPO, make_tiny_model, write_rows
from tests.cluster import Cluster, cluster
from tests.launcher.cluster_runs import GRADS_DS, environment
from tests.launcher.jobs import left_behind

NUMBERS = REPO / "docs/results/killed_launchers.json"
SECONDS = 280


def make(folder: Path, hosts: Cluster) -> None:
    """A job in `folder` whose probe takes some seconds, and its pool, prepared, in `calm`."""
    make_tiny_model(folder / "model")
    write_rows(folder / "pool.jsonl", 256)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "calm",
        "model": {"path": "model", "dtype": "float32"},
        "deepspeed": "zero3.json",
        "data": {"train": ["pool.jsonl"], "max_length": 64},
        "probe": {"epochs": 0, "tokens_per_microbatch": 128, "flush_seconds": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = [*GRADS_DS, "prepare", "config.yaml"]
    subprocess.run(words, cwd=folder, env=environment(hosts.environment), check=True)


def start(folder: Path, name: str, hosts: Cluster) -> subprocess.Popen[str]:
    """The probe on both hosts, over pdsh, into the run directory `name`."""
    words = ["probe", "config.yaml", "--set", f"run_dir={name}", "--hosts", str(hosts.hostfile)]
    with open(folder / f"{name}.said", "a") as said:
        return subprocess.Popen(
            [*GRADS_DS, *words, "--backend", "pdsh"],
            cwd=folder,
            env=environment(hosts.environment),
            stdout=said,
            stderr=said,
            text=True,
        )


def records(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    """The ranks' records of every start, the first one first."""
    starts = sorted((folder / name / "logs/probe").iterdir())
    return [
        [json.loads(f.read_text() or "{}") for f in sorted(s.glob("rank*.json"))] for s in starts
    ]


def running(folder: Path, name: str, process: subprocess.Popen[str]) -> float:
    """Wait until both ranks of the newest start run; the moment."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / name / "logs/probe").is_dir():
            ranks = records(folder, name)[-1]
            if sum(rank.get("state") == "running" for rank in ranks) == 2:
                break
        time.sleep(0.05)
    return time.monotonic()


def parts(folder: Path, name: str) -> int:
    """How many parts of the score table are written."""
    return len(list((folder / name / "scores").glob("part-*")))


def disturbed(
    folder: Path, name: str, hosts: Cluster, seconds: float, wanted: int
) -> dict[str, Any]:
    """One round: what came of a launcher killed `seconds` after its ranks began, and not before
    `wanted` parts were written.
    """
    shutil.copytree(folder / "prepared-run", folder / name)
    first = start(folder, name, hosts)
    began = running(folder, name, first)
    time.sleep(seconds)
    while parts(folder, name) < wanted and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    first.wait()
    killed, written = time.monotonic() - began, parts(folder, name)
    began = time.monotonic()
    second = start(folder, name, hosts)
    status = second.wait(SECONDS)
    took = time.monotonic() - began
    old, *new = records(folder, name)
    ended = max(rank.get("ended", float("inf")) for rank in old)
    table = parquet.read_table(folder / name / "scores/table.parquet")
    return {
        "killed seconds after the ranks began": round(killed, 1),
        "parts then": written,
        "ended": sorted({rank["state"] for rank in old}),
        "beside each other": any(rank["started"] < ended for ranks in new for rank in ranks),
        "status": status,
        "seconds of the second start": round(took, 1),
        "same table": table.equals(parquet.read_table(folder / "calm/scores/table.parquet")),
        "left behind": len(left_behind(str(folder), 30)),
    }


def rounds(folder: Path, hosts: Cluster, count: int) -> list[dict[str, Any]]:
    """`count` rounds: moments before the first part in turn with moments between two parts."""
    make(folder, hosts)
    shutil.copytree(folder / "calm", folder / "prepared-run")
    calm = start(folder, "calm", hosts)
    began = running(folder, "calm", calm)
    while not parts(folder, "calm") and calm.poll() is None:
        time.sleep(0.01)
    idle = time.monotonic() - began
    assert calm.wait(SECONDS) == 0, (folder / "calm.said").read_text()[-3000:]
    all_of_them, found = parts(folder, "calm"), []
    for number in range(count):
        seconds = idle * number / count if number % 2 == 0 else 0.0
        wanted = all_of_them * number // count if number % 2 else 0
        found.append(disturbed(folder, f"run{number}", hosts, seconds, wanted))
        print(json.dumps(found[-1]), flush=True)
    return found


def good(found: dict[str, Any]) -> bool:
    """Whether a round ended as it must."""
    wrong = found["status"] or found["beside each other"] or found["left behind"]
    return bool(found["same table"] and not wrong)


def main(options: argparse.Namespace) -> int:
    """Run the rounds; 1 when one of them did not end as it must."""
    with tempfile.TemporaryDirectory() as folder, cluster(2, 1) as hosts:
        found = rounds(Path(folder), hosts, options.rounds)
    if options.write:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(map(good, found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="launchers to kill")
    parser.add_argument("--write", action="store_true", help="into docs/results")
    sys.exit(main(parser.parse_args()))
