"""Exact per-sample gradient norms by groups of parameters, cheaper than a training step.

`recorder.py` is the way in. A micro-batch goes through
  trial/      once for each kind of batch: what uses which parameter, and one sample held against a
              backward of its own (batch_layout.py: whose token is whose)
  scoring/    a frozen model: forward, the head at the targets, a backward of activations
  training/   or the user's own step
  rules/      which read each layer by hooks into measure/'s sums
  formulas/   with the equations, pure tensor functions
and comes out as results.py's `GradNorms`. reference.py is the slow truth. Imports torch alone.
"""

from grads_ds.gradnorm.recorder import GradNormRecorder
from grads_ds.gradnorm.results import GradNorms

__all__ = ["GradNormRecorder", "GradNorms"]
