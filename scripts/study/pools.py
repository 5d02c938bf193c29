"""Pools for the study: de-duplicated splits of a domain, noise planted on purpose, and held-out
sets with controls.

Reads chat rows ({"messages": [...]} JSON lines). `write_cell` writes one folder:

    pool.jsonl       the pool, each row with its `kind`: clean, wrong_answer, near_duplicate,
                     off_domain; of a needle pool clean, or what the row is of
    domain.jsonl     held-out rows: the loss of the true answers (content and style)
    swapped.jsonl    the same questions with another held-out row's answer (style alone)
    general.jsonl    held-out rows of general text, as given
    anchor.jsonl     a few more clean rows of the domain (or of general text), in neither: what a
                     direction can be taken from
    replay.jsonl     the general rows that are not held out
    domain_choice.jsonl, general_choice.jsonl    held-out questions with the true answer and those
                                                 of other rows, to choose from
    <task>_choice.jsonl                          questions to be answered yes, no or maybe

The same rows, sizes and seed give the same bytes. Used by scripts/study/run.py.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GRAM = 8  # words
SHARED = 0.2  # a row with more of its answer's 8-grams in rows already taken is a near-duplicate
CHOICES, CHOICE_LENGTH = 3, 160  # answers a question is asked with, each cut to so many characters
ASKED = 60  # questions of a task at most
KINDS = ("wrong_answer", "near_duplicate", "off_domain")
_WORD = re.compile(r"\w+")


def read_rows(files: Iterable[Path], skip_every: int | None = None) -> list[Row]:
    """The rows of JSON lines files; of each file without every `skip_every`-th, which a base model
    may have seen.
    """
    rows = []
    for file in files:
        lines = file.read_text().splitlines()
        rows += [
            json.loads(line) for i, line in enumerate(lines) if skip_every is None or i % skip_every
        ]
    return rows


def grams(text: str) -> set[str]:
    """Word 8-grams, lower-cased; a shorter text is one piece."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))}


def distinct(rows: Sequence[Row], wanted: int, seed: int) -> list[Row]:
    """`wanted` rows in drawn order, none of which shares more than a fifth of its answer's 8-grams
    with those before it.

    Raises ValueError when the rows do not hold as many.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    seen: set[str] = set()
    taken: list[Row] = []
    for i in order:
        pieces = grams(answer(rows[i]))
        if len(pieces & seen) <= SHARED * len(pieces):
            taken.append(rows[i])
            seen |= pieces
            if len(taken) == wanted:
                return taken
    raise ValueError(
        f"wanted {wanted} distinct rows; found {len(taken)} among {len(rows)}; lower pool or"
        " held_out"
    )


def answer(row: Row) -> str:
    """The last turn's text."""
    return row["messages"][-1]["content"]


def with_answer(row: Row, text: str) -> Row:
    """The same conversation ending in `text`."""
    *before, last = row["messages"]
    return {"messages": [*before, {**last, "content": text}]}


