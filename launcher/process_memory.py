"""What memory a process holds, in bytes: now, and at most so far (Linux; elsewhere nothing).

Standard library only: every rank's supervisor imports it.
"""

from __future__ import annotations

from pathlib import Path

_FIELDS = {"VmRSS": "resident", "VmHWM": "resident_most"}


def memory_of(pid: int) -> dict[str, int]:
    """{"resident": bytes, "resident_most": bytes}; empty when there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    named = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return {
        ours: 1024 * int(named[theirs].split()[0])
        for theirs, ours in _FIELDS.items()
        if theirs in named
    }
