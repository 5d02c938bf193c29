"""Step `throughput`: the project's own benchmark of all recording modes, on a shape of 1B.

Plain training, scoring (all layers, embedding and head, head) and recording while training, in one
interleaved run: seconds, tokens per second, ratios, and each mode's memory in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys

from step import REPO, Step, start

LATE = "stopped at its time limit"
BENCH = REPO / "scripts/bench/bench_gradnorm.py"


def run(step: Step) -> bool:
    """The benchmark's result as it stands when it ends or its time is up."""
    folder = step.out.with_suffix(".bench")
    options = ["--shapes", "tiny", "--rounds", "1", "--no-memory"]
    if not step.cpu:
        options = ["--device", "cuda", "--shapes", "1B", "--rounds", "5"]
    command = [sys.executable, str(BENCH), "--out", str(folder), *options]
    ended: int | str
    try:
        ended = subprocess.run(command, timeout=max(1, step.left() - 5)).returncode
    except subprocess.TimeoutExpired:
        ended = LATE
    for file in folder.glob("*.json"):  # written after the times, and again after the memory
        result = json.loads(file.read_text())
        step.record(about=result["about"])
        for shape in result["results"]:
            step.record(shape=shape["shape"], modes=shape["modes"], failed=shape["failed"])
    step.record(benchmark_ended=ended)
    # the times come first, memory with what is left; a rival may not be installed
    own = [mode for mode in step.found.get("failed", {}) if mode.startswith("ours")]
    return ended in (0, LATE) and bool(step.found.get("modes")) and not own


if __name__ == "__main__":
    start(run)
