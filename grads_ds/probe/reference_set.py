"""The reference directions that the extra columns are taken against: from the reference set
(`probe.anchor`) and a seeded draw of the pool.

    reference.<parameter>   the reference set's mean gradient
    contrast.<parameter>    per layer group, that gradient over its norm less the pool's over its
    pool.<group>            cosine of each drawn row with the pool's mean as it is, less that with
                            the mean of the others (see `_left_out`)
    own.<group>             the same of each row of the reference set; with probe.controls
    reference_rows          how many rows the reference set has
    hidden.centre, hidden.direction   the pool's mean pooled hidden state, and the reference set's
                            less that
    fisher.rows             the head's squared row gradients over the reference set, mean 1

Kept in `probe/anchor.safetensors` under the recording's key: a probe that goes on, with other ranks
too, compares with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.distributed import ranks
from grads_ds.distributed.device import device
from grads_ds.engine.frozen_pass import score_batch
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.probe.set_means import means_of, planned_batches
from grads_ds.run_dir.publish import atomic_path

FILE = "probe/anchor.safetensors"
_FORMAT = 2  # of what is kept: a file of another one is made again
Kept = dict[str, Tensor]


def references(
    config: Config, run_dir: Path, key: str, recorder: GradNormRecorder, engine: Any
) -> Kept:
    """What `probe.extras` is taken against, by the names at the top of this file. Every rank calls
    this. Raises UserError for a layer group that cannot be compared, or a broken row.
    """
    file, wanted = run_dir / FILE, set(config.probe.extras)
    key = f"{key} {_FORMAT}"
    if ranks.from_main(lambda: _kept_for(file) == key):
        with safe_open(file, "pt", device=str(device())) as kept:
            return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
    gradient = bool(wanted & {"anchor", "contrast"})
    name = config.anchor_set()
    rows = load_from_disk(str(run_dir / "prepared" / name))
    own = means_of(
        config, rows, f"the reference set {name}", recorder, engine, gradient, "fisher" in wanted
    )
    found: Kept = {"reference_rows": torch.tensor(float(len(rows)))}
    if own.gradient is not None and config.probe.controls:
        found |= _left_out(config, rows, recorder, engine, own.gradient, "own")
    if "anchor" in wanted:
        found |= {f"reference.{name}": value for name, value in (own.gradient or {}).items()}
    if wanted & {"contrast", "hidden"}:
        pool = load_from_disk(str(run_dir / "prepared/pool"))
        drawn = drawn_rows(len(pool), config)
        common = means_of(
            config,
            pool.select(drawn),
            f"{len(drawn)} drawn rows of the pool",
            recorder,
            engine,
            "contrast" in wanted,
        )
        found |= {
            "hidden.centre": common.hidden_D,
            "hidden.direction": own.hidden_D - common.hidden_D,
        }
        if own.gradient is not None and common.gradient is not None:
            found |= {
                f"contrast.{name}": value
                for name, value in _contrast(recorder, own.gradient, common.gradient).items()
            }
            found |= _left_out(
                config, pool.select(drawn), recorder, engine, common.gradient, "pool"
            )
    if own.row_squares_V is not None:
        found["fisher.rows"] = own.row_squares_V / own.row_squares_V.mean().clamp_min(1e-300)
    ranks.from_main(lambda: _keep(file, found, key))
    return found


def section(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The kept tensors whose names start with `prefix` and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in kept.items() if name.startswith(start)}


def drawn_rows(count: int, config: Config) -> np.ndarray:
    """Positions of the pool's rows behind its mean gradient, int64, ascending."""
    draw = np.random.default_rng([config.seed, 11])
    size = min(count, config.probe.contrast_rows)
    return np.sort(draw.choice(count, size, replace=False))


def _group_norms(recorder: GradNormRecorder, gradient: Mapping[str, Tensor]) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, value in gradient.items():
        group = recorder.plan.groups[name]
        squares[group] = squares.get(group, 0.0) + float((value.double() ** 2).sum())
    return {group: max(value, 1e-300) ** 0.5 for group, value in squares.items()}


def _contrast(
    recorder: GradNormRecorder, own: Mapping[str, Tensor], common: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per group r / |r| - m / |m|: its inner product with g, over |g|, is the difference of the two
    cosines, for the price of one reference.
    """
    groups, r, m = recorder.plan.groups, _group_norms(recorder, own), _group_norms(recorder, common)
    return {
        name: own[name] / r[groups[name]] - common[name] / m[groups[name]]
        for name in own.keys() & common.keys()
    }


def _left_out(
    config: Config,
    rows: Any,
    recorder: GradNormRecorder,
    engine: Any,
    common: dict[str, Tensor],
    of: str,
) -> Kept:
    """For rows that are a part of the mean m = `common` they are compared with: the cosine with m
    less the cosine with the mean of the others, per group [rows], named `of`.<group>; nothing for a
    single row, which has no others.

    With n rows, (n m - g) / (n - 1) is the others' mean; <g, m>, |g| and |m| give both cosines.
    """
    if len(rows) < 2:
        return {}
    sizes, count = _group_norms(recorder, common), len(rows)
    what = {"pool": "the drawn rows", "own": "the reference rows"}[of] + " against their mean"
    here: dict[str, dict[int, float]] = {}
    before = recorder.references
    recorder.set_reference(common)
    for local, batch in planned_batches(config, rows, what, engine):
        norms = score_batch(recorder, engine, batch)
        for group, inner_B in norms.inner_products.items():
            size = sizes.get("embedding" if group not in sizes else group, 1e-300)
            norm_B = norms.norms[group].clamp_min(1e-300)
            others_B = (
                ((count * size) ** 2 - 2 * count * inner_B + norm_B**2).clamp_min(1e-300).sqrt()
            )
            without_B = (count * inner_B - norm_B**2) / (norm_B * others_B)
            excess_B = inner_B / (norm_B * size) - without_B
            here.setdefault(group, {}).update(zip(local, excess_B.tolist(), strict=False))
    recorder.references = before
    shared = ranks.all_gather_object(here)
    found: Kept = {}
    for group in sorted({group for part in shared for group in part}):
        values = {row: value for part in shared for row, value in part.get(group, {}).items()}
        found[f"{of}.{group}"] = torch.tensor(
            [values[row] for row in range(count)], dtype=torch.float64, device=device()
        )
    return found


def _kept_for(file: Path) -> str | None:
    """Which recording the references in `file` were taken for; None where there are none, or
    damaged ones.
    """
    try:
        with safe_open(file, "pt") as kept:
            return (kept.metadata() or {}).get("key")
    except (FileNotFoundError, SafetensorError):
        return None


def _keep(file: Path, tensors: Kept, key: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as aside:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            aside,
            {"key": key},
        )
