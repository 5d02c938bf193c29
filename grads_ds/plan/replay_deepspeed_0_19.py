"""DeepSpeed's ZeRO played through on a timeline: which weights are whole when, what is gathered and
reduced, the most memory at once.

The rules are those of DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py, stage3.py,
stage_1_and_2.py), in the steady state after its first steps, when it knows the modules' order. Pure
bookkeeping: no tensors.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from bisect import bisect_left
from collections import defaultdict, deque
from dataclasses import dataclass
from importlib import metadata

from grads_ds.plan.gradients_deepspeed_0_19 import GradientBuckets
from grads_ds.plan.timeline import Event, Name, Timeline
from grads_ds.plan.zero_settings import ZeroSettings

VERSION = "0.19."  # of DeepSpeed, whose rules these are


@dataclass(frozen=True)
class Replayed:
    """Elements gathered in the forward and in the backward pass: of the first micro-batch of a
    step, and of any later one. Of the worst moment: bytes of activations, of weights gathered
    whole, of gradients on their way, of the head's own pass; at_head: of the activations and of the
    weights gathered when the head's pass begins.
    """

    forward: tuple[float, float]
    backward: tuple[float, float]
    activations: float
    gathered: float
    buckets: float
    head: float
    at_head: tuple[float, float]


def replay(timeline: Timeline, limits: ZeroSettings) -> Replayed:
    """Play three micro-batches: the first, which finds all weights apart, and two more."""
    _compare_version()
    player = _Player(timeline, limits)
    passes = [player.micro_batch() for _ in range(3)]
    return Replayed(
        (passes[0][0], passes[2][0]), (passes[0][1], passes[2][1]), *player.worst, player.at_head
    )


@functools.cache
def _compare_version() -> None:
    """Warn, once in a process, when the installed DeepSpeed is another than the one played."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = metadata.version("deepspeed")
        if not found.startswith(VERSION):
            warnings.warn(
                f"plan: wanted DeepSpeed {VERSION}x, whose sharding is simulated; found {found};"
                " memory and traffic of ZeRO may differ from what is predicted",
                stacklevel=3,
            )


class _Handle:
    """One gathering: the weights still to be asked for, and the bytes of the buffer they arrived in
    together (none for a single one).
    """

    def __init__(self, names: set[Name], flat: float) -> None:
        self.names, self.flat, self.copied = set(names), flat, False


