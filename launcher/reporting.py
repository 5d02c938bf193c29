"""What a job leaves for machines while it goes on: JSON lines for log shippers, metrics for
Prometheus.

Appends to `logs/events.jsonl` (start, progress, end; one object a line) and replaces `metrics.prom`
(link it into node exporter's textfile folder) in the run directory.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from grads_ds.launcher.job_status import snapshot

REPORT_SECONDS = 10.0


class Reporter:
    """One job's line to the machines."""

    def __init__(self, run_dir: Path, stage: str, attempt: str):
        self.run_dir, self.stage, self.attempt = run_dir, stage, attempt
        self._last = time.monotonic()

    def note(self, event: str, **fields: Any) -> None:
        """Append one event and renew the metrics.

        A full disk does not end a job: the ranks' own writes will tell.
        """
        from grads_ds.launcher.metrics import prometheus

        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record = {
            "time": now,
            "event": event,
            "stage": self.stage,
            "attempt": self.attempt,
            **fields,
        }
        with contextlib.suppress(OSError):
            with open(self.run_dir / "logs/events.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            aside = self.run_dir / ".metrics.prom"
            aside.write_text(prometheus(snapshot(self.run_dir)))
            aside.replace(self.run_dir / "metrics.prom")

    def progress(self) -> None:
        """Note how far the job is, every few seconds."""
        if time.monotonic() - self._last < REPORT_SECONDS:
            return
        self._last = time.monotonic()
        job = snapshot(self.run_dir)["job"] or {}
        self.note(
            "progress",
            **{
                key: job.get(key)
                for key in (
                    "doing",
                    "done",
                    "total",
                    "eta_seconds",
                    "states",
                    "slowest",
                    "slow",
                    "silent",
                )
            },
        )
