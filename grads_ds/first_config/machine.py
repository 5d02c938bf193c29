"""What this machine and the model are, as far as values hang on it: GPUs, their memory, the model's
parameters, positions and template.

Reads the model's config and the headers of its weights, never the weights.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grads_ds.config.model_and_data import ModelConfig
from grads_ds.data.model_limits import model_limits
from grads_ds.data.tokenizer import PLAIN_TEMPLATE


@dataclass(frozen=True)
class Machine:
    """GPUs of this host (none: two ranks on the CPU, one on a single core), the memory of one in
    GiB, cores.
    """

    gpus: int
    gpu: str
    gib: float
    cores: int

    @property
    def ranks(self) -> int:
        """Ranks that `grads-ds run` starts here."""
        return self.gpus or min(2, self.cores)

    def words(self) -> str:
        """In a phrase."""
        if self.gpus:
            return f"{self.gpus} x {self.gpu} with {self.gib:.0f} GiB"
        return f"no GPU, {self.cores} CPU cores"


def this_machine() -> Machine:
    """The machine this process runs on."""
    import torch

    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return Machine(0, "", 0.0, cores)
    first = torch.cuda.get_device_properties(0)
    return Machine(torch.cuda.device_count(), first.name, first.total_memory / 2**30, cores)


@dataclass(frozen=True)
class Model:
    """The model: parameters (None where nothing tells), positions, whose chat template is used."""

    path: str
    parameters: int | None
    positions: int | None
    template: str

    def words(self) -> str:
        """In a phrase."""
        size = "size unknown"
        if self.parameters:
            large = self.parameters >= 1e6
            count = f"{self.parameters / 1e6:,.1f} M" if large else f"{self.parameters:,}"
            size = f"{count} parameters"
        context = f", {self.positions:,} positions" if self.positions else ""
        return f"{self.path}: {size}{context}, {self.template}"


def look_at_model(model: ModelConfig, tokenizer: Any) -> Model:
    """What of the model values hang on."""
    template = str(tokenizer.chat_template)
    plain = template.replace("{{ bos_token }}", "{{ BOS }}", 1) == PLAIN_TEMPLATE
    if model.chat_template:
        whose = f"chat template of {model.chat_template}"
    elif plain or template == PLAIN_TEMPLATE.replace("{{ BOS }}", ""):
        whose = "no chat template (a plain one is used)"
    else:
        whose = "chat template of its own"
    return Model(model.path, _parameters(model), model_limits(model).positions, whose)


def _parameters(model: ModelConfig) -> int | None:
    """From the headers of a folder's safetensors, else from the model's config."""
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(model.path).glob("*.safetensors"))
    try:
        if files:
            total = 0
            for file in files:
                with safe_open(file, "np") as header:
                    names = list(header.keys())
                    total += sum(math.prod(header.get_slice(n).get_shape()) for n in names)
            return total
        from grads_ds.plan.shapes import model_config, shape_of

        return shape_of(model_config(model.path)).parameters
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError):
        return None  # weights that cannot be read are told by `doctor` and by the run