class _Player:
    def __init__(self, timeline: Timeline, limits: ZeroSettings) -> None:
        self.timeline, self.limits, self.weights = timeline, limits, timeline.weights
        self.sharded = limits.stage >= 3 and limits.ranks > 1
        self.persistent = {
            n for n, w in self.weights.items() if w.numel <= limits.persistence_threshold
        }
        self.whole: set[Name] = set(self.persistent)
        self.inflight: dict[Name, _Handle] = {}
        self.users: defaultdict[Name, set[Name]] = defaultdict(set)
        self.worst, self.at_head = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0)
        self.activations = self.gathered = 0.0
        self.gradients = GradientBuckets(
            self.weights, limits, lambda more: self._moment(self.activations, more)
        )
        fetches = [event for event in timeline.events if event.kind == "fetch"]
        self.queue_of_pass = [
            (name, step) for step, event in enumerate(fetches) for name in event.weights
        ]
        self.places: defaultdict[Name, list[int]] = defaultdict(list)  # steps that use a weight
        self.passed = [0.0]  # elements used before each step
        for step, event in enumerate(fetches):
            self.passed.append(
                self.passed[-1] + sum(self.weights[name].numel for name in event.weights)
            )
            for name in event.weights:
                self.places[name].append(step)

    # ---- one micro-batch ----

    def micro_batch(self) -> tuple[float, float]:
        """(elements gathered in the forward pass, in the backward pass)."""
        self.step, self.available, self.received = 0, 0.0, [0.0, 0.0]
        self.queue = deque(self.queue_of_pass)
        self.fetched_for: defaultdict[Name, float] = defaultdict(lambda: -1.0)
        self.active: dict[Name, Event] = {}  # modules whose backward has begun and not ended
        # frozen weights a checkpoint's second forward has fetched
        self.owed: defaultdict[Name, set[Name]] = defaultdict(set)
        for name in list(self.inflight):
            self._drop(name)
        self.activations = 0.0
        for event in self.timeline.events:
            self._moment(self.activations + event.peak)
            self.activations += event.net
            if event.kind == "gradient":
                self.gradients.add(event.weights[0])
            elif event.kind == "head":
                self._moment(self.activations, head=event.head)
                self.at_head = (self.activations, self.gathered)
            elif self.sharded:
                (self._fetch if event.kind == "fetch" else self._release)(event)
        self.gradients.end_pass()
        for event in self.active.values():  # the embedding: no gradient passes its input
            own = set(event.weights) | self.owed[event.module]
            self._let_go(event.module, own, own)
        return self.received[0], self.received[1]

    def _bytes(self, elements: float) -> float:
        return elements * self.limits.dtype_bytes

    def _moment(self, activations: float, more: float = 0.0, head: float = 0.0) -> None:
        now = (activations, self.gathered, self.gradients.held + more, head)
        if sum(now) > sum(self.worst):
            self.worst = now

    # ---- stage 3: weights ----

    def _gather(self, names: set[Name], in_backward: bool) -> None:
        names = {n for n in names if n not in self.whole and n not in self.inflight}
        if not names:
            return
        count = sum(self.weights[n].numel for n in names)
        self.available += count
        self.received[in_backward] += count
        self.gathered += self._bytes(count)
        handle = _Handle(names, self._bytes(count) if len(names) > 1 else 0.0)
        for name in names:
            self.inflight[name] = handle
        self._moment(self.activations)

    def _arrive(self, name: Name) -> None:
        """The module that wants it waits: weights that came in one buffer are copied out of it, all
        together.
        """
        handle = self.inflight.pop(name)
        if not handle.copied:
            handle.copied = True
            self.gathered += handle.flat
            self.whole |= handle.names
            self._moment(self.activations)
        handle.names.discard(name)
        if not handle.names:  # the buffer goes when the last of them has been asked for
            self.gathered -= handle.flat

    def _drop(self, name: Name) -> None:
        """A weight that was gathered and not asked for before the pass ended."""
        self._arrive(name)
        self._free(name)

    def _free(self, name: Name) -> None:
        if name in self.whole and name not in self.persistent and not self.users[name]:
            self.whole.discard(name)
            self.gathered -= self._bytes(self.weights[name].numel)
            self.available -= self.weights[name].numel

    def _fetch(self, event: Event) -> None:
        limits = self.limits
        if event.by_gradient:
            self.active[event.module] = event
        self._gather(set(event.weights), event.in_backward)
        for name in event.weights:
            self.users[name].add(event.module)
            if (
                event.in_backward
                and not event.by_gradient
                and self.active
                and not self.weights[name].trained
            ):
                # stays with the block that is computed again until its gradient is done
                owner = next(reversed(self.active))
                self.owed[owner].add(name)
                self.users[name].add(owner)
            if name in self.inflight:
                self._arrive(name)
        fresh = sum(self.fetched_for[name] < self.step for name in event.weights)
        for _ in range(min(fresh, len(self.queue))):
            name, step = self.queue.popleft()
            self.fetched_for[name] = step
        budget = min(limits.max_live_parameters - self.available, limits.prefetch_bucket_size)
        ahead: set[Name] = set()
        count = 0
        while self.queue and count < budget:
            name, step = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for[name], step)
            if name not in self.whole and name not in self.inflight and name not in ahead:
                ahead.add(name)
                count += self.weights[name].numel
        self._gather(ahead, event.in_backward)
        self.step += 1

    def _release(self, event: Event) -> None:
        leaving = {name for name in event.weights if not self._comes_soon(name)}
        own = set(event.weights)
        if event.by_gradient:
            own |= self.owed[event.module]
            leaving |= self.owed.pop(event.module)
            self.active.pop(event.module, None)
        self._let_go(event.module, own, leaving)

    def _comes_soon(self, name: Name) -> bool:
        """Whether its next use was passed over by prefetching already, or lies within the reuse
        distance.
        """
        if self.fetched_for[name] > self.step:
            return True
        places = self.places[name]
        later = bisect_left(places, self.step)
        return (
            later < len(places)
            and self.passed[places[later]] - self.passed[self.step] < self.limits.max_reuse_distance
        )

    def _let_go(self, module: Name, own: set[Name], leaving: set[Name]) -> None:
        for name in own:
            self.users[name].discard(module)
        for name in leaving:
            if name not in self.inflight:
                self._free(name)
