"""Exact per-sample gradient norms by groups of parameters, cheaper than a training step.

Imports torch alone.
"""

from grads_ds.gradnorm.recorder import GradNormRecorder
from grads_ds.gradnorm.results import GradNorms

__all__ = ["GradNormRecorder", "GradNorms"]
