"""What a model is made of and what a micro-batch of it does, from its own code on the meta device:
no weights, any size, in seconds.

Reads a Hugging Face config (a folder, or one of the named shapes of the Llama family). No memory is
taken but for Python's own.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig

from grads_ds.config.errors import UserError
from grads_ds.config.model_and_data import LoraConfig
from grads_ds.engine.live_bytes import LiveBytes
from grads_ds.engine.lora import with_lora
from grads_ds.engine.recompute import recompute_activations
from grads_ds.gradnorm.formulas.head import DEFAULT_BUDGET
from grads_ds.gradnorm.measure.frozen import frozen, head_replaced, stand_in_logits
from grads_ds.gradnorm.trial.guard import LARGEST
from grads_ds.gradnorm.trial.site_plan import plan_sites
from grads_ds.plan.meta_kernels import ATTENTION, attend, inputs_kept
from grads_ds.plan.timeline import EventTracer, Timeline, repeat_layers

# (layers, width, inner width, heads, key-value heads, vocabulary)
NAMED = {
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "13B": (40, 5120, 13824, 40, 40, 32000),
    "34B": (48, 8192, 22016, 64, 8, 32000),
    "70B": (80, 8192, 28672, 64, 8, 128256),
    "405B": (126, 16384, 53248, 128, 8, 128256),
}


DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """Parameters, those of the repeated layers (`body`), repeated layers, width and vocabulary."""

    parameters: int
    body: int
    layers: int
    width: int
    vocabulary: int

    @property
    def head(self) -> int:
        """Parameters that the head multiplies by, tied to the embedding or not."""
        return self.width * self.vocabulary


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of `length` tokens. mode: train, checkpointed or score. lora: adapters
    instead of all parameters. layers: the groups that score records. sharded: ZeRO-3's linear
    layers are used. recomputed: how many layers, from the first, score computes again.
    """

    rows: int
    length: int
    mode: str
    dtype: torch.dtype
    lora: LoraConfig | None = None
    layers: tuple[str, ...] = ("embedding", "lm_head")
    sharded: bool = False
    recomputed: int = 0


def model_config(path: str) -> Any:
    """The Hugging Face config of a folder, hub id or named shape (7B, 13B, 34B, 70B, 405B)."""
    if path in NAMED:
        layers, width, inner, heads, kv_heads, vocabulary = NAMED[path]
        return LlamaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: wanted a model's config.json, or one of {', '.join(NAMED)}; {path}:"
            f" {str(error).splitlines()[0]}"
        ) from None


def with_layers(config: Any, layers: int, **changes: Any) -> Any:
    """A copy of `config` with another number of layers."""
    changes |= {"num_hidden_layers": layers, "layer_types": None}
    changed = type(config).from_dict(config.to_dict() | changes)
    changed._attn_implementation = ATTENTION
    return changed


