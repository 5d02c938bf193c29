"""Activations computed again in the frozen pass: the same norms for less memory, and
micro-batches as large as fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.engine import fitting
from grads_ds.engine.fitting import tokens_that_fit
from grads_ds.engine.frozen_pass import score_batch
from grads_ds.engine.live_bytes import LiveBytes
from grads_ds.engine.model import frozen_model
from grads_ds.engine.recompute import recompute_activations
from grads_ds.gradnorm import GradNormRecorder
from grads_ds.probe import recording
from ranks import run_on_ranks
from tests.probe.jobs import leave_unfinished, make_config, stage, table_of

GROUPS = ["embedding", "lm_head", "attention", "mlp", "norm"]


def sharded(folder: Path, **probe: Any) -> Config:
    """The model of `folder` under ZeRO-3, no parameter whole for longer than it is used."""
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    zero = {"stage": 3} | {f"stage3_{name}": 0 for name in (*limits, "prefetch_bucket_size")}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    return Config(
        run_dir=str(folder / "run"),
        deepspeed=str(folder / "zero3.json"),
        data={"train": ["none"]},
        model={"path": str(folder / "model"), "dtype": "float32"},
        probe={"epochs": 0} | probe,
    )


def deep_model(folder: Path, layers: int = 12) -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=86,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")


def norms_and_peaks(config: Config) -> tuple[dict[str, list[float]], list[float], bool]:
    """This rank's norms and losses of one batch, the bytes of tensors alive at most in its first
    scoring (with the checks) and in its second, and whether parameters are as they were.
    """
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())
    ids = torch.randint(0, 64, (4, 96), generator=draw)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    peaks = []
    with frozen_model(config, config.model.path, recompute=True) as (model, engine):
        recorder = GradNormRecorder(model, layers=GROUPS)
        for _ in range(2):
            with LiveBytes("cpu") as counter:
                norms = score_batch(recorder, engine, batch)
            peaks.append(float(counter.peak))
        apart = all(p.numel() == 0 for p in model.parameters())
    found = {name: values.tolist() for name, values in norms.norms.items()}
    return found | {"loss": norms.loss.tolist()}, peaks, apart


def each_of(configs: list[Config]) -> list[tuple[dict[str, list[float]], list[float], bool]]:
    return [norms_and_peaks(config) for config in configs]


def test_recomputed_norms_are_equal_and_take_a_fourth_of_the_memory(tmp_path: Path) -> None:
    deep_model(tmp_path)
    kinds = {
        "kept": {},
        "half": {"gradient_checkpointing": True, "recompute_layers": 6},
        "recomputed": {"gradient_checkpointing": True},
    }
    configs = [sharded(tmp_path, **settings) for settings in kinds.values()]
    for kept, half, recomputed in run_on_ranks(2, each_of, configs):
        for other in (half, recomputed):
            assert other[0].keys() == kept[0].keys() == {*GROUPS, "loss"}
            for name, values in kept[0].items():
                torch.testing.assert_close(other[0][name], values, rtol=1e-6, atol=0)
            assert other[2], "a parameter stays gathered"
        assert kept[1][1] > 4 * recomputed[1][1]
        assert 1.5 < kept[1][1] / half[1][1] < 2.5
        # the first micro-batch holds one sample against a backward of its own, as frugally
        assert recomputed[1][0] < 1.5 * recomputed[1][1]


def test_layers_that_cannot_be_recomputed_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"gradient_checkpointing: wanted .*; found Linear"):
        recompute_activations(model, None)


def test_more_layers_than_there_are_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    with pytest.raises(UserError, match="wanted 3 layers; found 2 of them"):
        recompute_activations(model, 3)


def what_fits(config: Config, free: float) -> int:
    """What this rank, which has `free` bytes, or twice that as rank 1, is told."""
    fitting.free_bytes = lambda: free * (1 + torch.distributed.get_rank())
    return tokens_that_fit(config, config.model.path, list(range(48)), ["embedding", "lm_head"])


def fitting_and_peaks(config: Config, free: float) -> tuple[int, int, float, float]:
    """Tokens that fit into `free` bytes and into twice as many; the most that a micro-batch of as
    many as fit into `free` takes, and one of two rows more.
    """
    few, many = what_fits(config, free), what_fits(config, 2 * free)
    return few, many, *(peak_of(config, few // 48 + rows) for rows in (0, 2))


def peak_of(config: Config, rows: int) -> float:
    ids = torch.arange(48)[None].expand(rows, -1).contiguous()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    with frozen_model(config, config.model.path) as (model, engine):
        recorder = GradNormRecorder(model, layers=["embedding", "lm_head"])
        with LiveBytes("cpu") as counter:
            score_batch(recorder, engine, batch)
    return float(counter.peak)


def test_micro_batches_take_what_the_poorest_rank_has_and_no_more(tmp_path: Path) -> None:
    deep_model(tmp_path, 3)
    answers = run_on_ranks(2, fitting_and_peaks, sharded(tmp_path), 6e6)
    assert answers[0] == answers[1]
    few, many, taken, larger = answers[0]
    assert few % 48 == 0 and 1.9 * few < many < 2.4 * few
    assert taken <= 6e6 < larger


def test_too_little_memory_for_one_sample_is_said(tmp_path: Path) -> None:
    deep_model(tmp_path, 3)
    with pytest.raises(AssertionError, match="wanted room for one sample of 48 tokens"):
        run_on_ranks(1, what_fits, sharded(tmp_path), 1e5)


def probed(config: Config, fits: int | None) -> int:
    """How often it was measured what fits, which is `fits`."""
    asked = []

    def measured(*_: Any) -> int:
        asked.append(fits)
        assert fits is not None, "measured again"
        return fits

    recording.tokens_that_fit = measured
    stage("probe", config)
    return len(asked)


def test_auto_is_measured_once_and_kept_by_a_run_that_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, probe={"tokens_per_microbatch": "auto", "flush_seconds": 0})
    stage("prepare", config)
    assert run_on_ranks(2, probed, config, 128) == [1, 1]
    scores = Path(config.run_dir) / "scores"
    whole = table_of(config)
    (start,) = json.loads((scores / "manifest.json").read_text())["starts"]
    assert start["tokens_per_microbatch"] == 128
    leave_unfinished(scores, 2)
    assert run_on_ranks(1, probed, config, None) == [0]
    assert table_of(config).equals(whole)


def test_storages_where_an_ignored_one_was_are_counted() -> None:
    counter = LiveBytes("cpu")
    for _ in range(50):
        counter.ignore(torch.empty(0))  # gone at once, its address free for others
    with counter:
        kept = [torch.ones(10) for _ in range(50)]
    assert counter.now == 40 * len(kept)
