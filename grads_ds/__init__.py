"""grads_ds: domain adaptation of language models by gradient-aware data selection, on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GradNormCallback", "GradNormRecorder", "__version__"]

if TYPE_CHECKING:
    from grads_ds.gradnorm import GradNormRecorder
    from grads_ds.probe.callback import GradNormCallback


def __getattr__(name: str) -> Any:
    # lazily, so that the command line answers without importing torch
    if name == "GradNormRecorder":
        from grads_ds.gradnorm import GradNormRecorder

        return GradNormRecorder
    if name == "GradNormCallback":
        from grads_ds.probe.callback import GradNormCallback

        return GradNormCallback
    raise AttributeError(name)
