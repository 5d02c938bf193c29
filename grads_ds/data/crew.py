"""Processes that share the work on blocks, each with the tokenizer; few blocks are done here.

Results come in the order of the blocks. A process that is killed (by the kernel's OOM killer, by
anybody) is replaced, and the blocks that were with it are done again.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any

from grads_ds.config.config import Config
from grads_ds.data.blocks import Block
from grads_ds.data.encoding import Outcome, set_worker, start_worker
from grads_ds.data.tokenizer import load_no_models

BLOCKS_FROM = (
    6  # blocks from which more processes pay (each takes 2 s and more to load the tokenizer)
)
AHEAD = 2  # blocks given out for each process: one at work, one at hand
Job = tuple[Path, Block, Callable[[Block], Outcome]]  # of which part, its rows, what to do
TRIES = 3  # how often in a row processes may be killed before a block is done


def start(config: Config) -> None:
    """Make this process, one of several, a worker that ends with the one that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    load_no_models()
    start_worker(config)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Crew:
    """Runs work on blocks; a context manager that ends its processes."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.size = len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._here = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[Path, Outcome]]:
        """Do each job; at most AHEAD of them for each process are in memory."""
        first = list(islice(jobs, BLOCKS_FROM + 1))
        jobs = chain(first, jobs)
        if self.size < 2 or (self._pool is None and len(first) <= BLOCKS_FROM):
            if not self._here:
                set_worker(self.config, self.tokenizer)
                self._here = True
            yield from ((file, work(block)) for file, block, work in jobs)
        else:
            yield from self._shared(jobs)

    def _shared(self, jobs: Iterator[Job]) -> Iterator[tuple[Path, Outcome]]:
        waiting: deque[tuple[Job, Future[Outcome]]] = deque()
        killed = 0
        while True:
            while len(waiting) < AHEAD * self.size and (job := next(jobs, None)) is not None:
                waiting.append((job, self._submit(job)))
            if not waiting:
                return
            try:
                outcome = waiting[0][1].result()
            except BrokenProcessPool:
                killed += 1
                if killed > TRIES:
                    raise RuntimeError(
                        f"prepare: its processes were killed {killed} times before one of them was"
                        " done with a block (out of memory?); fewer processes need less: run it"
                        " under taskset"
                    ) from None
                print(
                    "prepare: a process was killed; its blocks are done again in new ones",
                    flush=True,
                )
                self._pool = None
                waiting = deque((job, self._submit(job)) for job, _ in waiting)
                continue
            killed = 0
            (file, _, _), _ = waiting.popleft()
            yield file, outcome

    def _submit(self, job: Job) -> Future[Outcome]:
        _, block, work = job
        try:
            if self._pool is None:
                # spawned, not forked: the tokenizer's threads do not survive a fork
                self._pool = ProcessPoolExecutor(
                    self.size, multiprocessing.get_context("spawn"), start, (self.config,)
                )
            return self._pool.submit(work, block)
        except BrokenProcessPool as error:  # killed since: `result` says so again
            broken: Future[Outcome] = Future()
            broken.set_exception(error)
            return broken
