"""Recording on two real hosts, each with the parameters to itself: none of them crosses the link
between the hosts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cluster import Cluster, cluster
from conftest import REPO, make_tiny_model, write_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def prepared(folder: Path) -> int:
    """A prepared run of a model that is large against all else; the bytes of its parameters."""
    make_tiny_model(folder / "model")
    vocabulary = AutoModelForCausalLM.from_pretrained(folder / "model").config.vocab_size
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
        )
    )
    model.save_pretrained(folder / "model")
    write_rows(folder / "pool.jsonl", 24)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    return sum(p.nbytes for p in model.parameters())


def probed(hosts: Cluster, folder: Path, where: str) -> tuple[int, Any]:
    """Bytes that both hosts sent while the probe ran, and its table."""
    config = {
        "run_dir": f"run-{where}",
        "deepspeed": "zero3.json",
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": ["pool.jsonl"], "max_length": 64},
        "probe": {"epochs": 0, "tokens_per_microbatch": 128, "shard_within": where},
    }
    (folder / f"{where}.yaml").write_text(yaml.safe_dump(config))
    environment = hosts.environment | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    for stage, words in (
        ("prepare", ["--ranks", "1"]),
        ("probe", ["--hosts", str(hosts.hostfile)]),
    ):
        before = hosts.bytes_sent()
        done = subprocess.run(
            [sys.executable, "-m", "grads_ds", stage, f"{where}.yaml", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sent = hosts.bytes_sent() - before
    return sent, pq.read_table(folder / f"run-{where}/scores/table.parquet")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_no_parameter_crosses_between_hosts_that_shard_for_themselves(tmp_path: Path) -> None:
    """The whole job is counted: starting, logs, the look at the files, scores and barriers."""
    size = prepared(tmp_path)
    with cluster(2, slots=2) as hosts:
        world, table = probed(hosts, tmp_path, "world")
        host, other = probed(hosts, tmp_path, "host")
    assert world > 8 * size  # every micro-batch gathers the layers twice
    assert host < size / 4
    assert other.equals(table)
