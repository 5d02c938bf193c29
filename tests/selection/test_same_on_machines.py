"""The same table, settings and seed give the same rows on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from selection.pools import arrow_table, config, write_run

REPO = Path(__file__).resolve().parents[2]

EVERYTHING = {
    "joint": {"signal": "joint"},
    "linear": {"scale": "linear", "region": "density", "bandwidth": "isj"},
    "sample": {"region": "sample"},
    "length": {"length_correction": True, "signal": "l2"},
    "zscore": {"signal": "zscore", "region": "magnitude"},
    "auto": {"budget": "auto"},
    "cover": {"method": "k_center"},
    "mix": {"method": "mixture", "mixture": {"loss": 1, "grads": 2}},
    "random": {"method": "random"},
    "band": {"method": "perplexity_band"},
    "twins": {"near_duplicates": 0.9},
}


OTHER_MACHINE = """
import json, sys
from pathlib import Path
from grads_ds.config.config import Config
from grads_ds.selection.stage import run_variant
config = Config.model_validate_json(Path(sys.argv[1]).read_text())
for name in (None, *config.select.variants):
    run_variant(config, Path(sys.argv[2]), name)
assert "torch" not in sys.modules, "torch was imported"
"""


def test_same_choice_to_the_row_with_other_vector_instructions_and_threads(tmp_path: Path) -> None:
    """numpy's logarithms, exponentials and sums differ in their last bits between processors; the
    choice must not.
    """
    results = []
    for name, env in {
        "fast": {"OMP_NUM_THREADS": "2"},
        "plain": {
            "OMP_NUM_THREADS": "1",
            "NPY_DISABLE_CPU_FEATURES": "AVX512_SPR AVX512_ICL X86_V4 X86_V3",
        },
    }.items():
        run = tmp_path / name
        write_run(run, arrow_table(6000))
        path = tmp_path / f"{name}.json"
        path.write_text(config(run, variants=EVERYTHING).model_dump_json())
        subprocess.run(
            [sys.executable, "-c", OTHER_MACHINE, str(path), str(run)],
            check=True,
            env=os.environ | {"PYTHONPATH": str(REPO)} | env,
        )
        results.append(
            {
                str(file.parent.relative_to(run)): (
                    file.read_bytes(),
                    pq.read_table(file.parent / "selection.parquet"),
                )
                for file in sorted(run.glob("selection/**/selected.jsonl"))
            }
        )
    assert len(results[0]) == len(EVERYTHING) + 1
    for where, (rows, table) in results[0].items():
        assert rows == results[1][where][0], where
        assert table.select(["selected", "rank"]).equals(
            results[1][where][1].select(["selected", "rank"])
        ), where
