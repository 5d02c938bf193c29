"""A comparison of runs as text for a terminal and as one HTML page: the same lines. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grads_ds.config.errors import printable
from grads_ds.report.number_words import duration, percent, signed
from grads_ds.report.outcome import Difference
from grads_ds.report.page import templates
from grads_ds.report.run_comparison import Loss, RunComparison
from grads_ds.report.text_table import aligned
from grads_ds.run_dir.layout import MAIN


@dataclass(frozen=True)
class Line:
    """One thing that is compared, with a cell for each run and the cells' tones ("" for none)."""

    label: str
    cells: list[str]
    tones: list[str]


def comparison_lines(compared: RunComparison) -> dict[str, list[Line]]:
    """Heading -> lines: what was chosen, each held-out set, the time spent, the settings that
    differ.
    """
    runs = compared.runs
    reports = [run.run.subsets[0].report for run in runs]
    sizes = [int(run.run.subsets[0].selected.sum()) for run in runs]
    pools = [len(run.run.scores.sample_id) for run in runs]
    groups = {
        "selection": [
            _plain("method", [str(report.get("method", "?")) for report in reports]),
            _plain("pool", [f"{n:,}" for n in pools]),
            _plain(
                "selected",
                [f"{k:,} ({percent(k / max(1, n))})" for k, n in zip(sizes, pools, strict=True)],
            ),
        ]
    }
    groups["selection"] += [
        _plain(f"rows shared with {run.name}", [percent(share) for share in row])
        for run, row in zip(runs, compared.overlap, strict=True)
    ]
    for name, losses in compared.losses.items():
        kind = "forgetting" if name in compared.forgetting else "loss"
        groups[f"{name} ({kind})"] = _loss_lines(losses, runs[0].name)
    kept = [_retention((run.run.evaluation or {}).get("retention") or {}) for run in runs]
    if measures := list(dict.fromkeys(name for one in kept for name in one)):
        groups["kept of the base model"] = [
            _plain(name, [one.get(name, "–") for one in kept]) for name in measures
        ]
    stages = list(dict.fromkeys(stage for run in runs for stage in run.seconds))
    groups["time"] = [
        _plain(stage, [duration(run.seconds.get(stage)) for run in runs]) for stage in stages
    ]
    groups["time"].append(_plain("together", [duration(sum(run.seconds.values())) for run in runs]))
    if compared.differing:
        groups["settings that differ"] = [
            _plain(key, values) for key, values in compared.differing.items()
        ]
    return groups


def _retention(retention: Mapping[str, Any]) -> dict[str, str]:
    """What evaluation.json says of the selected model's distance to its base: measure -> text."""
    models = retention.get("models", {})
    own, base = models.get(MAIN, {}), models.get("base", {})
    found = {
        f"divergence from base on {name}": _between(value["value"], value.get("ci95"))
        for name, value in own.get("kl", {}).items()
    }
    if "own_answers" in own and "own_answers" in base:
        gap = own["own_answers"]["loss"] - base["own_answers"]["loss"]
        found["loss on the base's own answers less base"] = signed(gap)
    return found


def _between(value: float, interval: Sequence[float] | None) -> str:
    if not interval:
        return f"{value:.4f}"
    return f"{value:.4f} ({interval[0]:.4f}–{interval[1]:.4f})"


def _loss_lines(losses: list[Loss | None], first: str) -> list[Line]:
    lines = [
        _plain(
            "loss of the selected model",
            ["–" if one is None else _between(one.value, one.interval) for one in losses],
        )
    ]
    for label, name in (("base", "to_base"), ("random", "to_random"), (first, "to_first")):
        gaps = [None if one is None else getattr(one, name) for one in losses]
        if any(gap is not None for gap in gaps):
            tones = ["" if gap is None else gap.tone for gap in gaps]
            lines.append(Line(f"less {label}", [_gap(gap) for gap in gaps], tones))
    return lines


def _gap(gap: Difference | None) -> str:
    if gap is None or gap.interval is None:
        return signed(gap)
    return f"{signed(gap)} ({signed(gap.interval[0])} to {signed(gap.interval[1])})"


def _plain(label: str, cells: list[str]) -> Line:
    return Line(label, cells, [""] * len(cells))


def comparison_text(compared: RunComparison) -> str:
    """For a terminal; intervals are 95 %."""
    rows = [["", *(run.name for run in compared.runs)]]
    for heading, lines in comparison_lines(compared).items():
        rows.append([heading])
        rows += [[f"  {line.label}", *line.cells] for line in lines]
    text = [*aligned(rows, left=1), "loss: nats per target token, lower is better; intervals: 95 %"]
    return "\n".join([*text, *(f"* {sentence}" for sentence in compared.warnings)])


def comparison_page(compared: RunComparison) -> str:
    """One HTML page, complete in itself."""
    page = (
        templates()
        .get_template("comparison.html")
        .render(
            names=[run.name for run in compared.runs],
            groups=comparison_lines(compared),
            warnings=compared.warnings,
        )
    )
    return printable(page)
