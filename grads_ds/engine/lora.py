"""Low-rank adapters on a model, as `model.lora` asks for them."""

from __future__ import annotations

from typing import Any

from grads_ds.config.model_and_data import LoraConfig


def with_lora(model: Any, lora: LoraConfig) -> Any:
    """The model with PEFT's adapters, which alone are trained from here on."""
    import peft

    if hasattr(model, "enable_input_require_grads"):
        # else checkpointed blocks see no input that needs a gradient
        model.enable_input_require_grads()
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=(
                lora.target_modules
                if isinstance(lora.target_modules, str)
                else list(lora.target_modules)
            ),
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            modules_to_save=list(lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )
