"""`kill -9` of the launcher over two hosts and a start in the same second: no rank works beside
another start's, and the table is the undisturbed run's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.faults import killed_launchers
from tests.cluster import cluster
from tests.launcher.cluster_runs import needs


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_start_in_the_second_of_the_kill_gives_the_undisturbed_table(tmp_path: Path) -> None:
    """tests/launcher/test_orphans.py has the quick twin: ranks are waited for."""
    needs("pdsh")
    with cluster(2, 1) as hosts:
        found = killed_launchers.rounds(tmp_path, hosts, 3)
    assert all(map(killed_launchers.good, found)), found
