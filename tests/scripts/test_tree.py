"""The README's tree names every file there is, with the phrase the file opens with."""

from __future__ import annotations

import runpy

from conftest import REPO

TREE = runpy.run_path(str(REPO / "scripts/tree.py"))


def test_the_readme_shows_the_tree_as_it_is() -> None:
    shown = TREE["PLACE"].search((REPO / "README.md").read_text())
    assert shown and shown[0] == TREE["tree"](), "run: python scripts/tree.py --write"


def test_every_source_file_says_what_it_is() -> None:
    silent = [
        line
        for line in TREE["tree"]().splitlines()
        if line.rstrip().endswith((".py", ".sh", ".yaml"))
    ]
    assert silent == []
