"""What a model is made of, from its own code on the meta device: no weights, any size, in seconds.

Reads a Hugging Face config (a folder, or one of the named shapes of the Llama family) and builds the model on the meta
device. No memory is taken but for Python's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from grads_ds.config import UserError
from grads_ds.plan.live_bytes import LiveBytes

# (layers, width, inner width, heads, key-value heads, vocabulary)
NAMED = {
    "7B": (32, 4096, 11008, 32, 32, 32000), "13B": (40, 5120, 13824, 40, 40, 32000), "34B": (48, 8192, 22016, 64, 8, 32000),
    "70B": (80, 8192, 28672, 64, 8, 128256), "405B": (126, 16384, 53248, 128, 8, 128256),
}  # fmt: skip
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """Counts of parameters: all of them, of the largest repeated block, of the embedding, and of small tensors by size."""

    parameters: int
    block: int
    embedding: int
    tensors: tuple[int, ...]
    layers: int
    width: int
    vocabulary: int
    tied: bool


def model_config(path: str) -> Any:
    """The Hugging Face config of a folder, hub id or named shape (7B, 13B, 34B, 70B, 405B)."""
    if path in NAMED:
        layers, width, inner, heads, kv_heads, vocabulary = NAMED[path]
        return LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=8192,
        )  # fmt: skip
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: wanted a model's config.json, or one of {', '.join(NAMED)}; {path}: {str(error).splitlines()[0]}"
        ) from None


def on_meta(config: Any, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The causal language model of `config` on the meta device, in `dtype`, with its own or another number of layers."""
    if layers is not None:
        config = type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def shape_of(config: Any) -> Shape:
    """Count the parameters of the model."""
    model = on_meta(config, torch.bfloat16)
    blocks = [list(module.children()) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    repeated = max(blocks, key=len, default=[])
    sizes = [sum(p.numel() for p in block.parameters()) for block in repeated]
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tensors = {id(p): p.numel() for p in model.parameters()}
    return Shape(
        sum(tensors.values()), max(sizes, default=0), embedding.numel(), tuple(tensors.values()), len(repeated),
        embedding.shape[1], embedding.shape[0], head is not None and head.weight is embedding,
    )  # fmt: skip


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Let attention save what GPU kernels save (queries, keys, values, output, one number a row), not the T x T weights."""
    original = torch.nn.functional.scaled_dot_product_attention

    def fused(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return _Fused.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        row = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def activation_bytes(
    config: Any, dtype: torch.dtype, batch: int, length: int, mode: str, layers: int | None = None
) -> int:
    """Peak bytes of activations (everything but parameters and their gradients) of one micro-batch of `batch` x `length` tokens.

    `mode`: "train" and "checkpointed" (forward, loss and backward with logits of every position, as a Trainer does them) or
    "score" (parameters frozen, no logits: the gradient enters at the last hidden state). Peaks of one and two layers are
    taken from the model's own code on the meta device and carried on to all `layers`, which are equal.
    """
    total = layers if layers is not None else config.num_hidden_layers
    one, two = (_peak(config, dtype, batch, length, mode, depth) for depth in (2, 3))
    return max(0, one + (total - 2) * (two - one))


def _peak(config: Any, dtype: torch.dtype, batch: int, length: int, mode: str, layers: int) -> int:
    model = on_meta(config, dtype, layers)
    model.train(mode != "score")
    if mode == "checkpointed":
        model.activation_checkpointing_enable()
    tokens = torch.zeros((batch, length), dtype=torch.int64, device="meta")
    # given whole, so that no code looks into it; attention does not read it here
    mask = torch.zeros((batch, 1, length, length), dtype=torch.bool, device="meta")
    counter = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.ignore(tensor)
    with _fused_attention(), counter:
        if mode == "score":
            model.requires_grad_(False)
            embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
            hidden = model.get_decoder()(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
            hidden.backward(torch.empty_like(hidden))
        else:
            for (
                parameter
            ) in model.parameters():  # reduced and let go at once, as ZeRO does; its buckets are counted elsewhere
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            model(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False).loss.backward()
    return counter.peak
