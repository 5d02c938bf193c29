"""The batch plan: which samples share a micro-batch, on which rank, in which step. Made once, from
the lengths alone.

Micro-batches hold samples of similar length (little padding), stay within a budget of tokens
counted with their padding, and are dealt so that all ranks take the same number of steps and the
ranks of one step have nearly equal work: under ZeRO-3 the ranks go in lockstep, so a step lasts as
long as its slowest rank. Pure functions; reads and writes nothing; no torch import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# (rows [B], longest [B]) -> cost [B], any unit
Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class BatchPlan:
    """`batches[rank][step]` is a tuple of sample indices; an empty one means: take part, but there
    is no work.
    """

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    tokens_per_microbatch: int
    num_tokens: int  # real tokens over all samples
    padding_fraction: float  # share of the processed tokens that is padding
    imbalance: float  # sum over steps of the slowest rank's cost / the mean rank's cost, minus one
    over_budget: int  # samples longer than the budget, each a micro-batch of its own

    @property
    def steps(self) -> int:
        """Number of steps, the same on every rank."""
        return len(self.batches[0])

    @property
    def num_samples(self) -> int:
        return sum(len(batch) for rank in self.batches for batch in rank)

    def summary(self) -> str:
        """One line for the log."""
        over = f", {self.over_budget:,} samples above the budget" if self.over_budget else ""
        ranks = f"{len(self.batches)} rank{'s' if len(self.batches) > 1 else ''}"
        return (
            f"{self.num_samples:,} samples, {self.num_tokens:,} tokens in {self.steps:,} steps on"
            f" {ranks} of at most {self.tokens_per_microbatch:,} tokens: padding"
            f" {self.padding_fraction:.1%}, imbalance {self.imbalance:.1%}{over}"
        )


def plan_batches(
    lengths: Sequence[int] | np.ndarray,
    num_ranks: int,
    tokens_per_microbatch: int,
    seed: int,
    cost: Cost | None = None,
) -> BatchPlan:
    """Plan micro-batches of samples with `lengths` [N] tokens; rows x longest <=
    tokens_per_microbatch.

    A sample above the budget is a batch of its own. The number of steps is the least the budget
    allows; within it the batches are made as even as they get, so that no rank idles through a
    last, half-empty step. Steps run from the costliest down: what does not fit in memory fails in
    the first step, not after an hour. `cost` gives a batch's work from its rows and its longest
    sample (default: tokens with padding). The same arguments always give the same plan. Raises
    ValueError on a length below 1, no samples' ranks or budget below 1.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if num_ranks < 1 or tokens_per_microbatch < 1:
        raise ValueError(
            f"wanted at least 1 rank and 1 token, found {num_ranks} and {tokens_per_microbatch}"
        )
    if lengths.size and lengths.min() < 1:
        raise ValueError(
            f"wanted lengths of at least 1, found {lengths.min()} at index {lengths.argmin()}"
        )
    rng = np.random.default_rng(seed)
    # equal lengths are batched in drawn order, not in the pool's
    shuffled = rng.permutation(lengths.size)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    descending = lengths[order].tolist()

    bounds = _even_cuts(descending, num_ranks, tokens_per_microbatch)
    members = [tuple(order[a:b].tolist()) for a, b in pairwise(bounds)]
    return _deal(members, lengths, num_ranks, tokens_per_microbatch, rng, cost)


def deal_batches(
    members: Sequence[Sequence[int]],
    lengths: Sequence[int] | np.ndarray,
    num_ranks: int,
    tokens_per_microbatch: int,
    seed: int,
    cost: Cost | None = None,
) -> BatchPlan:
    """A plan of given micro-batches (indices into `lengths` [N]): what is left of an earlier plan,
    for any number of ranks.

    The batches stay as they are, so that their samples get the same scores to the bit.
    """
    batches = [tuple(batch) for batch in members if batch]
    return _deal(
        batches,
        np.asarray(lengths, np.int64),
        num_ranks,
        tokens_per_microbatch,
        np.random.default_rng(seed),
        cost,
    )


