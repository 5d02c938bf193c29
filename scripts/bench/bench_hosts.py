"""Recording over several hosts, parameters sharded over all of them or within each, against plain
ZeRO-3 training: bytes on the hosts' links and seconds of a step, in one job.

    python scripts/bench/bench_hosts.py [--hosts 1 2 4] [--rates 1gbit 10gbit]
        [--output docs/results/bench_hosts.json]

Needs root. For every number of hosts and rate it makes hosts out of network namespaces
(scripts/local_cluster.sh) and runs, on the same ranks in turn, a training step (forward, backward,
reduction, optimizer), a scoring step with `shard_within: world`, and one with `host`. Bytes are the
network interfaces' own counters, barriers among them; the predicted ones are what `grads-ds plan`
says of the recording. Random Llama, half of the tokens targets, float32, one thread per rank. Where
ranks are more than cores, seconds tell of the links only as far as these bind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.probe_workload import ALLOCATOR, batch_of, make, started

CLUSTER = [str(REPO / "scripts/local_cluster.sh"), "--name", f"h{os.getpid() % 10**6}"]
COUNTER = Path("/sys/class/net/eth0/statistics/tx_bytes")


def one_rank(folder: Path, rounds: int, samples: int, length: int) -> None:
    """Steps of all kinds in turn; rank 0 writes `folder`/steps.json."""
    import torch

    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import score_batch
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder

    _, trainer = started(folder, samples)
    batch = batch_of(samples, length, trainer.module.config.vocab_size)

    def train() -> None:
        trainer.backward(trainer(**batch).loss)
        trainer.step()

    def scorer(where: str) -> Callable[[], Any]:
        chosen = load_config(folder / "config.yaml", [f"probe.shard_within={where}"])
        context = frozen_model(chosen, chosen.model.path)
        model, engine = stack.enter_context(context)
        recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))
        return lambda: score_batch(recorder, engine, batch)

    with contextlib.ExitStack() as stack:
        world, host = scorer("world"), scorer("host")  # within its hosts from here on
        steps: dict[str, Callable[[], Any]] = {"training": train, "world": world, "host": host}
        found: dict[str, list[list[float]]] = {name: [] for name in steps}
        for turn in range(rounds + 2):
            for name, step in steps.items():
                ranks.barrier()
                sent, began = _sent(), time.monotonic()
                with contextlib.nullcontext() if name == "host" else ranks.everyone():
                    step()
                own = time.monotonic() - began
                ranks.barrier()
                # the first ones try the model and learn the order of its modules
                if turn > 1:
                    found[name].append([own, time.monotonic() - began, _sent() - sent])
        every = ranks.all_gather_object(found)
        if ranks.is_main():
            result = {
                name: {
                    "seconds": statistics.median(row[1] for row in found[name]),
                    "bytes": statistics.median(
                        sum(rank[name][i][2] for rank in every) for i in range(rounds)
                    ),
                }
                for name in steps
            }
            for name in ("world", "host"):
                pairs = zip(found[name], found["training"], strict=True)
                ratio = statistics.median(a[1] / b[1] for a, b in pairs)
                result[name]["ratio to training"] = round(ratio, 3)
            (folder / "steps.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    ranks.finish()
    os._exit(0)


def _sent() -> int:
    """Bytes this host has sent, told by one of its ranks."""
    return int(COUNTER.read_text()) if os.environ.get("LOCAL_RANK", "0") == "0" else 0


def predicted(options: argparse.Namespace, folder: Path, hosts: int) -> dict[str, float]:
    """Bytes over the links of all hosts that the plan says of one scoring step."""
    length, samples = options.length, options.samples
    from grads_ds.config.load import load_config
    from grads_ds.plan.cluster import Cluster
    from grads_ds.plan.forecast import forecasts
    from grads_ds.plan.shapes import model_config

    found = {}
    for where in ("world", "host"):
        words = [f"probe.shard_within={where}", f"data.max_length={length}"]
        words += [f"probe.tokens_per_microbatch={length * samples}", "probe.epochs=0"]
        config = load_config(folder / "config.yaml", words)
        cluster = Cluster(hosts, options.slots, 2.0**40, 1e10, 1e9)
        planned = forecasts(config, model_config(config.model.path), cluster, 1e6)
        found[where] = next(f for f in planned if f.stage == "recording").traffic.between_hosts * (
            hosts
        )
    return found


def on_hosts(options: argparse.Namespace, hosts: int, rate: str) -> dict[str, Any]:
    """All kinds of step on `hosts` hosts whose links carry `rate`."""
    folder = Path(tempfile.mkdtemp(prefix="bench_hosts."))
    try:
        parameters = make(folder, options.layers, options.vocabulary, options.width, 2)
        up = [*CLUSTER, "--slots", str(options.slots), "--rate", rate, "up", str(hosts)]
        subprocess.run(up, check=True, stdout=subprocess.DEVNULL)
        variables = ALLOCATOR | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        (folder / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in variables.items()))
        command = [str(Path(sys.executable).with_name("deepspeed")), "--force_multi", "--hostfile"]
        command += [f"/tmp/local_cluster.{CLUSTER[-1]}/hostfile", str(Path(__file__).resolve())]
        command += ["--folder", str(folder), "--rounds", str(options.rounds)]
        command += ["--samples", str(options.samples), "--length", str(options.length)]
        done = subprocess.run(
            [*CLUSTER, "exec", "1", *command],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=options.seconds,
        )
        if not (folder / "steps.json").exists():
            raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
        said = predicted(options, folder, hosts)
        found = json.loads((folder / "steps.json").read_text())
        for where, size in said.items():
            found[where]["bytes predicted"] = round(size)
        return {"hosts": hosts, "rate": rate, "parameters": parameters, **found}
    finally:
        subprocess.run([*CLUSTER, "down"], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def table(runs: list[dict[str, Any]]) -> str:
    """As Markdown: the table of docs/probe.md."""
    rows = [
        "| hosts | link | training: MB, s | world: MB (predicted), s, ratio | host: MB, s, ratio |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        training, world, host = (run[name] for name in ("training", "world", "host"))
        rows.append(
            f"| {run['hosts']} | {run['rate']} | {training['bytes'] / 1e6:.1f},"
            f" {training['seconds']:.2f} | {world['bytes'] / 1e6:.1f}"
            f" ({world['bytes predicted'] / 1e6:.1f}), {world['seconds']:.2f},"
            f" {world['ratio to training']:.2f} | {host['bytes'] / 1e6:.3f},"
            f" {host['seconds']:.2f}, {host['ratio to training']:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"])
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=600, help="limit of one job")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.folder:
        return one_rank(options.folder, options.rounds, options.samples, options.length)
    runs = [on_hosts(options, hosts, rate) for rate in options.rates for hosts in options.hosts]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu_cores": os.cpu_count(),
        "ranks per host": options.slots,
        "model": f"d {options.width}, {options.layers} layers, V {options.vocabulary},"
        f" {options.samples} x {options.length} tokens per rank",
        "runs": runs,
    }
    print(table(runs))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
