"""Every fault that the tests make happen, and what has to come of it: one list, for the tests and
for the table in docs/launcher.md.

A test that has made a fault happen calls `told` with what it saw. scripts/faults/table.py runs
those tests, gathers what they measured, and writes the table.
"""

from __future__ import annotations

import json
import os
import re

from tests.launcher.faults_of_hosts import FAULTS_OF_HOSTS
from tests.launcher.faults_of_jobs import FAULTS_OF_JOBS

FAULTS = [*FAULTS_OF_HOSTS, *FAULTS_OF_JOBS]
_BY_NAME = {fault.name: fault for fault in FAULTS}


def told(
    name: str, message: str, status: int, seconds: float, bad: str = "", good: str = ""
) -> None:
    """Check what came of the fault `name` against the list, and note it for the table where one is
    being made.

    `bad` and `good`: names of the host that has it and of the one that has not.
    """
    fault = _BY_NAME[name]
    found = _find(fault.message, message, bad, good)
    assert found, (
        f"{name}: wanted {fault.message!r} with BAD {bad} and GOOD {good} in: {message[-3000:]}"
    )
    if "BAD" in fault.message and good and not fault.both:
        wrong = _find(fault.message, message, good, bad)
        assert wrong is None, f"{name}: told of the wrong host: {wrong}"
    assert status == fault.status, (
        f"{name}: wanted status {fault.status}; found {status}: {message[-1000:]}"
    )
    assert seconds < fault.within, (
        f"{name}: wanted an answer within {fault.within} s; it took {seconds:.1f} s"
    )
    if file := os.environ.get("GRADS_DS_FAULT_TABLE"):
        with open(file, "a") as lines:
            lines.write(
                json.dumps(
                    {"name": name, "message": found, "status": status, "seconds": round(seconds, 1)}
                )
                + "\n"
            )


def _find(pattern: str, message: str, bad: str, good: str) -> str | None:
    """What the pattern finds in one of the message's lines."""
    if ("BAD" in pattern and not bad) or ("GOOD" in pattern and not good):
        return None
    pattern = pattern.replace("BAD", re.escape(bad)).replace("GOOD", re.escape(good))
    found = (re.search(pattern, line.strip()) for line in message.splitlines())
    return next((match[0] for match in found if match), None)
