"""What the frozen pass costs against plain ZeRO-3 training: time and bytes on the wire between
hosts, and memory per rank.

    python scripts/bench/bench_probe.py traffic [--rate 1gbit] [--output FILE]     two hosts; root
    python scripts/bench/bench_probe.py memory [--ranks 1 2 4]
        [--output docs/results/bench_probe_memory.json]

`traffic` brings up two hosts (scripts/local_cluster.sh, links limited to --rate) with one rank each
and runs one training step (forward, backward, gradient reduction, optimizer) and one scoring step
(embedding + head norms) of the same batch in turn, on the same ranks. Bytes are the network
interfaces' own counters. `memory` loads a model and scores one batch on N ranks, for each N, and
compares the anonymous memory of the heaviest rank with parameters/N + what one rank alone has
beside its parameters (activations) + one layer whole. Random Llama, d = 1024, half of the tokens
are targets, float32, one thread per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.probe_memory import memory, memory_rank
from scripts.bench.probe_workload import ALLOCATOR, batch_of, make, started

CLUSTER = [str(REPO / "scripts/local_cluster.sh"), "--name", f"b{os.getpid() % 10**6}"]

# ---- traffic and time ----------------------------------------------------------------------------


def traffic_rank(folder: Path, pairs: int, samples: int, length: int) -> None:
    """One rank: steps of both kinds in turn; rank 0 writes `folder`/traffic.json."""
    import torch

    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import score_batch
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder

    config, trainer = started(folder, samples)
    batch = batch_of(samples, length, trainer.module.config.vocab_size)
    found: dict[str, list[list[float]]] = {"training": [], "scoring": []}
    with frozen_model(config, config.model.path) as (model, engine):
        recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))

        def train() -> None:
            trainer.backward(trainer(**batch).loss)
            trainer.step()

        for pair in range(pairs + 1):
            for name, step in (
                ("training", train),
                ("scoring", lambda: score_batch(recorder, engine, batch)),
            ):
                ranks.barrier()
                sent, began, used = _sent(), time.monotonic(), time.process_time()
                step()
                ranks.barrier()
                seconds = time.monotonic() - began, time.process_time() - used
                # the first of each warms up: hooks are set, the order of layers is learned
                if pair:
                    found[name].append([*seconds, _sent() - sent])
    every = ranks.all_gather_object(found)
    if ranks.is_main():
        steps = {
            name: [
                [*own[:2], sum(e[name][i][2] for e in every)] for i, own in enumerate(found[name])
            ]
            for name in found
        }
        result: dict[str, Any] = {
            name: dict(
                zip(
                    ("seconds", "cpu_seconds", "bytes"),
                    map(statistics.median, zip(*rows, strict=True)),
                    strict=True,
                )
            )
            for name, rows in steps.items()
        }
        for i, what in enumerate(("seconds", "cpu_seconds", "bytes")):
            pairs_of = zip(steps["scoring"], steps["training"], strict=True)
            result[f"{what} ratio"] = round(statistics.median(a[i] / b[i] for a, b in pairs_of), 3)
        (folder / "traffic.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    ranks.finish()


def _sent() -> int:
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def traffic(options: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of step on two hosts."""
    folder = Path(tempfile.mkdtemp(prefix="bench_probe."))
    try:
        parameters = make(folder, options.layers, options.vocabulary, options.width, 2)
        rate = ["--rate", options.rate] if options.rate else []
        subprocess.run([*CLUSTER, *rate, "up", "2"], check=True, stdout=subprocess.DEVNULL)
        (folder / ".deepspeed_env").write_text(
            "".join(f"{k}={v}\n" for k, v in (ALLOCATOR | {"OMP_NUM_THREADS": "1"}).items())
        )
        hostfile = f"/tmp/local_cluster.{CLUSTER[-1]}/hostfile"
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--hostfile",
            hostfile,
            str(Path(__file__).resolve()),
        ]
        command += ["traffic-rank", "--folder", str(folder), "--pairs", str(options.pairs)]
        command += ["--samples", str(options.samples), "--length", str(options.length)]
        done = subprocess.run(
            [*CLUSTER, "exec", "1", *command], cwd=folder, capture_output=True, text=True
        )
        if done.returncode or not (folder / "traffic.json").exists():
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        shape = (
            f"d {options.width}, {options.layers} layers, V {options.vocabulary}, {options.samples}"
            f" x {options.length} tokens per rank"
        )
        return {
            "hosts": 2,
            "rate": options.rate or "unlimited",
            "model": shape,
            "parameters": parameters,
            "pairs": options.pairs,
            **json.loads((folder / "traffic.json").read_text()),
        }
    finally:
        subprocess.run([*CLUSTER, "down"], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("traffic", "memory", "traffic-rank", "memory-rank"))
    parser.add_argument("--rate", help="of every link, e.g. 1gbit; default: as fast as it goes")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shards", type=int, default=12, help="files of the checkpoint (memory)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "traffic-rank":
        return traffic_rank(options.folder, options.pairs, options.samples, options.length)
    if options.what == "memory-rank":
        return memory_rank(options.folder, options.samples, options.length)
    if options.layers is None:
        options.layers = 2 if options.what == "traffic" else 8
    result = traffic(options) if options.what == "traffic" else memory(options)
    result = {"date": time.strftime("%Y-%m-%d"), "cpu_cores": os.cpu_count(), **result}
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return None


if __name__ == "__main__":
    main()
