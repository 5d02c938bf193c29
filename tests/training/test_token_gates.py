"""Token gates train on what a ten-line reference says, however rows are packed, shared, accumulated
and dealt to ranks; what they do is counted, and what leaves nothing to learn is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from conftest import make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.training.token_gates import GATES
from ranks import run_on_ranks
from tests.training.test_train import ROWS, make_config
from tests.training.test_trainer import uneven_rows

WEIGHTS = [0.5 + n % 3 for n in range(ROWS)]
# how the same step is trained: settings of sft, arguments of the training
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulated": ({"micro_batch_size": 4}, {}),
    "packed": ({"micro_batch_size": 12}, {"packing": True}),
    "shared": ({"micro_batch_size": 8}, {"sequence": 2}),
}


def reference(base: Path, rows: Any, gate: str) -> tuple[list[np.ndarray], float, float]:
    """Each row's gates, the loss of one step of all rows and its gradient's norm: plain
    transformers in float64, row by row.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    said = []
    for row in rows:
        y = torch.tensor(row["labels"][1:])
        z = model(torch.tensor([row["input_ids"]])).logits[0, :-1][y != -100]
        said.append((torch.nn.functional.cross_entropy(z, y[y != -100], reduction="none"), z))
    tau = np.median([ce.mean().item() for ce, _ in said])
    tops = [z.detach().topk(20).values.softmax(-1) for _, z in said]
    gates = {
        "stm": [(ce.detach().exp() <= 2.5).double() for ce, _ in said],
        "eaft": [-(p * p.log()).sum(-1) / math.log(20) for p in tops],
        "flow": [torch.full_like(ce, math.exp(-ce.mean().item() / tau)) for ce, _ in said],
    }[gate]
    weighted = [row["weight"] * g for row, g in zip(rows, gates, strict=True)]
    total = sum((w * ce).sum() for w, (ce, _) in zip(weighted, said, strict=True))
    loss = total / sum(w.sum() for w in weighted)
    norms = [float((g**2).sum()) for g in torch.autograd.grad(loss, list(model.parameters()))]
    return [g.numpy() for g in gates], loss.item(), math.sqrt(sum(norms))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that is sure of some tokens."""
    folder = make_tiny_model(tmp_path_factory.mktemp("sure"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 12
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(base: Path) -> list[dict[str, Any]]:
    """Rows of uneven lengths and weights, half of whose tokens are what the model expects."""
    model, made = AutoModelForCausalLM.from_pretrained(base), []
    for n, row in enumerate(uneven_rows(WEIGHTS)):
        ids, drawn = row["input_ids"], np.random.default_rng(n)
        for place in range(1, len(ids)):
            if drawn.random() < 0.5:
                with torch.no_grad():
                    ids[place] = int(model(torch.tensor([ids[:place]])).logits[0, -1].argmax())
        labels = [-100 if label == -100 else i for i, label in zip(ids, row["labels"], strict=True)]
        made.append({"input_ids": ids, "labels": labels, "weight": row["weight"]})
    return made


class FirstStep(TrainerCallback):
    """Loss and gradient norm of the first step."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = next(e for e in state.log_history if "loss" in e)
        self.point = (entry["loss"], float(entry["grad_norm"]))


def train_one_step(config: Config, name: str, rows: Any, **options: Any) -> tuple[float, float]:
    from grads_ds.training.train import TrainingJob, train_model

    folder, step = Path(config.run_dir), FirstStep()
    places = (folder / name, folder / f"{name}-work", folder / f"{name}-tb")
    options |= {"what": name, "callbacks": [step], "identity": "test"}
    train_model(TrainingJob(config, config.sft, rows, config.model.path, *places, 1, **options))
    return step.point


def gated(config: Config, gate: str, rows: list[dict[str, Any]]) -> tuple[Config, Any, str]:
    from grads_ds.training.gated_rows import gated_rows

    sft = config.sft.model_copy(update={"token_gate": gate})
    config, folder = config.model_copy(update={"sft": sft}), Path(config.run_dir) / f"{gate}-gates"
    found, counts = gated_rows(config, Dataset.from_list(rows), folder, "test")
    return config, found, str(counts)


