"""The recording's forecast: what a model of 70B takes on 64 GPUs, what binds it, and advice that
does what it says when it is followed.
"""

from __future__ import annotations

import json
import re
import time

import pytest

from conftest import REPO
from grads_ds.cli import main
from grads_ds.config.load import load_config
from grads_ds.plan import recording_plan
from grads_ds.plan.cluster import Cluster, Forecast
from grads_ds.plan.planner import Planner
from grads_ds.plan.shapes import model_config, shape_of
from grads_ds.plan.stage_time import duration, scoring_flop

CONFIG = REPO / "configs/70b_eight_nodes.yaml"
BEFORE = 23_768  # tokens per second, sharded over all 64 GPUs and without computing again


def recording(*words: str, name: str = "70B", hosts: int = 8, network: float = 50) -> Forecast:
    """On hosts of eight H100."""
    cluster = Cluster(hosts, 8, 80 * 2.0**30, 0.4 * 989e12, network * 1e9, peak=989e12)
    config = load_config(CONFIG, ["probe.epochs=0", *words])
    return recording_plan.recording(Planner(config, model_config(name), cluster), 1e9)


def followed(advice: str) -> list[str]:
    """The words that set what a piece of advice says of section probe."""
    changes = re.findall(r"(\w+): (\w+)(?=[,:])", advice.removeprefix("probe: "))
    return [f"probe.{key}={value}" for key, value in changes]


@pytest.fixture(scope="module")
def planned() -> Forecast:
    return recording()


def test_70b_is_recorded_at_the_speed_of_arithmetic(planned: Forecast) -> None:
    assert planned.fits and planned.binds == "arithmetic" and planned.shards == 8
    assert planned.tokens_per_second >= 2.5 * BEFORE
    assert planned.traffic.between_hosts == 0
    assert planned.share_of_peak == pytest.approx(0.4)
    # bfloat16, whole on each host's eight GPUs (the norms are whole on every one)
    assert planned.memory.weights == pytest.approx(2 * 70.55e9 / 8, rel=0.01)


def test_where_nothing_need_be_computed_again_it_is_3_5_times_as_fast() -> None:
    cluster = Cluster(8, 8, 141 * 2.0**30, 0.4 * 989e12, 50e9)
    config = load_config(CONFIG, ["probe.epochs=0", "probe.gradient_checkpointing=false"])
    found = recording_plan.recording(Planner(config, model_config("70B"), cluster), 1e9)
    assert found.fits and found.binds == "arithmetic" and not found.recomputed
    assert found.tokens_per_second >= 3.5 * BEFORE


def test_samples_of_8192_tokens_fit() -> None:
    long = ["data.max_length=8192", "probe.tokens_per_microbatch=8192"]
    found = recording(*long, "probe.recompute_layers=null")
    assert found.fits and found.binds == "arithmetic" and found.recomputed == 80
    kept = recording(*long, "probe.gradient_checkpointing=false")
    assert not kept.fits and "gradient_checkpointing: true" in kept.advice[0]


def test_over_all_hosts_the_link_binds_and_the_advice_gains_what_it_says() -> None:
    plain = ["deepspeed=zero3", "probe.recompute_layers=null"]  # hpZ keeps frozen weights as well
    world = recording(*plain, "probe.shard_within=world")
    assert world.binds == "host link" and world.shards == 64
    (advice,) = world.advice
    assert "shard_within: host" in advice
    better = recording(*plain, *followed(advice))
    assert better.fits
    gain = better.tokens_per_second / world.tokens_per_second
    assert float(advice.rsplit(": ", 1)[1].split()[0]) == pytest.approx(gain, abs=0.05)


def test_auto_takes_as_many_tokens_as_fit() -> None:
    words = ["probe.shard_within=host", "probe.recompute_layers=null"]
    found = recording(*words, "probe.tokens_per_microbatch=auto")
    assert found.fits and found.micro_batch > 1
    more = (found.micro_batch + 1) * 2048
    assert more > 65536 or not recording(*words, f"probe.tokens_per_microbatch={more}").fits


def test_auto_shards_a_model_too_large_for_one_host_over_all(planned: Forecast) -> None:
    assert recording("probe.shard_within=auto").shards == planned.shards == 8
    assert recording("probe.shard_within=auto", name="405B").shards == 64


def test_a_slow_inside_link_binds_as_well() -> None:
    cluster = Cluster(1, 8, 80 * 2.0**30, 4e14, 50e9, inside=1e9)
    config = load_config(CONFIG, ["probe.epochs=0"])
    planner = Planner(config, model_config("7B"), cluster)
    assert recording_plan.recording(planner, 1e9).binds == "inside link"


def test_flop_of_a_token_are_two_a_parameter_and_pass() -> None:
    shape = shape_of(model_config("70B"))
    assert shape.body + 2 * shape.head == pytest.approx(shape.parameters, rel=1e-4)
    kept, again = (scoring_flop(shape, 2048, share) for share in (0.0, 1.0))
    attention = 80 * 2048 * 8192  # half of T x T, twice
    assert again - kept == 2 * (shape.body + attention)
    assert kept == pytest.approx(4 * (shape.body + attention + shape.head), rel=0.02)


def test_405b_on_1024_gpus_is_planned_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    words = ["plan", str(CONFIG), "--model", "405B", "--cluster", "128x8", "--json"]
    words += ["--set", "probe.batch_size=1024", "--set", "sft.batch_size=1024"]
    main(words)
    found = json.loads(capsys.readouterr().out)
    assert time.process_time() - began < 60
    assert [item["stage"] for item in found] == ["preliminary", "recording", "sft"]
    assert {item["binds"] for item in found} <= {"arithmetic", "host link", "inside link"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "under 1 s"), (42, "42 s"), (600, "10.0 min"), (7200, "2.0 h"), (864000, "10.0 days")],
)
def test_durations_are_said_in_seconds_minutes_hours_or_days(seconds: float, text: str) -> None:
    assert duration(seconds) == text
