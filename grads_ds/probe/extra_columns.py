"""Extra columns of the score table, recorded on request beside the norms (`probe.extras`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk
from safetensors import safe_open
from torch import Tensor

from grads_ds.config.config import Config
from grads_ds.config.errors import UserError
from grads_ds.config.probe import LAYER_GROUPS
from grads_ds.data.batches import plan_batches
from grads_ds.data.collate import IGNORE_INDEX
from grads_ds.distributed import ranks
from grads_ds.distributed.device import device
from grads_ds.distributed.progress import with_progress
from grads_ds.engine.frozen_pass import lengths_of, score_batch, to_device
from grads_ds.gradnorm import GradNormRecorder, GradNorms
from grads_ds.gradnorm.batch_layout import Layout, read_layout
from grads_ds.gradnorm.formulas.error_norm import error_norms
from grads_ds.gradnorm.formulas.head import LogitTransform
from grads_ds.gradnorm.sharding import gathered
from grads_ds.probe.early_norms import EarlyNorms, keep, kept_for
from grads_ds.workarounds import release_leftovers


def extra_columns(config: Config) -> list[str]:
    """Names of the columns that `probe.extras` adds, in the table's order."""
    wanted = config.probe.extras
    names: list[str] = [name for name in ("ifd", "el2n") if name in wanted]
    groups = anchor_groups(config)
    if "anchor" in wanted:
        names += [
            f"anchor_{what}_{group}" for what in ("inner_product", "cosine") for group in groups
        ]
    return names + ([f"{name}_early" for name in early_norms(config)] if "early" in wanted else [])


def anchor_groups(config: Config) -> list[str]:
    """Groups compared with the anchor: those recorded, less the parameters that no group names."""
    return list(LAYER_GROUPS) if config.probe.layers == "all" else list(config.probe.layers)


def early_norms(config: Config) -> list[str]:
    """Norm columns that the early pass gives."""
    return [f"{group}_grad_norm" for group in anchor_groups(config)]


