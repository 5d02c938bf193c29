"""The verdict says what the numbers say, the unwelcome as plainly as the welcome; intervals are of
paired differences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grads_ds.report.examples import EXCERPT, excerpt
from grads_ds.report.outcome import outcome_of, paired_interval, same_size
from grads_ds.report.verdict import verdict

HERE = Path("/nonexistent")


def evaluated(**losses: tuple[float, float]) -> dict[str, Any]:
    """evaluation.json with 50 selected, 50 random and 1000 pool samples."""
    about = {
        "selected": ("grads", 50),
        "random": ("random", 50),
        "random_2": ("random", 50),
        "big": ("random", 500),
        "full": ("full", 1000),
    }
    return {
        "models": {
            n: {"domain": {"loss": d, "perplexity": 1.0}, "general": {"loss": g, "perplexity": 1.0}}
            for n, (d, g) in losses.items()
        },
        "variants": {
            n: {"method": about[n][0], "budget": 0.05, "num_samples": about[n][1]}
            for n in losses
            if n != "base"
        },
    }


def words(**losses: tuple[float, float]) -> str:
    return " ".join(s.text for s in verdict(outcome_of(evaluated(**losses), HERE)))


def test_a_selection_that_beats_random_is_said_to() -> None:
    text = words(base=(3.0, 2.0), selected=(2.5, 2.01), random=(2.6, 2.02), full=(2.4, 2.2))
    assert "lowered the loss from 3.0000 (base) to 2.5000" in text
    assert "selection beat random by 0.1000" in text and "one random draw" in text
    assert "reaches 2.4000: the subset is 0.1000 worse" in text
    assert "changed by +0.0100 from the base's 2.0000: that much was forgotten" in text
    assert "full pool +0.2000, random (random) +0.0200" in text


def test_a_selection_that_does_not_beat_random_is_said_not_to() -> None:
    text = words(base=(3.0, 2.0), selected=(2.7, 1.9), random=(2.6, 2.0), full=(2.8, 2.2))
    assert "selection did not beat random, it is 0.1000 worse" in text
    assert "the subset is 0.1000 better" in text and "nothing was forgotten" in text
    assert "did not beat random, they are level" in words(
        base=(3, 2), selected=(2.6, 2), random=(2.6, 2)
    )


def test_training_that_hurts_is_said_to() -> None:
    outcome = outcome_of(evaluated(base=(3.0, 2.0), selected=(3.2, 2.0)), HERE)
    first = verdict(outcome)[0]
    assert "raised the loss from 3.0000 (base) to 3.2000" in first.text and first.tone == "bad"


def test_without_a_random_subset_of_the_size_nothing_is_claimed() -> None:
    text = words(base=(3.0, 2.0), selected=(2.5, 2.0), big=(2.4, 2.0))
    assert (
        "whether the selection is better than chance is not known" in text
        and "beat random" not in text
    )


def test_several_random_draws_are_averaged() -> None:
    text = words(base=(3.0, 2.0), selected=(2.5, 2.0), random=(2.6, 2.0), random_2=(2.8, 2.0))
    assert (
        "2 random subsets of the same size reach 2.7000 on average: selection beat random by"
        " 0.2000." in text
    )
    assert "one random draw" not in text


def test_the_verdict_says_when_held_out_rows_are_in_the_pool() -> None:
    losses = {"base": (3.0, 2.0), "selected": (2.5, 2.0)}
    outcome = outcome_of(evaluated(**losses), HERE)
    name = outcome.sets[0]
    counts = {"kept": 200, "also_in_pool": 3, "near_in_pool": 7}
    said = verdict(outcome, {"sets": {name: counts}})[-1]
    assert said.tone == "bad" and "5.0%" in said.text
    assert "3 token for token, 7 nearly" in said.text
    clean = {"sets": {name: {"kept": 200, "also_in_pool": 0, "near_in_pool": 0}}}
    assert verdict(outcome, clean) == verdict(outcome)


def test_without_models_or_sets_there_is_no_verdict() -> None:
    assert "no verdict" in verdict(outcome_of({}, HERE))[0].text
    assert (
        "no verdict" in verdict(outcome_of({"models": {"base": {}, "selected": {}}}, HERE))[0].text
    )


def test_sets_of_other_names_are_told_apart() -> None:
    models = {
        m: {s: {"loss": 1.0} for s in ("pubmed", "alpaca", "gsm8k")} for m in ("base", "selected")
    }
    outcome = outcome_of({"models": models, "variants": {}}, HERE)
    assert (outcome.domain, outcome.general) == (["pubmed"], ["alpaca", "gsm8k"])
    models = {
        m: {s: {"loss": 1.0} for s in ("general_math", "domain", "domain_swapped", "general_chat")}
        for m in models
    }
    outcome = outcome_of({"models": models, "variants": {}}, HERE)
    assert (outcome.domain, outcome.general) == (["domain"], ["general_math", "general_chat"])


def test_intervals_of_differences_come_from_paired_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, 400)
    base = rng.normal(3.0, 1.0, 400)  # samples differ far more than models do
    per_model = {
        "base": base,
        "random": base - 0.5,
        "selected": base - 0.52 + rng.normal(0, 0.05, 400),
    }
    value = evaluated(
        **{n: (float((v * tokens).sum() / tokens.sum()), 2.0) for n, v in per_model.items()}
    )
    for name, losses in per_model.items():
        pq.write_table(
            pa.table({"loss": losses, "num_target_tokens": tokens}), tmp_path / f"{name}.parquet"
        )
        value["models"][name]["domain"]["sample_losses_file"] = f"{name}.parquet"
    outcome = outcome_of(value, tmp_path)
    chosen = outcome.model("selected")
    assert chosen is not None
    gap = chosen.measures["domain"].against_random
    assert gap is not None and gap.interval is not None
    assert gap.interval[0] < gap.value < gap.interval[1] < 0 and gap.tone == "good"
    assert gap.interval[1] - gap.interval[0] < 0.03  # unpaired it would be 0.2 wide
    assert "95 % interval" in verdict(outcome)[0].text
    general = chosen.measures["general"].against_random
    assert general is not None and general.interval is None and not outcome.paired


def test_a_lead_within_chance_is_not_called_a_win(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tokens = np.full(200, 10)
    random = rng.normal(2.5, 1.0, 200)
    per_model = {
        "base": random + 0.5,
        "random": random,
        "selected": random + rng.permutation(np.linspace(-0.51, 0.49, 200)),
    }
    value = evaluated(**{n: (float(v.mean()), 2.0) for n, v in per_model.items()})
    for name, losses in per_model.items():
        pq.write_table(
            pa.table({"loss": losses, "num_target_tokens": tokens}), tmp_path / f"{name}.parquet"
        )
        value["models"][name]["domain"]["sample_losses_file"] = f"{name}.parquet"
    text = " ".join(s.text for s in verdict(outcome_of(value, tmp_path)))
    assert "did not clearly beat random, its lead of 0.0100 is within chance" in text


def test_interval_of_a_constant_gap_is_the_gap() -> None:
    losses, tokens = np.array([1.0, 2.0, 4.0]), np.array([3, 5, 7])
    assert paired_interval(losses - 0.25, [losses], tokens) == pytest.approx((-0.25, -0.25))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(100, 100, True), (100, 98, True), (100, 97, False), (100, None, False), (None, None, False)],
)
def test_same_size(one: int | None, other: int | None, same: bool) -> None:
    assert same_size(one, other) is same


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=10), st.text(max_size=900)), max_size=13))
def test_excerpts_are_bounded_whatever_the_row(turns: list[tuple[str, str]]) -> None:
    import json

    parts = excerpt(json.dumps({"messages": [{"role": r, "content": t} for r, t in turns]}))
    assert sum(len(text) for _, text in parts) <= EXCERPT + len(parts)


def test_a_long_prompt_does_not_hide_the_answer() -> None:
    import json

    parts = excerpt(json.dumps({"instruction": "x" * 5000, "input": "", "output": "the answer"}))
    assert [role for role, _ in parts] == ["instruction", "output"]
    assert (
        parts[1][1] == "the answer"
        and parts[0][1].endswith("x…")
        and len(parts[0][1]) == EXCERPT - 10 + 1
    )
    assert excerpt("not json") == [("row", "not json")]
    assert excerpt(json.dumps({"conversations": [{"from": "human", "value": "hi"}]})) == [
        ("human", "hi")
    ]