def first_steps(
    config: Config, rows: list[dict[str, Any]], cases: dict[str, list[str]]
) -> dict[str, Any]:
    """The weights of every gate's tokens, and its first step in the cases asked for."""
    found: dict[str, Any] = {}
    for gate in GATES:
        config, used, told = gated(config, gate, rows)
        found[gate] = ([used[i]["weight"] for i in range(ROWS)], told)
        for case in cases.get(gate, []):
            sft, options = CASES[case]
            changed = config.model_copy(update={"sft": config.sft.model_copy(update=sft)})
            found[f"{gate} {case}"] = train_one_step(changed, f"{gate}-{case}", used, **options)
    return found


def compare_with_reference(
    folder: Path, base: Path, rows: list[dict[str, Any]], gates: list[str]
) -> None:
    """Weights of all gates, to the bit on any number of ranks; steps of `gates`, in every case."""
    sft = {"batch_size": ROWS, "micro_batch_size": 4, "max_grad_norm": 1e9}
    data = {"train": ["rows"], "max_length": 64}
    (folder / "one").mkdir()
    shared, single = (
        run_on_ranks(ranks, first_steps, make_config(base, place, sft=sft, data=data), rows, cases)
        for ranks, place, cases in (
            (2, folder, {gate: [*CASES] for gate in gates}),
            (1, folder / "one", {gate: ["packed"] for gate in gates}),
        )
    )
    for gate in GATES:
        values, loss, norm = reference(base, rows, gate)
        assert shared[0][gate] == shared[1][gate] == single[0][gate]
        for row, own, weights in zip(rows, values, single[0][gate][0], strict=True):
            targets = np.array(row["labels"]) != -100
            wanted = np.zeros(len(targets))
            wanted[targets] = row["weight"] * own
            np.testing.assert_allclose(weights, wanted, atol=1e-6, rtol=1e-6)
        assert loss > 0.05 and 0.02 < np.concatenate(values).mean() < 0.98
        for told in (shared[0], single[0]):
            for case in (name for name in told if name.startswith(f"{gate} ")):
                assert told[case] == pytest.approx((loss, norm), rel=1e-6, abs=1e-6), case
    assert "rows have no target left" in single[0]["stm"][1]


def test_gated_steps_are_the_references_packed_shared_accumulated_on_ranks(
    tmp_path: Path, base: Path, rows: list[dict[str, Any]]
) -> None:
    compare_with_reference(tmp_path, base, rows, ["eaft"])


@pytest.mark.slow
@pytest.mark.long
def test_steps_of_every_gate_are_the_references(
    tmp_path: Path, base: Path, rows: list[dict[str, Any]]
) -> None:
    """The test above is its twin: behind the weights a gate has no way of its own."""
    compare_with_reference(tmp_path, base, rows, [*GATES])


def go_on_after_damage(config: Config, rows: list[dict[str, Any]]) -> None:
    """Weights after a start that left one part damaged are those of the first start; where no
    token is left, every rank says so.
    """
    from grads_ds.training import base_tokens

    base_tokens.FLUSH_SECONDS = -1.0  # a part for every micro-batch
    config = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"tokens_per_microbatch": 64})}
    )
    _, first, told = gated(config, "stm", rows)
    weights = [first[i]["weight"] for i in range(ROWS)]
    parts = sorted((Path(config.run_dir) / "stm-gates/test").glob("part-*.parquet"))
    assert len(parts) > 5
    parts[0].write_bytes(parts[0].read_bytes()[:-9] + b"nine bits")
    parts[1].unlink()
    asked = []
    recorder = base_tokens._TokenRecorder.score
    base_tokens._TokenRecorder.score = lambda self, samples: (  # type: ignore[method-assign]
        asked.extend(samples),
        recorder(self, samples),
    )[1]
    _, second, again = gated(config, "stm", rows)
    assert 0 < len(asked) < ROWS // 2  # what whole parts hold is not scored again
    assert [second[i]["weight"] for i in range(ROWS)] == weights and again == told
    unlikely = [{**row, "labels": [-100, *[7] * (len(row["labels"]) - 1)]} for row in rows[:4]]
    with pytest.raises(UserError, match=r"sft\.token_gate: wanted target tokens .* none of"):
        gated(config.model_copy(update={"run_dir": config.run_dir + "/u"}), "stm", unlikely)


def test_a_pass_goes_on_after_damage_and_an_empty_gate_is_refused(
    tmp_path: Path, base: Path, rows: list[dict[str, Any]]
) -> None:
    run_on_ranks(1, go_on_after_damage, make_config(base, tmp_path), rows)
