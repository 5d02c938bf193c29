"""The evaluation as a plain-text table, for the end of a run in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grads_ds.report.forgetting import read_forgetting
from grads_ds.report.outcome import outcome_of
from grads_ds.report.read_run import read_yaml
from grads_ds.report.run_logs import read_json
from grads_ds.report.verdict import verdict
from grads_ds.report.what_to_do import advice
from grads_ds.run_dir.provenance import RESOLVED


def report_table(run_dir: Path) -> str:
    """One line per model: base, full, then the subsets by size; per held-out set its loss and the
    difference to base.

    Reads evaluation.json (and the per-sample losses it names), for its verdict prepared.json. Says
    so when there is none.
    """
    evaluation = read_json(run_dir / "evaluation.json")
    if evaluation is None:
        return "no evaluation yet (evaluation.json is not there)"
    outcome = outcome_of(evaluation, run_dir)
    prepared = read_json(run_dir / "prepared/prepared.json")
    head = ["model", "method", "trained on"]
    for name in outcome.sets:
        head += [f"{name} loss", "to base"]
    lines = [head]
    for model in outcome.models:
        line = [
            model.name,
            model.method if model.name != "base" else "-",
            "-" if model.trained_on is None else f"{model.trained_on:,}",
        ]
        for name in outcome.sets:
            found = model.measures.get(name)
            gap = found.against_base if found else None
            line += [f"{found.loss:.4f}" if found else "-", f"{gap.value:+.4f}" if gap else "-"]
        lines.append(line)
    text = aligned(lines, left=2)
    said = [f"* {sentence.text}" for sentence in verdict(outcome, prepared)]
    first = _advice(run_dir, evaluation)
    return "\n".join([*first, *text, "loss: nats per target token, lower is better", "", *said])


def _advice(run_dir: Path, evaluation: dict[str, Any]) -> list[str]:
    """What to do and why, a line each, and an empty one; none where it was not measured."""
    found = read_forgetting(run_dir, evaluation, read_yaml(run_dir / RESOLVED))
    if found is None:
        return []
    told = advice(found)
    return [told.headline, *(f"* {reason}" for reason in told.reasons), ""]


def aligned(rows: list[list[str]], left: int) -> list[str]:
    """A table's lines, a rule below the first: the first `left` columns begin together, the others
    end together. A row may have fewer cells than the first.
    """
    widths = [
        max((len(row[i]) for row in rows if i < len(row) > 1), default=0)
        for i in range(len(rows[0]))
    ]
    text = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(len(line) for line in text))
    return text
