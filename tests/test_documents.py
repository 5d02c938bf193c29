"""The documents point at what is there: links, the README's map, the recipes; and keep to 100
columns.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from conftest import REPO

COLUMNS = 100
WRITTEN = (".md", ".py", ".sh", ".yaml", ".yml", ".toml", ".html", ".css", "Dockerfile", "run")


def tracked() -> list[str]:
    """Files of the project that people read and write."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [name for name in sorted(set(listing.splitlines())) if (REPO / name).is_file()]


PAST = ("CHANGELOG.md", "docs/LOG.md")  # tell of files that were
PAGES = [name for name in tracked() if name.endswith(".md")]


def too_long(name: str, lines: list[str]) -> list[int]:
    """Numbers of the lines above 100 columns; rows of Markdown tables cannot be wrapped, nor can
    addresses, data URIs and what a linter reads at the end of a line.
    """
    return [
        number
        for number, line in enumerate(lines, 1)
        if len(re.sub(r"  # (type: ignore|noqa).*", "", line)) > COLUMNS
        and not (name.endswith(".md") and line.startswith("|"))
        and not re.search(r"(https?://|data:)\S{40,}", line)
    ]


def test_lines_are_counted_as_said() -> None:
    long = "x" * 101
    assert too_long("a.md", [f"|{long}", long, "x" * 100]) == [2]
    assert too_long("a.py", [f"|{long}", f"url(data:image/svg+xml;{long})"]) == [1]


def test_every_written_line_fits_in_100_columns() -> None:
    found = []
    for name in tracked():
        if name.endswith(WRITTEN) and not (REPO / name).is_symlink():
            lines = (REPO / name).read_text().splitlines()
            found += [f"{name}:{number}" for number in too_long(name, lines)]
    assert found == []


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (REPO / page).read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    here = (REPO / page).parent
    assert [link for link in links if "://" not in link and not (here / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PAST])
def test_paths_that_a_page_names_exist(page: str) -> None:
    """A path with a placeholder (`*`, `<name>`) is not one."""
    rooms = "grads_ds|launcher|scripts|tests|configs|docs|docker"
    named = re.findall(
        rf"(?<![\w/.-])((?:{rooms})/[\w./-]*\w/?)(?![\w*<])", (REPO / page).read_text()
    )
    assert [name for name in named if not (REPO / name).exists()] == []


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w./-]+\.md)\)", (REPO / "docs/index.md").read_text()))
    pages = {str(file.relative_to(REPO / "docs")) for file in (REPO / "docs").rglob("*.md")}
    assert listed | {"index.md"} == {page for page in pages if not page.startswith("results/")}


def test_the_readme_is_short_and_its_map_is_of_this_tree() -> None:
    lines = (REPO / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    start = lines.index("## Where things are")
    drawn = [line for line in lines[start:] if line.startswith("    ")]
    assert len(drawn) <= 40
    folder = Path()
    for line in drawn:
        inner = line.startswith("      ")
        names = re.match(r"\s+((?:[\w.]+/?(?:, )?)+)", line)
        assert names, line
        deep = line.startswith("        ")
        for name in names[1].strip().split(", "):
            place = (folder if deep else folder.parent if folder.parts[1:] else folder) / name
            place = place if inner else Path(name)
            assert (REPO / place).exists(), line
            if name.endswith("/") and not deep:
                last = place
        if not inner or (not deep and names[1].strip().endswith("/") and "," not in names[1]):
            folder = last


def recipes() -> dict[str, list[str]]:
    """The recipes of CONTRIBUTING.md: what is added -> the paths it touches."""
    text = (REPO / "CONTRIBUTING.md").read_text()
    between = text.split("<!-- recipes -->")[1].split("<!-- end of recipes -->")[0]
    found = {}
    for part in between.strip().split("\n\n"):
        name, *lines = part.split("\n")
        heads = [line.split(":")[0] for line in lines if line.startswith("- ")]
        found[name.strip("*")] = [path for head in heads for path in re.findall(r"`(.+?)`", head)]
    return found


# how many files each change may touch
ALLOWED = {
    "selection method on columns that the table has": 2,
    "selection method with a column of its own": 4,
    "score column": 2,
    "score column with a setting of its own": 3,
    "config key": 2,
    "stage": 10,
    "layer rule": 3,
    "backend that starts ranks": 2,
    "batch queue": 1,
    "exit status": 4,
    "file kind": 2,
    "data format": 2,
    "export format": 2,
    "task of the evaluate stage": 2,
    "measure of forgetting": 2,
    "checkpoint policy": 2,
    "optimizer": 3,
    "figure of the report": 3,
    "section of the report": 3,
    "option of fine-tuning": 2,
}


def test_the_recipes_name_paths_of_this_tree_and_few_of_them() -> None:
    found = recipes()
    assert {name: len(paths) for name, paths in found.items()} == ALLOWED
    gone = [path for paths in found.values() for path in paths if not (REPO / path).exists()]
    assert gone == []
