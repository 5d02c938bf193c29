"""The table of injected faults in docs/launcher.md, made from the tests' own list and from what the
tests measure.

    python scripts/faults/table.py            all of them
    python scripts/faults/table.py -k slow    the tests of that name (pytest's options); the other
                                             rows stay as they are

Runs the tests that make faults happen (root, network namespaces; minutes), takes what each noted
(tests/launcher/faults.py), and writes docs/results/launcher_faults.json and the table between the
marks in docs/launcher.md. Fails when a listed fault has never been made to happen. A test holds the
table against the list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
from tests.launcher.faults import FAULTS

TESTS = [
    f"tests/launcher/test_{name}.py"
    for name in (
        "injected_faults",
        "unreachable_hosts",
        "run_faults",
        "cluster_faults",
        "slow_ranks",
        "signals",
        "supervision",
    )
] + ["tests/run_dir/test_lock.py"]
MARKS = ("<!-- faults: scripts/faults/table.py -->", "<!-- end of faults -->")


def table(measured: dict[str, dict[str, Any]]) -> str:
    """The Markdown table; `measured` by the fault's name."""
    rows = [
        "| fault | how it is made to happen | what is told (part) | status | seconds |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        seen = measured[fault.name]
        message = seen["message"].replace("|", "/")
        message = message if len(message) <= 90 else message[:60] + " ... " + message[-25:]
        rows.append(
            f"| {fault.name} | {fault.how} | `{message}` | {fault.status} | {seen['seconds']:g} (<"
            f" {fault.within:g}) |"
        )
    return "\n".join(rows)


def put(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page."""
    above, _, rest = page.read_text().partition(marks[0])
    page.write_text(f"{above}{marks[0]}\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}")


def main(options: list[str]) -> None:
    """Run the tests, write the table."""
    numbers = REPO / "docs/results/launcher_faults.json"
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder, "noted")
        environment = os.environ | {"GRADS_DS_FAULT_TABLE": str(noted)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *TESTS, *options], cwd=REPO, env=environment
        )
        lines = (
            [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
        )
    before = json.loads(numbers.read_text()) if options else {}
    found = before | {line["name"]: line for line in lines}
    measured = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
    absent = [fault.name for fault in FAULTS if fault.name not in measured]
    if done.returncode or absent:
        raise SystemExit(
            f"fault table: pytest ended with {done.returncode}; faults not made to happen:"
            f" {absent or 'none'}"
        )
    numbers.write_text(json.dumps(measured, indent=1) + "\n")
    put(REPO / "docs/launcher.md", MARKS, table(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
