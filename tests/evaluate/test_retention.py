"""What is kept of the base model: every number of an evaluation on two sharded ranks is the one
that a plain loop in float64 finds, and each model is loaded once.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import make_tiny_model, write_rows
from grads_ds.config.config import Config
from grads_ds.data.stage import run_prepare
from grads_ds.evaluate.measured_sets import measured_set
from grads_ds.evaluate.own_answers import FOLDER, draw_prompts
from grads_ds.evaluate.retention import flips
from grads_ds.evaluate.row_files import OWN, read_columns, rows_file, tasks_file
from ranks import run_on_ranks
from tests.evaluate.test_tasks import slow_right, write_task
from tests.training.test_train import make_config

NEW_TOKENS = 6


def trained_from(base: Path, folder: Path, seed: int = 1) -> Path:
    """The base model with other weights near its own, as a folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[int]]:
    """An evaluated run of one trained model, and how often each rank loaded a model."""
    folder = tmp_path_factory.mktemp("retention")
    base = make_tiny_model(folder / "base")
    data: dict[str, Any] = {"max_length": 256, "validation": {}}
    for number, name in enumerate(("pool", "domain", "general")):
        file = write_rows(folder / f"{name}.jsonl", 14, seed=number)
        if name == "pool":
            data["train"] = [str(file)]
        else:
            data["validation"][name] = str(file)
    evaluate = {
        "retention": {"new_tokens": NEW_TOKENS, "prompts": 8, "max_cost": 100.0},
        "interpolate": [0.5],
        "multiple_choice": {"choice": str(write_task(folder, 12))},
        "tokens_per_microbatch": 128,
        "generation_batch": 2,
        "bootstrap": 100,
    }
    config = make_config(base, folder, data=data, evaluate=evaluate)
    run_prepare(config, folder)
    trained_from(base, folder / "sft/model")
    (folder / "selection").mkdir()
    (folder / "selection/selected.jsonl").write_text("{}\n" * 7)
    return config, run_on_ranks(2, evaluate_and_count, config)


def evaluate_and_count(config: Config) -> int:
    from grads_ds.evaluate import stage, token_pass

    loaded, load = [], token_pass.frozen_model

    def counted(*arguments: Any) -> Any:
        loaded.append(arguments[1])
        return load(*arguments)

    token_pass.frozen_model = counted  # type: ignore[assignment]
    stage.run_evaluate(config, Path(config.run_dir))
    return len(loaded)


