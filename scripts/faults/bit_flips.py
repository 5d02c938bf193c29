"""One bit of a file turned over, as on a disk that rots, and what kind of output a file is."""

from __future__ import annotations

import os
import random
from pathlib import Path


def kind_of(file: Path) -> str:
    if file.name.startswith("part-"):
        return "scores/part-*.parquet"
    return str(file.relative_to("run")).split("/data-")[0]


def flip(file: Path, draw: random.Random) -> None:
    times = file.stat()
    with open(file, "r+b") as content:
        place = draw.randrange(times.st_size)
        content.seek(place)
        byte = content.read(1)[0] ^ (1 << draw.randrange(8))
        content.seek(place)
        content.write(bytes([byte]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk that rots
