"""The stages' forecasts on one cluster: memory of a rank, bytes of a step, tokens a second, hours,
what each stage waits for and what to change.

Joins the parts: shapes, memory, traffic, time. The computing rate is given, a named GPU's, or
measured on this host (grads_ds/plan/calibrate.py).
"""

from __future__ import annotations

from typing import Any

from grads_ds.config.config import Config
from grads_ds.plan.cluster import Cluster, Forecast
from grads_ds.plan.planner import Planner
from grads_ds.plan.recording_plan import recording
from grads_ds.plan.training_plan import training


def forecasts(config: Config, model: Any, cluster: Cluster, tokens: float) -> list[Forecast]:
    """The probe's two halves and SFT. `model` is a Hugging Face config, `tokens` how many the pool
    has.

    Raises UserError where the ranks or the model's heads cannot be shared out as
    sft.sequence_parallel says.
    """
    planner = Planner(config, model, cluster)
    budget = config.select.budget
    chosen = budget if isinstance(budget, float) and budget <= 1 else 1.0
    found = []
    if config.probe.epochs > 0:
        trained = tokens * config.probe.epochs
        found.append(training(planner, "preliminary", config.probe, trained))
    found.append(recording(planner, tokens))
    found.append(training(planner, "sft", config.sft, tokens * chosen * config.sft.epochs))
    return found
