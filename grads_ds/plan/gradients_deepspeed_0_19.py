"""What ZeRO keeps of gradients until they are reduced, as DeepSpeed 0.19.8 does it.

Pure bookkeeping for grads_ds/plan/replay_deepspeed_0_19.py: no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from grads_ds.plan.timeline import Name, Weight
from grads_ds.plan.zero_settings import ZeroSettings


class GradientBuckets:
    """Gradients on their way. `held`: bytes they take now. `moment(bytes)` is called whenever so
    many bytes more are alive for an instant.
    """

    def __init__(
        self, weights: Mapping[Name, Weight], limits: ZeroSettings, moment: Callable[[float], None]
    ) -> None:
        self.weights, self.limits, self.moment = weights, limits, moment
        self.held = self.buffers = 0.0
        self.bucket: list[Name] = []
        # stage 2: bytes of the last rank's part of the gradients, made when the first of them has
        # been reduced
        self.own = 0.0
        self.partition_of = self._partitions()

    def end_pass(self) -> None:
        """Reduce what is left and give the buffers back."""
        self._reduce()
        self.held -= self.buffers + self.own
        self.own = self.buffers = 0.0

    def _bytes(self, elements: float) -> float:
        return elements * self.limits.dtype_bytes

    def _partitions(self) -> dict[Name, tuple[int, int]]:
        """Stages 1 and 2: the first and last rank whose part of the flat gradients each trained
        weight touches.
        """
        trained = {n: w.numel for n, w in self.weights.items() if w.trained}
        size = max(1.0, sum(trained.values()) / self.limits.ranks)
        found, offset = {}, 0
        for name, count in trained.items():
            found[name] = (int(offset / size), int((offset + count - 1) / size))
            offset += count
        return found

    def add(self, name: Name) -> None:
        """The gradient of one weight is there."""
        size, limits = self.weights[name].numel, self.limits
        if not self.buffers and limits.stage in (1, 2):  # made when the first gradient comes
            self.buffers = self._bytes(limits.reduce_bucket_size) * (2 if limits.overlap else 1)
            self.held += self.buffers
        self.moment(self._bytes(size))
        if limits.stage == 0:
            return  # they stay where they are
        if (
            self.bucket
            and sum(self.weights[n].numel for n in self.bucket) + size > limits.reduce_bucket_size
        ):
            self._reduce(self._bytes(size))
        self.bucket.append(name)
        if size > limits.reduce_bucket_size:  # too large for the buffer: lives until it is reduced
            self.held += self._bytes(size)

    def _reduce(self, more: float = 0.0) -> None:
        if not self.bucket:
            return
        sizes = [self.weights[n].numel for n in self.bucket]
        if self.limits.stage >= 3:  # put in the order of ranks, in a copy
            copied = len(sizes) > 1 or bool(sizes[0] % self.limits.ranks)
        else:
            copied = len({rank for n in self.bucket for rank in self.partition_of[n]}) > 1
        self.moment(more + (self._bytes(sum(sizes)) if copied else 0.0))
        if (
            self.limits.stage == 2
            and not self.own
            and any(self.partition_of[n][1] == self.limits.ranks - 1 for n in self.bucket)
        ):
            self.own = self._bytes(
                sum(w.numel for w in self.weights.values() if w.trained) / self.limits.ranks
            )
            self.held += self.own
            self.moment(more)
        self.held -= sum(
            self._bytes(size) for size in sizes if size > self.limits.reduce_bucket_size
        )
        self.bucket = []