def swapped(rows: Sequence[Row], seed: int) -> list[Row]:
    """Every row with the answer of another one, each answer used once.

    Fewer than two rows stay as they are.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, order[1:] + order[:1], strict=True))
    return [with_answer(row, answer(rows[partner[i]])) for i, row in enumerate(rows)]


def multiple_choice(
    rows: Sequence[Row], seed: int, choices: int = CHOICES, like_topic: bool = False
) -> list[dict[str, Any]]:
    """Up to 60 of the rows as questions: the last answer's beginning among those of other rows,
    `choices` in all, drawn or with `like_topic` of the questions that share most words.

    Wants at least as many rows.
    """
    words = [set(_WORD.findall(row["messages"][-2]["content"].lower())) for row in rows]
    draw = random.Random(seed)
    tasks = []
    for i, row in enumerate(rows[:ASKED]):
        able = [j for j in range(len(rows)) if answer(rows[j]) != answer(row)]
        others = draw.sample(able, len(able) if like_topic else choices - 1)
        if like_topic:  # of equally alike ones the first drawn
            alike = {j: len(words[i] & words[j]) / len(words[i] | words[j]) for j in others}
            others = sorted(others, key=lambda j: -alike[j])[: choices - 1]
        right = draw.randrange(choices)
        order = [*others[:right], i, *others[right:]]
        question = row["messages"][-2]["content"]
        tasks.append(
            {
                "question": question,
                "choices": [answer(rows[j])[:CHOICE_LENGTH] for j in order],
                "answer": right,
            }
        )
    return tasks


def verdicts(rows: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """Up to 60 drawn rows whose answers begin with yes, no or maybe, as questions for that word."""
    words = ["yes", "no", "maybe"]
    found = [
        {
            "question": row["messages"][-2]["content"],
            "choices": words,
            "answer": words.index(first[0].lower()),
        }
        for row in rows
        if (first := _WORD.findall(answer(row))[:1]) and first[0].lower() in words
    ]
    return random.Random(seed).sample(found, min(ASKED, len(found)))


def near_duplicate(row: Row, draw: random.Random) -> Row:
    """The row with one word of its answer said twice."""
    words = answer(row).split(" ")
    place = draw.randrange(len(words))
    return with_answer(row, " ".join([*words[: place + 1], *words[place:]]))


def plant(
    clean: Sequence[Row], off_domain: Sequence[Row], size: int, share: float, seed: int
) -> list[Row]:
    """A pool of `size` rows with `kind`, of which `share` are noise: a third each wrong answers,
    near-duplicates of clean rows in the pool, and rows of another domain. `clean` must hold the
    rest and the wrong answers' questions.
    """
    draw = random.Random(seed)
    bad = round(size * share)
    counts = {kind: bad // 3 + (number < bad % 3) for number, kind in enumerate(KINDS)}
    kept = size - bad
    good, questions = clean[:kept], clean[kept : kept + counts["wrong_answer"]]
    pool = [{**row, "kind": "clean"} for row in good]
    pool += [{**row, "kind": "wrong_answer"} for row in swapped(questions, seed)]
    pool += [
        {**near_duplicate(row, draw), "kind": "near_duplicate"}
        for row in draw.sample(list(good), counts["near_duplicate"])
    ]
    pool += [
        {**row, "kind": "off_domain"} for row in draw.sample(list(off_domain), counts["off_domain"])
    ]
    draw.shuffle(pool)
    return pool


def needles(
    clean: Sequence[Row], others: Mapping[str, Sequence[Row]], size: int, share: float, seed: int
) -> list[Row]:
    """A pool of `size` rows with `kind`: a `share` of clean ones, and rows of each of the `others`
    in equal parts, whose names are their kinds.
    """
    draw = random.Random(seed)
    wanted = round(size * share)
    pool = [{**row, "kind": "clean"} for row in clean[:wanted]]
    rest = size - wanted
    for number, (name, rows) in enumerate(sorted(others.items())):
        count = rest // len(others) + (number < rest % len(others))
        pool += [{**row, "kind": name} for row in distinct(rows, count, seed)]
    draw.shuffle(pool)
    return pool


def write_cell(
    folder: Path,
    domain: Sequence[Row],
    off_domain: Sequence[Row],
    general: Sequence[Row],
    *,
    needle: tuple[float, Mapping[str, Sequence[Row]]] | None = None,
    pool: int,
    held_out: int,
    anchor: int = 0,
    anchor_from: str = "domain",
    noise: float,
    seed: int,
    choices: int = CHOICES,
    like_topic: bool = False,
    tasks: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """One cell's files (see the top of this file).

    Held-out rows share next to nothing with the pool's, by `distinct`. `needle`: the share of the
    domain's rows in the pool and the rows of other sources by name; nothing is planted then.
    """
    rows = distinct(domain, pool + held_out + anchor, seed)
    held, clean, rest = rows[:held_out], rows[held_out : held_out + pool], rows[held_out + pool :]
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    known = draw.sample(list(general), min(held_out, len(general)))
    others = [row for row in general if row not in known]
    if anchor_from == "general":
        rest = draw.sample(others, anchor)
    files: dict[str, Sequence[dict[str, Any]]] = {
        "pool": (
            needles(clean, needle[1], pool, needle[0], seed)
            if needle
            else plant(clean, off_domain, pool, noise, seed)
        ),
        "domain": held,
        "swapped": swapped(held, seed),
        "general": known,
        "domain_choice": multiple_choice(held, seed, choices, like_topic),
        "general_choice": multiple_choice(known, seed),
        "anchor": rest,
        "replay": others,
        **{f"{name}_choice": verdicts(rows, seed) for name, rows in (tasks or {}).items()},
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, sort_keys=True) + "\n" for row in content)
        )
