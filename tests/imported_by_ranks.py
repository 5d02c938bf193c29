"""What the server of tests/ranks.py imports once for all ranks: the stages, a model, and what
DeepSpeed and PEFT import when an engine is made. Imported objects are kept out of the ranks'
garbage collections, which would look through them before and after every training.
"""

from __future__ import annotations

import gc
import importlib

for _name in (
    "grads_ds.data.stage",
    "grads_ds.probe.preliminary_training",
    "grads_ds.probe.stage",
    "grads_ds.training.sft",
    "grads_ds.evaluate.stage",
    "transformers.models.llama.modeling_llama",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft.utils.transformers_weight_conversion",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()
