"""What `grads-ds plan` predicts against what real ZeRO runs take: states, activations, bytes of collectives, within 10 %."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from grads_ds.plan.live_bytes import LiveBytes
from grads_ds.plan.memory import training_memory
from grads_ds.plan.shapes import NAMED, activation_bytes, model_config, shape_of
from grads_ds.plan.traffic import training_traffic
from tests.ranks import run_on_ranks

SMALL = {
    "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1000, "max_position_embeddings": 512,
}  # fmt: skip
ZERO = {
    "stage": 3, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 50_000, "stage3_param_persistence_threshold": 1000,
    "stage3_max_live_parameters": 200_000, "stage3_max_reuse_distance": 0, "overlap_comm": False,
}  # fmt: skip
BATCH, LENGTH = 2, 64
# where each collective's call holds the tensor that is whole
WHOLE = {
    "all_gather_into_tensor": (0, "output_tensor"), "reduce_scatter_tensor": (1, "input"), "all_reduce": (0, "tensor"),
}  # fmt: skip


def trained(zero: dict[str, Any], micro_batches: int) -> dict[str, float]:
    """One real step on this rank: bytes of states after it, peak while it ran, bytes of its collectives."""
    settings = {
        "train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": micro_batches, "zero_optimization": zero,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }  # fmt: skip
    moved = dict.fromkeys(WHOLE, 0.0)
    part = (dist.get_world_size() - 1) / dist.get_world_size()
    counting = False

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            place, keyword = WHOLE[name]
            whole = kwargs[keyword] if keyword in kwargs else args[place]
            if counting:
                moved[name] += whole.numel() * whole.element_size() * part * (2 if name == "all_reduce" else 1)
            return original(*args, **kwargs)

        return call

    for name in WHOLE:  # before DeepSpeed looks them up
        setattr(dist, name, counted(name, getattr(dist, name)))
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=zero["stage"] == 3):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="sdpa"))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = torch.randint(0, 1000, (BATCH, LENGTH))
            engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
            engine.step()

    steps(2 * micro_batches)  # the first step allocates the optimizer's moments and traces the modules' order
    counting = True
    steps(micro_batches)
    zero3 = engine.optimizer  # names of DeepSpeed 0.19.8's stage 3 optimizer
    moments = sum(s.nbytes for g in zero3.optimizer.state.values() for s in g.values() if torch.is_tensor(s))
    whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.ds_persist)
    return moved | {
        "optimizer": float(moments + sum(t.nbytes for t in zero3.fp32_partitioned_groups_flat)),
        "weights": float(sum(p.ds_tensor.nbytes for p in model.parameters()) + whole),
        "gradients": float(zero3.grad_partitions_flat_buffer.nbytes),
    }


def close(predicted: float, measured: float) -> bool:
    print(f"predicted {predicted:,.0f}, measured {measured:,.0f}, error {100 * (predicted / measured - 1):+.1f} %")
    return abs(predicted / measured - 1) < 0.10


@pytest.mark.slow
@pytest.mark.parametrize("reuse, live", [(150_000, 150_000), (1_000_000_000, 1_000_000_000)])
def test_bytes_of_a_zero3_step(reuse: int, live: int) -> None:
    """Two micro-batches of a step on two ranks, counted where they go into the collectives."""
    zero = ZERO | {"stage3_max_reuse_distance": reuse, "stage3_max_live_parameters": live}
    measured = run_on_ranks(2, trained, zero, 2)[0]
    predicted = training_traffic(shape_of(LlamaConfig(**SMALL)), 4, 2, 1, zero)
    assert close(2 * predicted.gathers + predicted.once_a_step, measured["all_gather_into_tensor"])
    assert close(2 * predicted.reductions, measured["reduce_scatter_tensor"] + measured["all_reduce"] / 2)
    memory = training_memory(shape_of(LlamaConfig(**SMALL)), 4, 2, 2, zero, 0.0)
    assert close(memory.optimizer, measured["optimizer"])
    assert close(memory.weights, measured["weights"])
    assert close(memory.gradients, measured["gradients"])


@pytest.mark.parametrize("mode", ["train", "checkpointed", "score"])
def test_activations_of_real_tensors(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak over six real layers on the CPU against two meta layers carried on; attention as one saved call on both sides."""
    config = LlamaConfig(**(SMALL | {"num_hidden_layers": 6}))
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.train(mode != "score")
    if mode == "checkpointed":
        model.activation_checkpointing_enable()
    counter = LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.ignore(tensor)
    tokens = torch.randint(0, 1000, (BATCH, LENGTH))
    if mode == "score":
        model.requires_grad_(False)
    else:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with counter:
        if mode == "score":
            hidden = model.model(
                inputs_embeds=model.model.embed_tokens(tokens).requires_grad_(True), use_cache=False
            ).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        else:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert close(activation_bytes(config, torch.float32, BATCH, LENGTH, mode), counter.peak)


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_have_about_the_parameters_they_are_called_by(name: str) -> None:
    shape = shape_of(model_config(name))
    assert abs(shape.parameters / (float(name[:-1]) * 1e9) - 1) < 0.05
    assert shape.layers == NAMED[name][0]
