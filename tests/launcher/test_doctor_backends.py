"""A backend brings its own way to ask its hosts: no other file knows it by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from grads_ds.launcher import backends
from grads_ds.launcher.doctor.examine import glance
from grads_ds.launcher.hosts import Host
from grads_ds.launcher.job import Placement

REPO = Path(__file__).resolve().parents[2]


def test_a_backend_that_nobody_knows_is_asked_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`glance` sends no unknown backend through srun."""
    asked: list[tuple[list[str], int | None]] = []

    def ask(hosts: list[Host], words: list[str], question: str, port: int | None) -> dict[str, str]:
        asked.append((words, port))
        return {host.name: f"hosts: {host.name}: asleep" for host in hosts}

    module = ModuleType("flux")
    module.ask = ask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grads_ds.launcher.backends.flux", module)
    monkeypatch.setenv("PATH", "/nowhere")  # neither srun nor ssh
    place = Placement([Host("a", 1)], "flux", ssh_port=7)
    lost, findings = glance(place, tmp_path / "run", [], [])
    assert lost == {"a": "hosts: a: asleep"} and findings == []
    assert asked[0][0][-1] == "--quick" and asked[0][1] == 7


def test_a_backend_is_one_file_and_a_row_of_the_runners_table() -> None:
    """No source but its own file names a backend, the table of variables and the default apart."""
    known = {"__init__.py", "runners.py", "options.py", "run.py", "sbatch.py", "kubernetes.py"}
    for name in set(backends.NAMES) - {"local", "slurm"}:  # words of other meanings, too
        for file in [*REPO.glob("launcher/**/*.py"), *REPO.glob("grads_ds/**/*.py")]:
            if file.name not in {*known, f"{name}.py"}:
                assert f'"{name}"' not in file.read_text(), f"{file} knows {name}"
