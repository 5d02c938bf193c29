"""Packing: the samples of one micro-batch laid end to end in as few rows as hold them, none of them
seeing another.

What an optimizer step learns from is unchanged (the same samples, the same loss): packing only
leaves out the padding, so a larger micro_batch_size fits. Position ids start again at 0 with each
sample and no attention mask is given; from that eager and sdpa make a block-diagonal mask and
flash_attention_2, which wants everything in one row, variable-length calls. Reads and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.engine.attention import attention_of
from grads_ds.gradnorm.batch_layout import read_layout
from grads_ds.gradnorm.measure.frozen import keeps_packed_apart
from grads_ds.training.trainer import WEIGHTS, Collator


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in bins of at most `capacity` in all (a longer one stands alone): longest first, each
    into the first bin that holds it.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


class PackingCollator(Collator):
    """Rows -> input_ids, labels, position_ids, and loss weights where the rows have weights; each
    [bins, longest bin].

    The first token of each sample has no label: what stands before it in the row does not predict
    it. Padding at the end of a row has position 0 in each place, a sample of its own to every
    model.
    """

    def __init__(self, config: Config, pad_id: int):
        super().__init__(pad_id)
        self.one_row = attention_of(config) == "flash_attention_2"
        self.capacity = config.data.max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        bins = first_fit(lengths, sum(lengths) if self.one_row else self.capacity)
        shape = (len(bins), max(sum(lengths[i] for i in bin_) for bin_ in bins))
        batch = {
            "input_ids": np.full(shape, self.pad_id, np.int64),
            "labels": np.full(shape, IGNORE_INDEX, np.int64),
            "position_ids": np.zeros(shape, np.int64),
        }
        weights = np.zeros(shape, np.float32)
        for line, members in enumerate(bins):
            start = 0
            for row, length in ((rows[i], lengths[i]) for i in members):
                place = slice(start, start + length)
                batch["input_ids"][line, place] = row["input_ids"]
                batch["labels"][line, place] = [IGNORE_INDEX, *row["labels"][1:]]
                batch["position_ids"][line, place] = np.arange(length)
                weights[line, place] = row.get("weight", 1.0)
                start += length
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        return tensors | ({WEIGHTS: torch.from_numpy(weights)} if "weight" in rows[0] else {})


class PackingCheck(TrainerCallback):
    """Before the first step: changes one of two packed samples and refuses the model if the other
    one's hidden states change.
    """

    def __init__(self, collator: Collator, rows: Any):
        self.collator, self.rows = collator, rows

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Raises UserError on every rank for a model in which packed samples see each other."""
        columns = ("input_ids", "labels")
        pair = [
            {name: self.rows[i][name][:16] for name in columns}
            for i in (0, min(1, len(self.rows) - 1))
        ]
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.collator(pair).items()}
        if len(batch["input_ids"]) > 1:
            return  # samples so long that no two of them share a row
        starts = batch["position_ids"] == 0
        layout = read_layout(batch | {"segment_ids": starts.cumsum(-1)})
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "use_cache": False,
        }
        head = model.get_output_embeddings()
        if head is None or not keeps_packed_apart(model, head, layout, inputs):
            found = (
                f"{type(getattr(model, 'base_model', model)).__name__} with attention"
                f" {model.config._attn_implementation}"
            )
            raise UserError(
                "sft.packing: wanted a model that keeps the samples of a packed row apart; found"
                f" that under {found} they see each other; set sft.packing to false"
            )
