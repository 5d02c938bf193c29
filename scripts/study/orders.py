"""Orders of a cell's pool that no score table holds, as a selection method of the study's own.

`write_orders` writes `orders.json` into a cell's folder, a preference for every row of pool.jsonl:

    oracle   drawn among the clean rows, by what was planted; no other row can be chosen
    bm25     likeness of words to the reference rows: each of them asks the pool once (BM25 by the
             package bm25s, its own tokens and parameters), the mean of the scores

`register` makes them `method: given_order` for this process and for those it starts: a plugin of
`grads_ds.selection` with `plugin_options: {order: oracle, file: .../orders.json, pool: RUN's
prepared/pool}`, which says what line of pool.jsonl a sample is.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import load_from_disk

from grads_ds.config.errors import UserError

if TYPE_CHECKING:
    from grads_ds.config.select import SelectConfig
    from grads_ds.scores.read import ScoreTable

METHOD, FILE = "given_order", "orders.json"
NAME = "grads_ds_study_orders"
ENTRY_POINTS = f"[grads_ds.selection]\n{METHOD} = scripts.study.orders:given_order\n"


def register(out: Path) -> None:
    """Let this process, and those started with its environment, find the method: writes a package's
    description below `out` and puts it on the path.
    """
    folder = out.resolve() / "criteria"
    described = folder / f"{NAME}-1.dist-info"
    described.mkdir(parents=True, exist_ok=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1\n")
    (described / "entry_points.txt").write_text(ENTRY_POINTS)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    before = os.environ.get("PYTHONPATH")
    parts = before.split(os.pathsep) if before else []
    if str(folder) not in parts:
        os.environ["PYTHONPATH"] = os.pathsep.join([*parts, str(folder)])


def given_order(table: ScoreTable, settings: SelectConfig, seed: int) -> np.ndarray:
    """The preferences that the file gives, NaN for a row that cannot be chosen."""
    options = settings.plugin_options
    orders = json.loads(Path(options["file"]).read_text())
    if options["order"] not in orders:
        raise UserError(
            f"plugin_options.order: wanted one of {', '.join(orders)}; found {options['order']};"
            " name one of these"
        )
    values = np.array(orders[options["order"]], np.float64)
    lines = _lines(Path(options["pool"]))[table.sample_id]
    if lines.max() >= len(values):
        raise UserError(
            f"plugin_options.file: wanted a preference for each row of the pool; found"
            f" {len(values)}, and line {lines.max() + 1}; make the cell's pool again"
        )
    return values[lines]


def _lines(pool: Path) -> np.ndarray:
    """The line of pool.jsonl, from 0, of every prepared sample by its id, int64 [samples]: rows
    that prepare dropped leave gaps.
    """
    origins = load_from_disk(str(pool))["origin"]
    return np.array([int(origin.rsplit(":", 1)[1]) - 1 for origin in origins], np.int64)


def write_orders(folder: Path, seed: int, with_words: bool) -> None:
    """Write `orders.json` of a cell; `with_words`: bm25 too."""
    pool = _rows(folder / "pool.jsonl")
    draw = random.Random(seed)
    orders: dict[str, list[float | None]] = {
        "oracle": [draw.random() if row["kind"] == "clean" else None for row in pool]
    }
    if with_words:
        likeness = word_likeness(_texts(pool), _texts(_rows(folder / "anchor.jsonl")))
        orders["bm25"] = [float(value) for value in likeness]
    (folder / FILE).write_text(json.dumps(orders))


def word_likeness(pool: list[str], asking: list[str]) -> np.ndarray:
    """Mean BM25 score of each of the pool's texts over the asking texts, [pool]."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s uses jax where it is, which takes a GPU
    try:
        import bm25s
    except ImportError:
        raise UserError(
            "study: wanted the package bm25s, which asks the pool by words; found none installed;"
            " pip install bm25s, or leave order bm25 out of the study's file"
        ) from None
    tokens = bm25s.tokenize(pool, stopwords="en", show_progress=False)
    index = bm25s.BM25()
    index.index(tokens, show_progress=False)
    words = bm25s.tokenize(asking, stopwords="en", show_progress=False, return_ids=False)
    return np.mean([index.get_scores(asked) for asked in words], axis=0)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return ["\n".join(turn["content"] for turn in row["messages"]) for row in rows]
