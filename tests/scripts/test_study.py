"""The study's pools are clean where they say so, held-out rows are in no pool, and its differences are paired."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPO, WORDS

sys.path.insert(0, str(REPO / "scripts"))
import study
import study_pools as pools
import study_tables


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
    pools.write_cell(folder, DOMAIN, rows(40, seed=2), rows(50, seed=3), pool=90, held_out=30, noise=noise, seed=seed)
    return folder


def test_held_out_rows_and_their_near_duplicates_are_in_no_pool(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    seen = set().union(*(pools.grams(pools.answer(row)) for row in written(folder, "pool")))
    for row in written(folder, "domain"):
        pieces = pools.grams(pools.answer(row))
        assert len(pieces & seen) <= pools.SHARED * len(pieces)


def test_the_planted_faults_are_what_they_say(tmp_path: Path) -> None:
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


def test_swapped_rows_have_the_same_questions_and_the_same_answers_none_at_its_place(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    held, swapped = written(folder, "domain"), written(folder, "swapped")
    assert [row["messages"][0] for row in held] == [row["messages"][0] for row in swapped]
    assert sorted(map(pools.answer, held)) == sorted(map(pools.answer, swapped))
    assert not any(pools.answer(a) == pools.answer(b) for a, b in zip(held, swapped, strict=True))


def test_the_same_seed_gives_the_same_bytes_another_one_another_split(tmp_path: Path) -> None:
    one, two, other = cell(tmp_path / "one"), cell(tmp_path / "two"), cell(tmp_path / "other", seed=2)
    for name in ("pool", "domain", "swapped", "general"):
        assert (one / f"{name}.jsonl").read_bytes() == (two / f"{name}.jsonl").read_bytes()
    assert written(one, "domain") != written(other, "domain")


def test_too_few_distinct_rows_are_refused_with_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"wanted 20 distinct rows; found 10 among 30"):
        pools.distinct(rows(10) * 3, 20, seed=0)


@pytest.mark.parametrize("path", sorted((REPO / "configs/study").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_is_made_of_configs_that_load(path: Path, tmp_path: Path) -> None:
    from grads_ds.config import Config

    described = study.Study.model_validate(yaml.safe_load(path.read_text()))
    assert "random" in described.methods
    first = next(study.cells(described))
    for equal in described.equal:
        config = Config.model_validate(study.run_config(described, first, tmp_path, tmp_path / first.folder, equal))
        main, *names = [study.variant(m, b) for b in described.budgets for m in described.methods]
        assert config.sft.variants == ["full", *names]
        settings = {main: config.select.resolve(None)} | {name: config.select.resolve(name) for name in names}
        for budget in described.budgets:
            for method, wanted in described.methods.items():
                found = settings[study.variant(method, budget)].model_dump()
                plain = type(config.select)(**wanted, budget=budget).model_dump(exclude={"variants"})
                assert {key: found[key] for key in plain} == plain


def test_a_difference_is_paired_by_run() -> None:
    def run(base: float, random_: float, grads: float) -> study_tables.Run:
        sets = lambda value: {name: {"loss": value} for name in ("domain", "swapped", "general")}  # noqa: E731
        return {"models": {"base": sets(base), "full": sets(1.0), "random_5": sets(random_), "grads_5": sets(grads)}}

    # the levels differ wildly from run to run, the difference to random hardly does
    lines = study_tables.table([run(9, 5, 4.9), run(3, 2, 1.9), run(6, 4, 3.9)], 0.05)
    assert any(line.startswith("| grads_5 | 3 | +2.433 | +0.100 (+0.100 to +0.100)") for line in lines)


def test_one_run_has_no_interval() -> None:
    assert study_tables.interval([0.5])[1:] == (float("-inf"), float("inf"))
