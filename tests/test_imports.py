"""Imports point one way, and the parts that must stay light never pull torch in."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# what each part of the project may import of the project itself
ALLOWED = {
    "launcher": {"launcher", "grads_ds.config", "grads_ds.run_dir"},
    "grads_ds/gradnorm": {"grads_ds.gradnorm"},
    "grads_ds/config/config.py": set(),
    "grads_ds/run_dir/units.py": {"grads_ds.config"},
    "grads_ds/scores": {"grads_ds.scores", "grads_ds.config", "grads_ds.run_dir"},
    "grads_ds/selection": {
        "grads_ds.selection",
        "grads_ds.config",
        "grads_ds.run_dir",
        "grads_ds.scores",
    },
    "grads_ds/data": {"grads_ds.data", "grads_ds.config", "grads_ds.run_dir"},
    "grads_ds/report": {
        "grads_ds.report",
        "grads_ds.config",
        "grads_ds.run_dir",
        "grads_ds.scores",
    },
}
LIGHT = [
    "grads_ds.config",
    "grads_ds.run_dir",
    "grads_ds.scores",
    "grads_ds.selection.stage",
    "grads_ds.data.formats",
    "grads_ds.flow.stages",
    "grads_ds.data.batches",
    "grads_ds.cli",
    "grads_ds.commands.run",
    "grads_ds.flow.unit_inputs",
    "grads_ds.report",
    "grads_ds.launcher.hosts",
    "grads_ds.launcher.job",
    "grads_ds.distributed.heartbeat",
]


def imported(file: Path) -> set[str]:
    """Modules of the project that the file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "grads_ds":
                names |= {f"grads_ds.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return {name for name in names if name.split(".")[0] in ("grads_ds", "launcher")}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part: str) -> None:
    path = REPO / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files, f"{part} is gone: mend this test"
    for file in files:
        for name in imported(file):
            allowed = any(
                name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[part]
            )
            assert allowed, f"{file.relative_to(REPO)} imports {name}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_parts_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0, (
        f"{module} imports torch"
    )


def test_help_is_quick() -> None:
    """In processor time: other tests on the same machine must not decide."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(
            [sys.executable, "-m", "grads_ds", "--help"],
            cwd=REPO,
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0 and "prepare -> probe -> select" in result.stdout
    assert min(seconds) < 0.5
