"""`grads-ds plan`: forecasts that move the right way, advice that works when it is followed, no
weights read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grads_ds.cli import main
from grads_ds.commands.plan import _named
from grads_ds.config.errors import UserError
from grads_ds.config.load import load_config
from grads_ds.config.model_and_data import LoraConfig
from grads_ds.plan.cluster import GPUS, Cluster, Forecast
from grads_ds.plan.forecast import forecasts
from grads_ds.plan.quantized import quantized_elements
from grads_ds.plan.shapes import NAMED, model_config, shape_of


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": "absent/model"},
        "data": {"train": ["x"], "max_length": 1024},
        "probe": {"epochs": 0, "tokens_per_microbatch": 2048},
        "sft": {"batch_size": 64, "micro_batch_size": 2},
        "deepspeed": "zero3",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "config.yaml"


def planned(file: Path, cluster: Cluster, *overrides: str, name: str = "7B") -> dict[str, Forecast]:
    return {
        item.stage: item
        for item in forecasts(load_config(file, overrides), model_config(name), cluster, 1e8)
    }


def cluster(hosts: int = 1, ranks: int = 8, memory: float = 80, network: float = 50) -> Cluster:
    return Cluster(hosts, ranks, memory * 2**30, 4e14, network * 1e9)


def test_more_ranks_shard_the_states_and_checkpointing_trades_memory_for_time(
    config_file: Path,
) -> None:
    one, four = planned(config_file, cluster(1))["sft"], planned(config_file, cluster(4))["sft"]
    assert four.memory.optimizer == pytest.approx(one.memory.optimizer / 4)
    kept = planned(config_file, cluster(1), "sft.gradient_checkpointing=true")["sft"]
    assert kept.memory.activations < 0.3 * one.memory.activations
    # of 2 FLOP a parameter forward and 4 backward, the layers' forward once more
    shape = shape_of(model_config("7B"))
    layers = shape.body + shape.layers * 1024 * shape.width
    assert kept.hours == pytest.approx(one.hours * (1 + layers / 3 / (layers + shape.head)))


def test_states_of_a_7b_model_are_16_bytes_a_parameter_over_the_ranks(config_file: Path) -> None:
    memory = planned(config_file, cluster(1))["sft"].memory
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(
        16 * 6.738e9 / 8, rel=0.01
    )


def test_a_slow_network_is_the_bottleneck_and_is_told(config_file: Path) -> None:
    fast, slow = (
        planned(config_file, cluster(4))["sft"],
        planned(config_file, cluster(4, network=1))["sft"],
    )
    assert slow.tokens_per_second < fast.tokens_per_second / 4
    assert any("zero_hpz_partition_size" in line for line in slow.advice)
    # one host has no network
    assert (
        planned(config_file, cluster(1, network=1))["sft"].tokens_per_second
        > slow.tokens_per_second / 4
    )


def test_ranks_that_share_samples_hold_a_slice_of_the_activations_and_take_more_micro_batches(
    config_file: Path,
) -> None:
    alone, shared = (
        planned(config_file, cluster(2), f"sft.sequence_parallel={n}")["sft"] for n in (1, 4)
    )
    assert shared.memory.activations == pytest.approx(alone.memory.activations / 4, rel=0.05)
    assert shared.memory.optimizer == alone.memory.optimizer
    # of 64 rows, 2 at a time: 16 ranks, 4 groups
    assert (alone.micro_batches, shared.micro_batches) == (2, 8)
    # queries, keys, values and outcome of 2 rows of 256 tokens, bfloat16, three quarters of them to
    # other ranks, and their gradients
    assert (
        shared.traffic.exchanged == 32 * 512 * 4 * 4096 * 2 * 0.75 * 2
        and not alone.traffic.exchanged
    )
    assert shared.traffic.between_hosts == alone.traffic.between_hosts  # groups lie within a host
    over = planned(config_file, cluster(4, ranks=2), "sft.sequence_parallel=4")["sft"].traffic
    assert over.between_hosts > over.exchanged


def test_a_base_in_4_bits_takes_half_a_byte_a_weight_on_every_rank(config_file: Path) -> None:
    layers = 32 * 4096 * (4 * 4096 + 3 * 11008)  # the linear weights of a 7B Llama
    shape, lora = model_config("7B"), LoraConfig(load_in_4bit=True)
    assert quantized_elements(shape, lora) == layers
    whole = lora.model_copy(update={"modules_to_save": ("o_proj",)})
    assert quantized_elements(shape, whole) == layers - 32 * 4096**2
    assert quantized_elements(shape, LoraConfig()) == 0
    half = planned(config_file, cluster(), "model.lora={}")["sft"].memory
    four = planned(config_file, cluster(), "model.lora={load_in_4bit: true}")["sft"].memory
    held = layers * (1 / 2 + 1 / 64 + 1 / 4096)  # loaded whole, where shards take 1 / 8
    assert four.weights == pytest.approx(half.weights - 2 * layers / 8 + held)
    assert four.optimizer == half.optimizer


def test_a_sample_too_long_for_one_gpu_is_shared_by_as_few_as_fit(config_file: Path) -> None:
    long = ("data.max_length=200000", "sft.gradient_checkpointing=true")
    found = planned(config_file, cluster(2), *long)["sft"]
    (line,) = found.advice
    group = int(line.split()[1])
    assert not found.fits and line.startswith("sft.sequence_parallel: ") and group > 1
    followed = (*long, "sft.micro_batch_size=1")
    assert planned(config_file, cluster(2), *followed, f"sft.sequence_parallel={group}")["sft"].fits
    assert not planned(config_file, cluster(2), *followed, f"sft.sequence_parallel={group // 2}")[
        "sft"
    ].fits
    # which SFT refuses with it
    packed = planned(config_file, cluster(2), *long, "sft.packing=true")["sft"]
    assert not any("sequence_parallel" in line for line in packed.advice)


@pytest.mark.parametrize(
    ("n", "found"),
    [(3, "divisor of the 8 ranks; found 3"), (6, "divisor of its 32 attention heads")],
)
def test_groups_that_cannot_be_are_refused_by_the_plan_too(
    config_file: Path, n: int, found: str
) -> None:
    with pytest.raises(UserError, match=found):
        planned(config_file, cluster(1, ranks=8 if n == 3 else 6), f"sft.sequence_parallel={n}")


@pytest.mark.parametrize("memory, followed", [(40, "sft.gradient_checkpointing=true"), (24, None)])
def test_advice_fits_when_it_is_followed(
    config_file: Path, memory: float, followed: str | None
) -> None:
    plan = planned(config_file, cluster(memory=memory), "sft.micro_batch_size=4")["sft"]
    assert not plan.fits and plan.advice
    if followed:
        assert followed.replace("=", ": ") in plan.advice[0]
        assert planned(config_file, cluster(memory=memory), "sft.micro_batch_size=4", followed)[
            "sft"
        ].fits


@pytest.mark.parametrize("name", NAMED)
def test_every_named_shape_is_planned_without_weights(
    name: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        [
            "plan",
            str(config_file),
            "--model",
            name,
            "--cluster",
            "16x8",
            "--json",
            "--set",
            "sft.gradient_checkpointing=true",
        ]
    )
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [item["stage"] for item in found] == ["recording", "sft"]
    assert status == (0 if all(item["fits"] for item in found) else 2)
    assert all(item["hours"] > 0 for item in found)


def test_what_is_assumed_of_machine_and_pool_is_said(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        main(["plan", str(config_file), "--model", "7B", *words])
        return capsys.readouterr().out

    assert "1 host with 8 H100; assumed, as here is no GPU" in told()
    assert "1,000,000,000 tokens in the pool, assumed: its rows are not here" in told()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("x" * 4000)
    found = told("--gpu", "A10", "--cluster", "2x4", "--set", f"data.train={rows}")
    assert "2 hosts with 4 A10 each\n1,000 tokens in the pool, by the bytes" in found


def test_the_gpu_that_is_here_is_known_by_name_and_memory() -> None:
    assert _named("NVIDIA H200", 139.8, GPUS) == "H200"
    assert _named("NVIDIA A100-SXM4-80GB", 79.2, GPUS) == "A100-80"
    assert _named("NVIDIA A10", 22.1, GPUS) == "A10"
    assert _named("NVIDIA GeForce RTX 4090", 23.6, GPUS) is _named("", 0.0, GPUS) is None


def test_wrong_words_are_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_file), "--model", "7B", "--cluster", "two"]) == 2
    assert main(["plan", str(config_file), "--model", "8B"]) == 2
    assert main(["plan", str(config_file), "--model", "7B", "--gpu", "H1"]) == 2
    assert capsys.readouterr().err.count("wanted") == 3


def test_calibrate_takes_this_hosts_speed(
    config_file: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it prints, given back by --tflops, is the same plan; the GPU that was named has no say
    in it.
    """
    words = [
        "plan",
        str(config_file),
        "--json",
        "--set",
        f"model.path={tiny_model}",
        "--set",
        "data.max_length=64",
    ]
    main([*words, "--calibrate", "--gpu", "H200"])
    output = capsys.readouterr()
    measured = json.loads(output.out)
    assert all(0 < item["peak_bytes"] <= sum(item["memory"].values()) for item in measured)
    teraflops = output.err.rsplit("trains at ", 1)[1].split()[0]
    assert 1e-5 < float(teraflops) < 10  # a CPU core or a few
    main([*words, "--tflops", teraflops, "--gpu", "A10"])
    for one, other in zip(measured, json.loads(capsys.readouterr().out), strict=True):
        assert one["hours"] == pytest.approx(other["hours"], rel=0.01)


def test_the_anchors_gradient_is_whole_on_every_rank(config_file: Path) -> None:
    """4 bytes for each parameter of the recorded groups, however many ranks there are; what helps
    is fewer groups, and that is said.
    """
    anchor = ("probe.extras=[anchor]", "probe.anchor=general.jsonl")
    without, small = (
        planned(config_file, cluster(8))["recording"],
        planned(config_file, cluster(8), *anchor)["recording"],
    )
    assert small.memory.device - without.memory.device == pytest.approx(4 * 2 * 32000 * 4096)
    big = planned(config_file, cluster(8), *anchor, "probe.layers=all", name="70B")["recording"]
    assert big.memory.anchor == pytest.approx(4 * 70.6e9, rel=0.02)
    assert not big.fits and "probe.layers" in big.advice[0]
