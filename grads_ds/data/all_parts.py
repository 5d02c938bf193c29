"""The parts of all sets: their folder, the order in which sets are made, and what the pool's rows
are compared with meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from grads_ds.config.config import Config
from grads_ds.data.crew import Crew
from grads_ds.data.leaks import Known, Leaks
from grads_ds.data.prepared import prints_in
from grads_ds.data.problems import Problems
from grads_ds.data.set_parts import PartMaker, SetParts
from grads_ds.data.sources import find_inputs
from grads_ds.run_dir.digests import code_digest, inputs_digest
from grads_ds.run_dir.provenance import package_versions
from grads_ds.run_dir.publish import publish_text

LARGE = ("pool", "replay")  # sets that are no held-out ones


def begin_parts(work: Path, identity: str | None) -> None:
    """Make the work folder, without what was made of anything else than `identity` stands for."""
    mark = work / "identity"
    versions = {"code": code_digest(), **package_versions()}
    key = inputs_digest({"prepare": identity, **versions}) if identity else None
    if key is None or not mark.exists() or mark.read_text() != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        publish_text(mark, str(key))


def find_sets(config: Config) -> dict[str, SetParts]:
    """Every set's sources, nothing of them made."""
    sets: dict[str, SetParts] = {}
    for name, entries in config.prepared_sets().items():
        found = Problems()
        sets[name] = SetParts(find_inputs(entries, found), found)
    return sets


def made_in_order(sets: Iterable[str]) -> list[str]:
    """The names of the sets, the pool last: it is compared with the held-out ones."""
    return sorted(sets, key=lambda name: name == "pool")


def make_parts(
    config: Config,
    work: Path,
    crew: Crew,
    leaks: Leaks,
    sets: dict[str, SetParts],
    names: Iterable[str],
    wanted: bool = True,
) -> bool:
    """Make the parts of some sets; whether nothing is wrong with a row of any.

    Args:
        config: the run's.
        work: the work folder.
        crew: makes them.
        leaks: is given what is compared between sets.
        sets: all sets; those named are filled.
        names: which, in order.
        wanted: False where the rows are only checked.
    """
    clean = lambda: wanted and not any(s.unclean or s.found.count for s in sets.values())  # noqa: E731
    for name in names:
        known_file = write_known(config, name, leaks, work)
        PartMaker(sets[name], config.data.format, work / name, known_file, clean).run(crew)
        if not clean() or name == "replay":
            continue
        for tokens, grams in prints_in(sets[name].outcomes):
            if name == "pool":
                leaks.add_pool(tokens, grams.flatten().to_numpy())
            else:
                leaks.add(name, tokens, [row.values.to_numpy().copy() for row in grams])
    return clean()


def write_known(config: Config, name: str, leaks: Leaks, work: Path) -> Path | None:
    """The file of what the rows of set `name` are compared with; None for held-out sets, of which
    everything is kept. The pool's is asked for when the held-out sets are made.
    """
    compared = bool(config.data.validation or config.anchor_sources())
    if compared and name not in LARGE:
        return None
    known = leaks.known() if name == "pool" and compared else Known.nothing()
    return known.write(work)
