"""What checked content costs: the share of every stage's processor time that goes into sha256.

    python scripts/bench/bench_hashes.py [--write]

Every stage in a process of its own, as its command is, one rank on a CPU: a model of 14 M
parameters, 400 rows, 120 held out, a checkpoint after every 20 steps (by default it is every 500).
The seconds inside sha256, reading files for it included, are counted by themselves, so that other
processes of the machine do not blur them. --write puts the numbers into
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
from collections import Counter
from collections.abc import Callable
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
    for number, (name, rows) in enumerate((("pool", 400), ("domain", 120))):
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


class Timed:
    """A sha256 that counts the processor seconds and bytes of everything it is given: of outputs
    (what lies below `run` or is about to), and of the inputs, which say what is gone on from.
    """

    real, real_file = staticmethod(hashlib.sha256), staticmethod(hashlib.file_digest)
    seconds, bytes = Counter[str](), Counter[str]()

    def __init__(self, data: Any = b"", **_: Any):
        self.inner = self.real()
        self.update(data)

    def update(self, data: Any) -> None:
        """Hash `data`."""
        self._count("outputs", memoryview(data).nbytes, self.inner.update, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @classmethod
    def file(cls, file: Any, kind: str) -> Any:
        """Hash a whole file, reading it included."""
        which = "outputs" if Path(file.name).parts[0] == "run" else "inputs"
        return cls._count(which, os.fstat(file.fileno()).st_size, cls.real_file, file, kind)

    @classmethod
    def _count(cls, which: str, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        found = work(*arguments)
        cls.seconds[which] += time.thread_time() - began
        cls.bytes[which] += size
        return found


def measured(folder: Path, name: str) -> dict[str, Any]:
    """One stage in a forked process: its processor seconds, those inside sha256, and the bytes that
    went through it.
    """
    leave = os._exit

    def report(status: int) -> None:
        (folder / "spent.json").write_text(json.dumps([Timed.seconds, Timed.bytes]))
        leave(status)

    child = os.fork()
    if child == 0:
        hashlib.sha256, hashlib.file_digest = Timed, Timed.file  # type: ignore
        os._exit = report  # type: ignore[assignment]
        os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        stage(folder, name)
    _, status, used = os.wait4(child, 0)
    assert status == 0, (folder / "said").read_text()[-3000:]
    seconds, sizes = json.loads((folder / "spent.json").read_text())
    whole = used.ru_utime + used.ru_stime
    return {
        "seconds": round(whole, 2),
        **{
            which: {
                "hashing seconds": round(seconds.get(which, 0), 3),
                "MB": round(sizes.get(which, 0) / 1e6, 1),
                "percent of the stage": round(100 * seconds.get(which, 0) / whole, 2),
            }
            for which in ("outputs", "inputs")
        },
    }


def main(write: bool) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as base:
        if os.fork() == 0:
            make(Path(base))
            os._exit(0)
        os.wait()
        found = {name: measured(Path(base), name) for name in STAGES}
    print(json.dumps(found, indent=1))
    if write:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/results")
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    main(parser.parse_args().write)
