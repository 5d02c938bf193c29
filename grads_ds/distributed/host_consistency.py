"""Do all hosts see the same data, model, code and packages? Asked before any work that a difference
would spoil.

Reads the files named, this package's sources and the installed versions; writes nothing. No torch
import.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from grads_ds.config.errors import UserError
from grads_ds.distributed import ranks
from grads_ds.run_dir.digests import code_digest, content_digest
from grads_ds.run_dir.provenance import package_versions


def hub_commit(name: str) -> str | None:
    """The commit of the Hugging Face hub that the cached copy of model `name` is of; None for a
    folder, or where there is no copy.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of a repository
        return None
    return Path(file).parent.name if isinstance(file, str) else None


def check_hosts_agree(files: Mapping[str, str | Path]) -> dict[str, str]:
    """Compare the hosts; returns rank 0's facts. `files` maps what a path is ("data", "model") to
    where it lies.

    Every rank calls this; the first rank of each host looks. Raises UserError on every rank, naming
    each host that differs from rank 0's and in what.
    """
    mine = _facts(files) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    every = ranks.all_gather_object((platform.node(), mine))
    facts = {host: found for host, found in reversed(every) if found is not None}
    first = every[0][0]
    reference = facts[first]
    problems = [
        f"{host}: {difference}"
        for host, found in sorted(facts.items())
        if host != first
        for difference in _differences(reference, found, first)
    ]
    if problems:
        raise UserError(problems)
    return reference


def _facts(files: Mapping[str, str | Path]) -> dict[str, str]:
    facts = {f"{what} {path}": content_digest(path) or "not there" for what, path in files.items()}
    facts |= {"code of grads_ds": code_digest(), "python": sys.version.split()[0]}
    return facts | {f"package {name}": version for name, version in package_versions().items()}


def _differences(
    reference: Mapping[str, str], found: Mapping[str, str], first: str
) -> Iterable[str]:
    for name in sorted(reference.keys() | found.keys()):
        wanted, here = reference.get(name, "not installed"), found.get(name, "not installed")
        if wanted != here:
            yield f"{name}: wanted {wanted} as on {first}; found {here}; make the hosts the same"
