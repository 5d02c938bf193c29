"""How fast `prepare` reads, checks and tokenises short chats, and the memory it takes.

    python scripts/bench/bench_prepare.py [--rows 1000000] [--checkout DIR ...] [--out FILE.json]

Writes that many chats of two to four turns, makes a small tokenizer with a ChatML template, once
with `{% generation %}` marks and once without, and runs `grads-ds prepare` of every checkout given
(this one alone by default) on the same files, one after the other, in its own processes. Prints
and writes rows per second, the processor seconds of all its processes, which other work on the
machine disturbs less, and the peak of their proportional memory: with the files they map (PSS), and
without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "and",
    "grass",
    "green",
    "what",
    "colour",
    "most",
    "of",
    "time",
    "a",
    "question",
    "an",
    "answer",
]


def write_chats(path: Path, rows: int) -> None:
    """Chats of random words, one a line."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            turns = [
                {
                    "role": "assistant" if turn % 2 else "user",
                    "content": " ".join(draw.choices(WORDS, k=draw.randint(4, 30))),
                }
                for turn in range(draw.choice((2, 2, 4)))
            ]
            file.write(json.dumps({"messages": turns, "id": number}) + "\n")


def write_model(folder: Path, template: str) -> None:
    """A tokenizer and the config of a model, without weights: prepare reads no more."""
    from tests.data.twins import make_tokenizer

    make_tokenizer(folder, template)
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 1000}')


def memory(process: psutil.Process) -> tuple[int, int]:
    """Proportional memory of a process and its children, in bytes: all of it (PSS), and what is
    their own, without files that they map, whose pages the kernel takes back when it needs them.
    """
    pss = mapped = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            told = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in told.splitlines()[1:]}
        pss += int(sizes.get("Pss", 0)) * 1024
        mapped += int(sizes.get("Pss_File", 0)) * 1024
    return pss, pss - mapped


def processor_seconds() -> float:
    """Of all processes started here that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(
    command: list[str], rows: int, folder: Path, variables: dict[str, str]
) -> dict[str, Any]:
    """Run a command in `folder`, with further environment variables, and watch it."""
    began, used = time.perf_counter(), processor_seconds()
    environment = os.environ | variables
    with tempfile.TemporaryFile() as log:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        watched, pss, own = psutil.Process(run.pid), 0, 0
        while run.poll() is None:
            try:
                seen = memory(watched)
            except psutil.Error:
                break
            pss, own = max(pss, seen[0]), max(own, seen[1])
            time.sleep(0.2)
        if run.wait():
            log.seek(0)
            raise SystemExit(log.read().decode()[-3000:])
    seconds = time.perf_counter() - began
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor_seconds() - used, 2),
        "rows_per_second": round(rows / seconds, 1),
        "peak_pss_bytes": pss,
        "peak_own_bytes": own,
    }


def main() -> None:
    """Measure every checkout on the same rows, template after template."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--checkout", type=Path, action="append", help="default: this one")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from tests.data import twins

    results = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_chats(folder / "chats.jsonl", args.rows)
        for name, template in (("plain", twins.CHATML), ("marked", twins.CHATML_MARKED)):
            write_model(folder / name, template)
            for repeat in range(args.repeats):
                for number, checkout in enumerate(args.checkout or [REPO]):
                    run = folder / f"run-{name}-{repeat}-{number}"
                    config = folder / "config.json"  # JSON is YAML
                    config.write_text(
                        json.dumps(
                            {
                                "run_dir": str(run),
                                "model": {"path": str(folder / name)},
                                "data": {"train": [str(folder / "chats.jsonl")]},
                            }
                        )
                    )
                    command = [sys.executable, "-m", "grads_ds", "prepare", str(config)]
                    at = checkout.resolve()
                    path = {"PYTHONPATH": f"{at}:{os.environ.get('EXTRA_PATH', '')}"}
                    figures = measure(command, args.rows, at, path)
                    results.append({"template": name, "checkout": str(checkout), **figures})
                    print(json.dumps(results[-1]), flush=True)
    if args.out:
        record = {"rows": args.rows, "cpus": len(os.sched_getaffinity(0)), "results": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
