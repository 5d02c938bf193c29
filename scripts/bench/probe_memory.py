"""`bench_probe.py memory`: peak host memory of the probe against that of plain loading."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from scripts.bench.probe_workload import batch_of, make

# ---- memory --------------------------------------------------------------------------------------


class Peak(threading.Thread):
    """The most anonymous memory this process has had since `since()`, looked at every few
    milliseconds.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.003)

    def since(self) -> int:
        """The most until now; begins anew."""
        most, self.most = self.most, 0
        return most


def anonymous() -> int:
    """Bytes of memory of this process that no file backs: a checkpoint that is mapped does not
    count until it is copied.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem"))
    )


def memory_rank(folder: Path, samples: int, length: int) -> None:
    """One rank: load, score, write `folder`/memory<rank>.json."""
    from grads_ds.config.load import load_config
    from grads_ds.distributed import ranks
    from grads_ds.engine.frozen_pass import score_batch
    from grads_ds.engine.model import frozen_model
    from grads_ds.gradnorm import GradNormRecorder

    ranks.start()
    peak = Peak()
    peak.start()
    # the first use of anything brings in what is not the model's: a small one takes that
    for name in ("small", "large"):
        config = load_config(folder / name / "config.yaml")
        gc.collect()
        ranks.barrier()
        start = anonymous()
        peak.since()
        with frozen_model(config, config.model.path) as (model, engine):
            gc.collect()
            loading, resident = peak.since() - start, anonymous() - start
            recorder = GradNormRecorder(model, layers=("embedding", "lm_head"))
            batch = batch_of(samples, length, model.config.vocab_size)
            score_batch(recorder, engine, batch)
            peak.since()
            score_batch(recorder, engine, batch)
            scoring = peak.since() - start
        del model, engine, recorder
    (folder / f"memory{ranks.rank()}.json").write_text(json.dumps([loading, resident, scoring]))
    ranks.finish()


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks for every number of ranks, against parameters/N + what one rank has beside its
    parameters.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench_probe."))
    try:
        make(folder / "small", 1, 64, 64, 1)
        parameters = make(
            folder / "large", options.layers, options.vocabulary, options.width, options.shards
        )
        size = 4 * parameters
        largest = max(
            file.stat().st_size for file in (folder / "large/model").glob("*.safetensors")
        )
        measured = []
        for count in options.ranks:
            world = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
            ]
            command = [
                *world,
                str(Path(__file__).with_name("bench_probe.py").resolve()),
                "memory-rank",
                "--folder",
                str(folder),
            ]
            command += ["--samples", str(options.samples), "--length", str(options.length)]
            # what is freed goes back to the system at once, so that what is counted is what is used
            environment = os.environ | {
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
            each = [
                json.loads((folder / f"memory{rank}.json").read_text()) for rank in range(count)
            ]
            loading, resident, scoring = (max(values) / 2**20 for values in zip(*each, strict=True))
            measured.append(
                {
                    "ranks": count,
                    "loading_mb": loading,
                    "resident_mb": resident,
                    "scoring_mb": scoring,
                }
            )
        megabytes = size / 2**20
        beside = measured[0]["scoring_mb"] - megabytes / measured[0]["ranks"]
        layer = (megabytes - 2 * options.vocabulary * options.width * 4 / 2**20) / options.layers
        for entry in measured:
            # a layer whose parameters lie on other ranks is whole while it is computed
            entry |= {
                "predicted_mb": (
                    megabytes / entry["ranks"] + beside + (layer if entry["ranks"] > 1 else 0)
                )
            }
            entry |= {"measured_to_predicted": entry["scoring_mb"] / entry["predicted_mb"]}
        return {
            "parameters": parameters,
            "parameters_mb": round(megabytes, 1),
            "largest_shard_mb": round(largest / 2**20, 1),
            "beside_parameters_mb": round(beside, 1),
            "one_layer_mb": round(layer, 1),
            "tokens": options.samples * options.length,
            "measured": [{k: round(v, 3) for k, v in entry.items()} for entry in measured],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
