"""The study's pools are clean where they say so, held-out rows are in no pool, and its differences
are paired.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conftest import REPO, WORDS
from scripts.study import design, pools, tables
from scripts.study import run as study


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


@pytest.mark.parametrize(
    "path", sorted((REPO / "configs/study").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_study_is_made_of_configs_that_load(path: Path, tmp_path: Path) -> None:
    from grads_ds.config.config import Config

    described = design.read(path)
    assert "random" in described.methods
    for cell_ in design.cells(described):
        for equal in design.footings(described, cell_):
            given = design.run_config(described, tmp_path, cell_, tmp_path / cell_.folder, equal)
            config = Config.model_validate(given)
            main, *names = [design.variant(*pair) for pair in design.pairs(described, equal)]
            assert config.sft.variants == ["full", *names]
            settings = {main: config.select.resolve(None)} | {
                name: config.select.resolve(name) for name in names
            }
            for method, budget in design.pairs(described, equal):
                found = settings[design.variant(method, budget)].model_dump()
                plain = type(config.select)(**described.methods[method], budget=budget).model_dump(
                    exclude={"variants"}
                )
                assert {key: found[key] for key in plain} == plain


def test_a_study_like_another_says_only_what_differs(tmp_path: Path) -> None:
    noise, main = (design.read(REPO / f"configs/study/{name}.yaml") for name in ("noise", "main"))
    assert noise.methods == main.methods and noise.domains == main.domains
    assert noise.pool != main.pool and set(noise.footings) != set(main.footings)
    assert noise.run == main.run | {"evaluate": main.run["evaluate"] | {"multiple_choice": {}}}
    (tmp_path / "odd.yaml").write_text(f"like: {REPO}/configs/study/noise.yaml\npools: 3\n")
    with pytest.raises(ValueError, match="pools"):
        design.read(tmp_path / "odd.yaml")


def test_a_second_footing_takes_over_the_probe_and_the_whole_pools_model_alone(
    tmp_path: Path,
) -> None:
    run = tmp_path / "epochs"
    for file in (
        "scores/table.parquet",
        "selection/variants/random_5/selected.jsonl",
        "selection/variants/full/x",
        "sft/model/w",
        "sft/variants/full/model/w",
        "sft/variants/random_5/model/w",
        "evaluation.json",
        "evaluation/base.parquet",
        "tensorboard/events",
        "state/sft.full.json",
    ):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("")
    study.shutil.copytree(run, tmp_path / "steps", ignore=study._of_subsets)
    found = {
        str(file.relative_to(tmp_path / "steps"))
        for file in (tmp_path / "steps").rglob("*")
        if file.is_file()
    }
    assert found == {
        "scores/table.parquet",
        "selection/variants/random_5/selected.jsonl",
        "selection/variants/full/x",
        "sft/variants/full/model/w",
        "state/sft.full.json",
    }


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


def run(base: float, random_: float, grads: float, general: float = 1.0) -> tables.Run:
    def sets(value: float, other: float = 1.0) -> dict[str, dict[str, float]]:
        losses = {"domain": value, "swapped": value, "general": other}
        return {name: {"loss": loss} for name, loss in losses.items()}

    models = {
        "base": sets(base),
        "full": sets(1.0),
        "random_5": sets(random_),
        "grads_5": sets(grads, general),
    }
    accuracy = {name: {"domain": 0.5} for name in models}
    return {"equal": "epochs", "noise": 0.4, "models": models, "accuracy": accuracy}


def test_a_difference_is_paired_by_run() -> None:
    # the levels differ wildly from run to run, the difference to random hardly does
    lines = tables.table([run(9, 5, 4.9), run(3, 2, 1.9), run(6, 4, 3.9)], 0.05)
    assert any(
        line.startswith("| grads | 3 | +2.433 | **+0.100** (+0.100 to +0.100)") for line in lines
    )
    assert tables.interval([0.5])[1:] == (float("-inf"), float("inf"))


def test_the_rule_puts_out_what_loses_significantly_and_weighs_forgetting() -> None:
    losing = [run(5, 4, 4.1), run(5, 4, 4.11), run(5, 4, 4.12)]
    line = tables.rule(losing, ["grads"])[-1]
    assert line.startswith(
        "| grads | 5 %, 40 % faults, equal epochs | -0.110 (-0.135 to -0.085) | yes |"
    )
    wavering = [
        run(5, 4, 3.9, general=1.2),
        run(5, 4, 4.1, general=1.2),
        run(5, 4, 4.0, general=1.2),
    ]
    line = tables.rule(wavering, ["grads"])[-1]
    assert "| no | -0.200 | -0.200 |" in line  # no gain, and 0.2 nats of general loss
    apart = [run(5, 4, 3.9), {**run(5, 4, 3.0), "equal": "steps"}]
    for name in ("base", "full", "random_5", "grads_5"):
        apart[0]["models"][name.replace("grads", "other")] = apart[0]["models"][name]
    lines = tables.rule(apart, ["grads", "other"])[2:]
    assert [line.split(" | ")[-2:] for line in lines] == [
        ["+0.550", "+0.100 |"],
        ["+0.100", "+0.100 |"],
    ]
