"""The study's pools are clean where they say so, and held-out rows are in no pool."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conftest import WORDS
from scripts.study import pools


def rows(count: int, seed: int = 0, words: int = 30) -> list[pools.Row]:
    draw = random.Random(seed)
    vocabulary = [f"{word}{i}" for word in WORDS for i in range(20)]
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {seed} {i}"},
                {"role": "assistant", "content": " ".join(draw.choices(vocabulary, k=words))},
            ]
        }
        for i in range(count)
    ]


def written(folder: Path, name: str) -> list[pools.Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


# a raw set holds near-copies of its own
DOMAIN = rows(150) + [pools.near_duplicate(row, random.Random(7)) for row in rows(60)]


def cell(folder: Path, noise: float = 0.3, seed: int = 1) -> Path:
    pools.write_cell(
        folder,
        DOMAIN,
        rows(40, seed=2),
        rows(50, seed=3),
        pool=90,
        held_out=30,
        noise=noise,
        seed=seed,
    )
    return folder


def test_held_out_rows_and_their_near_duplicates_are_in_no_pool(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    seen = set().union(*(pools.grams(pools.answer(row)) for row in written(folder, "pool")))
    for row in written(folder, "domain"):
        pieces = pools.grams(pools.answer(row))
        assert len(pieces & seen) <= pools.SHARED * len(pieces)


def test_the_planted_noise_is_what_it_says(tmp_path: Path) -> None:
    pool = written(cell(tmp_path), "pool")
    kinds = [row["kind"] for row in pool]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "clean": 63,
        "wrong_answer": 9,
        "near_duplicate": 9,
        "off_domain": 9,
    }
    given = {(row["messages"][0]["content"], pools.answer(row)) for row in DOMAIN}
    questions = {question for question, _ in given}
    for row in pool:
        question = row["messages"][0]["content"]
        assert (question in questions) == (row["kind"] != "off_domain")
        assert ((question, pools.answer(row)) in given) == (row["kind"] == "clean")


def test_swapped_rows_have_the_same_questions_and_the_same_answers_none_at_its_place(
    tmp_path: Path,
) -> None:
    folder = cell(tmp_path)
    held, swapped = written(folder, "domain"), written(folder, "swapped")
    assert [row["messages"][0] for row in held] == [row["messages"][0] for row in swapped]
    assert sorted(map(pools.answer, held)) == sorted(map(pools.answer, swapped))
    assert not any(pools.answer(a) == pools.answer(b) for a, b in zip(held, swapped, strict=True))


def test_the_same_seed_gives_the_same_bytes_another_one_another_split(tmp_path: Path) -> None:
    one, two, other = (
        cell(tmp_path / "one"),
        cell(tmp_path / "two"),
        cell(tmp_path / "other", seed=2),
    )
    for name in ("pool", "domain", "swapped", "general"):
        assert (one / f"{name}.jsonl").read_bytes() == (two / f"{name}.jsonl").read_bytes()
    assert written(one, "domain") != written(other, "domain")


def test_too_few_distinct_rows_are_refused_with_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"wanted 20 distinct rows; found 10 among 30"):
        pools.distinct(rows(10) * 3, 20, seed=0)


def test_a_question_is_asked_with_its_own_answer_and_two_others(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    held = written(folder, "domain")
    asked = written(folder, "domain_choice")
    assert len(asked) == len(held)
    for row, question in zip(held, asked, strict=True):
        assert question["question"] == row["messages"][0]["content"]
        assert question["choices"][question["answer"]] == pools.answer(row)[: pools.CHOICE_LENGTH]
        assert len(set(question["choices"])) == pools.CHOICES
    assert len({question["answer"] for question in asked}) == pools.CHOICES


def test_anchor_rows_are_in_no_other_set(tmp_path: Path) -> None:
    pools.write_cell(
        tmp_path,
        DOMAIN,
        rows(40, seed=2),
        rows(50, seed=3),
        pool=80,
        held_out=30,
        anchor=12,
        noise=0.3,
        seed=1,
    )
    answers = {
        name: set(map(pools.answer, written(tmp_path, name)))
        for name in ("anchor", "pool", "domain")
    }
    assert len(answers["anchor"]) == 12
    assert not answers["anchor"] & (answers["pool"] | answers["domain"])


def test_a_general_anchor_is_of_general_rows_that_are_not_held_out_and_moves_no_other_file(
    tmp_path: Path,
) -> None:
    general = rows(50, seed=3)
    for source in ("domain", "general"):
        pools.write_cell(
            tmp_path / source,
            DOMAIN,
            rows(40, seed=2),
            general,
            pool=80,
            held_out=30,
            anchor=12,
            anchor_from=source,
            noise=0.3,
            seed=1,
        )
    anchor, held_out = (
        written(tmp_path / "general", "anchor"),
        written(tmp_path / "general", "general"),
    )
    assert len(anchor) == 12
    assert all(row in general and row not in held_out for row in anchor)
    replayed = written(tmp_path / "domain", "replay")
    assert len(replayed) == 20 and not any(row in held_out for row in replayed)
    for name in ("pool", "domain", "general", "domain_choice", "replay"):
        assert written(tmp_path / "domain", name) == written(tmp_path / "general", name)


def test_wrong_answers_of_like_topic_are_those_of_the_most_alike_questions() -> None:
    asked = [
        {
            "messages": [
                {"role": "user", "content": f"topic{i // 4} word{i // 4} number{i}"},
                {"role": "assistant", "content": f"answer {i}"},
            ]
        }
        for i in range(24)
    ]
    for number, task in enumerate(pools.multiple_choice(asked, 3, choices=4, like_topic=True)):
        assert task["choices"][task["answer"]] == f"answer {number}"
        assert {int(text.split()[1]) // 4 for text in task["choices"]} == {number // 4}
    drawn = pools.multiple_choice(asked, 3)
    assert [len(task["choices"]) for task in drawn] == [3] * 24


def test_verdicts_are_the_first_words_of_answers() -> None:
    answers = ["yes. It does.", "Maybe so", "No", "It depends", "yesterday"]
    asked = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]}
        for a in answers
    ]
    found = {task["question"]: task["answer"] for task in pools.verdicts(asked, 0)}
    assert found == {"yes. It does.": 0, "Maybe so": 2, "No": 1}
