"""The quickstart's material: split, bad rows marked, repeatable; its tokenizer keeps ids."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.quickstart import chat_tokenizer, corpus
from scripts.quickstart.documentation import paragraphs

REPO = Path(__file__).resolve().parents[2]


def build(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/quickstart/corpus.py"), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("material") / "a folder"
    build(out)
    return out


def rows_of(material: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (material / f"{name}.jsonl").read_text().splitlines()]


def answers(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows if "messages" in row]


@pytest.mark.slow
def test_pool_is_large_enough_and_a_third_of_it_is_bad(material: Path) -> None:
    kinds = Counter(row["kind"] for row in rows_of(material, "domain_pool"))
    assert sum(kinds.values()) >= 2000
    assert set(kinds) == {"good", "wrong_answer", "near_duplicate", "off_domain", "trivial"}
    assert 0.30 <= 1 - kinds["good"] / sum(kinds.values()) <= 0.35


@pytest.mark.slow
def test_no_held_out_answer_is_in_anything_that_is_trained_on(material: Path) -> None:
    seen: set[str] = set()
    for name in ("general", "domain_pool"):
        for row in rows_of(material, name):
            text = row.get("text") or row["messages"][1]["content"]
            seen.update(run for part in text.split("\n\n") for run in corpus.shingles(part))
    for name in ("domain_heldout", "general_heldout"):
        held_out = answers(rows_of(material, name))
        assert 150 <= len(held_out) <= 300
        leaked = [text for text in held_out if seen.intersection(corpus.shingles(text))]
        assert not leaked, leaked[:3]


@pytest.mark.slow
def test_wrong_answers_are_wrong_and_good_ones_are_not_repeated(material: Path) -> None:
    pool = rows_of(material, "domain_pool")
    right = {
        row["messages"][0]["content"]: row["messages"][1]["content"]
        for row in pool
        if row["kind"] == "good"
    }
    wrong = [row["messages"] for row in pool if row["kind"] == "wrong_answer"]
    assert all(question["content"] in right for question, _ in wrong)
    assert all(right[question["content"]] != answer["content"] for question, answer in wrong)
    assert len(set(right.values())) == len(right)


@pytest.mark.slow
def test_same_seed_and_versions_give_the_same_bytes_and_a_second_run_skips(
    material: Path, tmp_path: Path
) -> None:
    build(tmp_path)
    for file in sorted(material.glob("*.jsonl")):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name
    assert "skipped" in build(tmp_path).stdout


def test_paragraphs_keep_prose_and_drop_markup_and_lists() -> None:
    doc = """Sort `a` with :func:`~numpy.sort`, see [1]_.

    .. versionadded:: 1.0

    It keeps the order of equals

    Parameters
    ----------
    a : array
    """
    assert paragraphs(inspect.cleandoc(doc)) == [
        "Sort a with numpy.sort, see.",
        "It keeps the order of equals.",
    ]


def test_distinct_drops_copies_that_differ_in_a_few_words() -> None:
    text = "Return the eigenvalues of a complex Hermitian or real symmetric matrix"
    kept = corpus.distinct(
        [("a", text), ("b", text + " quickly"), ("a", "something else entirely, with other words")]
    )
    assert kept == [("a", text)]


def test_tokenizer_keeps_sentencepiece_ids_and_marks_the_assistant_tokens(tmp_path: Path) -> None:
    text = [
        "What does the function return? It returns a list of words in order, one for each line."
    ] * 3
    lines = [
        f"{line} {i} {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(500) for line in text
    ]
    chat_tokenizer.VOCABULARY = 340  # bytes, marks and a few merges: all that this text can carry
    tokenizer = chat_tokenizer.train_tokenizer(lines, tmp_path)
    chat_tokenizer.check_tokenizer(
        tokenizer, tmp_path, ["plain", "naïve — 東京\n\ttwo  spaces", lines[7]]
    )
    messages = [
        {"role": "user", "content": "What does it do?"},
        {"role": "assistant", "content": "It returns."},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [
        i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark
    ]
    assert tokenizer.decode(kept).strip() == "It returns.</s>"
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert tokenizer.pad_token_id not in encoded["input_ids"]
