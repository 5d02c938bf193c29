"""One bit of a file turned over, as on a disk that rots: which kind of output the file is, and what
a new start makes of it.
"""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scripts.faults.broken_calls import STUCK, attempt

# the kinds of output that are many files; every other file of a run is a kind of its own
_MANY = (
    (r"scores/part-.*", "scores/part-*.parquet"),
    (r"prepared/.*\.arrow", "prepared/**/*.arrow"),
    (r"prepared/.*\.json", "prepared/**/*.json"),
    (r"state/.*\.json", "state/*.json"),
    (r"state/.*\.owned", "state/*.owned"),
)


def kind_of(file: Path) -> str:
    """The kind of output that a file (relative to the job's folder: run/...) is."""
    name = str(file.relative_to("run"))
    return next((kind for pattern, kind in _MANY if re.fullmatch(pattern, name)), name)


def flip(file: Path, draw: random.Random) -> None:
    """Turn one bit over; the file's times stay."""
    times = file.stat()
    with open(file, "r+b") as content:
        place = draw.randrange(times.st_size)
        content.seek(place)
        byte = content.read(1)[0] ^ (1 << draw.randrange(8))
        content.seek(place)
        content.write(bytes([byte]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk that rots


def flips(
    folder: Path, config: object, draws: int, seed: int = 0
) -> Iterator[tuple[str, dict[str, int]]]:
    """Flip `draws` single bits in each kind of output; after each, a whole new start. Yields (kind,
    how they ended).
    """
    import small_run

    from scripts.faults.torture import REFUSED, WHOLE, WRONG, copied, status_of

    def start() -> int:
        return status_of(lambda: [step(config) for step in small_run.STEPS.values()])

    draw = random.Random(seed)
    before = folder.with_name("finished")
    copied(folder, before)
    wanted = small_run.outputs(folder)
    kinds: dict[str, list[Path]] = {}
    for file in sorted(before.rglob("*")):
        relative = file.relative_to(before)
        if file.is_file() and relative.parts[0] == "run" and file.stat().st_size:
            kinds.setdefault(kind_of(relative), []).append(relative)
    for kind, files in sorted(kinds.items()):
        ends: Counter[str] = Counter()
        for _ in range(draws):
            copied(before, folder)
            file = folder / draw.choice(files)
            flip(file, draw)
            if kind.startswith("scores/part"):  # read when the table has to be made again
                (folder / "run/state/probe.record.json").unlink()
            status = attempt(start)
            end = REFUSED if status in (2, 8) else STUCK if status == STUCK else WHOLE
            # the export lies outside the run: made before the damage, it is not made again
            changed = small_run.differences(wanted, folder) if status == 0 else []
            changed += [f"status {status}"] if status not in (0, 2, 8, STUCK) else []
            if changed:
                end = WRONG
                print(f"{file.relative_to(folder)}: {changed}", file=sys.stderr, flush=True)
            ends[end] += 1
        yield kind, dict(ends)
