"""Stage 6: one self-contained HTML page about a run, from its files alone. No torch import."""

from __future__ import annotations

from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.report.page import render
from grads_ds.report.read_run import read_run
from grads_ds.run_dir.publish import atomic_path


def run_report(config: Config, run_dir: Path) -> None:
    """Write `run_dir`/report.html.

    Raises UserError when the run has no score table or no selection.
    """
    text = render(read_run(config, run_dir))
    with atomic_path(run_dir / "report.html") as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
