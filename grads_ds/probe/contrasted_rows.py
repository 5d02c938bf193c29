"""A micro-batch's targets behind no prompt (`ifd`) and behind other rows' prompts (`prompt_gain`):
forwards alone, of both kinds together, cut by length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.data.batches import tight_batches
from grads_ds.distributed.device import device
from grads_ds.engine.frozen_pass import score_batch, to_device
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.gradnorm.scoring.in_step import Ranks
from grads_ds.probe.observed import observing
from grads_ds.probe.prompts import behind_prompt_of, partners, without_prompt
from grads_ds.probe.target_statistics import Asked

MEASURED = ("loss", "error", "norm")  # see target_statistics
# What one more forward costs, as a share of a micro-batch's tokens: where every forward gathers the
# parameters, and where they are whole.
SHARDED, WHOLE = 1 / 4, 1 / 32


class ContrastedRows:
    """Scores the samples of micro-batches in other contexts than their own.

    Args:
        config, run_dir: of this probe.
        alone: records losses alone, of the model that is recorded.
        engine: of that model.
        wanted: the extras that are recorded.
    """

    def __init__(
        self, config: Config, run_dir: Path, alone: GradNormRecorder, engine: Any, wanted: set[str]
    ) -> None:
        self.alone, self.engine, self.longest = alone, engine, config.data.max_length
        budget = config.probe.tokens_per_microbatch
        assert budget != "auto"  # measured before the pass began
        self.budget, sharded = budget, alone.gather is not None
        self.each = int(budget * (SHARDED if sharded else WHOLE))
        self.ranks = Ranks(sharded and torch.distributed.is_initialized(), device())
        self.bare = "ifd" in wanted
        self.asked = Asked(norm=True) if "prompt_gain" in wanted else None
        self.others = config.probe.other_prompts if self.asked else 0
        if self.others:
            self.pool = load_from_disk(str(run_dir / "prepared/pool"))
            self.place = {int(i): at for at, i in enumerate(self.pool["sample_id"])}
            self.partners = partners(len(self.pool), self.others, config.seed)

    def score(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Float64 [B]: bare, the loss behind no prompt; loss, error and norm, the means over the
        other rows' prompts. Zeros of the dummy row, where there are no samples.

        Every rank calls this as often as the others, and runs as many forwards as the rank with
        most.
        """
        rows = [without_prompt(sample) for sample in samples if self.bare]
        for turn in range(self.others):
            rows += [
                behind_prompt_of(sample, self.pool[self._partner(sample, turn)], self.longest)
                for sample in samples
            ]
        lengths = [len(row["input_ids"]) for row in rows]
        batches = tight_batches(lengths, self.budget, self.each)
        found = torch.zeros(len(MEASURED), len(rows), dtype=torch.float64, device=device())
        for turn in range(self.ranks.largest(max(1, len(batches)))):
            batch = batches[turn] if turn < len(batches) else []
            values = self._forward([rows[at] for at in batch])
            if batch:
                found[:, batch] = values
        return self._by_sample(found, len(samples))

    def _forward(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """MEASURED of each row, float64 [3, rows]; losses alone where the rest is not asked for."""
        with observing(self.alone, self.asked) as observed:
            loss = score_batch(self.alone, self.engine, to_device(rows), beside=True).loss
            if self.asked is None:
                return torch.stack([loss, *[torch.zeros_like(loss)] * (len(MEASURED) - 1)])
            statistics = observed.statistics()
        return torch.stack([getattr(statistics, name) for name in MEASURED])

    def _by_sample(self, found: Tensor, samples: int) -> dict[str, Tensor]:
        """The rows' values, kind after kind, by sample."""
        if not samples:
            zero = found.new_zeros(1)
            return dict.fromkeys(("bare", *MEASURED), zero)
        kinds = found.unflatten(1, (-1, samples))  # [3, kinds, B]
        values = {}
        if self.bare:
            values["bare"] = kinds[0, 0]
        if self.others:
            means = kinds[:, int(self.bare) :].mean(1)
            values |= dict(zip(MEASURED, means, strict=True))
        return values

    def _partner(self, sample: Mapping[str, Any], turn: int) -> int:
        """The position of the row whose prompt `sample` is put to; a control goes by the row that
        its own prompt is of.
        """
        known = int(sample.get("prompt_of", sample["sample_id"]))
        row = self.place.get(known, int(sample["sample_id"]) % len(self.pool))
        return int(self.partners[row, turn])
