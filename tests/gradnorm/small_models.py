"""Small random models of many architectures, batches for them, and the comparison with the slow
truth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grads_ds.gradnorm import GradNormRecorder, GradNorms
from grads_ds.gradnorm.reference import reference_norms

VOCAB = 61
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}

# name -> (model type, settings over the common ones)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biased": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi": ("phi", {"tie_word_embeddings": False}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", {}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "opt": ("opt", {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.1}),
    "opt-projected": (
        "opt",
        {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "falcon": (
        "falcon",
        {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True},
    ),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "stablelm": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "gpt-bigcode": (
        "gpt_bigcode",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "multi_query": True},
    ),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("qwen3_moe", {**_MOE, "head_dim": 8}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
    ),
}


def make_model(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model of one of ARCHITECTURES, its weights large enough that every part of it
    matters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, special = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_BASE, **special, **settings})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=settings.get("attn_implementation")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def copy_of(name: str, model: nn.Module) -> nn.Module:
    """One of ARCHITECTURES with the weights `model` has now, free of whatever was hooked to it."""
    copied = make_model(name)
    copied.load_state_dict(
        {key: value.detach().clone() for key, value in model.state_dict().items()}
    )
    return copied


def make_batch(
    lengths: list[int],
    prompts: list[int],
    seed: int = 0,
    side: str = "right",
    vocabulary: int = VOCAB,
) -> dict[str, Tensor]:
    """Random rows of these lengths, the first `prompts` tokens of each no targets, padded with
    token 0.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths), max(lengths)
    batch = {
        "input_ids": torch.zeros(rows, longest, dtype=torch.long),
        "attention_mask": torch.zeros(rows, longest, dtype=torch.long),
        "labels": torch.full((rows, longest), -100),
    }
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.where(torch.arange(length) < prompt, -100, ids)
    return batch


def truth(
    recorder: GradNormRecorder,
    model: nn.Module,
    batch: dict[str, Tensor],
    loss_reduction: str = "mean",
) -> GradNorms:
    """What `recorder` should have found, by one float64 backward per sample."""
    return reference_norms(model, recorder.plan, batch, loss_reduction)


def worst(found: GradNorms, true: GradNorms) -> dict[str, float]:
    """Largest relative error over the samples, by group; the two must hold the same groups."""
    assert set(found.norms) == set(true.norms), (set(found.norms), set(true.norms))
    return {
        group: float(((found.norms[group] - norm).abs() / norm.clamp_min(1e-12)).max())
        for group, norm in true.norms.items()
    }
