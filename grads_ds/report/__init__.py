"""The report: one self-contained HTML page about a run, and its evaluation as a plain-text table.

Reads the run directory alone; writes report.html. `grads-ds report CONFIG` runs it. No torch
import.

    gather.py    the run's files -> arrays and records
    outcome.py   evaluation.json -> table, differences, intervals;  verdict.py  the same in words
    tables.py    composition, norms, samples as text;  rivals.py  every method at the same budgets
    plot.py      axes and marks as inline SVG;  figures.py  the page's figures
    page.py      all of it -> HTML, by templates/page.html;  terminal.py  the plain-text table
"""

from __future__ import annotations

from pathlib import Path

from grads_ds.config import Config
from grads_ds.report.terminal import report_table
from grads_ds.run_dir import atomic_path

__all__ = ["report_table", "run_report"]


def run_report(config: Config, run_dir: Path) -> None:
    """Write `run_dir`/report.html.

    Raises UserError when the run has no score table or no selection.
    """
    from grads_ds.report.gather import gather
    from grads_ds.report.page import render

    text = render(gather(config, run_dir))
    with atomic_path(run_dir / "report.html") as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
