"""What ZeRO-3 knows of the order of a model's modules is found once for a probe, however many
micro-batches it has and whatever passes its extra columns add.

(Seen with DeepSpeed 0.19.8, which records forwards alone too, and looks through all later modules
wherever its cache was cleared.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from datasets import load_from_disk

from conftest import write_rows
from grads_ds.config.config import Config
from ranks import run_on_ranks
from tests.probe.jobs import make_config, stage

SETTLED = 2  # micro-batches until the last kind of batch to be met is known, at most


def changes_of(config: Config) -> list[tuple[int, int]]:
    """Of this rank, after each micro-batch of the pool taken twice: how often an order was
    discarded, and the cache of what modules release cleared, so far. The second time every kind of
    batch is known.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from grads_ds.data.batches import plan_batches
    from grads_ds.distributed import ranks
    from grads_ds.engine import module_order
    from grads_ds.engine.frozen_pass import lengths_of, score_plan
    from grads_ds.probe.extra_columns import ExtraColumns

    counts = [0, 0]

    def counted(place: int, original: object) -> object:
        def call(*arguments: object) -> object:
            counts[place] += 1
            return original(*arguments)  # type: ignore[operator]

        return call

    discard = PartitionedParameterCoordinator._invalidate_trace
    PartitionedParameterCoordinator._invalidate_trace = counted(0, discard)
    module_order.forget_release_plans = counted(1, module_order.forget_release_plans)
    run = Path(config.run_dir)
    rows = load_from_disk(str(run / "prepared/pool"))
    lengths = lengths_of(rows)
    plan = plan_batches(lengths, ranks.world(), config.probe.tokens_per_microbatch, config.seed)
    twice = replace(plan, batches=tuple(batches + batches for batches in plan.batches))
    found = []
    for _ in score_plan(
        config,
        config.model.path,
        rows,
        twice,
        lengths,
        config.probe.layers,
        "mean",
        "probe",
        beside=partial(ExtraColumns, config, run, f"{ranks.world()} ranks"),
    ):
        found.append((counts[0], counts[1]))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared probe whose micro-batches are a pass with a backward and three forwards alone."""
    folder = tmp_path_factory.mktemp("probe")
    config = make_config(
        folder,
        data={"train": [str(write_rows(folder / "pool.jsonl", 16))], "max_length": 64},
        probe={
            "tokens_per_microbatch": 64,
            "extras": ["ifd", "prompt_gain", "hidden"],
            "other_prompts": 2,
            "anchor": str(write_rows(folder / "anchor.jsonl", 7, seed=1)),
        },
    )
    stage("prepare", config)
    return config


@pytest.mark.slow
# a rank alone finds the order as each of two does
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_modules_order_is_found_once_however_many_micro_batches(
    prepared: Config, world: int
) -> None:
    for counts in run_on_ranks(world, changes_of, prepared):
        settled = counts[len(counts) // 2 + SETTLED :]
        assert len(settled) > SETTLED and set(settled) == {counts[-1]}, counts
