"""What checked content costs: processor time of every stage with all hashing, and with none.

    python scripts/bench/bench_hashes.py [--write]

One run of each kind, every stage in a process of its own, one rank on a CPU: a model of 14 M
parameters, 400 rows, a checkpoint after every 20 steps (by default it is every 500). Without: each
file has the digest 0. Also, of the run with hashing, the processor time inside the hash function by
itself, which other processes of the machine do not blur. --write puts the numbers into
docs/results/bench_hashes.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
from scripts.faults.storage_errors import STAGES, stage

NUMBERS = REPO / "docs/results/bench_hashes.json"


def make(folder: Path) -> None:
    """The job's model, rows and config."""
    import torch
    import yaml
    from transformers import AutoModelForCausalLM, LlamaConfig

    from conftest import make_tiny_model, write_rows

    make_tiny_model(folder / "model")
    config = LlamaConfig.from_pretrained(folder / "model")
    config.update(
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 64,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for number, (name, rows) in enumerate((("pool", 400), ("domain", 40))):
        write_rows(folder / f"{name}.jsonl", rows, seed=number)
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    settings = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "validation": {"domain": "domain.jsonl"}},
        "probe": {"epochs": 0},
        "select": {"budget": 0.8},
        "sft": {"epochs": 1, "batch_size": 8, "checkpoint_steps": 20},
        "deepspeed": "zero3.json",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def measured(folder: Path, name: str, hashing: bool) -> dict[str, float]:
    """One stage in a forked process: its processor seconds, those inside the hash function, and the
    bytes that went through it.
    """
    spent = {"hashing seconds": 0.0, "bytes": 0.0}
    real, leave = hashlib.file_digest, os._exit

    def timed(file: Any, kind: str) -> Any:
        began, size = time.thread_time(), os.fstat(file.fileno()).st_size
        found = real(file, kind) if hashing else hashlib.new(kind)
        spent["hashing seconds"] += time.thread_time() - began
        spent["bytes"] += size
        return found

    def report(status: int) -> None:
        (folder / "spent.json").write_text(json.dumps(spent))
        leave(status)

    child = os.fork()
    if child == 0:
        hashlib.file_digest, os._exit = timed, report  # type: ignore[assignment]
        os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        stage(folder, name)
    _, status, used = os.wait4(child, 0)
    assert status == 0, (folder / "said").read_text()[-3000:]
    found = json.loads((folder / "spent.json").read_text())
    return {"seconds": used.ru_utime + used.ru_stime, **found}


def main(write: bool) -> None:
    """Measure, print, write."""
    import deepspeed  # noqa: F401

    import grads_ds.evaluate.stage
    import grads_ds.probe.stage
    import grads_ds.training.sft  # noqa: F401

    found: dict[str, dict[str, float]] = {name: {} for name in STAGES}
    for how in ("with", "without"):
        with tempfile.TemporaryDirectory() as base:
            if os.fork() == 0:
                make(Path(base))
                os._exit(0)
            os.wait()
            for name in STAGES:
                one = measured(Path(base), name, how == "with")
                found[name][f"seconds {how}"] = round(one["seconds"], 2)
                if how == "with":
                    found[name]["hashing seconds"] = round(one["hashing seconds"], 3)
                    found[name]["MB hashed"] = round(one["bytes"] / 1e6, 1)
                    share = 100 * one["hashing seconds"] / one["seconds"]
                    found[name]["percent of the stage"] = round(share, 2)
    print(json.dumps(found, indent=1))
    if write:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/results")
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    main(parser.parse_args().write)
