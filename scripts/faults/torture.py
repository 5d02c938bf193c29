"""Tear a run down at every write, sync, rename and unlink of its single-process stages, and flip
bits in everything it leaves; after each, a new start must end with the undisturbed run's bytes or
with a clear error.

    python scripts/faults/torture.py [--every 1] [--flips 200] [--only prepare flips] [--write]

Needs a C compiler and Linux. Every attempt is a forked process on a copy of the run directory; the
calls are counted and broken by storage_shim.c, preloaded. Prints tables of Markdown and exits 1
when anything was silently wrong, stuck, or left behind. --write puts what was measured into
docs/results/torture.json (what was not stays as it was) and its tables into docs/trust.md.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import platform
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
from scripts.faults import broken_calls
from scripts.faults.broken_calls import COUNT, FAIL, FULL, KILL, REPO, STUCK, armed, attempt
from scripts.faults.table import put

ATTEMPTS = (("killed", KILL, 0), ("EIO", FAIL, errno.EIO), ("disk full", FULL, errno.ENOSPC))
WHOLE, REFUSED, WRONG = "same bytes", "clear error", "WRONG"
GOOD = (WHOLE, REFUSED)
NUMBERS, PAGE = REPO / "docs/results/torture.json", REPO / "docs/trust.md"
CRASHES = ("<!-- crash points: scripts/faults/torture.py -->", "<!-- end of crash points -->")
FLIPS = ("<!-- flips: scripts/faults/torture.py -->", "<!-- end of flips -->")


def status_of(work: Callable[[], Any]) -> int:
    """Do the work under a clock that stands still; its exit status, as the command line's."""
    import small_run

    from grads_ds.config.errors import UserError
    from grads_ds.run_dir.storage import storage_status

    small_run.frozen_clock()
    try:
        work()
    except UserError as error:
        print("refused:", error, flush=True)
        return 2
    except BaseException as error:
        traceback.print_exc()
        return storage_status(error) or 1
    return 0


def copied(source: Path, target: Path) -> None:
    """`target` is what `source` is."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def crash_points(folder: Path, name: str, config: object, every: int) -> dict[str, Any]:
    """The calls of a stage, and how the attempts to break it ended, by kind: `folder` holds the run
    just before the stage, and afterwards with it done.
    """
    import small_run

    def work() -> int:
        return status_of(lambda: small_run.STEPS[name](config))

    before, after = folder.with_name("before"), folder.with_name("after")
    copied(folder, before)
    calls = broken_calls.calls_of(work, folder, COUNT)
    copied(folder, after)
    wanted = small_run.outputs(folder)
    found: dict[str, Counter[str]] = {kind: Counter() for kind, *_ in ATTEMPTS}
    for kind, mode, number in ATTEMPTS:
        for n in range(1, calls + 1, every):
            copied(before, folder)
            first = attempt(work, armed(folder, n, mode, number))
            end, said = _ending(first, mode), ""
            if end is None:
                again = attempt(work)
                changed = small_run.differences(wanted, folder) if again == 0 else []
                end = STUCK if again == STUCK else WRONG if again or changed else WHOLE
                said = f"; then {again}; not the same: {', '.join(changed)}"
            if end != WHOLE:
                text = f"{name}: {kind} at call {n}: {end} (first start {first}{said})"
                print(text, file=sys.stderr, flush=True)
            found[kind][end] += 1
    copied(after, folder)
    return {"calls": calls, "every": every, **{kind: dict(ends) for kind, ends in found.items()}}


def _ending(first: int | str, mode: int) -> str | None:
    """What is wrong with how the broken start itself ended, or None."""
    if first == STUCK:
        return STUCK
    # a call whose failure is of no consequence (a leftover, the lock) may pass: the bytes tell
    allowed = {KILL: ("killed", 0), FAIL: (8, 0), FULL: (7, 0)}[mode]
    return None if first in allowed else f"{WRONG} status"


def crash_table(points: dict[str, dict[str, Any]]) -> str:
    """The crash points as Markdown."""
    lines = ["| stage | calls | broken at | attempts | how they ended |", "|---|---|---|---|---|"]
    for stage, found in points.items():
        for kind, *_ in ATTEMPTS:
            ends = found[kind]
            lines.append(
                f"| {stage} | {found['calls']} | {kind} | {sum(ends.values())} | {_told(ends)} |"
            )
    return "\n".join(lines)


def flip_table(flips: dict[str, dict[str, int]]) -> str:
    """The flips as Markdown."""
    lines = ["| output | flips | how the starts ended |", "|---|---|---|"]
    lines += [f"| `{kind}` | {sum(e.values())} | {_told(e)} |" for kind, e in flips.items()]
    return "\n".join(lines)


def _told(ends: dict[str, int]) -> str:
    return ", ".join(f"{end} {count:,}" for end, count in sorted(ends.items(), reverse=True))


def write(crashes: dict[str, dict[str, Any]], flipped: dict[str, dict[str, int]]) -> None:
    """Add what was measured to the record, and both tables to the page."""
    import small_run

    record = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    points = record.get("crash points", {}) | crashes
    found = record.get("flips", {}) | flipped
    record = {"date": time.strftime("%Y-%m-%d"), "machine": platform.platform()}
    record["crash points"] = {name: points[name] for name in small_run.STEPS if name in points}
    record["flips"] = dict(sorted(found.items()))
    NUMBERS.write_text(json.dumps(record, indent=1) + "\n")
    put(PAGE, CRASHES, crash_table(record["crash points"]))
    put(PAGE, FLIPS, flip_table(record["flips"]))


def main(options: argparse.Namespace) -> int:
    """Run what is asked for, print the tables; the exit status."""
    import small_run

    from conftest import make_tiny_model
    from scripts.faults.bit_flips import flips

    began, crashes, flipped = time.process_time(), {}, {}
    with broken_calls.scratch() as base:
        folder = Path(base, "job")
        folder.mkdir()
        if options.model:
            shutil.copytree(options.model, Path(base, "model"))
        else:
            assert attempt(lambda: bool(make_tiny_model(Path(base, "model"))) - 1) == 0
        config = small_run.make(folder, Path(base, "model"))
        small_run.warm(config)
        gc.freeze()  # pages that no collector of a forked process touches are not copied for it
        for name, step in small_run.STEPS.items():
            if options.only and name not in options.only:
                assert attempt(lambda step=step: status_of(lambda: step(config))) == 0  # type: ignore[misc]
            else:
                crashes[name] = crash_points(folder, name, config, options.every)
                write({name: crashes[name]}, {}) if options.write else None
        if options.flips and (not options.only or "flips" in options.only):
            for kind, ends in flips(folder, config, options.flips):
                flipped[kind] = ends
                write({}, {kind: ends}) if options.write else None
    print(f"{crash_table(crashes)}\n\n{flip_table(flipped)}", flush=True)
    ends = [found[kind] for found in crashes.values() for kind, *_ in ATTEMPTS]
    bad = [end for found in (*ends, *flipped.values()) for end in found if end not in GOOD]
    print(f"{time.process_time() - began:.0f} s of this process", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th call")
    parser.add_argument("--flips", type=int, default=200, help="bits per kind of output")
    parser.add_argument("--only", nargs="*", default=[], help="only these stages; flips")
    parser.add_argument("--model", type=Path, help="folder of a model in place of a tiny one")
    parser.add_argument("--write", action="store_true", help="into docs/")
    chosen = parser.parse_args()
    broken_calls.preload()
    sys.exit(main(chosen))