def on_meta(config: Any, dtype: torch.dtype, layers: int) -> Any:
    """The model of `config` on the meta device, in `dtype`, with `layers` layers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(with_layers(config, layers), dtype=dtype)


def shape_of(config: Any) -> Shape:
    """Count the parameters of the model: layers are equal."""
    one, two = (on_meta(config, torch.bfloat16, layers) for layers in (1, 2))
    first, second = one.num_parameters(), two.num_parameters()
    table = one.get_input_embeddings().weight
    layers = config.num_hidden_layers
    each = second - first
    return Shape(first + (layers - 1) * each, layers * each, layers, table.shape[1], table.shape[0])


AttentionInterface.register(ATTENTION, attend)  # and no mask of that name, so that none is made


def timeline_of(config: Any, batch: Batch) -> Timeline:
    """The events of one micro-batch, with the bytes of its activations (everything but parameters
    and their gradients).

    Training takes the loss over the logits of every position, as a Trainer does; score freezes the
    parameters and lets the gradient enter at the last hidden state, behind the recorder's own pass
    over the head (every position taken for a target).
    """
    kind: Any = type(config)
    return _timeline(kind, config.to_json_string(use_diff=False), batch)


@functools.lru_cache(maxsize=64)
def _timeline(kind: Any, text: str, batch: Batch) -> Timeline:
    config = kind.from_dict(json.loads(text))
    copies = _copies_of(config.num_hidden_layers, batch.recomputed)
    model = on_meta(config, batch.dtype, len(copies))
    if batch.lora is not None:
        model = with_lora(model, batch.lora)
    model.train(batch.mode != "score")
    if batch.mode == "checkpointed":
        model.activation_checkpointing_enable()
    if batch.mode == "score":
        model.requires_grad_(False)
        if batch.recomputed:
            again = batch.recomputed == config.num_hidden_layers
            recompute_activations(model, None if again else min(3, batch.recomputed))
    counter = LiveBytes("meta")
    watch = EventTracer(model, counter)
    tokens = torch.zeros((batch.rows, batch.length), dtype=torch.int64, device="meta")
    for tensor in [*model.parameters(), *model.buffers(), tokens]:
        counter.ignore(tensor)
    with counter:
        if batch.mode == "score":
            # DeepSpeed's own linear layers, and those that are recorded, keep their input though
            # their weight is frozen
            keeping = batch.sharded or set(batch.layers) - {"embedding", "lm_head"}
            with inputs_kept() if keeping else contextlib.nullcontext(), frozen(model):
                _score(model, watch, batch, {"input_ids": tokens, "use_cache": False})
        else:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            watch.backward_begins()
            loss.backward()
    return repeat_layers(watch.events, watch.weights, copies)


def _copies_of(layers: int, recomputed: int) -> list[int]:
    """The layers that are run, and how many each stands for: the outer two of those that are
    computed again and of those that are not by themselves, one for all between.
    """
    runs = []
    for count in (recomputed, layers - recomputed):
        outer_alone = [1, count - 2, 1] if count > 2 else [1] * count
        runs += outer_alone
    return runs


def _score(model: Any, watch: EventTracer, batch: Batch, inputs: dict[str, Any]) -> None:
    """As GradNormRecorder.score does it (grads_ds/gradnorm/recorder.py)."""
    head = model.get_output_embeddings()
    vocabulary, width = head.weight.shape
    given: list[Any] = []

    def take(hidden: Any) -> Any:
        taken = hidden.detach().reshape(-1, width).clone()
        if taken.element_size() < 4:
            taken = taken.float()
        seed = torch.empty_like(taken)
        watch.head_runs(
            head_bytes(batch.rows, batch.length, vocabulary, width, head.weight.element_size())
        )
        given.extend((hidden, seed))
        return stand_in_logits(hidden.detach())

    # before any other hook of the table sees it, as the recorder does it within the lookup
    table = model.get_input_embeddings()
    table.register_forward_hook(
        lambda module, args, output: output.requires_grad_(True), prepend=True
    )
    with head_replaced(head, take):
        model(**inputs)
    watch.backward_begins()
    hidden, seed = given
    hidden.backward(seed.to(hidden.dtype).reshape(hidden.shape).clone())


def head_bytes(
    rows: int,
    length: int,
    vocabulary: int,
    width: int,
    dtype_bytes: int,
    budget: int = DEFAULT_BUDGET,
) -> int:
    """What grads_ds/gradnorm/formulas/head.py holds at most beside its inputs and dL/dh: logits in
    fp32, and the rows of the weight they take.
    """
    whole = length * vocabulary <= budget
    chunk = vocabulary if whole else max(1, budget // length)
    logits = (
        min(rows, budget // (length * vocabulary)) * length * vocabulary
        if whole
        else 3 * length * chunk
    )
    upcast = chunk * width if dtype_bytes < 4 else 0
    product = chunk * width if length >= width else length * length
    return 4 * (logits + upcast + product)


def check_bytes(
    length: int, vocabulary: int, dtype_bytes: int, sizes: Counter[int]
) -> tuple[int, int]:
    """What one sample's own backward (grads_ds/gradnorm/trial/guard.py) holds at its head: logits
    and their gradient, and in fp32 log-softmax and two gradients of it; and at its end: gradients
    of the recorded parameters (see `recorded_sizes`), as many as it takes, about.
    """
    compared = sum(size * count for size, count in sizes.items() if size <= LARGEST)
    return length * vocabulary * (2 * dtype_bytes + 12), min(LARGEST, compared) * dtype_bytes


def recorded_sizes(config: Any, layers: tuple[str, ...]) -> Counter[int]:
    """Elements of a parameter -> how many such parameters the recorded groups have."""
    first, second = (_recorded_sizes(config, layers, depth) for depth in (1, 2))
    each = {size: count - first[size] for size, count in second.items()}
    return first + Counter(
        {size: (config.num_hidden_layers - 1) * count for size, count in each.items()}
    )


def _recorded_sizes(config: Any, layers: tuple[str, ...], depth: int) -> Counter[int]:
    model = on_meta(config, torch.bfloat16, depth)
    recorded = plan_sites(model, layers).groups
    return Counter(p.numel() for name, p in model.named_parameters() if name in recorded)
