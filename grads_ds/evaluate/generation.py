"""What a model answers: log-likelihoods of continuations and greedy generation, on all ranks of an
engine.

Reads nothing, writes nothing; every rank calls each function with the same arguments and gets every
result. Under ZeRO-3 the ranks go in lockstep: one without work takes part with a dummy row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from grads_ds.data.batches import plan_batches
from grads_ds.data.collate import IGNORE_INDEX, pad_batch
from grads_ds.distributed import heartbeat, ranks
from grads_ds.distributed.device import device
from grads_ds.gradnorm.batch_layout import read_layout

Pair = tuple[list[int], list[int]]  # token ids of a context and of what follows it


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Token ids of a context and a continuation, split where the whole text's own tokens fall, as
    lm-evaluation-harness does.

    Spaces that end the context go to the continuation; no special token is added. An empty context
    is the end-of-text token.
    """
    if not context:
        return [tokenizer.eos_token_id], tokenizer.encode(continuation, add_special_tokens=False)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    asked = tokenizer.encode(context, add_special_tokens=False)
    return whole[: len(asked)], whole[len(asked) :]


def log_likelihoods(
    model: nn.Module, pairs: Sequence[Pair], tokens_per_microbatch: int, longest: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (nats, float64 [N]) of each continuation after its context, and whether greedy
    decoding would give it.

    Of a pair above `longest` tokens the beginning is cut off.
    """
    samples = [_sample(context, continuation, longest) for context, continuation in pairs]
    plan = plan_batches(
        [len(sample["input_ids"]) for sample in samples], ranks.world(), tokens_per_microbatch, 0
    )
    mine: dict[int, tuple[float, bool]] = {}
    for number, indices in enumerate(plan.batches[ranks.rank()]):
        heartbeat.beat(what, number, plan.steps)
        batch = {
            k: torch.from_numpy(v).to(device())
            for k, v in pad_batch([samples[i] for i in indices], 0).items()
        }
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
        layout = read_layout(batch)
        rows_NV = logits.reshape(-1, logits.shape[-1])[layout.target_positions].float()
        chosen_N = rows_NV.log_softmax(-1).gather(1, layout.target_ids[:, None])[:, 0]
        greedy_N = rows_NV.argmax(-1) == layout.target_ids
        for place, (start, stop) in enumerate(layout.split_targets()):
            if indices:
                here = slice(start, stop)
                mine[indices[place]] = (
                    float(chosen_N[here].double().sum()),
                    bool(greedy_N[here].all()),
                )
    every = {
        index: value for part in ranks.all_gather_object(mine) for index, value in part.items()
    }
    values = [every[i] for i in range(len(pairs))]
    return np.array([v for v, _ in values], np.float64), np.array([g for _, g in values], bool)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int,
    until: Sequence[str],
    what: str,
) -> list[str]:
    """Greedy continuations of the prompts, each cut before the first of `until` and after
    `new_tokens` tokens.
    """
    rows = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    answers = generate_tokens(model, tokenizer, rows, new_tokens, batch_size, what)
    texts = []
    for ids in answers:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = [place for stop in until if (place := text.find(stop)) >= 0]
        texts.append(text[: min(found, default=len(text))])
    return texts


def generate_tokens(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int,
    what: str,
) -> list[list[int]]:
    """Greedy continuations of prompts given as token ids, each up to and with the first end token,
    of at most `new_tokens` tokens. Of a prompt that leaves no room the beginning is cut off.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(1, getattr(model.config, "max_position_embeddings", 2**31) - new_tokens)
    given = model.generation_config.eos_token_id
    ends = set() if given is None else {given} if isinstance(given, int) else set(given)
    mine: dict[int, list[int]] = {}
    share = batch_size * ranks.world()
    for start in range(0, len(prompts), share):
        heartbeat.beat(what, start, len(prompts))
        indices = list(range(len(prompts)))[start + ranks.rank() : start + share : ranks.world()]
        ids = [list(prompts[i])[-longest:] or [pad] for i in indices] or [[pad]]
        rows = pad_batch(
            [{"input_ids": row, "labels": [IGNORE_INDEX] * len(row)} for row in ids], pad, "left"
        )
        inputs = {
            key: torch.from_numpy(rows[key]).to(device()) for key in ("input_ids", "attention_mask")
        }
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                synced_gpus=ranks.world() > 1,
            )
        for place, i in enumerate(indices):
            said = out[place, inputs["input_ids"].shape[1] :].tolist()
            stop = next((n + 1 for n, token in enumerate(said) if token in ends), len(said))
            mine[i] = said[:stop]
    every = {index: ids for part in ranks.all_gather_object(mine) for index, ids in part.items()}
    return [every[i] for i in range(len(prompts))]


def _sample(context: list[int], continuation: list[int], longest: int) -> dict[str, list[int]]:
    ids = (context + continuation)[-longest:]
    labels = ([IGNORE_INDEX] * len(context) + continuation)[-longest:]
    return {"input_ids": ids, "labels": labels}
