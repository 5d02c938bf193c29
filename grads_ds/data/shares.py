"""Large pools over several hosts that share the run directory: each host makes parts of blocks that
no other host has taken.

The host that was asked to prepare makes the held-out sets, opens the shares (`open_shares`), has a
process on every host take its share (`make_share`), and then prepares as ever: it finds the parts
whole, makes what is missing, and puts them together. So the result is that of one process, and a
host that dies loses no part that was whole. Reads the user's files on every host; writes parts into
the work folder, `shares.json`, an empty file for each block that is taken, and each host's count.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.data.all_parts import LARGE, begin_parts, find_sets, make_parts, write_known
from grads_ds.data.blocks import Unclean, blocks_of
from grads_ds.data.crew import Crew, Job
from grads_ds.data.encoding import make_part, read_outcome
from grads_ds.data.input_files import Input
from grads_ds.data.leaks import Leaks
from grads_ds.data.model_limits import fit_problems
from grads_ds.data.problems import Problems
from grads_ds.data.reading_bar import ReadingBar
from grads_ds.data.set_parts import part_file, read_end, write_end
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.run_dir.layout import PARTS
from grads_ds.run_dir.publish import publish_json

HOSTS_FROM = 24  # blocks from which more hosts pay: a job on them takes about 10 s to start
SHARES = "shares.json"  # set -> the file of what its rows are compared with
STOP = "stop"  # there once something is wrong with a row: the rest is for the asking host to check


def worth_sharing(config: Config) -> bool:
    """Whether the pool has so many blocks that other hosts are to make some; False where it cannot
    be read.
    """
    return next(islice(_blocks(config), HOSTS_FROM - 1, None), None) is not None


def _blocks(config: Config) -> Iterator[int]:
    """The sizes of the blocks that may be shared, up to where something is wrong."""
    sets = find_sets(config)
    for name in LARGE:
        for item in _shared(sets[name].inputs) if name in sets else ():
            try:
                yield from (block.size for block in blocks_of(item, config.data.format, Problems()))
            except Unclean:
                return


def _shared(inputs: list[Input]) -> list[Input]:
    """The hub's data sets are read by the asking host alone."""
    return [item for item in inputs if item.kind != "hub"]


def open_shares(config: Config, run_dir: Path, identity: str) -> bool:
    """Make the held-out sets here, and open the others for all hosts; False where something is
    wrong, for `run_prepare` to tell.
    """
    work = run_dir / PARTS
    begin_parts(work, identity)
    for left in (*work.rglob("*.taken"), *work.glob("share-*.json"), work / STOP):
        left.unlink(missing_ok=True)
    tokenizer = load_tokenizer(config.model)
    if fit_problems(config, tokenizer):
        return False
    sets, leaks = find_sets(config), Leaks()
    with Crew(config, tokenizer) as crew:
        held_out = [name for name in sets if name not in LARGE]
        if not make_parts(config, work, crew, leaks, sets, held_out):
            return False
    known = {name: write_known(config, name, leaks, work) for name in sets if name in LARGE}
    publish_json(work / SHARES, {name: file.name for name, file in known.items() if file})
    return True


def make_share(config: Config, run_dir: Path, rank: int, tell: Callable[[str], None]) -> None:
    """Make parts here until no block is left to take. Every host runs this, in one process.

    rank: of this process among them. tell: is told at every block that this process is at work.
    Raises UserError where no shares are open.
    """
    work = run_dir / PARTS
    if not (work / SHARES).is_file():
        found, change = f"no {work / SHARES}", "run: grads-ds prepare CONFIG --hosts HOSTFILE"
        raise UserError(problem("prepare --share", "open shares", found, change))
    opened = json.loads((work / SHARES).read_text())
    made = rows = 0
    with Crew(config, load_tokenizer(config.model)) as crew:
        for name, parts in find_sets(config).items():
            if name not in opened:
                continue
            with ReadingBar(name, parts.inputs) as bar:
                share = _Share(work / name, work / STOP, work / opened[name], bar, tell)
                try:
                    for file, outcome in crew.run(share.jobs(parts.inputs, config.data.format)):
                        tell(f"preparing {name}")
                        if outcome.digest:
                            made, rows = made + 1, rows + outcome.counts["read"]
                            bar.done(outcome.counts["read"])
                        else:
                            print(
                                f"prepare: {file.name}: something is wrong with a row", flush=True
                            )
                            (work / STOP).touch()
                except UserError as error:  # the asking host meets it again, and tells it
                    print(f"prepare: {error}", flush=True)
                    (work / STOP).touch()
        count = {"blocks": made, "rows": rows, "processes": crew.size}
    publish_json(work / f"share-{rank:05d}.json", {"host": socket.gethostname()} | count)


class _Share:
    """The blocks of one set that this host takes."""

    def __init__(
        self,
        folder: Path,
        stop: Path,
        known_file: Path,
        bar: ReadingBar,
        tell: Callable[[str], None],
    ) -> None:
        self.folder, self.stop, self.known_file, self.bar = folder, stop, known_file, bar
        self.tell = tell
        folder.mkdir(parents=True, exist_ok=True)

    def jobs(self, inputs: list[Input], style: str) -> Iterator[Job]:
        """What to do for each block taken; of the others the bar alone is told."""
        for number, item in enumerate(inputs):
            if item.kind != "hub" and not self._is_there(number):
                try:
                    yield from self._of_source(number, item, style)
                except Unclean:
                    self.stop.touch()
            if self.stop.exists():
                return
            self.bar.end(item)

    def _of_source(self, number: int, item: Input, style: str) -> Iterator[Job]:
        notes, part = Problems(), 0
        for block in blocks_of(item, style, notes):
            if self.stop.exists():
                return
            self.tell(f"preparing {self.folder.name}")
            self.bar.read(block)
            file, part = part_file(self.folder, number, part), part + 1
            # a block that another host has taken counts as done: it is at work on it
            if not _take(file) or read_outcome(file):
                self.bar.done(block.size)
                continue
            yield file, block, partial(make_part, file=file, known_file=self.known_file)
        write_end(self.folder, number, part, notes.notes)

    def _is_there(self, number: int) -> bool:
        """Whether an earlier start has left all parts of a source; the asking host looks whether
        they are whole.
        """
        end = read_end(self.folder, number)
        return end is not None and all(
            part_file(self.folder, number, part).exists() for part in range(end[0])
        )


def _take(file: Path) -> bool:
    """Take a block for this host; False where another one has."""
    try:
        os.close(os.open(file.with_suffix(".taken"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def shares_made(run_dir: Path) -> list[str]:
    """What each host has made, in words."""
    shares = [json.loads(f.read_text()) for f in sorted((run_dir / PARTS).glob("share-*.json"))]
    return [
        "{host} {blocks:,} blocks, {rows:,} rows, {processes} processes".format(**share)
        for share in shares
    ]
