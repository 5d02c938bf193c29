"""Whether the rows of a trial's tensors belong to the samples that their place says: tensors of two
runs are compared, the second with some samples' tokens changed.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from grads_ds.gradnorm.batch_layout import Layout
from grads_ds.gradnorm.trial.call_log import Call, CallLog

_NOISE = 1e-3  # share of a change (of squares) that may fall on other samples' rows


class Checks:
    """Whether tensors of the first run changed in the second where they may, and only there."""

    def __init__(self, layout: Layout, touched_BT: Tensor, first: CallLog, second: CallLog) -> None:
        # what padding does is nobody's
        self.touched_BT = touched_BT | ~layout.real
        self.alone = layout.num_samples == 1
        self.rows_are_samples = layout.packed_index is None
        again: dict[tuple[int, int], Call] = {}
        for log in (second, first):
            turns: Counter[int] = Counter()
            for call in log.calls:
                key = (id(call.module), turns[id(call.module)])
                turns[id(call.module)] += 1
                if log is second:
                    again[key] = call
                else:
                    call.again = again.get(key)
        self.counts = Counter(id(call.module) for call in first.calls)

    def right(self, call: Call, which: str, shared: bool = False) -> bool:
        """Whether the call's "inputs" or "outputs" change for the touched samples alone. shared:
        tensors that belong to no sample are allowed, if they do not change.
        """
        if call.again is None:
            return False
        before, after = getattr(call, which), getattr(call.again, which)
        if set(before) != set(after):
            return False
        return all(self._tensor(before[place], after[place], which, shared) for place in before)

    def looked_up(self, call: Call) -> bool:
        """Whether rows of a table belong to the samples by their place, or to the positions of one
        row that all samples share.
        """
        rows, length = self.touched_BT.shape
        if call.again is None or set(call.outputs) != {0} or self.alone:
            return self.alone
        before, after = call.outputs[0], call.again.outputs.get(0)
        if after is None or before.shape != after.shape:
            return False
        if before.shape == (1, length):
            return True
        if before.shape == (length,):
            return torch.equal(before, after)
        if torch.equal(before, after):  # positions, the same for all samples
            by_mask = before.shape == (rows, length) and rows != length
            return by_mask or (before.dim() == 2 and _copies(before, rows))
        return self._tensor(before, after, "outputs", False)

    def repeated(self, call: Call) -> bool:
        """Whether input and output, [k * B * T, ...], are k times all rows in their order."""
        if call.again is None or set(call.inputs) != {0} or set(call.outputs) != {0}:
            return False
        for before, after in (
            (call.inputs[0], call.again.inputs.get(0)),
            (call.outputs[0], call.again.outputs.get(0)),
        ):
            tokens = self.touched_BT.numel()
            if after is None or before.shape != after.shape or before.shape[0] % tokens:
                return False
            pairs = zip(before.split(tokens), after.split(tokens), strict=True)
            if not all(self._tensor(one, other, "inputs", False) for one, other in pairs):
                return False
        return True

    def one_for_all(self, call: Call) -> bool:
        """Whether the call gave one tensor, [1, ...], that depends on no sample."""
        if call.again is None or call.given_out or set(call.outputs) != {0} or not call.plain:
            return False
        before, after = call.outputs[0], call.again.outputs.get(0)
        return (
            after is not None
            and before.dim() >= 2
            and before.shape[0] == 1 < len(self.touched_BT)
            and torch.equal(before, after)
        )

    def _tensor(self, before: Tensor, after: Tensor, which: str, shared: bool) -> bool:
        if before.shape != after.shape:
            return False
        if self.alone:
            return True
        rows = len(self.touched_BT)
        change = (after - before).double().square()
        moved = float(change.sum()) > 1e-9 * float(before.double().square().sum())
        owner = self._owner(before.shape)
        if owner is None:
            return shared and not moved
        if not moved:  # it depends on no sample: shared by all, unless nothing, or a copy for each
            return which == "inputs" or not bool(before.any()) or _copies(before, rows)
        owned = owner.reshape(owner.shape + (1,) * (change.dim() - owner.dim()))
        return float((change * ~owned).sum()) <= _NOISE * float(change.sum())

    def _owner(self, shape: torch.Size) -> Tensor | None:
        """Which leading rows of a fingerprint the touched samples own, by their place."""
        rows, length = self.touched_BT.shape
        if shape[:2] == (rows, length):
            return self.touched_BT
        if shape[:1] == (rows * length,):
            return self.touched_BT.reshape(-1)
        if len(shape) == 1 and shape[0] and shape[0] % (rows * length) == 0:  # by heads
            return self.touched_BT.reshape(-1).repeat_interleave(shape[0] // (rows * length))
        if len(shape) == 3 and shape[0] == rows and shape[2] == length:
            return self.touched_BT[:, None, :].expand(shape)
        if len(shape) >= 2 and shape[0] == rows and self.rows_are_samples:
            return self.touched_BT.any(1)
        return None


def _copies(fingerprint: Tensor, rows: int) -> bool:
    """Whether its first dimension is the batch's rows, each a copy of the same."""
    if fingerprint.dim() < 2 or fingerprint.shape[0] != rows or fingerprint.shape[1] == rows:
        return False
    return torch.equal(fingerprint, fingerprint[:1].expand_as(fingerprint))
