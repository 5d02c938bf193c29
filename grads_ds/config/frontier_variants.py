"""`sft.frontier`: random subsets at several budgets and the whole pool, as variants like any other.

They are written into `select.variants` and `sft.variants` before the config is checked, so that
every stage treats them as what they are.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

BUDGETS = (0.02, 0.05, 0.1, 0.25, 0.5)  # of sft.frontier: true

# a frontier subset is plain random, whatever the main selection asks for
_PLAIN: dict[str, Any] = {
    "method": "random",
    "budget_tokens": None,
    "filters": [],
    "strata": None,
    "near_duplicates": None,
    "weights": "none",
}


def frontier_name(budget: float) -> str:
    """The variant of a budget."""
    return f"frontier-{budget:g}"


def is_frontier(name: str) -> bool:
    """Whether a variant is one of a frontier's random subsets."""
    return name.startswith("frontier-")


def with_frontier(given: Any) -> Any:
    """A config's tree with its frontier's variants; what is no such tree is left to the checks."""
    if not isinstance(given, dict):
        return given
    sections = {name: given.get(name) for name in ("select", "sft")}
    select, sft = (
        value.model_dump() if isinstance(value, BaseModel) else value or {}
        for value in sections.values()
    )
    if not isinstance(select, dict) or not isinstance(sft, dict):
        return given
    wanted = sft.get("frontier")
    budgets = BUDGETS if wanted is True else wanted
    if not isinstance(budgets, list | tuple):
        return given
    numbers = [b for b in budgets if isinstance(b, float | int) and 0 < b < 1]
    names = {frontier_name(b): _PLAIN | {"budget": float(b)} for b in numbers}
    variants, trained = select.get("variants") or {}, sft.get("variants") or []
    if not names or not isinstance(variants, dict) or not isinstance(trained, list):
        return given
    more = [name for name in [*names, "full"] if name not in trained]
    return given | {
        "select": select | {"variants": variants | names},
        "sft": sft | {"variants": [*trained, *more]},
    }