def tight_batches(
    lengths: Sequence[int] | np.ndarray, tokens_per_microbatch: int, each: int
) -> list[list[int]]:
    """Batches (indices into `lengths` [N]) of at most `tokens_per_microbatch` tokens, padding
    included, whose padded tokens together with `each` for every batch are the fewest there are.

    For passes that can be cut anywhere: unlike `plan_batches`, which takes as few as the budget
    allows. A sample above the budget is a batch of its own.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    descending, count = lengths[order], lengths.size
    # the least cost of the first n samples, and where the last of their batches begins
    cost, begins = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for stop in range(1, count + 1):
        padded = descending[:stop] * np.arange(stop, 0, -1)
        fits = (padded <= tokens_per_microbatch) | (np.arange(stop) == stop - 1)
        costs = np.where(fits, cost[:stop] + padded + each, np.iinfo(np.int64).max)
        begins[stop] = costs.argmin()
        cost[stop] = costs[begins[stop]]
    batches, stop = [], count
    while stop:
        batches.append(order[begins[stop] : stop].tolist())
        stop = int(begins[stop])
    return batches[::-1]


def _deal(
    members: list[tuple[int, ...]],
    lengths: np.ndarray,
    num_ranks: int,
    tokens_per_microbatch: int,
    rng: np.random.Generator,
    cost: Cost | None,
) -> BatchPlan:
    """Batches -> steps of ranks: those of neighbouring cost share a step; steps thereby run from
    the costliest down.
    """
    rows = np.array([len(batch) for batch in members], np.int64)
    longest = np.array([lengths[list(batch)].max() for batch in members], np.int64)
    work = np.asarray(cost(rows, longest) if cost else rows * longest, dtype=np.float64)
    by_cost = np.argsort(-work, kind="stable")
    steps = -(-rows.size // num_ranks)
    grid = np.full((steps, num_ranks), -1, dtype=np.int64)
    grid.reshape(-1)[: rows.size] = by_cost
    grid = rng.permuted(grid, axis=1)  # so that no rank gets every step's costliest batch
    grid_work = np.where(grid >= 0, np.append(work, 0.0)[grid], 0.0)

    batches = tuple(
        tuple(members[b] if b >= 0 else () for b in column) for column in grid.T.tolist()
    )
    if not steps:
        batches = tuple(() for _ in range(num_ranks))
    dealt = np.array([index for batch in members for index in batch], np.int64)
    num_tokens, padded = int(lengths[dealt].sum()), int((rows * longest).sum())
    mean_work = grid_work.mean(axis=1).sum() if steps else 0.0
    return BatchPlan(
        batches=batches,
        tokens_per_microbatch=tokens_per_microbatch,
        num_tokens=num_tokens,
        padding_fraction=1.0 - num_tokens / padded if padded else 0.0,
        imbalance=float(grid_work.max(axis=1).sum() / mean_work - 1.0) if mean_work else 0.0,
        over_budget=int((lengths[dealt] > tokens_per_microbatch).sum()),
    )


def _even_cuts(descending: list[int], num_ranks: int, budget: int) -> list[int]:
    """Cut the sorted samples into batches: as few steps as `budget` allows, then the smallest
    budget with as few.

    Filling every batch to the brim would leave a last step in which most ranks idle; the smaller
    budget spreads that gap over all batches. Returns the batches' bounds, from 0 to N.
    """
    fullest = _cut(descending, budget, limit=len(descending))
    assert fullest is not None
    allowed = -(-(len(fullest) - 1) // num_ranks) * num_ranks
    best, low, high = fullest, 0, budget  # `high` is known to do; the answer lies in (low, high]
    while high - low > max(1, high // 1024):
        middle = (low + high) // 2
        cuts = _cut(descending, middle, limit=allowed)
        if cuts is None:
            low = middle
        else:
            best, high = cuts, middle
    return best


def _cut(descending: list[int], budget: int, limit: int) -> list[int] | None:
    """Bounds of batches filled in order up to `budget` tokens with padding; None when more than
    `limit` are needed.
    """
    bounds, at, total = [0], 0, len(descending)
    while at < total:
        if len(bounds) > limit:
            return None
        at = min(total, at + max(1, budget // descending[at]))
        bounds.append(at)
    return bounds
