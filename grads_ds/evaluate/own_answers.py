"""The base model's own answers to general prompts: what a trained model forgets of them is what it
forgets of the base model, which text by others does not show.

Reads the prepared general sets; keeps the answers in `evaluation/own_answers/answers.<key>.json`,
where the key is a digest of the model's files, its dtype, the prompts and the length: they are
generated once, greedily, on the sharded engine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from grads_ds.config.config import Config
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.distributed import ranks
from grads_ds.evaluate.generation import generate_tokens
from grads_ds.evaluate.measured_sets import MeasuredSet, content_key, in_choice_half, prompt_of
from grads_ds.run_dir.digests import content_digest, inputs_digest
from grads_ds.run_dir.publish import publish_json

FOLDER = "evaluation/own_answers"


def draw_prompts(sets: list[MeasuredSet], most: int, longest: int) -> tuple[list[list[int]], int]:
    """(at most `most` prompts of the general sets, each once, as many of the choice half as of the
    audit half; how many were left out for having more than `longest` tokens). Which ones are taken
    depends on their content alone; a prompt of each half by turns.
    """
    every = {tuple(prompt_of(row)) for measured in sets for row in measured.rows}
    fitting = [prompt for prompt in every if 0 < len(prompt) <= longest]
    # the first byte tells the half, the others the order
    drawn = sorted(fitting, key=lambda prompt: content_key(prompt)[1:])
    halves = [[p for p in drawn if in_choice_half(p) is half] for half in (True, False)]
    each = min(most // 2, *(len(half) for half in halves))
    pairs = zip(*(half[:each] for half in halves), strict=True)
    return [list(prompt) for pair in pairs for prompt in pair], len(every) - len(fitting)


def own_answers(
    config: Config, run_dir: Path, model: Any, tokenizer: Any, prompts: list[list[int]]
) -> list[list[int]]:
    """The loaded base model's answers, token ids, from the cache where they lie in it whole. Every
    rank calls this and gets all of them.
    """
    settings = config.evaluate.retention
    assert settings is not None
    files = ranks.from_main(lambda: content_digest(config.model.path))
    key = inputs_digest(
        {
            "model": files,
            "dtype": config.model.dtype,
            "prompts": prompts,
            "new_tokens": settings.new_tokens,
            "ends": model.generation_config.eos_token_id,
        }
    )
    file = run_dir / FOLDER / f"answers.{key}.json"
    # of a hub id no digest is known: another model may have its name
    found = ranks.from_main(lambda: _read(file, len(prompts)) if files else None)
    if found is not None:
        return found
    answers = generate_tokens(
        model,
        tokenizer,
        prompts,
        settings.new_tokens,
        config.evaluate.generation_batch,
        "base answers general prompts",
    )
    if ranks.is_main() and files:
        publish_json(file, {"sha256": _digest(answers), "answers": answers})
    return answers


def answer_rows(prompts: list[list[int]], answers: list[list[int]]) -> list[dict[str, list[int]]]:
    """Rows whose targets are the answers."""
    return [
        {"input_ids": [*prompt, *answer], "labels": [*[IGNORE_INDEX] * len(prompt), *answer]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _read(file: Path, wanted: int) -> list[list[int]] | None:
    """The answers of a cache file, None where there is none or it is not as it was written."""
    try:
        held = json.loads(file.read_bytes())
        answers = held["answers"]
        whole = held["sha256"] == _digest(answers) and len(answers) == wanted
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        print(f"{file} is not as it was written: the base model answers again", flush=True)
        return None
    return [[int(token) for token in answer] for answer in answers]


def _digest(answers: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(np.asarray([len(answer), *answer], "<i8").tobytes())
    return digest.hexdigest()
