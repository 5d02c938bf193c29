"""`grads-ds scores verify`: right scores pass, one wrong number fails, and what cannot be verified
is refused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from conftest import make_tiny_model
from grads_ds import GradNormRecorder, scores
from grads_ds.cli import main
from grads_ds.data.collate import pad_batch

LAYERS = ["embedding", "lm_head"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as a probe without preliminary training leaves it."""
    run = tmp_path_factory.mktemp("verify") / "run"
    model_path = make_tiny_model(run.parent / "base")
    draw = np.random.default_rng(0)
    ids = [draw.integers(10, 60, size).tolist() for size in (5, 9, 7, 12, 6)]
    labels = [[-100, -100, *row[2:]] for row in ids[:-1]] + [[-100] * 6]  # the last has no target
    pool = {"sample_id": range(5), "sample_hash": list("abcde"), "input_ids": ids, "labels": labels}
    rows = Dataset.from_dict(pool)
    rows.save_to_disk(str(run / "prepared/pool"))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    batch = {k: torch.from_numpy(v) for k, v in pad_batch([rows[i] for i in range(5)], 0).items()}
    found = GradNormRecorder(model, layers=LAYERS).score(batch)
    norms = {f"{name}_grad_norm": x.numpy() for name, x in found.norms.items()}
    recording = scores.Recording({"model": "m"})
    writer = scores.PartWriter(run / "scores", 0, recording, scores.schema(list(norms)))
    counts = np.array([sum(x != -100 for x in row) for row in labels])
    samples = {**pool, "num_tokens": [len(row) for row in ids]}
    writer.add(scores.make_rows(samples, found.loss.numpy(), counts, norms))
    writer.flush()
    scores.merge(run / "scores", recording.key, np.arange(5), {"model": "m"})
    config = {
        "run_dir": str(run),
        "model": {"path": str(model_path), "dtype": "float32"},
        "data": {"train": ["pool.jsonl"]},
        "probe": {"epochs": 0, "layers": LAYERS},
    }
    (run / "resolved.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_right_scores_pass_over_the_samples_of_status_ok(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scores", "verify", str(run)]) == 0
    said = capsys.readouterr().out
    for name in ("loss", "embedding_grad_norm", "lm_head_grad_norm"):
        assert f"{name:24} largest relative difference over 4 samples" in said


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_one_wrong_number_fails_and_its_column_is_named(
    run: Path, factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "scores/table.parquet"
    table = pq.read_table(file)
    name = "lm_head_grad_norm"
    values = table[name].to_numpy().copy()
    values[2] *= factor
    column = pa.array(values, pa.float32())
    pq.write_table(table.set_column(table.column_names.index(name), name, column), file)
    assert main(["scores", "verify", str(run)]) == 1
    assert "beyond 0.0001: lm_head_grad_norm\n" in capsys.readouterr().out
    if factor == 1.001:
        assert main(["scores", "verify", str(run), "--tolerance", "0.01"]) == 0


def test_scores_of_a_moving_model_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "resolved.yaml"
    config = yaml.safe_load(file.read_text())
    config["probe"] |= {"epochs": 1, "record": "during"}
    file.write_text(yaml.safe_dump(config))
    assert main(["scores", "verify", str(run)]) == 2
    assert "wanted the scores of one model" in capsys.readouterr().err
