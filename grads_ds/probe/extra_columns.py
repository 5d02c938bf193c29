"""Extra columns of the score table, recorded on request with the norms (`probe.extras`).

Their names and what asks for them stand in `config/columns.py`; here each gets its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from torch import Tensor

from grads_ds.config.columns import TOKEN_LOSSES, compared_groups, wants_reference
from grads_ds.config.config import Config
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.engine.frozen_pass import score_batch, to_device
from grads_ds.gradnorm import GradNormRecorder, GradNorms
from grads_ds.probe.contrasted_rows import ContrastedRows
from grads_ds.probe.early_norms import EarlyNorms
from grads_ds.probe.observed import Observed, observing
from grads_ds.probe.prompts import has_prompt
from grads_ds.probe.reference_set import drawn_rows, references, section
from grads_ds.probe.set_means import losses_alone
from grads_ds.probe.target_statistics import Asked, TargetStatistics

OF_TARGETS = {"surprise", "fisher", "prompt_gain"}  # read the distribution at every target
# what a row's targets rise to under other rows' prompts, less what they are under the row's own
GAINS = {"prompt_gain": "loss", "el2n_gain": "error", "norm_gain": "norm"}
Columns = dict[str, Any]  # float64 [B]; of token_losses B arrays


class ExtraColumns:
    """The extra columns of one frozen pass. Every rank makes one when the model is there: the
    reference directions are taken then.

    `key`: the recording that the kept references belong to. Raises UserError when a recorded group
    cannot be compared with the reference set.
    """

    def __init__(
        self, config: Config, run_dir: Path, key: str, recorder: GradNormRecorder, engine: Any
    ) -> None:
        self.recorder, self.engine, self.wanted = recorder, engine, set(config.probe.extras)
        self.groups = compared_groups(config.probe.layers)
        self.early = None
        if "early" in self.wanted:
            names = [f"{group}_grad_norm" for group in self.groups]
            self.early = EarlyNorms.read(run_dir, names)
        self.contrasted = None
        if self.wanted & {"ifd", "prompt_gain"}:
            alone = losses_alone(recorder)
            self.contrasted = ContrastedRows(config, run_dir, alone, engine, self.wanted)
        if "el2n" in self.wanted and not self.wanted & OF_TARGETS:
            recorder.record_error_norms()
        if TOKEN_LOSSES in self.wanted:
            recorder.record_tokens()
        self.kept: dict[str, Tensor] = {}
        if wants_reference(self.wanted):
            self.kept = references(config, run_dir, key, recorder, engine)
            named = {"anchor": "reference", "contrast": "contrast"}  # extra -> section of `kept`
            recorder.set_references(
                {of: section(self.kept, of) for extra, of in named.items() if extra in self.wanted}
            )
        self.drawn: dict[int, int] = {}
        if self.wanted & {"contrast", "hidden"}:
            ids = load_from_disk(str(run_dir / "prepared/pool"))["sample_id"]
            drawn = drawn_rows(len(ids), config).tolist()
            self.drawn = {int(ids[row]): at for at, row in enumerate(drawn)}

    def score(self, samples: Sequence[Mapping[str, Any]]) -> tuple[GradNorms, Columns]:
        """A micro-batch's norms and its extra columns, float64 [B] each (of the dummy row where
        there are no samples).
        """
        batch = to_device(samples)
        columns: Columns = {}
        at_targets = None
        if self.wanted & OF_TARGETS:
            weights = self.kept["fisher.rows"] if "fisher" in self.wanted else None
            at_targets = Asked("prompt_gain" in self.wanted, weights)
        with observing(self.recorder, at_targets) as observed:
            norms = score_batch(self.recorder, self.engine, batch)
            own = observed.statistics() if at_targets is not None else None
            columns |= self._of_the_head(samples, norms, observed, own)
        columns |= self._against_references(samples, norms)
        if norms.tokens is not None:
            is_target_BT = batch["labels"][:, 1:] != IGNORE_INDEX
            columns[TOKEN_LOSSES] = [
                _array(losses[chosen])
                for losses, chosen in zip(norms.tokens.loss[:, 1:], is_target_BT, strict=True)
            ]
        if self.contrasted is not None:
            other, asked = self.contrasted.score(samples), _with_prompt(samples)
            if "ifd" in self.wanted:
                ratio = torch.where(other["bare"] > 0, norms.loss / other["bare"], torch.nan)
                columns["ifd"] = asked * _array(ratio)
            if own is not None and "prompt_gain" in self.wanted:
                for column, name in GAINS.items():
                    columns[column] = asked * _array(other[name] - getattr(own, name))
        if self.early is not None:
            columns |= self.early.of(samples)
        return norms, columns

    def _against_references(
        self, samples: Sequence[Mapping[str, Any]], norms: GradNorms
    ) -> Columns:
        """The cosines and inner products with the reference set, and the cosines with it less those
        with the pool's mean.
        """
        columns: Columns = {}
        zero = torch.zeros_like(norms.loss)  # of a group the model does not have
        for group in self.groups:
            if anchor := norms.directions.get("reference"):
                cosine = _array(anchor.cosines.get(group, zero))
                columns[f"anchor_cosine_{group}"] = cosine - self._own_excess(group, samples)
                inner = _array(anchor.inner_products.get(group, zero))
                apart = np.where(_places(samples) < 0, inner, np.nan)
                columns[f"anchor_inner_product_{group}"] = apart
            if contrast := norms.directions.get("contrast"):
                inner_B = contrast.inner_products.get(group, zero)
                value = _array(inner_B / norms.norms.get(group, zero).clamp_min(1e-300))
                drawn = [self.drawn.get(int(sample["sample_id"])) for sample in samples]
                columns[f"anchor_contrast_{group}"] = (
                    value + self._excess("pool", group, drawn) - self._own_excess(group, samples)
                )
        return columns

    def _excess(self, of: str, group: str, places: Sequence[int | None]) -> np.ndarray:
        """What a row's cosine with a mean owes to the row's own part in it, float64 [B]; 0 where it
        has none. `of`: pool or own, see `reference_set`.
        """
        kept = self.kept.get(f"{of}.{group}")
        return np.array(
            [0.0 if at is None or kept is None else float(kept[at]) for at in places], np.float64
        )

    def _own_part(self, samples: Sequence[Mapping[str, Any]], centred_BD: Tensor) -> Tensor:
        """What leaving a row out of the mean it has a part in adds to the direction r - m, [B, D]:
        (r - h) / (n - 1) for a row of the reference set, (h - m) / (n - 1) for one of the pool's
        draw.
        """
        known = [at >= 0 for at in _places(samples).tolist()]
        drawn = [int(row["sample_id"]) in self.drawn for row in samples] or [False]
        in_BD = lambda these: torch.tensor(these, device=centred_BD.device)[:, None]  # noqa: E731
        rest = max(1.0, float(self.kept["reference_rows"]) - 1)
        from_reference_BD = (self.kept["hidden.direction"] - centred_BD) / rest
        from_draw_BD = centred_BD / max(1, len(self.drawn) - 1)
        return in_BD(known) * from_reference_BD + in_BD(drawn) * from_draw_BD

    def _own_excess(self, group: str, samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """`_excess` of the samples that are rows of the reference set."""
        places = _places(samples).tolist()
        return self._excess("own", group, [None if at < 0 else at for at in places])

    def _of_the_head(
        self,
        samples: Sequence[Mapping[str, Any]],
        norms: GradNorms,
        observed: Observed,
        own: TargetStatistics | None,
    ) -> Columns:
        """The columns that the head's input and output give, without another pass."""
        columns: Columns = {}
        if "el2n" in self.wanted:
            errors = norms.error_norms if own is None else own.error
            assert errors is not None
            columns["el2n"] = _array(errors)
        if own is not None and "surprise" in self.wanted:
            columns["surprise"] = _array(own.loss - own.entropy)
            columns["conflict"] = _array(own.conflict)
        if own is not None and "fisher" in self.wanted:
            # the weights are the reference rows' own
            known = np.where(_places(samples) < 0, 0.0, np.nan)
            columns["row_fisher"] = _array(own.row_norm) + known
        if "hidden" in self.wanted:
            pooled_BD = observed.pooled().double()
            centred_BD = pooled_BD - self.kept["hidden.centre"]
            direction_D = self.kept["hidden.direction"]
            direction_BD = direction_D + self._own_part(samples, centred_BD)
            columns["anchor_hidden_cosine"] = _array(
                torch.nn.functional.cosine_similarity(centred_BD, direction_BD, eps=1e-300)
            )
        return columns


def _places(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The place in the reference set of each sample that is one of its rows, int64 [B]; else -1."""
    # the dummy row of a rank without work is none
    return np.array([int(row.get("reference_row", -1)) for row in samples] or [-1], np.int64)


def _with_prompt(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 for a sample with a prompt, NaN for one without, float64 [B]."""
    return np.array([1.0 if has_prompt(row) else np.nan for row in samples] or [1.0])


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
