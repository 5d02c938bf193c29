"""How long the launcher waits for what, in seconds. Those that depend on the cluster are options of
the command line (grads_ds/commands/options.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which something is a fault."""

    start: float = 180.0  # until every rank's supervisor has reported
    lost: float = 30.0  # a supervisor's silence
    hang: float = 1800.0  # a rank without progress (torch's own limit for a collective, too)
    grace: float = 20.0  # from SIGTERM to SIGKILL, after a failure or an interrupt
    # from SIGTERM to SIGKILL when the job is asked to stop: training writes a checkpoint in it
    checkpoint: float = 90.0
    # over which a rank's own work is summed; two such windows make a straggler
    straggler_window: float = 30.0
    # after the first trouble, for the others to report theirs: one of them may be the cause
    settle: float = 4.0

    @property
    def blocked(self) -> float:
        """A round of the launcher's own loop that took longer than this was held up."""
        return max(1.0, self.lost / 4)
