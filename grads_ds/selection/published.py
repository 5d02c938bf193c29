"""Other people's criteria, on the same table and at the same budget.

Each is a function (table of eligible rows, settings, seed) -> Scored. Columns that the probe
records only on request are asked for by name.
"""

from __future__ import annotations

import numpy as np

from grads_ds.config.columns import NORM_SUFFIX
from grads_ds.config.select import SelectConfig
from grads_ds.scores.read import ScoreTable
from grads_ds.selection import region
from grads_ds.selection.cover import cover_preference
from grads_ds.selection.criterion import Criterion, Scored
from grads_ds.selection.grads import CONTRAST, mean_cosine
from grads_ds.selection.numbers import rounded
from grads_ds.selection.signal import positive, robust_z
from grads_ds.statistics import Floats


def loss(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Highest loss per target token first."""
    return _plain(table.floats("loss"))


def perplexity_band(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Samples between two quantiles of perplexity (`band`), drawn evenly (Marion et al. 2023, arXiv
    2309.04564)."""
    values = table.floats("loss")
    preference = region.band_preference(values, settings.band, table.sample_id, seed)
    edges = region.band_edges(values, settings.band)
    return Scored(preference, values, notes={"loss_edges": list(edges)})


def length(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Most target tokens first (Zhao et al. 2024, arXiv 2402.04833)."""
    return _plain(table.floats("num_target_tokens"))


def grand(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """GraNd: largest gradient norm first, over all recorded groups (Paul et al.

    2021, arXiv 2107.07075).
    """
    if "total" in table.norm_groups:
        return _plain(table.norms("total"), {"groups": ["total"]})
    groups = table.norm_groups or ["embedding"]
    squares = sum(table.norms(group) ** 2 for group in groups)
    return _plain(np.sqrt(squares), {"groups": groups})


def el2n(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """EL2N: largest error vector first (Paul et al. 2021). Wants column el2n."""
    return _plain(table.floats("el2n"))


def ifd(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Instruction-following difficulty, highest below 1 first; from 1 on the prompt misleads (Li et
    al. 2024, arXiv 2308.12032), these come last. Wants column ifd.
    """
    values = table.floats("ifd")
    preference = np.where(values < 1.0, values, -values)
    return Scored(np.where(np.isfinite(values), preference, np.nan), values)


def low_ifd(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Lowest IFD first: rows whose answer the prompt explains best. On models that follow prompts
    wrong answers stand at the high end.
    """
    values = table.floats("ifd")
    return Scored(np.where(np.isfinite(values), -values, np.nan), values)


def prompt_gain(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Rows first whose loss rises most under another row's prompt. Wants column prompt_gain."""
    return _plain(table.floats("prompt_gain"))


def hidden_nearest(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Nearest to the reference set in mean hidden states, both less the pool's mean (after RDS,
    Ivison et al. 2025, arXiv 2503.01807). Wants column anchor_hidden_cosine.
    """
    return _plain(table.floats("anchor_hidden_cosine"))


def snr(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Lowest gradient signal-to-noise over two checkpoints first: mean norm over its spread, the
    mean over the groups (after GradFiltering). Wants columns <group>_grad_norm_early beside
    <group>_grad_norm.
    """
    early = [name for name in table.columns if name.endswith(NORM_SUFFIX + "_early")]
    if not early:
        table.floats(f"<group>{NORM_SUFFIX}_early")
    total = np.zeros(len(table))
    for name in early:
        then, now = (
            positive(table.floats(name)),
            positive(table.floats(name.removesuffix("_early"))),
        )
        total += np.log(then + now) - np.log(np.abs(now - then) + 1e-6 * (then + now))
    return Scored(rounded(-total / len(early)), rounded(total / len(early)))


def anchor_conflict(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Least opposed to the reference set first: highest mean cosine, less the pool's where that was
    recorded. Wants columns anchor_contrast_<group> or anchor_cosine_<group>.
    """
    return _plain(mean_cosine(table))


def orthogonal(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Most orthogonal to the reference set first: smallest absolute cosine (after OGS). Columns as
    anchor_conflict's.
    """
    cosine = mean_cosine(table)
    return Scored(-np.abs(cosine), cosine)


def less(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Largest first-order influence on the reference set's loss first, over the recorded groups
    (after LESS, Xia et al. 2024, arXiv 2402.04333, without its optimizer correction). With columns
    anchor_contrast_<group> these times the norms; else anchor_inner_product_<group>.
    """
    if any(name.startswith(CONTRAST) for name in table.columns):
        parts = [value * table.norms(group) for group, value in table.prefixed(CONTRAST).items()]
    else:
        parts = list(table.prefixed("anchor_inner_product_").values())
    total: Floats = np.sum(parts, axis=0)
    return _plain(total)


def k_center(table: ScoreTable, settings: SelectConfig, seed: int) -> Scored:
    """Diversity: a cover of cheap features (log norms, loss, log length), see `cover`."""
    features = [np.log(positive(table.norms(group))) for group in table.norm_groups]
    if "loss" in table.columns:
        features.append(table.floats("loss"))
    if "num_target_tokens" in table.columns:
        features.append(np.log(np.maximum(table.floats("num_target_tokens"), 1.0)))
    spread = np.column_stack([robust_z(rounded(feature)) for feature in features])
    preference = cover_preference(np.clip(spread, -6.0, 6.0), table.sample_id, seed)
    return Scored(preference, preference, notes={"features": spread.shape[1]})


def _plain(values: Floats, notes: dict[str, object] | None = None) -> Scored:
    return Scored(np.where(np.isfinite(values), values, np.nan), values, notes=notes or {})


PUBLISHED: dict[str, Criterion] = {
    "loss": loss,
    "perplexity_band": perplexity_band,
    "length": length,
    "grand": grand,
    "el2n": el2n,
    "ifd": ifd,
    "low_ifd": low_ifd,
    "prompt_gain": prompt_gain,
    "hidden_nearest": hidden_nearest,
    "k_center": k_center,
    "snr": snr,
    "anchor_conflict": anchor_conflict,
    "orthogonal": orthogonal,
    "less": less,
}
