"""Numbers as the page shows them: signs, significant digits, shares, times. Pure."""

from __future__ import annotations

import math

from grads_ds.report.outcome import Difference


def signed(value: float | Difference | None) -> str:
    """A difference with its sign, four decimals; a dash for none."""
    if value is None:
        return "–"
    number = value.value if isinstance(value, Difference) else value
    return f"{number:+.4f}".replace("-", "−")


def compact(value: float | None) -> str:
    """Four significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return (
        f"{value:,.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:.3e}".replace("-", "−")
    )


def percent(share: float) -> str:
    """A share as a percentage, finer where it is small."""
    points = 100 * share
    return (
        f"{points:.0f} %"
        if points >= 99.5 or points == 0
        else f"{points:.1f} %"
        if points >= 1
        else f"{points:.2g} %"
    )


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lift_style(lift: float | None) -> str:
    """CSS class of a lift: over- or under-represented, in three strengths."""
    if lift is None:
        return ""
    steps = 3.0 if lift <= 0 else min(3.0, abs(math.log2(lift)) / 0.5)
    return "" if steps < 0.4 else f"{'over' if lift > 1 else 'under'}{max(1, round(steps))}"


# by these names the templates have them
FILTERS = {
    "loss": lambda v: f"{v:.4f}",
    "signed": signed,
    "compact": compact,
    "percent": percent,
    "duration": duration,
    "count": lambda v: f"{v:,}",
    "lift_style": lift_style,
    "perplexity": lambda v: f"{v:,.2f}" if v < 1e4 else f"{v:.3e}",
}
