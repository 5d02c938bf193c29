"""How many: a fraction, a count, tokens, or adapted to the distribution; and how the budget spreads
over strata.

Every rule takes the front of one order of preference, so that a larger budget holds every smaller
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grads_ds.config.errors import UserError
from grads_ds.config.select import SelectConfig
from grads_ds.statistics import Floats, Ints


@dataclass(frozen=True)
class Budget:
    """`samples`: how many at most; `tokens`: how many tokens at most (None: no limit); `rule`: in
    words.
    """

    samples: int
    tokens: int | None
    rule: str
    warnings: tuple[str, ...] = ()


def resolve_budget(
    settings: SelectConfig, pool_size: int, scorable: int, gain: Floats | None
) -> Budget:
    """The budget of a pool of `pool_size` rows of which `scorable` can be chosen.

    A fraction is of the whole pool, rounded half up, at least one sample. Raises UserError when a
    count exceeds the pool or when `auto` meets a method without a distribution.
    """
    if settings.budget_tokens is not None:
        return Budget(
            scorable,
            settings.budget_tokens,
            f"the longest front of the order within {settings.budget_tokens} tokens",
        )
    if settings.budget == "auto" and settings.method == "guided":
        return Budget(scorable, None, f"auto: the {scorable} samples that no filter rejects")
    if settings.budget == "auto":
        if gain is None:
            raise UserError(
                "select.budget: auto adapts to the distribution of GrADS's signal, or to what"
                f" guided's filters leave; method {settings.method} has neither; give a fraction or"
                " a count"
            )
        count = above_mean(gain)
        return Budget(count, None, f"auto: the {count} samples above the pool's mean preference")
    budget = float(settings.budget)
    if budget > 1:
        count = int(budget)
        if count > pool_size:
            raise UserError(
                f"select.budget: wanted at most the pool's {pool_size} samples; found {count};"
                " lower it or give 1.0 for all"
            )
        rule = f"{count} samples"
    else:
        count = max(1, int(np.floor(budget * pool_size + 0.5)))
        rule = f"{budget:g} of {pool_size} samples"
    if count > scorable:
        note = (
            f"the budget is {count} samples, only {scorable} can be chosen: all of them are taken"
        )
        return Budget(scorable, None, rule, (note,))
    return Budget(count, None, rule)


def above_mean(gain: Floats) -> int:
    """Samples whose gain exceeds the mean; where the Lorenz curve of the gains lies farthest from
    equality.

    All equal: every sample (no part of the pool stands out).
    """
    count = int(np.count_nonzero(gain > np.mean(gain) * (1 + 1e-12)))
    return count if count else len(gain)


def spread(order: Ints, strata: NDArray[np.int64], balance: str) -> Ints:
    """The order in which strata take turns, each giving its samples in the order they stood.

    Proportional: the j-th sample (from 0) of a stratum of n goes to place (j + 1/2) / n, Webster's
    (Sainte-Lague's) rule, whose quotas never shrink as the budget grows. Equal: to place j; small
    strata run out and leave the rest to the others.
    """
    if not len(order):
        return order
    of = strata[order]
    by_stratum = np.argsort(of, kind="stable")
    sizes = np.bincount(of)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    turn = np.empty(len(order), dtype=np.int64)
    turn[by_stratum] = np.arange(len(order)) - starts[of[by_stratum]]
    place = turn.astype(np.float64) if balance == "equal" else (turn + 0.5) / sizes[of]
    return order[np.argsort(place, kind="stable")]


def front(order: Ints, budget: Budget, tokens: Ints | None) -> int:
    """How many of `order` fit the budget. Raises UserError when not even the first does."""
    count = min(budget.samples, len(order))
    if budget.tokens is None or tokens is None:
        return count
    total = np.cumsum(tokens[order[:count]])
    fits = int(np.searchsorted(total, budget.tokens, side="right"))
    if fits == 0 and count:
        raise UserError(
            f"select.budget_tokens: wanted room for the first sample's {int(total[0])} tokens;"
            f" found {budget.tokens}; raise it"
        )
    return fits


def describe(budget: Budget, chosen: Ints, tokens: Ints | None, pool_size: int) -> dict[str, Any]:
    """The budget as it stands in selection.json."""
    return {
        "rule": budget.rule,
        "samples": len(chosen),
        "fraction_of_pool": round(len(chosen) / pool_size, 9),
        "tokens": None if tokens is None else int(tokens[chosen].sum()),
        "token_limit": budget.tokens,
    }
