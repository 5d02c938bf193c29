"""constraints.txt -> constraints.hashes.txt: for each pinned version, the sha256 of the file that
pip takes for this Python on this kind of machine.

    python scripts/lock.py

Asks pip (`--dry-run --report`), which asks its index; installs nothing. torch is left out: its
builds for CPUs and for each CUDA are different files of one version. docs/trust.md says how the
result is used; tests/test_packaging.py holds it to constraints.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PINS, HASHES = REPO / "constraints.txt", REPO / "constraints.hashes.txt"
LEFT_OUT = {"torch": "its builds for CPUs and for each CUDA are different files of one version"}
HEAD = """# The files behind constraints.txt for CPython 3.11 on Linux x86_64, by sha256; written by
# scripts/lock.py. Without {names}:
# {why}.
"""


def pins(text: str) -> dict[str, str]:
    """Version by name of the lines `name==version`."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, flags=re.M))


def normal(name: str) -> str:
    """A project's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def report_of(wanted: dict[str, str]) -> list[dict[str, Any]]:
    """What pip would install for these pins, from its own report."""
    with tempfile.TemporaryDirectory() as folder:
        report, listed = Path(folder, "report.json"), Path(folder, "pins.txt")
        listed.write_text("".join(f"{name}=={version}\n" for name, version in wanted.items()))
        words = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--no-build-isolation"]
        words += ["--quiet", "--report", str(report), "-r", str(listed)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        installed: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return installed


def main() -> None:
    """Write the file; lines of versions that are pinned still stay as they are."""
    wanted = {name: v for name, v in pins(PINS.read_text()).items() if name not in LEFT_OUT}
    before = HASHES.read_text().splitlines(keepends=True) if HASHES.exists() else []
    known = {(normal(name), v): line for line in before for name, v in pins(line).items()}
    kept = {n: known[normal(n), v] for n, v in wanted.items() if (normal(n), v) in known}
    lines = list(kept.values())
    new = {name: version for name, version in wanted.items() if name not in kept}
    for entry in report_of(new) if new else ():
        hashes = entry["download_info"]["archive_info"]["hashes"]
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        lines.append(f"{name}=={version} --hash=sha256:{hashes['sha256']}\n")
    names, why = ", ".join(LEFT_OUT), "; ".join(LEFT_OUT.values())
    HASHES.write_text(HEAD.format(names=names, why=why) + "".join(sorted(lines, key=str.lower)))
    print(f"{HASHES.name}: {len(lines)} of {len(wanted)} files, {len(new)} asked for")


if __name__ == "__main__":
    main()
