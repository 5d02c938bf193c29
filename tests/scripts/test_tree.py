"""docs/tree.md names every file there is, with the sentence the file opens with."""

from __future__ import annotations

from conftest import REPO
from scripts import tree


def test_the_tree_page_shows_the_tree_as_it_is() -> None:
    assert tree.PAGE.read_text() == tree.tree(), "run: python scripts/tree.py --write"


def test_every_source_file_says_what_it_is() -> None:
    silent = [
        name
        for name in tree.files()
        if name.endswith((".py", ".sh", ".yaml", ".md")) and not tree.phrase(REPO / name)
    ]
    assert silent == []
