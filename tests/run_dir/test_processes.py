"""A number that the system gave to another process holds nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from grads_ds.config.errors import UserError
from grads_ds.run_dir.lock import LOCK_VARIABLE, lock
from grads_ds.run_dir.processes import boot_id, process_gone, this_process
from grads_ds.run_dir.publish import publish_json


def test_another_process_of_the_holders_number_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of this number, begun at another time
    earlier = this_process() | {"process": f"{boot_id()}:1"}
    assert process_gone(earlier) and not process_gone(this_process())
    record = earlier | {"token": "x", "what": "before", "since": "then"}
    publish_json(tmp_path / "lock.json", record)
    with lock(tmp_path, "the next job"):
        held = json.loads((tmp_path / "lock.json").read_text())
        assert held["what"] == "the next job" and held["pid"] == os.getpid()
        monkeypatch.delenv(LOCK_VARIABLE)
        with pytest.raises(UserError, match="in use by the next job"), lock(tmp_path, "second"):
            pass
