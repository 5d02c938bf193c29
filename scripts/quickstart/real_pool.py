"""The quickstart's chats -> a pool small enough for a real model on two cores, planted faults kept.

    python scripts/quickstart/real_pool.py [--material FOLDER] [--out runs/quickstart_real/material]

Reads what corpus.py wrote; writes pool.jsonl (240 chats on scientific Python: 60 % good, 10 % each
of wrong answers, near-duplicates of good rows, chats on other things and trivial answers; field
`kind`), heldout.jsonl, general_heldout.jsonl and anchor.jsonl (32 good chats that are in no other
file). The same bytes for the same material. Needs no network.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

GOOD, BAD = 144, 24  # rows; rows of each kind of fault
KINDS = ("wrong_answer", "near_duplicate", "off_domain", "trivial")
HELD_OUT, ANCHOR = 48, 32

Row = dict[str, Any]


def answer(row: Row) -> str:
    """The last turn's text."""
    return str(row["messages"][-1]["content"])


def small_pool(rows: list[Row]) -> list[Row]:
    """GOOD good rows and BAD of each fault, in the order of `rows`; the good twin of every
    near-duplicate is among them, and the good rows of no other row's right answer.
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    bad = [row for kind in KINDS for row in by_kind[kind][:BAD]]
    copied = {answer(row) for row in bad if row["kind"] == "near_duplicate"}
    twins = [row for row in by_kind["good"] if answer(row) in copied]
    others = [row for row in by_kind["good"] if answer(row) not in copied]
    chosen = {id(row) for row in [*bad, *twins, *others[: GOOD - len(twins)]]}
    return [row for row in rows if id(row) in chosen]


def read(file: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    """Write the four files, or say that they are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--material", type=Path, default=Path("runs/quickstart/material"))
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_real/material"))
    args = parser.parse_args()
    held_out = read(args.material / "domain_heldout.jsonl")
    files = {
        "pool": small_pool(read(args.material / "domain_pool.jsonl")),
        "heldout": held_out[:HELD_OUT],
        "anchor": held_out[HELD_OUT : HELD_OUT + ANCHOR],
        "general_heldout": read(args.material / "general_heldout.jsonl")[:HELD_OUT],
    }
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    changed = {
        name: text
        for name, text in texts.items()
        if not (file := args.out / f"{name}.jsonl").is_file() or file.read_text() != text
    }
    for name, text in changed.items():
        (args.out / f"{name}.jsonl").write_text(text)
        print(f"pool: {name}.jsonl: {len(files[name])} rows")
    if not changed:
        print(f"pool: skipped, {args.out} is up to date")


if __name__ == "__main__":
    main()
