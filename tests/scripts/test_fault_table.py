"""The table of faults in docs/launcher.md is the tests' list: none is missing, none claims another
status.
"""

from __future__ import annotations

import json

from scripts.faults import table
from tests.conftest import REPO
from tests.launcher.faults import FAULTS


def test_the_documented_faults_are_those_that_tests_make_happen() -> None:
    measured = json.loads((REPO / "docs/results/launcher_faults.json").read_text())
    assert len(FAULTS) >= 25 and {fault.name for fault in FAULTS} == set(measured)
    assert (
        f"{table.MARKS[0]}\n{table.table(measured)}\n{table.MARKS[1]}"
        in (REPO / "docs/launcher.md").read_text()
    )
    source = "".join((REPO / file).read_text() for file in table.TESTS)
    assert [fault.name for fault in FAULTS if f'"{fault.name}"' not in source] == []
    assert all(
        seen["seconds"] < fault.within for fault in FAULTS for seen in [measured[fault.name]]
    )
