"""Times per-sample gradient norms against a plain training step and against other ways to get them,
in one interleaved run.

    python scripts/bench/bench_gradnorm.py

Reads nothing. Writes bench_gradnorm.json and bench_gradnorm.md to docs/results (or --out DIR).
Every round runs every mode once, in turn, so that a busy machine slows all alike; measured are the
seconds of processor time of the one thread (not those it waits for others), reported the medians
over the rounds and their ratio to plain forward + backward of the same run. Memory is each mode's
peak above the loaded model, in a process of its own. Opacus and torch.func take part where they
can: `pip install grads-ds[bench]`. With --device cuda: Llama-like models of 1B parameters and more
in bfloat16, seconds of the clock, memory as torch counts it, into bench_gradnorm-cuda.*; larger and
larger models are scored until one does not fit.
"""

from __future__ import annotations

import os
import sys

# Before torch: glibc gives large tensors back to the system at once, and page faults would be what
# is measured.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
}
if "--memory" not in sys.argv and any(
    os.environ.get(name) != value for name, value in _MALLOC.items()
):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _MALLOC)

import argparse
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.gradnorm_modes import MODES, PEERS, SCORING, SHAPES, Shape, make

# steps before anything is measured: the first batch of a kind is tried and one sample checked
WARM_UP = 2


def clock(device: str) -> float:
    """Seconds of processor time of this process, or of the wall where a GPU does the work, once it
    has done it.
    """
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str, restart: bool = False) -> float:
    """MiB: with `restart` what is held now, from where the next call's peak is counted; of this
    process (Linux), or of the GPU.
    """
    if device == "cpu":
        if restart:
            # forgets the peak of loading; getrusage would keep even the parent's
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)" if restart else r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
    if restart:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


def peak_memory(shape: Shape, mode: str) -> float | None:
    """MiB above the loaded model at the peak of one step of the mode, warmed up, in a process of
    its own; None if it failed.
    """
    command = [sys.executable, __file__, "--memory", shape.name, mode]
    # no spare memory kept
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | exact)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def memory_of(shape: Shape, mode: str) -> float:
    """Runs the mode in this process; see peak_memory."""
    torch.set_num_threads(1)
    prepare, attention = MODES[mode]
    model, batch = make(shape, attention)
    before = peak(shape.device, restart=True)
    step = prepare(model, batch)
    for _ in range(WARM_UP):
        step()
    peak(shape.device, restart=True)
    step()
    return peak(shape.device) - before


def bench(shape: Shape, rounds: int) -> dict[str, Any]:
    """Median seconds of every mode over the rounds."""
    steps: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    shared = make(shape)
    for mode, (prepare, attention) in MODES.items():
        if not (shape.peers if mode in PEERS else shape.train or mode in SCORING):
            continue
        try:
            # peers change their model
            steps[mode] = prepare(*(make(shape, attention) if mode in PEERS else shared))
            for _ in range(WARM_UP):
                steps[mode]()
        except Exception as error:
            steps.pop(mode, None)
            failed[mode] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    seconds: dict[str, list[float]] = {mode: [] for mode in steps}
    for turn in range(rounds):
        for mode, step in steps.items():
            start = clock(shape.device)
            step()
            seconds[mode].append(clock(shape.device) - start)
        print(f"{shape.name}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    plain = statistics.median(seconds.get("plain forward + backward", [float("nan")]))
    tokens = int(shared[1]["attention_mask"].sum())
    results = {
        mode: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(times) / plain if plain == plain else None,
            "tokens_per_second": tokens / statistics.median(times),
            "rounds": times,
            "peak_mib": None,
        }
        for mode, times in seconds.items()
    }
    return {"shape": asdict(shape), "modes": results, "failed": failed}


def table(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Per-sample gradient norms: time and memory",
        "",
        (
            f"Made by `scripts/bench/bench_gradnorm.py` on {about['date']}: {about['machine']},"
            f" torch {about['torch']}, transformers {about['transformers']}. {about['clock']}"
            f" seconds, medians of {about['rounds']} interleaved rounds after {WARM_UP} steps of"
            " each (the first batch of a kind is tried and checked); the ratio is to the plain"
            " forward + backward step of the same run. Memory: peak above the loaded model, in a"
            " process of its own."
        ),
        "",
    ]
    for result in results:
        shape = result["shape"]
        kind = "padded rows of 1/4 to the whole length" if shape["ragged"] else "rows of one length"
        lines += [
            f"## {shape['name']}",
            "",
            (
                f"Llama: d = {shape['width']}, {shape['layers']} layers, V = {shape['vocabulary']};"
                f" {shape['rows']} x {shape['length']} tokens, {kind}, {shape['targets']:.0%}"
                " targets."
            ),
            "",
            "| mode | seconds | ratio | tokens/s | peak MiB |",
            "| --- | --- | --- | --- | --- |",
        ]
        for mode, row in result["modes"].items():
            memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(
                f"| {mode} | {row['seconds']:.3f} | {ratio} | {row['tokens_per_second']:,.0f} |"
                f" {memory} |"
            )
        lines += [f"\n{mode} did not run: {why}" for mode, why in result["failed"].items()] + [""]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", nargs="*", help="some of " + ", ".join(shape.name for shape in SHAPES)
    )
    parser.add_argument("--out", type=Path, default=REPO / "docs/results")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("SHAPE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shapes = {shape.name: shape for shape in SHAPES}
    if options.memory:
        print(memory_of(shapes[options.memory[0]], options.memory[1]))
        return
    torch.set_num_threads(1)
    import transformers

    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": (
            f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, one thread,"
            " float32"
            if options.device == "cpu"
            else f"{torch.cuda.get_device_name()}, bfloat16"
        ),
        "clock": "Processor" if options.device == "cpu" else "Wall-clock",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": options.rounds,
    }
    results: list[dict[str, Any]] = []
    stem = "bench_gradnorm" + ("" if options.device == "cpu" else "-cuda")
    options.out.mkdir(parents=True, exist_ok=True)

    def publish() -> None:
        (options.out / f"{stem}.json").write_text(
            json.dumps({"about": about, "results": results}, indent=1) + "\n"
        )
        (options.out / f"{stem}.md").write_text(table(results, about))

    for name in options.shapes or [
        s.name for s in SHAPES if s.device == options.device and s.name != "tiny"
    ]:
        results.append(bench(shapes[name], options.rounds))
        publish()
        if options.device == "cuda":
            torch.cuda.empty_cache()  # other processes measure the memory
        for mode, row in results[-1]["modes"].items():
            row["peak_mib"] = None if options.no_memory else peak_memory(shapes[name], mode)
        publish()
    print(table(results, about))


if __name__ == "__main__":
    main()
