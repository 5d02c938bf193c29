"""A tiny random model of any of transformers' causal language model types, from its own config
class with every size it knows made small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 61
# small value -> the names that config classes have for what is to be that small; a name that a
# class does not know is left out
_NAMES: dict[float, str] = {
    32: ("hidden_size n_embd d_model dim embedding_size lru_width"),
    48: ("intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    24: (
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_key_value_heads eos_token_id num_experts_per_tok moe_topk "
        "moe_k linear_num_key_heads type_vocab_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads "
        "time_step_rank mamba_dt_rank linear_num_value_heads laurel_rank"
    ),
    8: (
        "head_dim d_kv kv_channels kv_lora_rank qk_nope_head_dim v_head_dim "
        "query_pre_attn_scalar state_size mamba_d_state attention_window_size "
        "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input"
    ),
    64: ("max_position_embeddings n_positions max_seq_len n_ctx mamba_d_ssm"),
    1: (
        "bos_token_id n_shared_experts n_group topk_group first_k_dense_replace "
        "decoder_sparse_step mamba_n_groups n_groups mamba_ngroups"
    ),
    12: ("q_lora_rank"),
    5: ("sliding_window"),
    16: ("mamba_d_head mamba_head_dim"),
    0.0: (
        "attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop attn_pdrop "
        "hidden_dropout_prob activation_dropout attention_probs_dropout_prob"
    ),
}
SIZES: dict[str, Any] = {
    name: value for value, names in _NAMES.items() for name in names.split()
} | {
    "pad_token_id": 0,
    "is_decoder": True,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
}

# sizes that must fit each other, by type
_LATENT = {"num_key_value_heads": 4}  # latent attention: every head has keys of its own
_LATENT_ROPE = {**_LATENT, "head_dim": 4}  # whose head_dim is that of the rotated part
_HYBRID_DELTA = {"linear_head_dim": 8, "linear_num_heads": 4}
_BLT_PART = {"hidden_size_global": 32}
OWN: dict[str, dict[str, Any]] = {
    # a name that its attention reads and its config class does not declare
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "axk1": _LATENT_ROPE,
    "axk2": _LATENT,
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _LATENT_ROPE,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "longcat_flash": _LATENT_ROPE,
    "minicpm3": _LATENT,
    "youtu": _LATENT_ROPE,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _LATENT,
        "vision_config": {
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense", "dense"],
            "per_layer_config": {},
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _LATENT,
    "bailing_hybrid": {
        **_LATENT,
        **_HYBRID_DELTA,
        "num_expert_group": 1,
        "topk_group": 1,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kimi_linear": {
        **_LATENT,
        **_HYBRID_DELTA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3],
        "patch_in_forward": False,
        "encoder_config": _BLT_PART,
        "decoder_config": _BLT_PART,
    },
    "xlm": {"emb_dim": 32, "causal": True, "is_encoder": True, "is_decoder": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {
        "axial_pos_embds_dim": [8, 24],
        "axial_pos_shape": [8, 8],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "attn_layers": ["local", "lsh"],
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
}


# types that no model of can be measured here, and why
NOT_BUILT = {
    "gemma4_assistant": "drafts for another model: its forward takes that model's keys, values and"
    " embeddings, and no input_ids alone",
    "inkling2_text": "computes in float32 whatever the model's precision: no float64 truth",
    "musicgen": "AutoModelForCausalLM gives its decoder the whole model's config, which has none of"
    " the decoder's sizes; its rows are codebooks, ids [4 B, T]",
    "reformer": "asserts training mode in its backward, in which its hashes are drawn at random: a"
    " sample has no gradient of its own",
}
NOT_BUILT["gemma4_unified_assistant"] = NOT_BUILT["gemma4_assistant"]
NOT_BUILT["musicgen_melody"] = NOT_BUILT["musicgen"]


def kinds() -> list[str]:
    """The model types that transformers' AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    """The model, float32, with eager attention, its weights large enough that all of it matters."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind in NOT_BUILT:
        raise ValueError(NOT_BUILT[kind])
    torch.manual_seed(seed)
    config = _small(CONFIG_MAPPING[kind], OWN.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    size = sum(p.numel() for p in model.parameters())
    if size > 2e7:
        raise ValueError(f"{size:,} parameters: its sizes go by names that are not known here")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float().eval()


def _small(kind: Any, own: dict[str, Any]) -> Any:
    """A config of that class with small sizes, in its parts too. own: settings over those."""
    known = vars(kind())
    settings = {name: value for name, value in SIZES.items() if _fits(name, known)}
    for name in settings.keys() & {n for n, v in known.items() if type(v) is int}:
        settings[name] = int(settings[name])  # rates of dropout that a class takes for whole
    for name, value in known.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            settings[name] = _small(type(value), own.get(name, {}))
    own = {name: value for name, value in own.items() if name not in settings or name in SIZES}
    return kind(**{**settings, **own})


def _fits(name: str, known: dict[str, Any]) -> bool:
    if name not in known or isinstance(known[name], list | dict):
        return False
    # an option that is off stays off
    return known[name] is not None or name in ("head_dim", "num_key_value_heads", "pad_token_id")
