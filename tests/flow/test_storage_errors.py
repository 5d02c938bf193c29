"""A file system that fails under a real stage is told as such: traceback, a status of its own, and
the next start goes on.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPO, make_tiny_model, write_rows
from scripts.faults.torture import FULL, build_shim

# stage -> the error, and the folder of the run below which every write fails with it
BROKEN = {
    "prepare": (errno.ENOSPC, ""),
    "probe": (errno.EIO, "scores"),
    "select": (errno.EDQUOT, "selection"),
    "sft": (errno.ENOSPC, "sft"),
    "evaluate": (errno.ESTALE, "evaluation"),
    "report": (errno.EIO, ""),
}
STATUS = {errno.ENOSPC: 7, errno.EDQUOT: 7, errno.EIO: 8, errno.ESTALE: 8}


def stage(folder: Path, name: str, shim: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One stage in one process, as `deepspeed --module grads_ds` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(REPO)}
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "grads_ds", name, "config.yaml"],
        cwd=folder,
        env=os.environ | alone | place | quiet | shim,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.slow
def test_every_stage_tells_a_failing_disk_and_goes_on_when_it_is_whole(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model")
    for number, name in enumerate(("pool", "domain")):
        write_rows(tmp_path / f"{name}.jsonl", 12, seed=number)
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    config = {
        "run_dir": "run",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "validation": {"domain": "domain.jsonl"}},
        "probe": {"epochs": 0},
        "select": {"budget": 0.5},
        "sft": {"epochs": 1, "batch_size": 2, "checkpoint_steps": 1},
        "deepspeed": "zero3.json",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, (number, below) in BROKEN.items():
        shim = {
            "LD_PRELOAD": str(build_shim()),
            "SHIM_ROOT": str(tmp_path / "run" / below) if below else str(tmp_path / "run"),
            "SHIM_AT": "12" if not below else "1",  # past the claim and the lock
            "SHIM_MODE": str(FULL),
            "SHIM_ERRNO": str(number),
        }
        broken = stage(tmp_path, name, shim)
        said = broken.stderr[-3000:]
        assert broken.returncode == STATUS[number], (name, said)
        assert "Traceback" in said and f"exit status {STATUS[number]}" in said, (name, said)
        assert "in the input" not in said
        whole = stage(tmp_path, name, {})
        assert whole.returncode == 0, (name, whole.stderr[-3000:])
