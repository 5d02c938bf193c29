"""What of `sft.trainer` cannot work here: packages and GPUs it needs, and settings that the
DeepSpeed file takes over.

No torch import: asked before any work starts.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError, problem
from grads_ds.config.trainer_options import BITSANDBYTES, TRACKERS
from grads_ds.launcher.host_choice import visible_gpus

_SECTION = "sft.trainer"
_BY_OPTIMIZER = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")


def check_trainer(config: Config) -> list[str]:
    """Problems of `sft.trainer`."""
    options, found = config.sft.trainer, []
    if options.optim in BITSANDBYTES:
        found += needs_gpu(f"{_SECTION}.optim", options.optim)
        found += needs_package(f"{_SECTION}.optim", "bitsandbytes", "grads-ds[bitsandbytes]")
    if options.use_liger_kernel:
        found += needs_gpu(f"{_SECTION}.use_liger_kernel", "true")
        found += needs_package(f"{_SECTION}.use_liger_kernel", "liger_kernel", "liger-kernel")
        if config.sft.weights:
            wanted = "false with sft.weights: Liger's loss gives no logits to weigh"
            found.append(_worded("use_liger_kernel", wanted, "true", "set one of them back"))
    if options.tf32:
        found += needs_gpu(f"{_SECTION}.tf32", "true")
    for tracker in options.report_to:
        if tracker in TRACKERS:
            found += needs_package(f"{_SECTION}.report_to", tracker, f"grads-ds[{tracker}]")
    try:
        return found + _of_deepspeed(config, config.deepspeed_json())
    except UserError:  # check_training tells it
        return found


def _of_deepspeed(config: Config, user: dict[str, Any]) -> list[str]:
    """Settings that the DeepSpeed file takes over, or cannot carry out."""
    options, found = config.sft.trainer, []
    for name in _BY_OPTIMIZER if "optimizer" in user else ():
        if (value := getattr(options, name)) is not None:
            wanted = f"none, as {config.deepspeed} brings an optimizer of its own"
            found.append(_worded(name, wanted, str(value), "remove it here or there"))
    if "scheduler" in user and options.lr_scheduler_kwargs:
        wanted = f"none, as {config.deepspeed} brings a scheduler of its own"
        found.append(_worded("lr_scheduler_kwargs", wanted, "some", "remove it here or there"))
    offload = user.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and options.optim not in (None, "adamw_torch", "adamw_torch_fused"):
        wanted = "adamw_torch where the optimizer is offloaded (DeepSpeed steps with its own Adam)"
        found.append(_worded("optim", wanted, str(options.optim), "change it or do not offload"))
    return found


def needs_gpu(key: str, value: str) -> list[str]:
    """The problem of a config's `key` that has this value where there is no GPU."""
    fix = "remove it, or run where there is one"
    return [] if visible_gpus() else [problem(key, "a CUDA device for it", f"{value}, no GPU", fix)]


def needs_package(key: str, module: str, package: str) -> list[str]:
    """The problem of a config's `key` that wants a module, which `pip install package` brings."""
    wanted, fix = f"the package {module}", f"pip install '{package}'"
    return [] if find_spec(module) else [problem(key, wanted, "none installed here", fix)]


def _worded(name: str, wanted: str, found: str, fix: str) -> str:
    return problem(f"{_SECTION}.{name}", wanted, found, fix)
