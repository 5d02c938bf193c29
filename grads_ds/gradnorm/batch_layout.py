"""Which token belongs to which sample, and which positions are targets: read once per micro-batch.

Shapes: B rows, T positions, S samples (rows, or segments of packed rows), L longest sample, N
target positions. Hugging Face's convention: labels are aligned with input_ids and shifted here,
position t predicts labels[t + 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Layout:
    """One micro-batch. Target positions are sorted by sample, then by position."""

    rows: int
    length: int
    num_samples: int
    input_ids: Tensor  # int64 [B, T]
    real: Tensor  # bool [B, T], False at padding
    position_ids: Tensor  # int64 [B, T]
    needs_positions: bool  # they are not 0, 1, 2, ... in every row
    # int64 [S, L], flat position of each token of each sample, -1 where there is none
    packed_index: Tensor | None
    target_positions: Tensor  # int64 [N], flat b * T + t of the predicting position
    target_ids: Tensor  # int64 [N]
    target_samples: Tensor  # int64 [N]
    target_counts: Tensor  # int64 [S]
    front: int = 0  # positions that the model adds in front of every row, part of T from here on

    @property
    def has_holes(self) -> bool:
        """Whether an unpacked row has padding between its tokens."""
        begins = self.real.clone()
        begins[:, 1:] &= ~self.real[:, :-1]
        return self.packed_index is None and bool((begins.sum(1) > 1).any())

    @property
    def token_counts(self) -> Tensor:
        """int64 [S]: how many tokens each sample has, without padding."""
        own = self.real if self.packed_index is None else self.packed_index >= 0
        return own.sum(-1) - self.front

    def behind(self, front: int) -> Layout:
        """The same rows behind `front` positions of the model's own (prompt tuning)."""
        if not front:
            return self

        def pad(tensor: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(tensor, (front, 0), value=value)

        return replace(
            self,
            length=self.length + front,
            input_ids=pad(self.input_ids, 0),
            real=pad(self.real, True),
            position_ids=pad(self.position_ids, 0),
            target_positions=self.target_positions
            + front * (self.target_positions // self.length + 1),
            front=front,
        )

    def per_sample(self, tensor: Tensor, flat_ok: bool = True) -> Tensor | None:
        """[B, T, ...], [B, heads, T, ...], [B * T, ...], [B * T * heads, W] or, where rows are
        samples, [B, any, ...] -> [S, L, ...]; None if its rows cannot be told apart by sample.
        """
        if tensor.dim() == 4 and tensor.shape[0] == self.rows and tensor.shape[2] == self.length:
            if self.packed_index is not None and tensor.shape[1] == self.length:
                return None  # as many heads as tokens: which is which cannot be told
            tensor = tensor.transpose(1, 2)
        elif tensor.shape[:2] == (self.rows, self.length):
            pass
        elif flat_ok and tensor.dim() >= 2 and tensor.shape[0] == self.rows * self.length:
            tensor = tensor.reshape(self.rows, self.length, *tensor.shape[1:])
        elif flat_ok and self._by_heads(tensor):
            tensor = tensor.reshape(self.rows, self.length, -1, tensor.shape[1])
        elif self.rows == 1 and self.packed_index is None:  # one sample: every row is its own
            return tensor.reshape(1, -1, tensor.shape[-1])
        elif self.packed_index is None and tensor.dim() >= 3 and tensor.shape[0] == self.rows:
            return tensor
        else:
            return None
        if self.packed_index is None:
            return tensor
        flat = tensor.reshape(self.rows * self.length, *tensor.shape[2:])
        gathered = flat[self.packed_index.clamp_min(0)]
        return gathered.masked_fill(
            (self.packed_index < 0).reshape(*self.packed_index.shape, *[1] * (flat.dim() - 1)), 0
        )

    def _by_heads(self, tensor: Tensor) -> bool:
        tokens = self.rows * self.length
        return tensor.dim() == 2 and tensor.shape[0] > tokens and tensor.shape[0] % tokens == 0

    def split_targets(self) -> list[tuple[int, int]]:
        """Each sample's slice [start, stop) of the target positions."""
        stops = self.target_counts.cumsum(0).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))


