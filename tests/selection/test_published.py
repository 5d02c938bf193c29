"""Each rival ranks as its definition says, asks for the columns it lacks by name, and third parties
can add their own.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.baselines import length_bins
from grads_ds.selection.choose import Choice, choose
from grads_ds.selection.cover import farthest_first, grid_cover
from grads_ds.selection.methods import CRITERIA
from selection.pools import score_table

FIVE = {
    "loss": np.array([0.5, 3.0, 1.0, 2.0, 4.0]),
    "num_target_tokens": np.array([50, 10, 30, 40, 20]),
    "embedding_grad_norm": np.array([3.0, 0.1, 1.0, 2.0, 0.5]),
    "lm_head_grad_norm": np.array([4.0, 9.0, 1.0, 0.1, 0.5]),
    "ifd": np.array([0.2, 1.4, 0.9, 1.1, 0.6]),
    "el2n": np.array([0.2, 0.9, 0.3, 0.8, 0.1]),
    "anchor_cosine_embedding": np.array([-0.9, 0.1, 0.0, 0.8, -0.2]),
    "anchor_inner_product_embedding": np.array([1.0, -5.0, 2.0, 3.0, 0.0]),
    "anchor_inner_product_lm_head": np.array([1.0, 9.0, -4.0, 0.5, 0.0]),
    "embedding_grad_norm_early": np.array([3.0, 0.2, 1.0, 1.0, 50.0]),
}


def order(method: str, table: ScoreTable | None = None, **select: Any) -> list[int]:
    choice = choose(
        table or score_table(5, **FIVE), SelectConfig(method=method, budget=1.0, **select), 0
    )
    return choice.sample_id[choice.chosen].tolist()


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("loss", [4, 1, 3, 2, 0]),
        ("length", [0, 3, 2, 4, 1]),
        ("grand", [1, 0, 3, 2, 4]),  # 9.0006, 5, 2.0025, 1.41, 0.71
        ("ifd", [2, 4, 0, 3, 1]),  # from 1 on last
        ("el2n", [1, 3, 2, 0, 4]),
        ("anchor_conflict", [3, 1, 2, 4, 0]),
        ("orthogonal", [2, 1, 4, 3, 0]),
        ("less", [1, 3, 0, 4, 2]),  # 4, 3.5, 2, 0, -2
        ("snr", [4, 1, 3, 0, 2]),  # unsteady norms first
    ],
)
def test_order_is_the_definition(method: str, wanted: list[int]) -> None:
    assert order(method) == wanted


def test_grand_takes_the_total_where_it_was_recorded() -> None:
    table = score_table(5, **FIVE, total_grad_norm=np.array([1.0, 2, 3, 4, 5]))
    assert order("grand", table) == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("method", "column"),
    [
        ("ifd", "ifd"),
        ("el2n", "el2n"),
        ("anchor_conflict", "anchor_cosine_<group>"),
        ("orthogonal", "anchor_cosine_<group>"),
        ("less", "anchor_inner_product_<group>"),
        ("snr", "<group>_grad_norm_early"),
    ],
)
def test_a_missing_column_is_named_with_the_way_to_record_it(method: str, column: str) -> None:
    with pytest.raises(UserError, match=f"wanted column {column} .*found num_tokens.*record"):
        order(method, score_table(5))


def test_a_sample_that_a_rival_cannot_judge_is_left_out() -> None:
    table = score_table(5, **(FIVE | {"ifd": np.array([0.2, np.nan, 0.9, 1.1, 0.6])}))
    assert order("ifd", table) == [2, 4, 0, 3]
    assert order("mixture", table, mixture={"ifd": 1, "loss": 1}) == [4, 2, 3, 0]


def test_perplexity_band_keeps_the_middle() -> None:
    table = score_table(400)
    choice = choose(table, SelectConfig(method="perplexity_band", budget=100, band=(0.3, 0.6)), 0)
    low, high = np.quantile(table.floats("loss"), [0.3, 0.6])
    assert low <= table.floats("loss")[choice.chosen].min()
    assert table.floats("loss")[choice.chosen].max() <= high


def test_random_is_uniform_and_seeded() -> None:
    table = score_table(2000)
    hits = np.zeros(2000)
    for seed in range(100):
        hits[choose(table, SelectConfig(method="random", budget=0.1), seed).chosen] += 1
    # a binomial count of 100 draws at 0.1 each: mean 10, deviation 3
    assert hits.mean() == pytest.approx(10)
    assert hits.std() == pytest.approx(3.0, rel=0.08)
    assert abs(np.corrcoef(hits, np.arange(2000))[0, 1]) < 0.08


def test_length_matched_is_random_among_samples_as_long_as_grads_chooses() -> None:
    n, budget = 2000, 0.1
    table = score_table(n)
    bins = length_bins(table.floats("num_target_tokens"))
    lengths = table.floats("num_target_tokens")
    assert len(np.unique(bins)) > 80
    assert all(np.ptp(lengths[bins == code]) <= 12 for code in np.unique(bins))
    grads = choose(table, SelectConfig(budget=budget, region="magnitude"), 0)
    wanted = np.bincount(bins[grads.chosen], minlength=n)
    hits = np.zeros(n)
    for seed in range(200):
        matched = choose(
            table, SelectConfig(method="length_matched", budget=budget, region="magnitude"), seed
        )
        assert (np.bincount(bins[matched.chosen], minlength=n) == wanted).all()
        hits[matched.chosen] += 1
    # within a bin every sample is as likely as the others: binomial counts about the bin's share
    share = wanted[bins] / np.bincount(bins, minlength=n)[bins]
    spread = np.sqrt(200 * share * (1 - share))
    normal = (hits - 200 * share)[spread > 0] / spread[spread > 0]
    assert abs(normal.std() - 1) < 0.08
    assert abs(np.corrcoef(hits - 200 * share, grads.signal)[0, 1]) < 0.08
    # the lengths GrADS chooses are far from the pool's, and the control's are as far
    off = {
        name: lengths[c.chosen].mean() - lengths.mean()
        for name, c in (("grads", grads), ("matched", matched))
    }
    assert off["grads"] < -30
    assert off["matched"] == pytest.approx(off["grads"], abs=1.5)


def test_length_matched_follows_the_settings_of_grads() -> None:
    table = score_table(400)
    bins = length_bins(table.floats("num_target_tokens"))
    for settings in ({"region": "density"}, {"region": "mass", "signal": "l2"}, {"budget": "auto"}):
        pair = [
            choose(table, SelectConfig(method=m, **settings), 3).chosen
            for m in ("grads", "length_matched")
        ]
        counts = [np.bincount(bins[chosen], minlength=400).tolist() for chosen in pair]
        assert counts[0] == counts[1]
        assert set(pair[0]) != set(pair[1])


def test_mixture_of_one_is_that_method_and_weights_count() -> None:
    table = score_table(300)
    assert order("mixture", table, mixture={"loss": 3.0}) == order("loss", table)
    heavy = order("mixture", table, mixture={"loss": 9, "length": 1})[:60]
    light = order("mixture", table, mixture={"loss": 1, "length": 9})[:60]
    top = set(order("loss", table)[:60])
    assert len(top & set(heavy)) > 2 * len(top & set(light))


def radius(features: np.ndarray, chosen: np.ndarray) -> float:
    distance = np.linalg.norm(features[:, None] - features[None, chosen], axis=2)
    return float(distance.min(axis=1).max())


def test_cover_leaves_nobody_far_away() -> None:
    features = np.random.default_rng(0).normal(size=(1500, 3))
    draw = np.random.default_rng(1).random(1500)
    for k in (10, 50, 200):
        exact = radius(features, np.argsort(-farthest_first(features), kind="stable")[:k])
        grid = radius(features, np.argsort(-grid_cover(features, draw), kind="stable")[:k])
        chance = radius(features, np.arange(k))
        assert exact < chance
        assert grid < chance


def test_farthest_first_is_the_greedy_definition() -> None:
    features = np.random.default_rng(0).normal(size=(40, 2))
    got = np.argsort(-farthest_first(features), kind="stable").tolist()
    taken = got[:1]
    while len(taken) < 40:
        away = [min(np.linalg.norm(features[i] - features[j]) for j in taken) for i in range(40)]
        taken.append(int(np.argmax(away)))
    assert got == taken


DOCUMENTED = (Path(__file__).resolve().parents[2] / "docs/selection.md").read_text()
FAULTY = """
def faulty(table, settings, seed):
    return np.zeros(3)