def float64(path: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def log_probabilities(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def slow_losses_and_divergence(
    base: Any, model: Any, rows: list[dict[str, Any]]
) -> tuple[float, float]:
    """Means over the target tokens of all rows: -log q(target), KL(base || model)."""
    losses, divergences = [], []
    for row in rows:
        p, q = (log_probabilities(m, list(row["input_ids"])) for m in (base, model))
        for t in range(1, len(row["input_ids"])):
            if row["labels"][t] != -100:
                losses.append(-q[t - 1, row["input_ids"][t]].item())
                divergences.append((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item())
    return float(np.mean(losses)), float(np.mean(divergences))


def slow_answer(model: Any, prompt: list[int], end: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS:
        ids.append(int(log_probabilities(model, ids)[-1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_losses_divergence_and_bits_per_byte_are_those_of_a_float64_loop(
    run: tuple[Config, list[int]],
) -> None:
    config, _ = run
    folder = Path(config.run_dir)
    record = json.loads((folder / "evaluation.json").read_text())
    base, model = float64(config.model.path), float64(folder / "sft/model")
    for name in ("domain", "general"):
        rows = list(load_from_disk(str(folder / "prepared" / name)))
        loss, divergence = slow_losses_and_divergence(base, model, rows)
        found = record["models"]["selected"][name]
        kl = record["retention"]["models"]["selected"]["kl"][name]
        assert found["loss"] == pytest.approx(loss, abs=1e-5)
        assert kl["value"] == pytest.approx(divergence, abs=1e-5) and divergence > 1e-3
        assert kl["ci95"][0] < kl["value"] < kl["ci95"][1]
        # every token's loss of the base model is kept for later uses, once for the set
        kept = pq.read_table(folder / rows_file("base", name))["token_losses"].to_pylist()
        own, _ = slow_losses_and_divergence(base, base, rows)
        assert float(np.mean(np.concatenate(kept))) == pytest.approx(own, abs=1e-5)
        texts = [json.loads(row["row"])["messages"][-1]["content"] for row in rows]
        wanted = loss * kl["targets"] / math.log(2) / sum(len(t.encode()) for t in texts)
        assert found["bits_per_byte"] == pytest.approx(wanted, rel=1e-5)


def test_own_answers_are_the_base_models_greedy_ones_and_measured_so(
    run: tuple[Config, list[int]],
) -> None:
    config, _ = run
    folder = Path(config.run_dir)
    record = json.loads((folder / "evaluation.json").read_text())
    base, model = float64(config.model.path), float64(folder / "sft/model")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    general = measured_set("general", load_from_disk(str(folder / "prepared/general")), tokenizer)
    prompts, _ = draw_prompts([general], 8, 250)
    rows = []
    for prompt in prompts:
        answer = slow_answer(base, prompt, tokenizer.eos_token_id)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    kept = record["retention"]["models"]["selected"]
    loss, divergence = slow_losses_and_divergence(base, model, rows)
    assert kept["own_answers"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert kept["kl"][OWN]["value"] == pytest.approx(divergence, abs=1e-5)
    own = record["retention"]["models"]["base"]["own_answers"]["loss"]
    assert own == pytest.approx(slow_losses_and_divergence(base, base, rows)[0], abs=1e-5)
    halves = read_columns(folder / rows_file("selected", OWN), ["choice"])["choice"]
    assert halves.sum() * 2 == len(halves) == record["retention"]["plan"]["prompts"]


def test_each_model_is_loaded_once_and_between_them_is_what_is_merged(
    run: tuple[Config, list[int]],
) -> None:
    config, loads = run
    assert loads == [3, 3]  # base, selected, selected@0.5: for two sets, own answers and a task
    folder = Path(config.run_dir)
    record = json.loads((folder / "evaluation.json").read_text())
    between = record["between"]["selected@0.5"]
    assert (between["of"], between["alpha"]) == ("selected", 0.5)
    base, model = float64(config.model.path), float64(folder / "sft/model")
    start = base.state_dict()
    middle = {k: (start[k] + v) / 2 for k, v in model.state_dict().items()}
    model.load_state_dict(middle)
    rows = list(load_from_disk(str(folder / "prepared/domain")))
    loss, divergence = slow_losses_and_divergence(float64(config.model.path), model, rows)
    assert between["sets"]["domain"]["loss"] == pytest.approx(loss, abs=1e-5)
    found = record["retention"]["models"]["selected@0.5"]["kl"]["domain"]["value"]
    assert found == pytest.approx(divergence, abs=1e-5)
    assert not (folder / "evaluation/.between").exists()


def test_flips_are_counted_question_by_question(run: tuple[Config, list[int]]) -> None:
    config, _ = run
    folder = Path(config.run_dir)
    tasks = json.loads((folder / "evaluation.json").read_text())["tasks"]
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    file = Path(config.evaluate.multiple_choice["choice"])
    base, model = (
        slow_right(AutoModelForCausalLM.from_pretrained(path), tokenizer, file)
        for path in (config.model.path, folder / "sft/model")
    )
    lost = sum(b and not m for b, m in zip(base, model, strict=True))
    won = sum(m and not b for b, m in zip(base, model, strict=True))
    assert tasks["selected"]["choice"]["flips"] == {"lost": lost, "won": won, "num_samples": 12}
    assert lost + won > 0
    right = read_columns(folder / tasks_file("selected", "choice"), ["right"])["right"]
    assert right.tolist() == model
    counted = flips(np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0]))
    assert (counted["lost"], counted["won"]) == (1, 1)


def test_answers_are_generated_once_and_again_when_their_file_is_not_whole(
    run: tuple[Config, list[int]], tmp_path: Path
) -> None:
    config, _ = run
    folder = tmp_path / "run"
    shutil.copytree(Path(config.run_dir) / FOLDER, folder / FOLDER)
    (file,) = (folder / FOLDER).glob("answers.*.json")
    held = json.loads(file.read_text())
    general = load_from_disk(str(Path(config.run_dir) / "prepared/general"))
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts, _ = draw_prompts([measured_set("general", general, tokenizer)], 8, 250)
    assert answers_of(config, folder, prompts) == (held["answers"], 0)
    held["answers"][0] = [5]
    file.write_text(json.dumps(held))
    answers, generated = answers_of(config, folder, prompts)
    assert generated == 1 and answers[0] != [5]
    assert json.loads(file.read_text())["answers"] == answers


def answers_of(
    config: Config, folder: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], int]:
    """The answers and how often the model was asked, in this process."""
    from grads_ds.evaluate import own_answers as module

    asked, generate = [], module.generate_tokens
    model = AutoModelForCausalLM.from_pretrained(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)

    def counted(*arguments: Any) -> Any:
        asked.append(1)
        return generate(*arguments)

    module.generate_tokens = counted  # type: ignore[assignment]
    try:
        return module.own_answers(config, folder, model, tokenizer, prompts), len(asked)
    finally:
        module.generate_tokens = generate
