"""How the end-to-end tests start the command, and what each change must redo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.flow.stages import STAGES, Unit, due_units
from grads_ds.run_dir.units import mark_done
from tests import forked_ranks

ROWS = 48


ARTEFACTS = [
    "resolved.yaml",
    "prepared/pool/state.json",
    "prepared/domain/state.json",
    "prepared/general/state.json",
    "probe/model/model.safetensors",
    "scores/table.parquet",
    "scores/manifest.json",
    "selection/selected.jsonl",
    "selection/selection.parquet",
    "selection/selection.json",
    "selection/variants/random/selected.jsonl",
    "sft/model/model.safetensors",
    "sft/model/config.json",
    "sft/model/tokenizer.json",
    "sft/variants/full/model/model.safetensors",
    "sft/variants/random/model/model.safetensors",
    "evaluation.json",
    "report.html",
    "logs/probe.log",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(folder: Path, *arguments: str, **variables: str) -> str:
    environment = (
        os.environ
        | {
            "PYTHONPATH": forked_ranks.python_path(),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        | variables
    )
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def grads_ds(folder: Path, *arguments: str) -> str:
    return call(folder, "-m", "grads_ds", *arguments)


def redone(config: Config) -> list[str]:
    """The units that a start would run now, found by recording each as done again without running
    it; records are restored.
    """
    run_dir = Path(config.run_dir)
    saved = {f: f.read_bytes() for f in (run_dir / "state").iterdir()}
    names = []

    def pretend(unit: Unit) -> None:
        names.append(unit.name)
        mark_done(
            run_dir,
            unit.name,
            unit.inputs,
            [name for name in unit.outputs if (run_dir / name).exists()],
            0.0,
        )

    try:
        for stage in STAGES:
            while due := due_units(stage, config, run_dir):
                pretend(due[0][0])
        return names
    finally:
        for file, content in saved.items():
            file.write_bytes(content)


FROM_SELECT = [
    "select/selected",
    "select/random",
    "sft/selected",
    "sft/random",
    "evaluate",
    "report",
]


CHANGES = {
    "select.budget=0.5": FROM_SELECT,
    "select.variants.random.budget=0.5": ["select/random", "sft/random", "evaluate", "report"],
    "sft.learning_rate=0.02": ["sft/selected", "sft/full", "sft/random", "evaluate", "report"],
    "evaluate.bootstrap=50": ["evaluate", "report"],
    # nothing is evaluated again for a limit to forgetting
    "evaluate={max_forgetting: 1.0, forgetting: loss}": ["evaluate/best", "report"],
    "probe.layers=[lm_head]": ["probe/record", *FROM_SELECT],
    "probe.learning_rate=0.02": ["probe/train", "probe/record", *FROM_SELECT],
    "run_dir=run": [],
}


DELETED = {
    "prepared/pool/state.json": [
        "prepare",
        "probe/train",
        "probe/record",
        "select/selected",
        "select/random",
        "sft/selected",
        "sft/full",
        "sft/random",
        "evaluate",
        "report",
    ],
    "scores/table.parquet": ["probe/record", *FROM_SELECT],
    "selection/selection.parquet": ["select/selected", "sft/selected", "evaluate", "report"],
    "sft/variants/full/model/model.safetensors": ["sft/full", "evaluate", "report"],
    "evaluation.json": ["evaluate", "report"],
    "report.html": ["report"],
}
