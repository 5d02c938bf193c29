"""All methods side by side at the same budgets: how much of each kind of sample each keeps, and how
far they agree.

Works on a score table in memory; the stage writes the result to selection/comparison.json. Methods
whose columns were not recorded are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection.choose import choose

BUDGETS = (0.05, 0.5)
LARGEST = 200_000  # samples; beyond it the comparison costs more than the choice
FIELD_VALUES = 20  # a field with more values is no kind of sample

Fields = Mapping[str, tuple[NDArray[np.int64], list[str]]]


def contestants(main: SelectConfig) -> dict[str, dict[str, Any]]:
    """The settings compared, by name: every region of GrADS with the main signal, the first also
    without its trend in length, then every other method.
    """
    regions: dict[str, dict[str, Any]] = {
        f"grads {name}": {"method": "grads", "region": name} for name in _REGIONS
    }
    regions["grads density, length-corrected"] = {
        "method": "grads",
        "region": "density",
        "length_correction": True,
    }
    others = {
        name: {"method": name} for name in SelectConfig.METHODS if name not in ("grads", "mixture")
    }
    mixed = {"mixture": {"method": "mixture"}} if main.mixture else {}
    return regions | others | mixed


_REGIONS = ("density", "mass", "magnitude", "band", "sample")


def compare(
    table: ScoreTable,
    fields: Fields,
    main: SelectConfig,
    seed: int,
    chosen: NDArray[np.bool_],
    budgets: Sequence[float] = BUDGETS,
) -> dict[str, Any]:
    """Per method and budget: samples, overlap with `chosen` (per row of the table), and per field
    and value the share of its samples kept. `fields`: codes per row of the table and their values.

    Strata, near-duplicates, corrections for length and forget_less are left out: the methods are
    compared as they are.
    """
    fields = {name: pair for name, pair in fields.items() if 1 < len(pair[1]) <= FIELD_VALUES}
    plain = main.model_dump(exclude={"variants"}) | {
        "strata": None,
        "near_duplicates": None,
        "forget_less": 0.0,
        "length_correction": False,
        "budget_tokens": None,
        "weights": "none",
        "filters": [],
    }
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, change in contestants(main).items():
        try:
            entry = {}
            for budget in budgets:
                choice = choose(table, SelectConfig(**(plain | change | {"budget": budget})), seed)
                entry[f"{budget:g}"] = _entry(choice.selected, chosen, fields)
            found[name] = entry
        except UserError as error:
            skipped[name] = "; ".join(error.problems)
    return {"budgets": [f"{budget:g}" for budget in budgets], "methods": found, "skipped": skipped}


def _entry(selected: NDArray[np.bool_], main: NDArray[np.bool_], fields: Fields) -> dict[str, Any]:
    both = int(np.count_nonzero(selected & main))
    either = int(np.count_nonzero(selected | main))
    kept: dict[str, dict[str, float]] = {}
    for name, (codes, values) in fields.items():
        pool = np.bincount(codes, minlength=len(values))
        kept_here = np.bincount(codes[selected], minlength=len(values))
        kept[name] = {
            word: round(int(m) / int(p), 6)
            for word, m, p in zip(values, kept_here, pool, strict=True)
            if p
        }
    return {
        "samples": int(np.count_nonzero(selected)),
        "overlap_with_selected": both,
        "jaccard_with_selected": round(both / either, 6) if either else None,
        "kept": kept,
    }
