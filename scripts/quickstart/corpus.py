"""Real text that is on every machine -> the quickstart's general corpus, domain pool and held-out
sets.

    python scripts/quickstart/corpus.py [--out runs/quickstart/material] [--seed 0]

Reads the documentation that ships with Python and with the installed packages; sources are parsed,
never imported. Writes, as JSON lines, the same bytes for the same seed and the same versions:

    general.jsonl          what the base model learns first: {"text"} rows, and chats on the
                           standard library
    domain_pool.jsonl      chats on the APIs of numpy, scipy and torch, a third bad on purpose:
                           field `kind`
    domain_heldout.jsonl   the same questions on other functions: in no other file
    general_anchor.jsonl   general chats, from general.jsonl: what must not be forgotten
    general_heldout.jsonl  the general chats' questions on other functions: in no other file
    corpus.json            counts, versions and the seed

A second run with the same inputs does nothing and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.quickstart import documentation
from scripts.quickstart.documentation import (
    Entry,
    entries_of,
    language_topics,
    package_texts,
    packages_read,
)

DOMAIN = ("numpy", "scipy", "torch/nn", "torch/optim", "torch/distributions", "torch/linalg")
GOOD = 1400
# a third of the pool
BAD = {"wrong_answer": 280, "near_duplicate": 210, "off_domain": 140, "trivial": 70}
HELD_OUT = 250
ANCHOR = 64
ANSWER = (40, 240)  # characters
QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Describe {name} briefly.",
    "Can you tell me what {name} does?",
    "I found {name} in some code. What is it?",
)
TRIVIAL = (
    "Yes.",
    "I do not know.",
    "It depends.",
    "See the documentation.",
    "OK.",
    "It does what its name says.",
)

# ---- making rows --------------------------------------------------------------------------------


def answer_of(entry: Entry) -> str | None:
    """The documentation's first whole sentences, within ANSWER; None where there is none."""
    answer = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(entry.paragraphs)):
        if len(answer) + len(sentence) + 1 > ANSWER[1]:
            break
        answer = f"{answer} {sentence}".strip()
    return answer if len(answer) >= ANSWER[0] and answer.isascii() else None


def chat(question: str, answer: str, kind: str | None = None) -> dict[str, object]:
    """One row in the messages format."""
    row: dict[str, object] = {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    return row | {"kind": kind} if kind else row


def distinct(pairs: Iterable[tuple[str, str]], others: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Drop each (name, answer) sharing its name or six words in a row with an earlier one or
    `others`.
    """
    names: set[str] = set()
    seen = {run for text in others for run in shingles(text)}
    kept = []
    for name, answer in pairs:
        runs = shingles(answer)
        if name not in names and not seen.intersection(runs):
            kept.append((name, answer))
            names.add(name)
            seen.update(runs)
    return kept


def shingles(text: str, size: int = 6) -> list[str]:
    """All runs of `size` words, lower case, letters and digits alone (the whole text where it is
    shorter).
    """
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def questions(
    entries: Sequence[Entry], rng: random.Random, others: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """(question, answer) pairs without near-duplicates of each other or of `others`, in random
    order.
    """
    pairs = [(entry.name, answer) for entry in entries if (answer := answer_of(entry))]
    rng.shuffle(pairs)
    return [
        (rng.choice(QUESTIONS).format(name=name), answer)
        for name, answer in distinct(pairs, others)
    ]


def domain_pool(
    good: Sequence[tuple[str, str]], general: Sequence[tuple[str, str]], rng: random.Random
) -> list[dict[str, object]]:
    """The good rows and the bad ones, shuffled. `general` gives the off-domain rows."""
    wanted = {kind: round(count * len(good) / GOOD) for kind, count in BAD.items()}
    others = list(good)
    rng.shuffle(others)
    bad = others[: wanted["wrong_answer"] + 1]
    rows = [chat(q, a, "good") for q, a in good]
    rows += [chat(bad[i][0], bad[i + 1][1], "wrong_answer") for i in range(len(bad) - 1)]
    rows += [
        chat(_rephrased(q, rng), a, "near_duplicate")
        for q, a in others[-wanted["near_duplicate"] :]
    ]
    rows += [chat(q, a, "off_domain") for q, a in general[: wanted["off_domain"]]]
    rows += [
        chat(q, rng.choice(TRIVIAL), "trivial") for q, _ in rng.sample(others, wanted["trivial"])
    ]
    rng.shuffle(rows)
    return rows


def _rephrased(question: str, rng: random.Random) -> str:
    name = next(
        m[1]
        for t in QUESTIONS
        if (m := re.fullmatch(re.escape(t).replace(r"\{name\}", "(.+)"), question))
    )
    return rng.choice([t.format(name=name) for t in QUESTIONS if t.format(name=name) != question])


def main() -> None:
    """Build everything, or say that it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart/material"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    site, stdlib = (Path(sysconfig.get_paths()[key]) for key in ("purelib", "stdlib"))
    packages = packages_read()
    code = b"".join(Path(file).read_bytes() for file in (__file__, documentation.__file__))
    inputs = {
        "seed": args.seed,
        "python": sys.version.split()[0],
        "packages": [f"{name}=={package.version}" for name, package in packages.items()],
        "script": hashlib.sha256(code).hexdigest(),
    }
    summary = args.out / "corpus.json"
    if summary.exists() and json.loads(summary.read_text())["inputs"] == inputs:
        print(f"corpus: skipped, {args.out} is up to date")
        return

    roots = [(stdlib, ""), *((site / folder, folder.replace("/", ".")) for folder in DOMAIN)]
    with ProcessPoolExecutor(min(len(roots), os.cpu_count() or 1)) as pool:
        standard, *domain = pool.map(entries_of, *zip(*roots, strict=True))
    rng = random.Random(args.seed)
    on_domain = questions([entry for part in domain for entry in part], rng)
    on_python = questions(standard, rng, others=[answer for _, answer in on_domain])
    good = on_domain[HELD_OUT : HELD_OUT + GOOD]
    off_domain, general_chats = on_python[HELD_OUT : HELD_OUT + 300], on_python[HELD_OUT + 300 :]
    hidden = {
        run
        for _, answer in [*on_python[:HELD_OUT], *on_domain[:HELD_OUT]]
        for run in shingles(answer)
    }
    documented = ["\n\n".join(entry.paragraphs) for entry in standard]
    prose = [*language_topics(stdlib), *package_texts(packages), *documented]
    texts = [
        "\n\n".join(p for p in text.split("\n\n") if not hidden.intersection(shingles(p)))
        for text in prose
    ]
    general = [{"text": text} for text in dict.fromkeys(texts) if text] + [
        chat(q, a) for q, a in general_chats
    ]
    rng.shuffle(general)
    files = {
        "general": general,
        "domain_pool": domain_pool(good, off_domain, rng),
        "domain_heldout": [chat(q, a) for q, a in on_domain[:HELD_OUT]],
        "general_anchor": [chat(q, a) for q, a in general_chats[:ANCHOR]],
        "general_heldout": [chat(q, a) for q, a in on_python[:HELD_OUT]],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    summary.unlink(missing_ok=True)  # written last: what it vouches for is whole
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines)
        print(f"corpus: {name}.jsonl: {len(rows)} rows, {len(lines) / 1e6:.2f} MB")
    summary.write_text(
        json.dumps({"inputs": inputs, "rows": {n: len(r) for n, r in files.items()}}, indent=1)
    )
    print(f"corpus: done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
