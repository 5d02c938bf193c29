"""The shapes and the ways to get gradient norms that scripts/bench/bench_gradnorm.py times.

A mode is a function (model, batch) -> step, which one call of the step runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm import GradNormRecorder


@dataclass(frozen=True)
class Shape:
    """One model and batch. targets: share of each row's tokens that are targets. ragged: rows of
    different lengths, padded. train: whether the modes that train take part.
    """

    name: str
    width: int
    inner: int
    layers: int
    vocabulary: int
    rows: int
    length: int
    targets: float
    ragged: bool = False
    peers: bool = False
    device: str = "cpu"
    train: bool = True


SHAPES = [
    Shape("d1024-T256-half", 1024, 2816, 4, 32000, 2, 256, 0.5, peers=True),
    Shape("d256-T512-half", 256, 704, 2, 8192, 4, 512, 0.5, peers=True),
    Shape("d1024-T256-all", 1024, 2816, 2, 16000, 2, 256, 1.0),
    Shape("d1024-padded", 1024, 2816, 2, 16000, 4, 256, 0.5, ragged=True),
    Shape("d1024-bucketed", 1024, 2816, 2, 16000, 4, 160, 0.5),
    # shows that the script runs; tells nothing else
    Shape("tiny", 64, 96, 1, 64, 2, 16, 0.5, peers=True),
    Shape("1B", 2048, 5632, 22, 32000, 4, 2048, 0.5, device="cuda"),
    *(
        Shape(name, width, inner, layers, 32000, 4, 2048, 0.5, device="cuda", train=False)
        for name, width, inner, layers in (
            ("3B", 3200, 8640, 26),
            ("7B", 4096, 11008, 32),
            ("13B", 5120, 13824, 40),
            ("34B", 6656, 22016, 54),
        )
    ),
]


def make(shape: Shape, attention: str = "sdpa") -> tuple[nn.Module, dict[str, Tensor]]:
    """A random Llama of the shape and a random batch for it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        tie_word_embeddings=False,
    )
    dtype = torch.float32 if shape.device == "cpu" else torch.bfloat16
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    ids = torch.randint(3, shape.vocabulary, (shape.rows, shape.length))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(shape.rows):
        length = shape.length * (row + 1) // shape.rows if shape.ragged else shape.length
        mask[row, length:] = 0
        labels[row, length:] = -100
        labels[row, : round(length * (1 - shape.targets))] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return model, {name: tensor.to(shape.device) for name, tensor in batch.items()}


def plain_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The yardstick: forward and backward of every weight, gradients kept from step to step as an
    optimizer would have them.
    """

    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        model(**batch).loss.backward()

    return step


def scoring(layers: Any) -> Callable[[nn.Module, dict[str, Tensor]], Callable[[], Any]]:
    """Our frozen scoring of these layers."""

    def prepare(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
        recorder = GradNormRecorder(model, layers)
        return lambda: recorder.score(batch)

    return prepare


def during(layers: Any) -> Callable[[nn.Module, dict[str, Tensor]], Callable[[], Any]]:
    """The plain step with our recording on."""

    def prepare(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
        recorder, step = GradNormRecorder(model, layers), plain_step(model, batch)

        def recorded() -> None:
            with recorder:
                step()
                recorder.collect()

        return recorded

    return prepare


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """A training step per sample, each row cut to its length, and the norm of every gradient."""

    def step() -> None:
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            model.zero_grad(set_to_none=False)
            model(
                **{name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
            ).loss.backward()
            torch.nn.utils.get_total_norm(
                [p.grad for p in model.parameters() if p.grad is not None]
            )

    return step


def vmapped(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """torch.func: vmap over grad, eager attention (its masks are made of operations vmap knows)."""
    from torch.func import functional_call, grad, vmap

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    positions = torch.arange(batch["input_ids"].shape[1])[None]

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        out = functional_call(
            model,
            weights,
            (),
            {
                "input_ids": ids[None],
                "attention_mask": mask,
                "position_ids": positions,
                "use_cache": False,
            },
        )
        losses = nn.functional.cross_entropy(
            out.logits[0, :-1], labels[1:], reduction="none", ignore_index=-100
        )
        return losses.sum() / (labels[1:] != -100).sum()

    length = batch["input_ids"].shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]

    def step() -> None:
        grads = vmap(grad(loss), in_dims=(None, 0, 0, None))(
            parameters, batch["input_ids"], batch["labels"], causal
        )
        sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()  # type: ignore[union-attr]

    return step


def opacus_ghost(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Opacus's fast gradient clipping: its norms and first backward (its second, clipped backward
    is not counted).
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, strict=False, loss_reduction="mean"
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logits = wrapped(
            **{name: tensor for name, tensor in batch.items() if name != "labels"}, use_cache=False
        ).logits
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100
        )
        (losses.sum(1) / (labels != -100).sum(1)).mean().backward()
        wrapped.get_norm_sample()

    return step


MODES: dict[str, tuple[Callable[..., Callable[[], Any]], str]] = {
    "plain forward + backward": (plain_step, "sdpa"),
    "ours: all layers": (scoring("all"), "sdpa"),
    "ours: embedding + head": (scoring(("embedding", "lm_head")), "sdpa"),
    "ours: head": (scoring(("lm_head",)), "sdpa"),
    "ours: while training, embedding + head": (during(("embedding", "lm_head")), "sdpa"),
    "ours: while training, all layers": (during("all"), "sdpa"),
    "one sample at a time": (one_by_one, "sdpa"),
    "torch.func vmap": (vmapped, "eager"),
    "Opacus ghost clipping": (opacus_ghost, "sdpa"),
}
SCORING = ("ours: all layers", "ours: embedding + head", "ours: head")
PEERS = ("torch.func vmap", "Opacus ghost clipping")
