"""What a gate makes of the base model's losses, what it counts, and where the losses come from when
the probe recorded them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from grads_ds import scores
from grads_ds.config.columns import TOKEN_LOSSES
from grads_ds.training.gated_rows import recorded_losses
from grads_ds.training.token_gates import BaseTokens, open_gates
from tests.training.test_train import make_config


@given(st.lists(st.lists(st.floats(0, 30, width=32), max_size=5), min_size=1, max_size=6))
def test_what_a_gate_shuts_is_counted(samples: list[list[float]]) -> None:
    starts = np.cumsum([0, *map(len, samples)])
    flat = np.array([loss for sample in samples for loss in sample], np.float32)
    base = BaseTokens(flat, None, starts)
    values, counts = open_gates("stm", base)
    kept = [[loss <= math.log(2.5) for loss in sample] for sample in samples]
    assert values.tolist() == [float(k) for sample in kept for k in sample]
    assert counts.shut == sum(not k for sample in kept for k in sample)
    assert counts.emptied == sum(bool(sample) and not any(sample) for sample in kept)
    flow, _ = open_gates("flow", base)
    means = [float(np.mean(np.array(s, np.float32), dtype=np.float64)) for s in samples if s]
    tau = max(float(np.median(means)) if means else 0.0, np.finfo(np.float64).tiny)
    counts_of = [len(sample) for sample in samples if sample]
    wanted = np.repeat([math.exp(-mean / tau) for mean in means], counts_of)
    np.testing.assert_allclose(flow, wanted, rtol=1e-9)


def test_gates_take_every_tokens_loss_where_the_probe_recorded_it(tmp_path: Path) -> None:
    own = {3: [0.5, 2.0], 5: [1.0], 8: [0.25, 0.25, 3.0]}
    recording, names = scores.Recording({"model": "m"}, {"ranks": 1}), [TOKEN_LOSSES]
    writer = scores.PartWriter(tmp_path / "scores", 0, recording, scores.schema(names))
    samples = {"sample_id": [*own], "sample_hash": ["h"] * 3, "num_tokens": np.full(3, 9)}
    counts, means = np.array([2, 1, 3]), np.array([np.mean(losses) for losses in own.values()])
    writer.add(scores.make_rows(samples, means, counts, {}, {TOKEN_LOSSES: [*own.values()]}, None))
    writer.flush()
    (tmp_path / "scores/manifest.json").write_text(json.dumps({"key": recording.key}))
    probe = {"epochs": 0, "extras": [TOKEN_LOSSES]}
    for gate in ("stm", "flow"):
        config = make_config(tmp_path / "base", tmp_path, sft={"token_gate": gate}, probe=probe)
        base = recorded_losses(config, tmp_path, np.array([3, 8]))
        assert base is not None and base.starts.tolist() == [0, 2, 5]
        np.testing.assert_array_equal(base.losses, np.float32(own[3] + own[8]))
        assert open_gates("stm", base)[0].tolist() == [1, 0, 1, 1, 0]


def test_flow_takes_the_losses_that_the_probe_recorded(tmp_path: Path) -> None:
    losses, counts = np.array([1.5, 0.25, 3.0, 2.0], np.float32), np.array([2, 5, 1, 4], np.int32)
    table = {"sample_id": [0, 1, 2, 3], "loss": losses, "num_target_tokens": counts}
    (tmp_path / "scores").mkdir()
    pq.write_table(pa.table(table), tmp_path / "scores/table.parquet")

    def values(reduction: str = "mean", epochs: float = 0, gate: str = "flow") -> Any:
        probe = {"epochs": epochs, "loss_reduction": reduction}
        config = make_config(tmp_path / "base", tmp_path, sft={"token_gate": gate}, probe=probe)
        base = recorded_losses(config, tmp_path, np.array([1, 3]))
        return None if base is None else open_gates("flow", base)[0]

    own = np.array([0.25, 2.0])
    wanted = np.repeat(np.exp(-own / np.median(own)), [5, 4])
    np.testing.assert_allclose(values(), wanted, rtol=1e-6)
    own = own / [5, 4]
    np.testing.assert_allclose(
        values("sum"), np.repeat(np.exp(-own / np.median(own)), [5, 4]), rtol=1e-6
    )
    # of a trained model, or where every token's loss is wanted, they are not the base's
    assert values(epochs=1) is None and values(gate="stm") is None
