"""What words alone find in needle pools: the share of the domain's rows among those that BM25 puts
first, as many as there are. No model is read.

    python scripts/study/word_needles.py configs/study/needle.yaml --material FOLDER
        [--shares 0.05 0.1] [--output docs/results/study_word_needles.json]

Makes each cell's pool as scripts/study/real.py does, asks it with the reference rows
(scripts/study/orders.py) and prints precision per pool and its mean over them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from scripts.study import orders
from scripts.study.design import Cell, Study, cells, read
from scripts.study.footings import make_pool


def precision(study: Study, material: Path, cell: Cell) -> dict[str, Any]:
    """Of one cell: rows of the domain, and their share among as many that BM25 puts first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_pool(study, material, cell, folder)
        orders.write_orders(folder, cell.seed, with_words=True)
        liked = np.array(json.loads((folder / orders.FILE).read_text())["bm25"])
        rows = (folder / "pool.jsonl").read_text().splitlines()
    clean = np.array([json.loads(row)["kind"] == "clean" for row in rows])
    first = np.argsort(-liked, kind="stable")[: clean.sum()]
    return {
        "domain": cell.domain,
        "seed": cell.seed,
        "share": study.needle,
        "pool": len(clean),
        "needles": int(clean.sum()),
        "precision": round(float(clean[first].mean()), 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--material", type=Path, required=True, help="folder of models and data")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = []
    for share in options.shares:
        study = read(options.study).model_copy(update={"needle": share})
        for cell in cells(study):
            found.append(precision(study, options.material.resolve(), cell))
            print("{share:.0%} {domain} seed {seed}: {precision:.2f}".format(**found[-1]))
        mean = np.mean([one["precision"] for one in found if one["share"] == share])
        print(f"{share:.0%}: mean over {len(list(cells(study)))} pools {mean:.3f}")
    if options.output:
        options.output.write_text(json.dumps({"pools": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
