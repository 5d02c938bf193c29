"""What computing activations again saves and costs in the frozen pass: norms, memory, time, on the
same micro-batch of the same model.

    python scripts/bench/bench_recompute.py [--output docs/results/bench_recompute.json]
    python scripts/bench/bench_recompute.py --times        the times alone, into the same file

One rank, ZeRO-3, a random Llama of --layers layers, embedding and head. Memory is bytes of all
tensors alive at most above what is there before a micro-batch; times are processor seconds, kept
and recomputed in turn in one process, the ratio is the median of the pairs'. Where the machine is
busy the times mean nothing: run --times when it is quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.bench.probe_workload import batch_of, make

OUTPUT = REPO / "docs/results/bench_recompute.json"
KINDS = {"kept": {}, "recomputed": {"gradient_checkpointing": True}}


def measure(options: argparse.Namespace, folder: Path, memory: bool) -> dict[str, Any]:
    """Both kinds on one batch: norms, peaks (only with `memory`), and seconds in turn."""
    import contextlib
    from functools import partial

    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.engine.device_memory import peak_bytes
    from grads_ds.engine.frozen_pass import score_batch
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder

    ranks.start()
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in KINDS}
    with contextlib.ExitStack() as stack:
        steps = {}
        for name, settings in KINDS.items():
            words = [f"probe.{key}={json.dumps(value)}" for key, value in settings.items()]
            config = load_config(folder / "config.yaml", words)
            model, engine = stack.enter_context(frozen_model(config, config.model.path, True))
            recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))
            steps[name] = (recorder, partial(score_batch, recorder, engine))
        batch = batch_of(options.samples, options.length, options.vocabulary)
        for turn in range(options.rounds + 1):
            for name, (recorder, step) in steps.items():
                if memory:
                    peak = peak_bytes(lambda s=step: s(batch), recorder.model)
                    found[name]["peak"] = round(peak)
                began = time.process_time()
                norms = step(batch)
                if turn:  # the first tries the model and learns the order of its modules
                    found[name]["seconds"].append(time.process_time() - began)
                found[name]["norms"] = norms.norms
    return found


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Of two results' norms, relative."""
    return max(
        float(((first[group] - second[group]).abs() / first[group]).max()) for group in first
    )


def main() -> int:
    """Command line; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.times:
        options.output = options.output or OUTPUT
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench_recompute.") as name:
        folder = Path(name)
        parameters = make(folder, options.layers, options.vocabulary, options.width, 2)
        result: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "model": f"d {options.width}, {options.layers} layers, V {options.vocabulary},"
            f" {options.samples} x {options.length} tokens",
            "parameters": parameters,
        }
        if options.times:
            found = measure(options, folder, memory=False)
            pairs = list(zip(*(found[name]["seconds"] for name in KINDS), strict=True))
            result = json.loads(options.output.read_text()) | {
                "seconds": {
                    name: round(statistics.median(found[name]["seconds"]), 3) for name in KINDS
                },
                "time ratio": round(statistics.median(again / kept for kept, again in pairs), 3),
            }
        else:
            options.rounds = 1
            found = measure(options, folder, memory=True)
            result |= {
                "bytes": {name: found[name]["peak"] for name in KINDS},
                "memory ratio": round(found["kept"]["peak"] / found["recomputed"]["peak"], 2),
                "largest difference of a norm": largest_difference(
                    *(found[name]["norms"] for name in KINDS)
                ),
            }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    missed = (
        result.get("time ratio", 0) > 1.35
        or result.get("memory ratio", 4) < 4
        or result.get("largest difference of a norm", 0) > 1e-6
    )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