def broken(table, settings, seed):
    raise KeyError("gone")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with three criteria, installed the way pip leaves one; the first is the
    documentation's example.
    """
    example = DOCUMENTED.partition("    # their_criteria.py\n")[2].partition(
        "    # pyproject.toml"
    )[0]
    (tmp_path / "their_criteria.py").write_text(textwrap.dedent(example) + FAULTY)
    info = tmp_path / "their_criteria-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-criteria\nVersion: 1.0\n")
    names = "\n".join(
        f"{name} = their_criteria:{name}" for name in ("shortest", "faulty", "broken")
    )
    (info / "entry_points.txt").write_text(f"[grads_ds.selection]\n{names}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_criteria", raising=False)


@pytest.mark.usefixtures("plugin")
def test_a_plugin_is_a_method_like_any_other() -> None:
    assert order("shortest") == [1, 4, 2, 3, 0]
    assert order("shortest", plugin_options={"floor": 25}) == [2, 3, 0]
    assert order("mixture", mixture={"shortest": 1.0}) == [1, 4, 2, 3, 0]
    with pytest.raises(
        UserError, match=r"wanted 5 preferences of plugin faulty; found shape \(3,\)"
    ):
        order("faulty")
    with pytest.raises(UserError, match=r"plugin broken .* failed: KeyError"):
        order("broken")


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="did you mean random"):
        SelectConfig(method="randon")


def test_every_method_the_config_names_exists() -> None:
    rng = np.random.default_rng(0)
    needed = {part for columns in SelectConfig.METHODS.values() for part in columns}
    names = [part.split(" | ")[0].replace("<group>", "embedding") for part in needed]
    extra = {name: rng.random(30) for name in names}
    table = score_table(30, **extra)
    table = replace(table, controls={"swapped": score_table(40, seed=1)})
    assert set(SelectConfig.METHODS) == set(CRITERIA)
    for method in SelectConfig.METHODS:
        mixture = {"grads": 1.0} if method == "mixture" else {}
        choice: Choice = choose(table, SelectConfig(method=method, budget=5, mixture=mixture), 0)
        assert len(choice.chosen) == 5
