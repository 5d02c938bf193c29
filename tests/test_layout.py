"""The shape of the tree: few rooms, short files, no two files of one name."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from conftest import REPO

ROOMS, LINES = 22, 260
SHARED = {"stage.py", "__init__.py"}  # names that many rooms have


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, relative to the project."""
    files = [file for folder in folders for file in REPO.glob(f"{folder}/**/*.py")]
    return sorted(file.relative_to(REPO) for file in files)


def test_the_first_level_of_the_package_can_be_taken_in_at_a_glance() -> None:
    rooms = [
        entry.name
        for entry in (REPO / "grads_ds").iterdir()
        if not entry.name.startswith((".", "__")) and entry.suffix != ".typed"
    ]
    assert len(rooms) <= ROOMS, sorted(rooms)


def test_no_file_is_longer_than_260_lines() -> None:
    files = sources("grads_ds", "launcher", "scripts", "tests")
    lengths = {str(file): len((REPO / file).read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > LINES} == {}


def test_no_two_files_share_a_name_but_a_rule_and_its_formulas() -> None:
    places: dict[str, list[Path]] = defaultdict(list)
    for file in sources("grads_ds", "launcher"):
        places[file.name].append(file.parent)
    gradnorm = Path("grads_ds/gradnorm")
    twins = {gradnorm / "formulas", gradnorm / "rules"}
    shared = {
        name: [str(folder) for folder in folders]
        for name, folders in places.items()
        if len(folders) > 1 and name not in SHARED and set(folders) != twins
    }
    assert shared == {}
