"""The tables of the study on a real model, from docs/results/study_real.json and study_needle.json.

Used by scripts/study/pages.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.study.page_tables import results
from scripts.study.tables import interval

NOISE = 0.4


NAMES = {
    "guided_25": "the least doubtful, 25 %",
    "doubt_25": "guided, 25 %",
    "oracle_25": "clean rows, 25 %",
    "full": "the whole pool",
}
MEASURES = ("margin", "domain", "general")


def _trained(study: str, noise: float) -> list[dict[str, Any]]:
    """The pools with this share of noise of which every model is trained and evaluated."""
    return [cell for cell in results(study)["cells"] if cell["models"] and cell["noise"] == noise]


def _differences(cells: Sequence[dict[str, Any]], model: str, measure: str) -> list[float]:
    """A model's measure less random's, pool by pool; pools without that model are left out."""
    found = []
    for models in (cell["models"] for cell in cells):
        random = next(name for name in models if name.startswith("random_"))
        if model in models:
            found.append(models[model][measure] - models[random][measure])
    return found


def trained_table() -> str:
    """Per domain and model of the noisiest pools the mean differences to random, and in how many
    pools the interval of the margin's paired difference lies above, or below, zero.
    """
    rows = [
        "| domain | trained on | pools | content margin to random | in single pools | held-out loss"
        " to random | general loss to random |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = _trained("real", NOISE)
    for domain in dict.fromkeys(cell["domain"] for cell in cells):
        own = [cell for cell in cells if cell["domain"] == domain]
        for model, told in NAMES.items():
            if model not in own[0]["models"]:
                continue
            means = [np.mean(_differences(own, model, measure)) for measure in MEASURES]
            rows.append(
                f"| {domain} | {told} | {len(own)} | {means[0]:+.3f} | {_sides(own, model)} |"
                f" {means[1]:+.3f} | {means[2]:+.3f} |"
            )
    return "\n".join(rows)


def pooled_table(study: str = "real") -> str:
    """Per share of faulty rows and model the differences to random over all pools, with their 95 %
    t-intervals over pools.
    """
    return _pooled([(study, model) for model in NAMES])


def promise_table() -> str:
    """The same of what guided is today, beside clean rows of the same pools and the whole pool."""
    return _pooled([("doubt", "doubt_25"), ("doubt", "oracle_25"), ("real", "full")])


def _pooled(models: Sequence[tuple[str, str]]) -> str:
    rows = [
        "| faulty rows | trained on | pools | content margin to random | in single pools | held-out"
        " loss to random | general loss to random |",
        "|---|---|---|---|---|---|---|",
    ]
    for noise in (NOISE, 0.2, 0.0):
        for study, model in models:
            cells = [cell for cell in _trained(study, noise) if model in cell["models"]]
            if not cells:
                continue
            values = [with_interval(_differences(cells, model, measure)) for measure in MEASURES]
            rows.append(
                f"| {noise:.0%} | {NAMES[model]} | {len(cells)} | {values[0]} |"
                f" {_sides(cells, model)} | {values[1]} | {values[2]} |"
            )
    return "\n".join(rows)


def needle_table() -> str:
    """Of the needle pools the differences to random over all pools, with 95 % t-intervals."""
    cells = _trained("needle", 0.0)
    rows = [
        "| trained on | pools | held-out loss to random | content margin to random | general loss"
        " to random |",
        "|---|---|---|---|---|",
    ]
    names = {
        "guided_10": "guided, 10 % (the nearest hidden states)",
        "bm25_10": "BM25, 10 %",
        "full": "the whole pool",
    }
    for model, told in names.items():
        margin, domain, general = (
            with_interval(_differences(cells, model, measure)) for measure in MEASURES
        )
        rows.append(f"| {told} | {len(cells)} | {domain} | {margin} | {general} |")
    return "\n".join(rows)


def single_table() -> str:
    """Per share of faulty rows and domain how the second candidate differs from random in single
    pools: pools, and how many intervals leave zero out on the wrong side, each by itself and over
    all comparisons.
    """
    rows = [
        "| faulty rows | domain | pools | margin below random's, held-out loss above it | over all"
        " comparisons |",
        "|---|---|---|---|---|",
    ]
    for noise in (NOISE, 0.0):
        cells = _trained("doubt", noise)
        for domain in dict.fromkeys(cell["domain"] for cell in cells):
            own = [cell["models"]["doubt_25"] for cell in cells if cell["domain"] == domain]
            told = [
                f"{sum(m['margin_minus_random' + how][2] < 0 for m in own)},"
                f" {sum(m['domain_minus_random' + how][1] > 0 for m in own)}"
                for how in ("", "_jointly")
            ]
            rows.append(f"| {noise:.0%} | {domain} | {len(own)} | {told[0]} | {told[1]} |")
    return "\n".join(rows)


def _sides(cells: Sequence[dict[str, Any]], model: str) -> str:
    found = [cell["models"][model]["margin_minus_random"] for cell in cells]
    above, below = sum(low > 0 for _, low, _ in found), sum(high < 0 for _, _, high in found)
    return f"{above} above, {below} below"


def with_interval(values: Sequence[float]) -> str:
    """A mean with its 95 % t-interval."""
    mean, low, high = interval(values)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def chosen_table() -> str:
    """Per method the share of clean rows in a quarter of the noisy pools, and of rows of the domain
    in a tenth of the needle pools: mean, and the least of a pool.
    """
    noisy, needle = (
        [cell for cell in results(name)["cells"] if cell["noise"] == noise]
        for name, noise in (("real", NOISE), ("needle", 0.0))
    )
    rows = [
        f"| method | clean rows of a quarter, {len(noisy)} noisy pools | least | rows of the domain"
        f" in a tenth, {len(needle)} needle pools | least |",
        "|---|---|---|---|---|",
    ]
    shares = {
        method: [_shares(cells, method) for cells in (noisy, needle)] for method in noisy[0]["kept"]
    }
    for method, both in sorted(shares.items(), key=lambda item: -np.mean(item[1][0])):
        told = [f"{np.mean(found):.2f} | {min(found):.2f}" if found else " | " for found in both]
        rows.append(f"| {method} | {told[0]} | {told[1]} |")
    return "\n".join(rows)


def seen_table() -> str:
    """Per column the area under the curve among rows of like length, the mean over the noisy pools
    and the range: of the controls `swapped` against the pool, and of planted wrong answers and rows
    off the domain against the clean rows.
    """
    cells = [cell for cell in results("real")["cells"] if cell["noise"] == NOISE]
    rows = [
        f"| column, {len(cells)} noisy pools | controls `swapped` | planted wrong answers | planted"
        " rows off the domain |",
        "|---|---|---|---|",
    ]
    for column in cells[0]["planted_area_among_like_length"]:
        planted = [cell["planted_area_among_like_length"][column] for cell in cells]
        controls = [cell["controls"]["area_among_like_length"][column] for cell in cells]
        told = [
            _mean_and_range([area[kind] for area in areas if kind in area])
            for areas, kind in (
                (controls, "swapped"),
                (planted, "wrong_answer"),
                (planted, "off_domain"),
            )
        ]
        rows.append(f"| `{column}` | {' | '.join(told)} |")
    return "\n".join(rows)


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _shares(cells: Sequence[dict[str, Any]], method: str) -> list[float]:
    kept = [cell["kept"].get(method, {}).get("kept") for cell in cells]
    return [found.get("clean", 0) / sum(found.values()) for found in kept if found]
