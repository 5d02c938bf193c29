"""Tasks of the evaluate stage beside held-out loss: multiple choice, exact match, and
lm-evaluation-harness's own.

Reads JSONL files of {"question", "choices", "answer": index} or {"prompt", "answer": text}, and the
harness's task files; writes nothing. Every rank calls `run_tasks` with a model on an engine. The
harness needs the extra: pip install 'grads-ds[eval]'.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.config import Config
from grads_ds.config.evaluate import EvaluateConfig
from grads_ds.data.tokenizer import load_tokenizer
from grads_ds.evaluate.generation import encode_pair, generate, log_likelihoods
from grads_ds.evaluate.task_files import read_choices, read_prompts
from grads_ds.statistics import bootstrap_interval


def wants_tasks(settings: EvaluateConfig) -> bool:
    """Whether any task is asked for."""
    return bool(settings.multiple_choice or settings.exact_match or settings.lm_eval)


@dataclass(frozen=True)
class TaskResults:
    """Every task's numbers by name, and of multiple choice which questions [N] were answered
    rightly (0 or 1).
    """

    numbers: dict[str, dict[str, Any]]
    right: dict[str, np.ndarray]


def run_tasks(config: Config, model: Any, model_name: str) -> TaskResults:
    """Every task's result for a model on an engine. Every rank calls this."""
    settings = config.evaluate
    numbers: dict[str, dict[str, Any]] = {}
    right: dict[str, np.ndarray] = {}
    tokenizer = load_tokenizer(config.model)
    for name, file in settings.multiple_choice.items():
        numbers[name], right[name] = multiple_choice(
            model, tokenizer, read_choices(Path(file)), config, f"{model_name} on {name}"
        )
    for name, file in settings.exact_match.items():
        numbers[name] = exact_match(
            model, tokenizer, read_prompts(Path(file)), config, f"{model_name} on {name}"
        )
    if settings.lm_eval:
        from grads_ds.evaluate.lm_eval import run_lm_eval

        numbers |= run_lm_eval(model, tokenizer, config, model_name)
    return TaskResults(numbers, right)


def multiple_choice(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], config: Config, what: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Accuracy when the choice of the highest log-likelihood after the question is taken; also with
    it divided by the choice's characters. Question and choice are joined by a space, or follow the
    chat template's assistant turn. The array says which questions were answered rightly by
    likelihood alone.
    """
    pairs, owners = [], []
    for number, row in enumerate(rows):
        for choice in row["choices"]:
            pairs.append(
                encode_pair(
                    tokenizer, *_asked(tokenizer, row["question"], choice, config.evaluate.chat)
                )
            )
            owners.append(number)
    values, _ = log_likelihoods(
        model, pairs, config.evaluate.tokens_per_microbatch, _context(model), what
    )
    sizes = np.array([max(1, len(choice)) for row in rows for choice in row["choices"]])
    owner = np.array(owners)
    right, right_by_size = np.zeros(len(rows)), np.zeros(len(rows))
    for number, row in enumerate(rows):
        mine = owner == number
        right[number] = np.argmax(values[mine]) == row["answer"]
        right_by_size[number] = np.argmax(values[mine] / sizes[mine]) == row["answer"]
    numbers = {"kind": "multiple_choice"} | _accuracy(right, config)
    return numbers | {"accuracy_by_characters": float(right_by_size.mean())}, right


def exact_match(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], config: Config, what: str
) -> dict[str, Any]:
    """Share of prompts whose greedy continuation, up to its first line break and without outer
    spaces, is the answer.
    """
    prompts = [
        _chat(tokenizer, row["prompt"]) if config.evaluate.chat else row["prompt"] for row in rows
    ]
    settings = config.evaluate
    texts = generate(
        model, tokenizer, prompts, settings.max_new_tokens, settings.generation_batch, ["\n"], what
    )
    right = np.array(
        [text.strip() == row["answer"].strip() for text, row in zip(texts, rows, strict=True)],
        float,
    )
    return {"kind": "exact_match"} | _accuracy(right, config)


def _asked(tokenizer: Any, question: str, choice: str, chat: bool) -> tuple[str, str]:
    return (_chat(tokenizer, question), choice) if chat else (question, f" {choice}")


def _chat(tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def _context(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _accuracy(right: np.ndarray, config: Config) -> dict[str, Any]:
    """Accuracy and its 95 % bootstrap interval (percentile method; the same redrawn samples for
    every model).
    """
    interval = bootstrap_interval(right.astype(float), config.evaluate.bootstrap, config.seed)
    return {
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(interval),
        "num_samples": len(right),
    }
