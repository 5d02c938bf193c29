"""`kill -9` of the launcher over two hosts and a start in the same second: no rank works beside
another start's, and the table is the undisturbed run's.
"""

from __future__ import annotations

import json
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


def test_ten_kills_in_a_row_are_on_record_and_all_ended_well() -> None:
    """Half of them before the score table's first part was written, half later and later."""
    found = json.loads(killed_launchers.NUMBERS.read_text())
    assert len(found) >= 10 and all(map(killed_launchers.good, found))
    moments = [round_["killed seconds after the ranks began"] for round_ in found]
    early, late = moments[::2], [round_["parts then"] for round_ in found[1::2]]
    assert early == sorted(set(early)) and late == sorted(late) and late[0] > 0
