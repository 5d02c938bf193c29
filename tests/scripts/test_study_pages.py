"""The pages show the study's committed numbers, and no others."""

from __future__ import annotations

import pytest

from conftest import REPO
from scripts.study import pages


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_are_those_of_the_committed_numbers(page: str) -> None:
    text = (REPO / page).read_text()
    assert "<!-- study: " in text
    assert pages.filled(text) == text, "run: python scripts/study/pages.py"


def test_a_changed_number_is_put_right() -> None:
    text = (REPO / "README.md").read_text()
    changed = text.replace("| 40% | guided, 25 % | 9 | +", "| 40% | guided, 25 % | 9 | -")
    assert changed != text
    assert pages.filled(changed) == text
