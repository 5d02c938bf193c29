"""Two hosts of one slot each, for the length of a test file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grads_ds.launcher.hosts import read_hostfile
from tests.cluster import Cluster, cluster
from tests.launcher.jobs import left_behind


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    with cluster(2, 1) as two:
        yield two


@pytest.fixture
def place(
    hosts: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, object]]:
    """Both hosts by Open MPI, which starts fastest; everything of a test must have ended
    afterwards.
    """
    monkeypatch.setenv("PATH", hosts.environment["PATH"])
    monkeypatch.chdir(tmp_path)
    yield {"hosts": read_hostfile(hosts.hostfile), "backend": "openmpi"}
    assert left_behind(str(tmp_path)) == []
