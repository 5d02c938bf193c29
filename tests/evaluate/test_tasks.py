"""Tasks of the evaluate stage: every number is the one that a plain loop, or lm-evaluation-harness
itself, finds.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import WORDS, make_tiny_model
from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.evaluate.task_files import read_choices, read_prompts, task_problems
from ranks import run_on_ranks
from tests.training.test_train import make_config

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_task(folder: Path, count: int = 40) -> Path:
    draw = random.Random(5)
    rows = []
    for _ in range(count):
        choices = [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(draw.randint(2, 4))
        ]
        question = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
        rows.append(
            {"question": question, "choices": choices, "answer": draw.randrange(len(choices))}
        )
    file = folder / "choice.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_prompts(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Half of the answers are the model's own, by a loop of single steps; the others are not."""
    rows = []
    for number in range(6):
        prompt = " ".join(WORDS[number : number + 1 + number])
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        asked = ids.shape[1]
        with torch.no_grad():
            while ids.shape[1] < asked + 5:
                following = model(ids).logits[0, -1].argmax()[None, None]
                ids = torch.cat([ids, following], 1)
                if following.item() == tokenizer.eos_token_id:
                    break
        said = tokenizer.decode(ids[0, asked:], skip_special_tokens=True).split("\n")[0].strip()
        rows.append({"prompt": prompt, "answer": said if number % 2 and said else "something else"})
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def measure(config: Config) -> dict[str, dict[str, Any]]:
    from grads_ds.engine.model import frozen_model
    from grads_ds.evaluate.tasks import run_tasks

    with frozen_model(config, config.model.path) as (model, _):
        return run_tasks(config, model, "base").numbers


def slow_right(model: Any, tokenizer: Any, file: Path) -> list[int]:
    """Which questions are answered rightly, by likelihood alone."""
    return [
        int(scores.argmax() == row["answer"]) for row, scores in _scores(model, tokenizer, file)
    ]


def _scores(
    model: Any, tokenizer: Any, file: Path
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Each question and its choices' log-likelihoods."""
    for row in read_choices(file):
        scores = []
        for choice in row["choices"]:
            asked = len(tokenizer.encode(row["question"], add_special_tokens=False))
            ids = torch.tensor(
                [tokenizer.encode(f"{row['question']} {choice}", add_special_tokens=False)]
            )
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            scores.append(logs[asked - 1 : -1].gather(1, ids[0, asked:, None]).sum())
        yield row, torch.stack(scores)


def slow_accuracy(model: Any, tokenizer: Any, file: Path) -> tuple[float, float]:
    right, by_size = slow_right(model, tokenizer, file), []
    for row, scores in _scores(model, tokenizer, file):
        sizes = torch.tensor([len(choice) for choice in row["choices"]])
        by_size.append(int((scores / sizes).argmax() == row["answer"]))
    return sum(right) / len(right), sum(by_size) / len(right)


def test_tasks_on_two_ranks_agree_with_a_loop_and_with_the_harness_to_the_digit(
    tmp_path: Path,
) -> None:
    base = make_tiny_model(tmp_path / "base")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
    )
    choice, prompts = write_task(tmp_path), write_prompts(tmp_path, model, tokenizer)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.format(file=choice))
    harness = importlib.util.find_spec("lm_eval") is not None
    settings = {
        "multiple_choice": {"choice": str(choice)},
        "exact_match": {"prompts": str(prompts)},
        "max_new_tokens": 5,
        "generation_batch": 2,
        "tokens_per_microbatch": 256,
        "bootstrap": 100,
        "lm_eval": {"tasks": ["local_choice"], "include_path": str(tasks)} if harness else None,
    }
    config = make_config(base, tmp_path, evaluate=settings)
    one, two = run_on_ranks(2, measure, config)
    assert one == two
    accuracy, by_characters = slow_accuracy(model, tokenizer, choice)
    assert (one["choice"]["accuracy"], one["choice"]["accuracy_by_characters"]) == (
        accuracy,
        by_characters,
    )
    low, high = one["choice"]["accuracy_ci95"]
    assert low < accuracy < high
    answers = [row["answer"] != "something else" for row in read_prompts(prompts)]
    assert one["prompts"]["accuracy"] == sum(answers) / len(answers) > 0
    if not harness:
        pytest.skip("the rest needs lm-evaluation-harness: pip install 'grads-ds[eval]'")
    ours = one["lm_eval/local_choice"]  # the harness, on our ranks
    assert (ours["acc,none"], ours["acc_norm,none"]) == (accuracy, by_characters)
    assert plain_harness(base, tasks) == (accuracy, by_characters)


def plain_harness(base: Path, tasks: Path) -> tuple[float, float]:
    """lm-evaluation-harness with its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "dtype": "float32"},
        device="cpu",
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=10,
    )["results"]["local_choice"]
    return found["acc,none"], found["acc_norm,none"]


def test_faulty_task_files_are_told_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "choice.jsonl"
    file.write_text(
        '{"question": "q", "choices": ["a", "b"], "answer": 2}\n{"question": "q"}\nnot json\n'
    )
    with pytest.raises(UserError) as caught:
        read_choices(file)
    assert [fault.split(": ")[0] for fault in caught.value.problems] == [
        f"{file}:{n}" for n in (1, 2, 3)
    ]
    evaluate = {
        "multiple_choice": {"a": str(file)},
        "exact_match": {"b": str(tmp_path / "none.jsonl")},
    }
    config = Config(run_dir="r", model={"path": "m"}, data={"train": ["d"]}, evaluate=evaluate)
    assert len(task_problems(config.evaluate)) == 4
