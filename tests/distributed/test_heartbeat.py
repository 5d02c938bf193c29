"""What a rank reports to its supervisor while it works."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

from grads_ds.distributed import heartbeat


def test_a_rank_reports_while_another_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's thread may have come halfway through its import when a beat is due."""
    reader, writer = os.pipe()
    monkeypatch.setattr(heartbeat, "_pipe", writer)
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    heartbeat.beat("working", 1, 1)
    os.close(writer)
    with os.fdopen(reader) as told:
        record = json.loads(told.readline())
    assert record["progress"]["doing"] == "working" and "gpu_most" not in record
