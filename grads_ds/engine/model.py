"""A Hugging Face model on a DeepSpeed engine: loading it sharded, gathering its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from grads_ds.config.config import Config
from grads_ds.distributed.host_group import within_host
from grads_ds.engine.attention import attention_of
from grads_ds.engine.placement import stays_in_host
from grads_ds.engine.recompute import recompute_activations
from grads_ds.engine.settings import scoring_settings
from grads_ds.engine.strict_loading import check_loaded, check_tensors
from grads_ds.workarounds import close


def load_model(config: Config, path: str | Path, **loading: Any) -> nn.Module:
    """The causal language model at `path` in the configured dtype. Every rank calls this.

    Sharded as it loads while an HfDeepSpeedConfig is alive. `loading` goes to `from_pretrained`.
    Raises UserError when a tensor is missing, unexpected, of another shape or not finite.
    """
    check_tensors(config, path)
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=attention_of(config),
        trust_remote_code=config.model.trust_remote_code,
        output_loading_info=True,
        **loading,
    )
    check_loaded(model, info, path)
    return model


@contextlib.contextmanager
def frozen_model(
    config: Config, path: str | Path, recompute: bool = False
) -> Iterator[tuple[nn.Module, Any]]:
    """The model at `path` on an engine without optimizer or gradients. Yields (module, engine).

    Under ZeRO-3 each rank holds its share of the parameters only. Call the module, not the engine,
    whose output hook refuses a backward that the engine did not start. recompute: layers keep
    their input alone and compute their activations again in the backward, as far as
    `probe.gradient_checkpointing` and `probe.recompute_layers` say.
    """
    settings = scoring_settings(config)
    with contextlib.ExitStack() as stack:
        if stays_in_host(config, path, settings):
            # a second copy of the shards within a group, where there is no larger one
            settings["zero_optimization"].pop("zero_hpz_partition_size", None)
            stack.enter_context(within_host())
        # transformers looks at it while it lives, to load sharded
        stack.enter_context(contextlib.nullcontext(HfDeepSpeedConfig(settings)))
        model = load_model(config, path)
        model.requires_grad_(False)
        model.eval()
        if recompute and config.probe.gradient_checkpointing and config.probe.recompute_layers != 0:
            recompute_activations(model, config.probe.recompute_layers)
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        stack.callback(close, engine)
        yield engine.module, engine


def gathered_parameters(parameters: Sequence[torch.Tensor]) -> AbstractContextManager[Any]:
    """Whole parameters for the length of a `with`, whatever the ZeRO stage."""
    parameters = [p for p in parameters if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(parameters) if parameters else contextlib.nullcontext()