def read_layout(batch: Mapping[str, Tensor]) -> Layout:
    """Reads input_ids [B, T], labels [B, T], attention_mask [B, T] (default: all ones) and, for
    packed rows, segment_ids [B, T] (an int per token, the same for the tokens of one sample,
    negative at padding). In the place of labels, shift_labels [B, T]: the target of each position
    itself, as for a part of a sequence whose next token another rank holds.

    Raises ValueError if shapes differ, if the mask is not two-dimensional, or if a label stands at
    a padded position.
    """
    input_ids, shifted = batch["input_ids"], batch.get("shift_labels")
    labels = batch["labels"] if shifted is None else shifted
    rows, length = input_ids.shape
    segments = batch.get("segment_ids")
    mask = batch.get("attention_mask")
    for name, tensor in (("labels", labels), ("attention_mask", mask), ("segment_ids", segments)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, found"
                f" {tuple(tensor.shape)}"
            )
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask != 0
    packed_index = None
    if segments is not None:
        real = real & (segments >= 0)
        sample_BT, num_samples, packed_index = _number_segments(segments, real)
    else:
        num_samples = rows
        sample_BT = torch.arange(rows, device=input_ids.device)[:, None].expand(rows, length)
    is_target = (labels != IGNORE_INDEX) & real if shifted is not None else torch.zeros_like(real)
    # A sample's first token is predicted by nothing of its own: not by padding on its left, nor by
    # the sample packed before it.
    if shifted is None:
        is_target[:, :-1] = (
            (labels[:, 1:] != IGNORE_INDEX) & (sample_BT[:, 1:] == sample_BT[:, :-1]) & real[:, :-1]
        )
    stray = (labels != IGNORE_INDEX) & ~real
    if bool(stray.any()):
        raise ValueError(
            f"labels must be {IGNORE_INDEX} at padding; found {int(stray.sum())} labels where"
            " attention_mask or segment_ids say padding. Set them to -100 or correct the mask"
        )
    positions = is_target.reshape(-1).nonzero()[:, 0]
    samples = sample_BT.reshape(-1)[positions]
    targets = labels.reshape(-1)[positions + (shifted is None)] if len(positions) else positions
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = _positions(real, None if segments is None else sample_BT)
    counted = torch.arange(length, device=input_ids.device).expand_as(position_ids)
    natural = torch.equal(torch.where(real, position_ids, counted), counted)
    return Layout(
        rows,
        length,
        num_samples,
        input_ids,
        real,
        position_ids,
        not natural or packed_index is not None or shifted is not None,
        packed_index,
        positions,
        targets,
        samples,
        torch.bincount(samples, minlength=num_samples),
    )


def _positions(real_BT: Tensor, sample_BT: Tensor | None) -> Tensor:
    """Positions counted over each sample's real tokens: the same whatever the padding, on either
    side.
    """
    counted = real_BT.long().cumsum(-1)
    if sample_BT is not None:
        changed = torch.ones_like(real_BT)
        changed[:, 1:] = sample_BT[:, 1:] != sample_BT[:, :-1]
        offset = torch.where(changed, counted - 1, 0).cummax(-1).values
        counted = counted - offset
    return (counted - 1).clamp_min(0)


def _number_segments(segments_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, int, Tensor]:
    """Numbers the segments of all rows 0..S-1 in reading order (-1 at padding) and lists each one's
    flat positions.
    """
    changed = torch.ones_like(real_BT)
    changed[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    sample_BT = torch.where(
        real_BT, (changed & real_BT).reshape(-1).cumsum(0).reshape(real_BT.shape) - 1, -1
    )
    flat = sample_BT.reshape(-1)
    num_samples = int(flat.max()) + 1 if flat.numel() else 0
    positions = (flat >= 0).nonzero()[:, 0]
    owner = flat[positions]
    counts = torch.bincount(owner, minlength=num_samples)
    starts = counts.cumsum(0) - counts
    longest = int(counts.max()) if num_samples else 0
    index = torch.full((num_samples, longest), -1, dtype=torch.long, device=flat.device)
    index[owner, torch.arange(len(positions), device=flat.device) - starts[owner]] = positions
    return sample_BT, num_samples, index


def on_the_left(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The batch with each row's real tokens moved together to its left end, padding to the right,
    and where each position's token came from, int64 [B, T]; None where nothing had to move.

    A causal model then needs no mask, and counts positions from each sample's first token.
    """
    mask = batch.get("attention_mask")
    if mask is None or "segment_ids" in batch or mask.shape != batch["input_ids"].shape:
        return dict(batch), None
    real = mask != 0
    if not bool((real[:, 1:] & ~real[:, :-1]).any()):
        return dict(batch), None
    order = torch.argsort((~real).long(), dim=1, stable=True)
    moved = {
        name: value.gather(1, order)
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.shape == mask.shape
    }
    if "position_ids" in moved:  # counted from each sample's first token
        counted = torch.arange(mask.shape[1], device=mask.device)
        from_first = moved["position_ids"] - moved["position_ids"][:, :1]
        moved["position_ids"] = torch.where(real.gather(1, order), from_first, counted)
    return {**batch, **moved}, order


def unpad(batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The samples of a batch, each (input_ids, labels) without padding; shift_labels in the place
    of labels come as they are.
    """
    layout = read_layout(batch)
    labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"]
    if layout.packed_index is None:
        return [
            (ids[real], row[real])
            for ids, row, real in zip(layout.input_ids, labels, layout.real, strict=True)
        ]
    indices = [index[index >= 0] for index in layout.packed_index]
    return [(layout.input_ids.reshape(-1)[index], labels.reshape(-1)[index]) for index in indices]


def padded(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The opposite of `unpad`: one row per sample, padded on the right."""
    longest = max(len(ids) for ids, _ in samples)
    ids, labels = samples[0]
    batch = {
        "input_ids": ids.new_zeros(len(samples), longest),
        "labels": labels.new_full((len(samples), longest), IGNORE_INDEX),
        "attention_mask": ids.new_zeros(len(samples), longest),
    }
    for row, (ids, labels) in enumerate(samples):
        batch["input_ids"][row, : len(ids)] = ids
        batch["labels"][row, : len(ids)] = labels
        batch["attention_mask"][row, : len(ids)] = 1
    return batch
