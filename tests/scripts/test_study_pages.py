"""The pages show the study's committed numbers, and no others."""

from __future__ import annotations

import sys

import pytest

from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import study_pages


@pytest.mark.parametrize("page", study_pages.PAGES)
def test_tables_are_those_of_the_committed_numbers(page: str) -> None:
    text = (REPO / page).read_text()
    assert "<!-- study: " in text
    assert study_pages.filled(text) == text, "run: python scripts/study_pages.py"


def test_a_changed_number_is_put_right() -> None:
    text = (REPO / "README.md").read_text()
    changed = text.replace("| magnitude | **-", "| magnitude | **+")
    assert changed != text
    assert study_pages.filled(changed) == text
