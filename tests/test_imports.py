"""Imports point one way, without circles; the parts that must stay light never pull torch in.

An import counts wherever it stands in a file: inside a function, too.
"""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
# a room may import those before it in this order, and itself
ORDER = (
    "statistics",
    "gradnorm",
    "config",
    "run_dir",
    "launcher",
    "workarounds",
    "data",
    "distributed",
    "engine",
    "scores",
    "selection",
    "training",
    "probe",
    "evaluate",
    "report",
    "export",
    "plan",
    "first_config",
    "flow",
    "commands",
    "cli",
    "__main__",
)
# narrower than the order: whole lists of what these may import of the project
NARROW = {"gradnorm": set(), "config": set(), "launcher": {"config", "run_dir"}}
OUTSIDE = {"gradnorm": {"torch"}}  # what a room may import beside the standard library
TRAINERS = {"transformers.Trainer", "transformers.TrainerCallback", "peft.get_peft_model"}
SUPERVISOR = "grads_ds.launcher.rank"  # starts ranks with any Python: the standard library alone
LIGHT = [
    "grads_ds.config.load",
    "grads_ds.run_dir.units",
    "grads_ds.scores",
    "grads_ds.selection.stage",
    "grads_ds.data.formats",
    "grads_ds.flow.stages",
    "grads_ds.data.batches",
    "grads_ds.cli",
    "grads_ds.commands.run",
    "grads_ds.flow.unit_inputs",
    "grads_ds.report.stage",
    "grads_ds.launcher.hosts",
    "grads_ds.launcher.job",
    "grads_ds.distributed.heartbeat",
]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the launcher's as grads_ds.launcher."""
    found = {}
    for file in [*REPO.glob("grads_ds/**/*.py"), *REPO.glob("launcher/**/*.py")]:
        parts = file.relative_to(REPO).with_suffix("").parts
        parts = parts if parts[0] == "grads_ds" else ("grads_ds", *parts)
        found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imported(file: Path) -> set[str]:
    """Dotted names that the file imports: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports() -> dict[str, set[str]]:
    """For each module the modules of the project it imports: the named one, else its package."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        graph[module] = set()
        for name in imported(file):
            while name.startswith("grads_ds") and name not in MODULES:
                name = name.rpartition(".")[0]
            if name in MODULES and name != module:
                graph[module].add(name)
    return graph


GRAPH = own_imports()


def room(module: str) -> str:
    """The name at the first level of grads_ds that a module lies in."""
    return module.split(".")[1] if "." in module else module


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Nodes of one circle, each importing the next; empty when there is none."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other, [*path, other])):
                return found
        state[node] = 2
        return []

    for node in sorted(graph):
        if node not in state and (found := visit(node, [node])):
            return found
    return []


def test_rooms_import_only_what_stands_below_them() -> None:
    rank = {name: place for place, name in enumerate(ORDER)}
    assert {room(module) for module in MODULES} == {*ORDER, "grads_ds"}
    wrong = []
    for module, others in GRAPH.items():
        for other in others:
            here, there = room(module), room(other)
            if here == there or module == "grads_ds" or other == "grads_ds":
                continue
            if rank[there] > rank[here] or there not in NARROW.get(here, {there}):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_the_package_itself_imports_what_it_offers_only_when_asked() -> None:
    """`import grads_ds` must not pull a room in; what it offers is looked up by name."""
    code = "import sys, grads_ds; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_no_circle_of_files_or_rooms() -> None:
    files = {module: others for module, others in GRAPH.items() if module != "grads_ds"}
    assert circle(files) == []
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in files.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module), "grads_ds"}
    assert circle(rooms) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]  # it can find one


def test_a_recording_imports_no_trainer() -> None:
    """A rank that trains nothing saves a second of imports: transformers' trainer, PEFT."""
    needed, front = set[str](), ["grads_ds.probe.stage", "grads_ds.evaluate.stage"]
    while front:
        module = front.pop()
        needed.add(module)
        front += [other for other in GRAPH[module] - needed if other != "grads_ds"]
    trainers = {module for module in needed if _imports_at_start(MODULES[module]) & TRAINERS}
    assert trainers == set()
    assert _imports_at_start(MODULES["grads_ds.probe.callback"]) & TRAINERS  # it can find one


def _imports_at_start(file: Path) -> set[str]:
    """What of other packages the file imports outside functions."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_a_room_imports_no_other_package_than_its_own(name: str) -> None:
    files = [file for module, file in MODULES.items() if room(module) == name]
    tops = {found.split(".")[0] for file in files for found in imported(file)}
    assert tops - sys.stdlib_module_names - {"grads_ds"} == OUTSIDE[name]


def test_the_supervisor_of_a_rank_needs_the_standard_library_alone() -> None:
    """-S: without any installed package; -I: without the environment's paths."""
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import {SUPERVISOR}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([sys.executable, "-I", "-S", "-c", "import pydantic"]).returncode


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


def test_help_imports_no_command() -> None:
    """What makes --help quick on any machine: a command's file is imported when it is given."""
    code = (
        "import sys; from grads_ds.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('pydantic', 'yaml', 'numpy') if m in sys.modules]\n"
        "commands = [m for m in sys.modules if m.startswith('grads_ds.commands.')]\n"
        "assert not heavy + commands, heavy + commands"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
