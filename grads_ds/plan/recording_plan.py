"""The forecast of the recording: whose ranks share out the parameters, how large a micro-batch fits
and how many layers it computes again, and what would be faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from grads_ds.engine.memory_shares import LARGEST, PARAMETERS
from grads_ds.plan.cluster import Forecast
from grads_ds.plan.memory import Memory, scoring_memory
from grads_ds.plan.planner import Planner
from grads_ds.plan.shapes import Batch, check_bytes, recorded_sizes
from grads_ds.plan.stage_time import StepTime, scoring_flop, step_time
from grads_ds.plan.traffic import Traffic, scoring_traffic

FASTER = 1.05  # what advice has to gain


@dataclass(frozen=True)
class _Choice:
    """How the recording is done: rows of a micro-batch, layers computed again, and whether each
    host has the parameters to itself.
    """

    rows: int
    recomputed: int
    in_host: bool


@dataclass(frozen=True)
class _Outcome:
    memory: Memory
    traffic: Traffic
    time: StepTime


class _Recording:
    """What the choices of one recording share."""

    def __init__(self, planner: Planner) -> None:
        self.planner, self.probe = planner, planner.config.probe
        layers = self.probe.layers
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        held = len({"anchor", "contrast"} & set(self.probe.extras))  # reference gradients
        sizes = recorded_sizes(planner.model, self.layers)
        self.anchor = held * sum(size * count for size, count in sizes.items())
        self.check = check_bytes(
            planner.length, planner.shape.vocabulary, planner.dtype.itemsize, sizes
        )
        self.stage = int(planner.zero.get("stage", 0))
        self._outcomes: dict[_Choice, _Outcome] = {}

    def of(self, choice: _Choice) -> _Outcome:
        """What a choice takes."""
        if choice not in self._outcomes:
            self._outcomes[choice] = self._outcome(choice)
        return self._outcomes[choice]

    def shards(self, choice: _Choice) -> int:
        """Ranks that share out the parameters."""
        cluster = self.planner.cluster
        if self.stage < 3:
            return 1
        return cluster.ranks_per_host if choice.in_host else cluster.ranks

    def _outcome(self, choice: _Choice) -> _Outcome:
        planner, cluster, zero = self.planner, self.planner.cluster, dict(self.planner.zero)
        if choice.in_host:
            zero.pop("zero_hpz_partition_size", None)
        ranks = cluster.ranks_per_host if choice.in_host else cluster.ranks
        limits = planner.limits(zero, ranks)
        # below stage 3 the frozen pass shards nothing (grads_ds/engine/settings.py)
        sharded = limits.stage >= 3
        limits = limits if sharded else replace(limits, stage=0)
        batch = Batch(
            choice.rows,
            planner.length,
            "score",
            planner.dtype,
            None,
            self.layers,
            sharded,
            choice.recomputed,
        )
        played = planner.play(batch, limits)
        hosts = 1 if choice.in_host else cluster.hosts
        traffic = scoring_traffic(played[1], limits, zero, hosts)
        share = choice.recomputed / planner.shape.layers
        flop = scoring_flop(planner.shape, planner.length, share)
        return _Outcome(
            scoring_memory(
                *played,
                limits,
                zero,
                cluster.ranks_per_host,
                self.anchor,
                choice.rows,
                planner.shape.layers,
                self.check,
            ),
            traffic,
            step_time(flop, choice.rows * planner.length, 1, cluster, traffic),
        )

    def fits(self, choice: _Choice) -> bool:
        """Whether a GPU holds it."""
        return self.of(choice).memory.device <= self.planner.budget

    def speed(self, choice: _Choice) -> float:
        """Tokens per second and rank."""
        return choice.rows * self.planner.length / self.of(choice).time.seconds

    def most_rows(self, choice: _Choice) -> int:
        """The rows that fit, at most `LARGEST` tokens; 0 where not even one does."""
        one, two = (self.of(replace(choice, rows=n)).memory.device for n in (1, 2))
        most = max(1, LARGEST // self.planner.length)
        rows = min(most, 1 + int((self.planner.budget - one) / max(two - one, 1.0)))
        while rows > 0 and not self.fits(replace(choice, rows=rows)):
            rows -= 1
        return max(rows, 0)

    def fewest_recomputed(self, choice: _Choice) -> int | None:
        """The fewest layers to compute again with which it fits; None where it never does."""
        every, budget = self.planner.shape.layers, self.planner.budget
        none, all_ = (self.of(replace(choice, recomputed=n)).memory.device for n in (0, every))
        if all_ > budget:
            return None
        # a layer more frees about as much as any other
        each = max((none - all_) / every, 1.0)
        count = min(every, max(0, math.ceil((none - budget) / each)))
        while not self.fits(replace(choice, recomputed=count)):
            count += 1
        while count and self.fits(replace(choice, recomputed=count - 1)):
            count -= 1
        return count


def recording(planner: Planner, tokens: float) -> Forecast:
    """The recording of a pool of `tokens`."""
    task, probe = _Recording(planner), planner.config.probe
    again = planner.shape.layers if probe.recompute_layers is None else probe.recompute_layers
    choice = _Choice(
        1,
        min(again, planner.shape.layers) if probe.gradient_checkpointing else 0,
        _in_host(task, probe.shard_within),
    )
    if probe.tokens_per_microbatch == "auto":
        rows = max(1, task.most_rows(choice))
    else:
        rows = max(1, probe.tokens_per_microbatch // planner.length)
    choice = replace(choice, rows=rows)
    found = task.of(choice)
    each = choice.rows * planner.length
    return planner.forecast(
        "recording",
        choice.rows,
        1,
        choice.recomputed,
        found.memory,
        found.traffic,
        found.time,
        each * planner.cluster.ranks,
        tokens,
        task.shards(choice),
        _faster(task, choice) if task.fits(choice) else _fitting(task, choice),
    )


def _in_host(task: _Recording, wanted: str) -> bool:
    """As grads_ds/engine/placement.py decides it."""
    planner = task.planner
    cluster = planner.cluster
    if task.stage < 3 or cluster.hosts == 1 or wanted == "world":
        return False
    offloaded = planner.zero.get("offload_param", {}).get("device", "none") != "none"
    size = planner.shape.parameters * planner.dtype.itemsize / cluster.ranks_per_host
    return wanted == "host" or (not offloaded and size <= PARAMETERS * planner.budget)


def _fitting(task: _Recording, choice: _Choice) -> list[str]:
    """The mildest change with which it fits."""
    length, least = task.planner.length, replace(choice, rows=1)
    if rows := task.most_rows(choice):
        return [f"probe.tokens_per_microbatch: {rows * length} fits"]
    again = replace(choice, recomputed=task.planner.shape.layers)
    if rows := task.most_rows(again):
        return [
            f"probe.gradient_checkpointing: true with tokens_per_microbatch: {rows * length} fits"
        ]
    memory = task.of(least).memory
    if task.anchor and memory.device - memory.anchor <= task.planner.budget:
        size = memory.anchor / 2**30
        return [
            f"probe.extras: the anchor's gradient is whole on every GPU ({size:.1f} GiB); record"
            " fewer groups (probe.layers), or leave anchor and contrast out"
        ]
    wider = replace(again, rows=1, in_host=False)
    if choice.in_host and task.fits(wider):
        return ["probe.shard_within: world fits, with gradient_checkpointing: true"]
    return ["recording needs more GPUs: not even one sample fits"]


def _faster(task: _Recording, choice: _Choice) -> list[str]:
    """The fastest other choice, where it gains something."""
    waits = task.of(choice).time.binds != "arithmetic"
    if not waits and not choice.recomputed:
        return []
    places = {choice.in_host}
    if waits and task.stage >= 3 and task.planner.cluster.hosts > 1:
        places.add(True)
    best = choice
    for in_host in sorted(places):
        rows = choice.rows
        tried = {1, rows, max(1, rows // 4)}
        for count in sorted(tried):
            other = replace(choice, rows=count, in_host=in_host)
            again = task.fewest_recomputed(other)
            if again is None:
                continue
            other = replace(other, recomputed=again)
            if task.speed(other) > task.speed(best) * 1.01:
                best = other
    gain = task.speed(best) / task.speed(choice)
    if gain < FASTER:
        return []
    return [f"probe: {_words(task, choice, best)}: {gain:.1f} times as fast"]


def _words(task: _Recording, choice: _Choice, best: _Choice) -> str:
    changes: dict[str, Any] = {}
    if best.in_host != choice.in_host:
        changes["shard_within"] = "host" if best.in_host else "world"
    if best.rows != choice.rows or task.probe.tokens_per_microbatch == "auto":
        changes["tokens_per_microbatch"] = best.rows * task.planner.length
    if best.recomputed != choice.recomputed:
        if best.recomputed and not task.probe.gradient_checkpointing:
            changes["gradient_checkpointing"] = "true"
        changes["recompute_layers"] = best.recomputed
    return ", ".join(f"{key}: {value}" for key, value in changes.items())
