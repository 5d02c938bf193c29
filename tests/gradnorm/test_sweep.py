"""A draw of the sweep over model types is exact or refused by name, and no type in the committed
table is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import pytest

from conftest import REPO

RESULTS = REPO / "docs/gradnorm-types.json"
# hybrids with gated norms and convolutions, learned positions, mixtures of experts, a head whose
# input the model divides by what its config calls logits_scaling (minicpm3)
DRAW = ["bamba", "falcon_h1", "jamba", "llama4_text", "bert", "jetmoe", "minicpm3"]


def sweep() -> Any:
    sys.path.insert(0, str(REPO / "scripts/sweep"))
    spec = importlib.util.spec_from_file_location("sweep", REPO / "scripts/sweep/sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRAW)
def test_a_drawn_type_is_exact_or_refused_by_name(kind: str) -> None:
    found = sweep().verdicts(kind)
    words = {case: verdict.split(":")[0] for case, verdict in found.items()}
    assert set(words.values()) <= {"exact", "exact, one sample at a time", "refused"}, found
    assert words["score right"].startswith("exact"), found


def test_no_type_of_the_committed_table_is_wrong() -> None:
    results = json.loads(RESULTS.read_text())
    wrong = {(k, c) for k, row in results.items() for c, v in row.items() if "wrong" in v}
    assert not wrong
    raw = {(k, c) for k, row in results.items() for c, v in row.items() if v.startswith("raw")}
    assert not raw
