"""How fast this host's device trains, by a short benchmark: forward and backward of one layer of
the model itself.

Takes a few seconds and one layer's memory; reads no weights. A rank of a job on several
accelerators or cores is taken to be as fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel

from grads_ds.plan.shapes import with_layers

CPU_TOKENS = 512  # a layer of a 7B model takes seconds there
ROUNDS = 5


def layer_flop(parameters: int, width: int, tokens: int, length: int) -> float:
    """Of training one layer on `tokens` tokens: 6 for each parameter, and attention's own with its
    masked half left out.
    """
    return 6.0 * tokens * (parameters + length * width)


def calibrate(
    config: Any,
    dtype: torch.dtype,
    rows: int,
    length: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s that training `rows` x `length` tokens reaches: the best of a few rounds.

    `config` is a Hugging Face config.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        length = min(length, CPU_TOKENS)
        rows = max(1, min(rows, CPU_TOKENS // length))
    small = with_layers(
        config, 1, vocab_size=8, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    small._attn_implementation = "sdpa"
    model = AutoModel.from_config(small, dtype=dtype).to(device).train()
    width = model.get_input_embeddings().weight.shape[1]
    parameters = sum(p.numel() for p in model.parameters()) - 8 * width
    hidden = torch.randn(rows, length, width, device=device, dtype=dtype, requires_grad=True)
    best = float("inf")
    for _ in range(ROUNDS):
        began = clock()
        out = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        out.backward(torch.ones_like(out))
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - began)
        model.zero_grad(set_to_none=True)
    return layer_flop(parameters, width, rows * length, length) / best