class ExtraColumns:
    """The extra columns of one frozen pass. Every rank makes one when the model is there: the
    anchor's gradient is taken then.

    Raises UserError when a recorded group cannot be compared with the anchor.
    """

    def __init__(
        self, config: Config, run_dir: Path, key: str, recorder: GradNormRecorder, engine: Any
    ) -> None:
        self.recorder, self.engine, self.wanted = recorder, engine, config.probe.extras
        self.groups = anchor_groups(config)
        # no layers: the loss alone, without a backward
        self.alone = GradNormRecorder(
            recorder.model, (), loss_reduction=recorder.loss_reduction, gather=recorder.gather
        )
        self.early = (
            EarlyNorms.read(run_dir, early_norms(config)) if "early" in self.wanted else None
        )
        if "anchor" in self.wanted:
            recorder.set_reference(self._anchor(config, run_dir, key))

    def score(
        self, samples: Sequence[Mapping[str, Any]]
    ) -> tuple[GradNorms, dict[str, np.ndarray]]:
        """A micro-batch's norms and its extra columns, float64 [B] each (of the dummy row where
        there are no samples).
        """
        batch = to_device(samples)
        columns: dict[str, np.ndarray] = {}
        with _seen(self.recorder) as seen:
            norms = score_batch(self.recorder, self.engine, batch)
        if "el2n" in self.wanted:
            columns["el2n"] = self._error_norms(read_layout(batch), seen).cpu().numpy()
        if "ifd" in self.wanted:
            bare = score_batch(
                self.alone, self.engine, to_device([without_prompt(sample) for sample in samples])
            ).loss
            columns["ifd"] = torch.where(bare > 0, norms.loss / bare, torch.nan).cpu().numpy()
        if "anchor" in self.wanted:
            zero = torch.zeros_like(norms.loss)  # a group the model does not have
            for what, found in (("inner_product", norms.inner_products), ("cosine", norms.cosines)):
                columns |= {
                    f"anchor_{what}_{group}": found.get(group, zero).cpu().numpy()
                    for group in self.groups
                }
        if self.early is not None:
            columns |= self.early.of(samples)
        return norms, columns

    def _error_norms(self, layout: Layout, seen: dict[str, Tensor]) -> Tensor:
        head: Any = self.recorder.plan.head
        if self.recorder.plain_head:
            logits = seen["logits"].reshape(-1, seen["logits"].shape[-1])[layout.target_positions]
            norms = error_norms(logits, None, None, layout.target_ids, LogitTransform())
        else:
            hidden = seen["hidden"].reshape(-1, seen["hidden"].shape[-1])[layout.target_positions]
            with gathered(list(head.parameters(recurse=False)), self.recorder.gather):
                norms = error_norms(
                    hidden, head.weight, head.bias, layout.target_ids, self.recorder.head.transform
                )
        total = torch.zeros(layout.num_samples, dtype=torch.float64, device=norms.device)
        return total.index_add_(0, layout.target_samples, norms) / layout.target_counts.clamp_min(1)

    def _anchor(self, config: Config, run_dir: Path, key: str) -> dict[str, Tensor]:
        """The anchor set's mean gradient over all ranks, fp32 by parameter name.

        Kept for the recording `key`: a probe that goes on, with other ranks too, compares with the
        same bits.
        """
        file = run_dir / "probe/anchor.safetensors"
        if ranks.from_main(lambda: kept_for(file) == key):
            with safe_open(file, "pt", device=str(device())) as kept:
                return {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        name = config.anchor_set()
        rows = load_from_disk(str(run_dir / "prepared" / name))
        lengths = lengths_of(rows)
        plan = plan_batches(lengths, ranks.world(), config.probe.tokens_per_microbatch, config.seed)
        if ranks.is_main():
            print(f"anchor {name}: {plan.summary()}", flush=True)
        counted = 0

        def batches() -> Iterator[dict[str, Tensor]]:
            nonlocal counted
            for mine in with_progress(plan, lengths, f"gradient of the anchor {name}"):
                # the dummy row of a rank without work counts, with a gradient of zero
                counted += max(1, len(mine))
                yield to_device([rows[i] for i in mine])
                release_leftovers(self.engine)

        mean = self.recorder.mean_gradient(batches())
        groups = self.recorder.plan.groups
        part = {groups[name] for name in groups if name not in mean}
        lost = sorted(part & set(self.groups))
        if lost:
            raise UserError(
                "probe.anchor: wanted groups whose parameters all have a formula; found"
                f" {', '.join(lost)} with some that have none in this model; leave them out of"
                " probe.layers"
            )
        mean = {name: gradient for name, gradient in mean.items() if groups[name] not in part}
        for gradient in mean.values():
            gradient *= counted / len(rows)
            if ranks.world() > 1:
                torch.distributed.all_reduce(gradient)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in mean.values()):
            raise UserError(
                "probe.anchor: wanted samples with finite gradients; found one without; look for"
                " broken rows"
            )
        ranks.from_main(lambda: keep(file, mean, key))
        return mean


def without_prompt(sample: Mapping[str, Any]) -> dict[str, list[int]]:
    """The target tokens alone, each run of them behind the one token before it (the end of the
    template's assistant mark).

    As many target tokens as the whole sample has, so that the two losses are means over the same
    tokens.
    """
    ids, labels = list(sample["input_ids"]), list(sample["labels"])
    keep = [
        i
        for i in range(len(ids))
        if labels[i] != IGNORE_INDEX or (i + 1 < len(ids) and labels[i + 1] != IGNORE_INDEX)
    ]
    keep = keep or [0]
    return {"input_ids": [ids[i] for i in keep], "labels": [labels[i] for i in keep]}


@contextlib.contextmanager
def _seen(recorder: GradNormRecorder) -> Iterator[dict[str, Tensor]]:
    """What enters the head (`hidden`) and leaves the model (`logits`, the model's own where the
    recorder runs the head plainly).
    """
    seen: dict[str, Tensor] = {}

    def enters(module: Any, args: tuple[Tensor, ...]) -> None:
        seen["hidden"] = args[0].detach()

    def leaves(module: Any, args: Any, output: Any) -> None:
        seen["logits"] = output["logits"].detach()

    handles = [
        recorder.plan.head.register_forward_pre_hook(enters, prepend=True),
        recorder.model.register_forward_hook(leaves),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
