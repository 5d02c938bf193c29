"""What fine-tuning costs here against plain TRL: the same model, rows and DeepSpeed file, block by
block in one run.

    python scripts/bench/bench_sft.py [--pairs 120] [--output docs/results/bench_sft.json]

Two jobs of two ranks live side by side: ours through our launcher, supervised, with every hook of
`sft`; TRL's SFTTrainer through torchrun. One trains while the other waits: a block of optimizer
steps of one, of the other, of the other again, of the first, and so on, so that whatever else the
machine does meets both. Seconds are those from the word to go until the last rank is done, and the
ranks' processor time; the ratio of a pair is of the same steps on the same rows, and the losses of
both are compared. Interval: bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.sft_sides import RANKS, make, ours_rank, trl_rank

SIDES = ("ours", "trl")
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def launch_ours(folder: Path, steps: int, block: int) -> None:
    """Our launcher with its supervisors around `ours_rank`."""
    from grads_ds.launcher.hosts import Host
    from grads_ds.launcher.job import Placement, run_job

    command = [
        sys.executable,
        __file__,
        "ours-rank",
        "--folder",
        str(folder),
        *numbers(steps, block),
    ]
    raise SystemExit(
        run_job(
            "sft", command, Placement([Host("localhost", RANKS)], "local"), folder / "logs"
        ).status
    )


def numbers(steps: int, block: int) -> list[str]:
    return ["--steps", str(steps), "--block", str(block)]


# ---- the two jobs, in turn -----------------------------------------------------------------------


@contextlib.contextmanager
def jobs(folder: Path, steps: int, block: int) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Both jobs, started; what is left of them is killed at the end."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={RANKS}",
    ]
    commands = {
        "ours": [sys.executable, __file__, "ours"],
        "trl": [*torchrun, __file__, "trl-rank"],
    }
    started = {}
    try:
        for side, command in commands.items():
            with open(folder / f"{side}.log", "wb") as log:
                started[side] = subprocess.Popen(
                    [*command, "--folder", str(folder), *numbers(steps, block)],
                    env=os.environ | ENVIRONMENT | {"SIDE": side},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=REPO,
                )
        yield started
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def measure(folder: Path, pairs: int, block: int) -> dict[str, Any]:
    """Every pair's ratios, ours to TRL's, and both curves."""
    steps = block * (pairs + 1)
    lines: dict[str, list[Any]] = {side: [] for side in SIDES}
    blocks: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with socket.create_server(("127.0.0.1", 0)) as server, jobs(folder, steps, block) as started:
        (folder / "port").write_text(str(server.getsockname()[1]))
        for _ in range(len(SIDES) * RANKS):
            line = accept(server, started, folder)
            lines[json.loads(line.readline())["side"]].append(line)
        for number in range(pairs + 1):
            for side in SIDES if number % 2 else reversed(SIDES):
                began = time.monotonic()
                for line in lines[side]:
                    line.write("go\n")
                    line.flush()
                said = [json.loads(line.readline()) for line in lines[side]]
                blocks[side].append(
                    {
                        "seconds": time.monotonic() - began,
                        "cpu_seconds": sum(rank["cpu_seconds"] for rank in said),
                    }
                )
        last = {side: [json.loads(line.readline()) for line in lines[side]] for side in SIDES}
        beside = {}
        for side, process in started.items():
            # with all descendants, each of which was waited for
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit((folder / f"{side}.log").read_text()[-3000:])
            beside[side] = used.ru_utime + used.ru_stime
    losses = {side: last[side][0]["losses"] for side in SIDES}
    differences = [abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True)]
    result: dict[str, Any] = {"steps": steps, "largest_difference_of_losses": max(differences)}
    result["losses"] = {side: [round(loss, 5) for loss in losses[side]] for side in SIDES}
    for what in ("seconds", "cpu_seconds"):
        ratios = [
            ours[what] / trl[what]
            for ours, trl in zip(blocks["ours"][1:], blocks["trl"][1:], strict=True)
        ]
        result[what] = {
            side: round(statistics.median(b[what] for b in blocks[side][1:]) / block, 4)
            for side in SIDES
        }
        result[what] |= {"ratio": round(geometric_mean(ratios), 4), "ratio_ci95": interval(ratios)}
        result[what]["ratios"] = [round(ratio, 4) for ratio in ratios]
    result["job_cpu_seconds"] = {side: round(used, 1) for side, used in beside.items()}
    return result


def accept(server: socket.socket, started: dict[str, subprocess.Popen[bytes]], folder: Path) -> Any:
    """The next rank's line; ends with a job's output where the job ends before its ranks have
    called.
    """
    server.settimeout(1)
    for _ in range(240):
        with contextlib.suppress(TimeoutError):
            rank = server.accept()[0]
            rank.settimeout(None)
            return rank.makefile("rw")
        for side, process in started.items():
            if process.poll() is not None:
                raise SystemExit(f"{side} ended: {(folder / f'{side}.log').read_text()[-3000:]}")
    raise SystemExit("\n".join((folder / f"{side}.log").read_text()[-3000:] for side in started))


def geometric_mean(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def interval(ratios: list[float]) -> list[float]:
    """95 % bootstrap interval of the geometric mean."""
    draws = np.random.default_rng(0).choice(np.log(ratios), size=(10_000, len(ratios)))
    return [
        round(float(bound), 4) for bound in np.exp(np.quantile(draws.mean(axis=1), [0.025, 0.975]))
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="both", choices=("both", "ours", "ours-rank", "trl-rank")
    )
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--block", type=int, default=1, help="optimizer steps of one turn")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a row, at most")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    roles = {"ours": launch_ours, "ours-rank": ours_rank, "trl-rank": trl_rank}
    if options.what in roles:
        roles[options.what](options.folder, options.steps, options.block)
        return
    with tempfile.TemporaryDirectory(prefix="bench_sft.") as folder:
        shape = (options.width, options.layers, options.vocabulary)
        parameters = make(
            Path(folder), *shape, 8 * options.block * (options.pairs + 1), options.longest
        )
        result = measure(Path(folder), options.pairs, options.block)
    from importlib.metadata import version

    versions = {name: version(name) for name in ("trl", "transformers", "deepspeed", "torch")}
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu_cores": os.cpu_count(),
        "versions": versions,
        "parameters": parameters,
    }
    head |= {
        "ranks": RANKS,
        "zero_stage": 3,
        "pairs": options.pairs,
        "steps_per_block": options.block,
    }
    text = re.sub(
        r"\[[^\[\]{}]*\]",
        lambda found: " ".join(found[0].split()),
        json.dumps(head | result, indent=1),
    )
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
