"""The parts of one set: its sources cut into blocks, each block made into a part, once.

Reads the user's files; writes parts into a work folder, from which a start that was killed goes on:
whole parts are not made again, and a source whose parts are all whole is not read again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from grads_ds.data.blocks import Unclean, blocks_of, check_source
from grads_ds.data.crew import Crew, Job
from grads_ds.data.encoding import Outcome, check, make_part, read_outcome
from grads_ds.data.input_files import Input
from grads_ds.data.problems import Problems
from grads_ds.data.reading_bar import ReadingBar
from grads_ds.run_dir.publish import publish_json


@dataclass
class SetParts:
    """A set's sources and what became of them.

    found: what is wrong with the list of sources, and what was noted. outcomes: by part, in order.
    unclean: numbers of sources that something is wrong with.
    """

    inputs: list[Input]
    found: Problems
    outcomes: dict[Path, Outcome] = field(default_factory=dict)
    unclean: set[int] = field(default_factory=set)

    def read_problems(self, style: str) -> Problems:
        """Everything that is wrong with the sources, in order, beside what was `found`."""
        for number in sorted(self.unclean):
            before, item = self.found.count, self.inputs[number]
            check_source(item, style, self.found)
            if self.found.count == before:
                raise RuntimeError(f"{item.path}: changed while it was read; start again")
        return self.found


class PartMaker:
    """Makes one set's parts in `folder`, but for those that are whole there.

    Args:
        made: the set's sources, and what is to become of them.
        style: `data.format`.
        folder: of this set, in the work folder.
        known_file: see `make_part`.
        wanted: whether there is still a use for parts; once something is wrong with a row of any
            set, the rest is only checked.
    """

    def __init__(
        self,
        made: SetParts,
        style: str,
        folder: Path,
        known_file: Path | None,
        wanted: Callable[[], bool],
    ) -> None:
        self.made, self.style, self.folder = made, style, folder
        self.known_file, self.wanted = known_file, wanted
        folder.mkdir(parents=True, exist_ok=True)
        self.whole = self._whole()
        self.ends: dict[int, tuple[int, list[str]]] = {}  # of sources read: parts, notes
        self.done: Counter[int] = Counter()  # parts by source

    def run(self, crew: Crew) -> None:
        """Make them, by `crew`."""
        with ReadingBar(self.folder.name, self.made.inputs) as bar:
            for file, outcome in crew.run(self._jobs(bar)):
                self._take(file, outcome, bar)
        ordered = sorted(self.made.outcomes, key=_place)
        self.made.outcomes = {file: self.made.outcomes[file] for file in ordered}
        read: Counter[int] = Counter()
        for file, outcome in self.made.outcomes.items():
            read[_place(file)[0]] += outcome.counts["read"]
        self.made.unclean |= {n for n in range(len(self.made.inputs)) if not read[n]}

    def _jobs(self, bar: ReadingBar) -> Iterator[Job]:
        for number, item in enumerate(self.made.inputs):
            if (end := self._finished(number)) is not None:
                for file in (part_file(self.folder, number, part) for part in range(end[0])):
                    self._take(file, self.whole[file], bar)
                bar.end(item)
                for note in end[1]:
                    self.made.found.note(note)
                continue
            notes, part = Problems(), 0
            try:
                for block in blocks_of(item, self.style, notes):
                    file, part = part_file(self.folder, number, part), part + 1
                    bar.read(block)
                    if file in self.whole:
                        self._take(file, self.whole[file], bar)
                    elif number in self.made.unclean:
                        break  # it is read again for its problems
                    elif self.wanted():
                        make = partial(make_part, file=file, known_file=self.known_file)
                        yield file, block, make
                    else:
                        yield file, block, check
            except Unclean:
                self.made.unclean.add(number)
            bar.end(item)
            for note in notes.notes:
                self.made.found.note(note)
            self.ends[number] = part, notes.notes
            self._mark(number)

    def _take(self, file: Path, outcome: Outcome, bar: ReadingBar) -> None:
        number, _ = _place(file)
        self.made.outcomes[file] = outcome
        if outcome.unclean:
            self.made.unclean.add(number)
        bar.done(outcome.counts["read"])
        self.done[number] += bool(outcome.digest)
        self._mark(number)

    def _mark(self, number: int) -> None:
        """Note how many parts a source has, once they are all whole."""
        parts, notes = self.ends.get(number, (-1, []))
        if self.done[number] == parts and number not in self.made.unclean:
            write_end(self.folder, number, parts, notes)

    # ---- what an earlier start has left ----------------------------------------------------------

    def _whole(self) -> dict[Path, Outcome]:
        """Parts that are whole; not of a hub's data set, which may have changed since."""
        files = sorted(self.folder.glob("*-*.arrow"), key=_place)
        hub = {n for n, item in enumerate(self.made.inputs) if item.kind == "hub"}
        files = [file for file in files if _place(file)[0] not in hub]
        with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
            outcomes = list(threads.map(read_outcome, files))
        found = {f: outcome for f, outcome in zip(files, outcomes, strict=True) if outcome}
        if files:
            damaged = len(files) - len(found)
            said = f"; {damaged:,} were damaged and are made again" if damaged else ""
            name = self.folder.name
            print(f"prepare: {name}: {len(found):,} blocks are done already{said}", flush=True)
        return found

    def _finished(self, number: int) -> tuple[int, list[str]] | None:
        """Of a source whose parts are all whole: how many they are, and its notes."""
        end = read_end(self.folder, number)
        if end is None or any(
            part_file(self.folder, number, part) not in self.whole for part in range(end[0])
        ):
            return None
        return end


def part_file(folder: Path, number: int, part: int) -> Path:
    """Where a part lies in its set's folder: of which source, which one of it, from 0."""
    return folder / f"{number}-{part}.arrow"


def write_end(folder: Path, number: int, parts: int, notes: list[str]) -> None:
    """Note how many parts a source has, and what was noted when it was read to its end."""
    publish_json(_end_file(folder, number), {"parts": parts, "notes": notes})


def read_end(folder: Path, number: int) -> tuple[int, list[str]] | None:
    """What `write_end` noted; None where there is nothing, or a damaged file."""
    try:
        end = json.loads(_end_file(folder, number).read_text())
        return int(end["parts"]), list(end["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _end_file(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _place(file: Path) -> tuple[int, int]:
    """(number of the source, number of the part in it) of a part."""
    number, _, part = file.stem.partition("-")
    return int(number), int(part)
