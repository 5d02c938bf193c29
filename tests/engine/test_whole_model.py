"""A model that is asked for one token after another gathers its layers once, where memory allows,
and is sharded again afterwards.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import torch

from grads_ds.config.config import Config
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.engine import whole_model as under_test
from grads_ds.engine.frozen_pass import score_batch
from grads_ds.engine.model import frozen_model
from grads_ds.engine.whole_model import whole_model
from grads_ds.evaluate.generation import generate
from grads_ds.gradnorm import GradNormRecorder
from ranks import run_on_ranks
from tests.probe.jobs import make_config


def asked(config: Config) -> list[dict[str, Any]]:
    """What two prompts are answered, and how many gathers that takes: with room and without; the
    norms of a batch before and after.
    """
    gathers: Counter[str] = Counter()
    backend = deepspeed.comm.comm.cdb  # looked its collective up when the ranks started
    original = backend.all_gather_function

    def counted(**arguments: Any) -> Any:
        gathers["all"] += 1
        return original(**arguments)

    backend.all_gather_function = counted
    tokenizer = load_tokenizer(config.model)
    ids = torch.arange(8, 24)[None]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for room in (1e9, 0.0):
        under_test.free_bytes = lambda room=room: room
        with frozen_model(config, config.model.path) as (model, engine):
            recorder = GradNormRecorder(model)
            before = score_batch(recorder, engine, batch).norms
            with whole_model(engine) as whole:
                gathers.clear()
                prompts = ["what is the color", "question answer"]
                texts = generate(model, tokenizer, prompts, 6, 1, ["never"], "asked")
                count = gathers["all"]
            apart = all(p.numel() == 0 for p in model.parameters())
            after = score_batch(recorder, engine, batch).norms
        same = all(torch.equal(before[name], after[name]) for name in before)
        found.append(
            {"whole": whole, "texts": texts, "gathers": count, "apart": apart, "same": same}
        )
    return found


def test_generation_gathers_the_layers_once_where_memory_allows(tmp_path: Path) -> None:
    for kept, sharded in run_on_ranks(2, asked, make_config(tmp_path, tied=False)):
        assert kept["whole"] and not sharded["whole"]
        assert kept["texts"] == sharded["texts"] and len(kept["texts"]) == 2
        assert kept["gathers"] == 0 < sharded["gathers"]
        assert kept["apart"] and kept["same"] and sharded["same"]
