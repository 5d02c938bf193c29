"""What a run left behind, read into plain arrays and records. Reads the run directory alone; writes
nothing; no torch.

Only scores/table.parquet and selection/ have to be there. Everything else (variants, evaluation,
curves, state, the pool's texts) may be absent and is then None or empty, so that a report can be
made of a run that stopped half-way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from grads_ds.config.config import Config
from grads_ds.config.errors import WRONG_PATH, UserError
from grads_ds.report.run_logs import Timing, read_curve, read_json, read_timings
from grads_ds.run_dir.layout import MAIN
from grads_ds.run_dir.provenance import RESOLVED, resolved_is_whole
from grads_ds.scores.read import read_table
from grads_ds.selection.pool import read_pool
from grads_ds.statistics import Floats, Ints

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """scores/table.parquet in the order of sample_id; every array [N]. `norms` by group: embedding,
    lm_head, ...
    """

    sample_id: Ints
    num_target_tokens: Ints
    loss: Floats
    norms: dict[str, Floats]
    statuses: dict[str, int]
    ok: Bools


@dataclass(frozen=True)
class Subset:
    """One selection, its arrays [N] in the order of `Scores`; NaN where a sample has no signal or
    density.
    """

    name: str
    report: dict[str, Any]
    signal: Floats
    density: Floats
    selected: Bools
    rank: Floats | None
    reason: pa.ChunkedArray | None

    @property
    def title(self) -> str:
        """The name, with the method where the name does not tell it."""
        method = str(self.report.get("method", "?"))
        return self.name if method in self.name else f"{self.name} ({method})"


@dataclass(frozen=True)
class Run:
    """Everything the page shows. `curves`: name -> (step, loss). `prepared`, `evaluation`,
    `comparison`: the JSON files as they stand.
    """

    run_dir: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    scores: Scores
    subsets: list[Subset]
    evaluation: dict[str, Any] | None
    curves: dict[str, tuple[Ints, Floats]]
    prepared: dict[str, Any] | None
    timings: list[Timing]
    comparison: dict[str, Any] | None


def read_run(config: Config, run_dir: Path) -> Run:
    """Read the run. Raises UserError when there is no score table or no selection, or they do not
    fit each other.
    """
    trained = [MAIN, *config.sft.variants]
    return read_files(run_dir, config.select.variants, trained, config.model_dump(mode="json"))


def read_files(
    run_dir: Path, variants: Iterable[str], trained: Iterable[str], given: dict[str, Any]
) -> Run:
    """As `read_run`, without a config of this version.

    Args:
        run_dir: the run directory.
        variants: names of the subsets beside the main one.
        trained: names of the models whose curves are read.
        given: the config where the run directory holds none.
    """
    if not resolved_is_whole(run_dir):
        raise UserError(
            f"report: {run_dir / RESOLVED} was altered; remove it, the page then shows the config"
            " given"
        )
    saved = read_yaml(run_dir / RESOLVED)
    provenance = saved.pop("provenance", None) or {}
    scores = read_scores(run_dir / "scores/table.parquet")
    subsets = [read_subset(run_dir / "selection", MAIN, scores)]
    # a variant of an earlier config may have left its folder: it is not shown
    for name in variants:
        folder = run_dir / "selection/variants" / name
        if (folder / "selection.json").is_file():
            subsets.append(read_subset(folder, name, scores))
    folders = {"probe": run_dir / "tensorboard/probe"}
    folders |= {name: run_dir / "tensorboard/sft" / name for name in dict.fromkeys(trained)}
    curves = {
        name: curve for name, folder in folders.items() if (curve := read_curve(folder)) is not None
    }
    return Run(
        run_dir=run_dir,
        config=saved or given,
        provenance=provenance,
        scores=scores,
        subsets=subsets,
        evaluation=read_json(run_dir / "evaluation.json"),
        curves=curves,
        prepared=read_json(run_dir / "prepared/prepared.json"),
        timings=read_timings(run_dir / "state"),
        comparison=read_json(run_dir / "selection/comparison.json"),
    )


def read_scores(path: Path) -> Scores:
    """The score table, sorted by sample_id. Raises UserError when it is missing."""
    if not path.is_file():
        raise UserError(
            f"report: wanted the score table {path}; found none; run: grads-ds run CONFIG --to"
            " probe"
        )
    table = read_table(path)
    by_status = sorted(table.count_by_status().items(), key=lambda item: -item[1])
    return Scores(
        sample_id=table.sample_id,
        num_target_tokens=np.asarray(table.columns["num_target_tokens"], dtype=np.int64),
        loss=table.floats("loss"),
        norms={group: table.norms(group) for group in table.norm_groups},
        statuses=dict(by_status),
        ok=np.array(table.status_words)[table.status] == "ok",
    )


def read_subset(folder: Path, name: str, scores: Scores) -> Subset:
    """A selection folder, aligned with `scores`. Raises UserError when it is missing or of another
    score table.
    """
    report = read_json(folder / "selection.json")
    path = folder / "selection.parquet"
    if report is None or not path.is_file():
        raise UserError(
            f"report: wanted {folder}/selection.parquet and selection.json; found them incomplete; "
            "run: grads-ds run CONFIG --to select"
        )
    have = pq.read_schema(path).names
    wanted = [
        c for c in ("sample_id", "signal", "density", "selected", "rank", "reason") if c in have
    ]
    table = pq.read_table(path, columns=wanted, page_checksum_verification=True)
    ids = _ints(table["sample_id"])
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], scores.sample_id):
        raise UserError(
            f"report: wanted the samples of the score table in {path}; found {len(ids)} rows for "
            f"{len(scores.sample_id)} scores, or other ids; run: grads-ds run CONFIG --to select"
        )
    return Subset(
        name=name,
        report=report,
        signal=_floats(table["signal"])[order],
        density=_floats(table["density"])[order],
        selected=table["selected"].to_numpy().astype(bool)[order],
        rank=_floats(table["rank"])[order] if "rank" in have else None,
        reason=table["reason"].take(pa.array(order)) if "reason" in have else None,
    )


def read_rows(run_dir: Path, sample_ids: list[int]) -> dict[int, dict[str, str]]:
    """row, source and metadata of these samples of prepared/pool, by id; samples that are not there
    are left out.
    """
    try:
        pool = read_pool(run_dir / "prepared/pool")
    except UserError:
        return {}
    places = np.flatnonzero(np.isin(pool.sample_id, np.array(sample_ids, dtype=np.int64)))
    names = [name for name in ("row", "source", "metadata") if name in pool.table.column_names]
    readers = {name: pool.row_reader(places, name) for name in names}
    return {
        int(pool.sample_id[place]): {name: read(i) for name, read in readers.items()}
        for i, place in enumerate(places)
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, empty when the file is missing or is not one."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (*WRONG_PATH, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)  # null becomes NaN


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.asarray(column.to_numpy(), dtype=np.int64)
